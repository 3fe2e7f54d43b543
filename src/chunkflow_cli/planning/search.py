"""Find the best (ChunkSize, K) and layout: plan, simulate and rank every choice of a grid, without torch or a device.

Each choice plans the same global batches with the code that training uses, so the search ranks what would run. A
predicted step takes as long as its slowest rank or pipeline, plus the optimizer step. Its seconds are split into parts
that you can act on: useful work, recompute, the fixed cost of each chunk, and waiting (pipeline bubbles, and ranks that
wait for the slowest).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import cut_points
from chunkflow_cli.planning.costs import OperationCost
from chunkflow_cli.planning.prediction import (
    operation_seconds,
    rank_seconds,
    seconds_before,
    stage_seconds,
    step_seconds,
)
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.simulate import simulate
from chunkflow_cli.planning.timeline import Timeline


@dataclass(frozen=True)
class Candidate:
    """A choice of the grid with its predictions; seconds are those of a mean step."""

    chunk_size: int
    k: int
    stages: int
    """Stages of the pipeline; 1 without one."""
    sequence: int
    """Ranks of a sequence-parallel group; 1 without."""
    cuts: str
    """How long sequences are cut, as in `chunk.cuts`: into pieces of equal `tokens` or equal `time`."""
    offload_state: str
    """Where state is kept, as in `chunk.offload_state`: on the device (`none`), or in `host` memory."""
    data_parallel: int
    """Ranks or pipelines that samples are divided among; all sequence-parallel groups together."""
    step_seconds: float
    memory_bytes: int
    fits: bool
    recompute_share: float
    """Share of all chunks that are forwarded twice."""
    bubble_ratio: float
    """Share of the machine's time in which a stage or rank waits."""
    fill: float
    """Share of the chunks' room that holds tokens."""
    recompute_seconds: float
    """Seconds that second forwards add on the slowest rank."""
    fixed_seconds: float
    """Seconds that the slowest rank's chunks cost regardless of their tokens."""
    waiting_seconds: float
    """Mean waiting time of all stages and ranks."""
    bubble_seconds: float
    """Seconds that the stages of the slowest rank's pipeline wait for each other."""
    optimizer_seconds: float
    """Seconds of the optimizer step, including the sum of gradients over ranks, on the slowest stage."""

    def is_like(self, other: Candidate) -> bool:
        """Return True if only chunk size and K may differ, so that one heat map shows both."""
        return (self.layout, self.cuts) == (other.layout, other.cuts)

    def is_at(self, other: Candidate) -> bool:
        """Return True if only the cuts may differ."""
        return (self.layout, self.chunk_size, self.k) == (other.layout, other.chunk_size, other.k)

    @property
    def layout(self) -> tuple[int, int]:
        """How devices are divided: ranks per sequence-parallel group, and pipeline stages."""
        return self.sequence, self.stages


def grid(
    chunk_sizes: Sequence[int], ks: Sequence[int], longest: int, pair_weight: float = 0.0
) -> list[tuple[int, int]]:
    """Return all (chunk_size, k) that differ in what they do: K beyond the longest sequence's chunks changes nothing.

    Args:
        longest: tokens of the longest sequence.
        pair_weight: see `cut_points`; above 0, sequences are cut into more pieces.

    Raises:
        ValueError: one of the lists is empty, or contains a number below 1.
    """
    for name, values in (("chunk_sizes", chunk_sizes), ("ks", ks)):
        if not values:
            raise ValueError(f"{name} is empty: there is nothing to search")
        if min(values) < 1:
            raise ValueError(f"{name}={list(values)} must be positive numbers")
    pairs = []
    for size in sorted(set(chunk_sizes)):
        most_chunks = len(cut_points(longest, size, pair_weight)) - 1
        pairs += [(size, k) for k in sorted({min(k, most_chunks) for k in ks})]
    return pairs


@dataclass(frozen=True)
class SimulatedStep:
    """A step of a pipeline. Each rank is simulated when it is first asked for.

    On long-tailed data one rank decides the step, and that is known without simulating hundreds of others.
    """

    run: RunPlan
    plan: StepPlan
    timelines: dict[int, Timeline] = field(default_factory=dict)
    """Timelines that were simulated so far, by rank."""

    def timeline(self, rank: int) -> Timeline:
        """Return the timeline of one rank alone.

        The ranks of a sequence-parallel group do the same, because every chunk of a pipeline is spread; the first rank
        represents all of them.
        """
        rank -= self.plan.ranks[rank].sequence_rank
        if rank not in self.timelines:
            planned = self.plan.ranks[rank]
            self.timelines[rank] = simulate(planned.schedules, operation_seconds(self.run, planned))
        return self.timelines[rank]

    @property
    def first_of_groups(self) -> list[int]:
        """The first rank of each sequence-parallel group; without groups, all ranks."""
        return [index for index, rank in enumerate(self.plan.ranks) if rank.sequence_rank == 0]

    def makespan(self, stage_seconds: NDArray[np.float64]) -> float:
        """Return the seconds until the last rank is done.

        Args:
            stage_seconds: (ranks,) mean seconds for which the stages of a rank are busy.
        """
        most = 0.0
        first = np.array(self.first_of_groups)
        for rank in first[np.argsort(-stage_seconds[first], kind="stable")].tolist():
            if self._one_after_the_other(rank, stage_seconds[rank]) > most:
                most = max(most, self.timeline(rank).makespan)
        return most

    def _one_after_the_other(self, rank: int, stage_seconds: float) -> float:
        """Return the seconds of all stages' operations and messages in turn; no order takes longer."""
        stages, costs, chunks = self.run.stages, self.run.costs, self.plan.ranks[rank].chunks
        messages = 2 * (stages - 1)
        sent = len(chunks) * costs.transfer_latency_seconds + chunks.tokens * costs.transfer_seconds_per_token
        return 1.001 * (stages * stage_seconds + messages * sent)  # covers rounding in another order of sums


PeakMemory = Callable[[RunPlan, Sequence[SimulatedStep]], int]
"""Predicts the bytes of the fullest rank from the run and, with a pipeline, its planned steps."""


def search(
    runs: Sequence[RunPlan],
    steps: Sequence[int],
    memory_bytes: PeakMemory,
    memory_limit_bytes: int,
    on_candidate: Callable[[int], None] = lambda done: None,
    offloaded: Callable[[RunPlan], RunPlan | None] = lambda run: None,
) -> list[Candidate]:
    """Predict every choice, in the given order.

    State in host memory never makes a step faster, so it is tried only for choices that do not fit without.

    Args:
        runs: one run under different chunk sizes, K and layouts.
        steps: steps of the run that are planned; they represent all.
        memory_limit_bytes: choices that need more do not fit.
        on_candidate: called after each choice with the number of choices done.
        offloaded: returns a run with its state in host memory; None if that is no choice.
    """
    candidates = []
    for run in runs:
        candidate = _predict(run, steps, memory_bytes, memory_limit_bytes)
        if not candidate.fits and (moved := offloaded(run)) is not None:
            other = _predict(moved, steps, memory_bytes, memory_limit_bytes)
            candidate = other if other.fits else candidate
        candidates.append(candidate)
        on_candidate(len(candidates))
    return candidates


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that fit, fastest first; of equally fast ones, the one that needs less memory first."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    return sorted(fitting, key=lambda candidate: (candidate.step_seconds, candidate.memory_bytes))


def best_of_layouts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the fastest candidate that fits for each layout; if none fits, the one that needs the least memory."""
    found = []
    for layout in sorted({each.layout for each in candidates}):
        rows = [each for each in candidates if each.layout == layout]
        found.append((best_first(rows) or [min(rows, key=lambda each: each.memory_bytes)])[0])
    return found


def _predict(run: RunPlan, steps: Sequence[int], memory_bytes: PeakMemory, limit: int) -> Candidate:
    seconds, busy, recompute, fixed, bubbles = [], [], [], [], []
    simulated: list[SimulatedStep] = []
    share = 1.0 if run.costs.is_of_one_stage else 1.0 / run.stages
    counts = np.zeros(4, dtype=np.int64)
    for planned in (run[step] for step in steps):
        counts += (planned.recomputed_chunks, planned.chunks, planned.run_tokens, planned.room)
        of_stages = _stage_seconds(run, planned)
        of_ranks = of_stages.mean(axis=1)
        if run.pipeline is None:
            seconds.append(step_seconds(run, planned) if run.is_in_lockstep else float(of_ranks.max()))
        else:
            simulated.append(SimulatedStep(run, planned))
            before = max(seconds_before(run, rank) for rank in planned.ranks) if run.answers is not None else 0.0
            seconds.append(simulated[-1].makespan(of_ranks) + before)
        busy.append(float(of_ranks.mean()))
        slowest = planned.ranks[int(of_ranks.argmax())]
        recompute.append(_recompute_seconds(slowest, run) * share)
        fixed.append(_fixed_seconds(slowest, run) * share)
        bubbles.append(seconds[-1] - float(of_stages.max()))
    recomputed, chunks, tokens, room = counts.tolist()
    needed = memory_bytes(run, simulated)
    waiting = np.array(seconds) - np.array(busy)
    return Candidate(
        chunk_size=run.chunk_size,
        k=run.k,
        stages=run.stages,
        sequence=run.sequence,
        cuts="time" if run.equal_time else "tokens",
        offload_state="host" if run.costs.moves_state else "none",
        data_parallel=run.ranks,
        step_seconds=float(np.mean(seconds)) + run.costs.step_seconds,
        memory_bytes=needed,
        fits=needed <= limit,
        recompute_share=recomputed / chunks,
        bubble_ratio=float(waiting.sum() / sum(seconds)) if sum(seconds) else 0.0,
        fill=tokens / room,
        recompute_seconds=float(np.mean(recompute)),
        fixed_seconds=float(np.mean(fixed)),
        waiting_seconds=float(waiting.mean()),
        bubble_seconds=float(np.mean(bubbles)),
        optimizer_seconds=run.costs.step_seconds,
    )


def _stage_seconds(run: RunPlan, step: StepPlan) -> NDArray[np.float64]:
    """Return the seconds for which each stage of each rank is busy, (ranks, stages)."""
    group = 1 if run.pipeline is None else run.sequence  # with a pipeline, the ranks of a group do the same
    return np.repeat([stage_seconds(run, rank) for rank in step.ranks[::group]], group, axis=0)


def _recompute_seconds(rank: RankPlan, run: RunPlan) -> float:
    """Return the seconds that a rank would save if no chunk were forwarded twice."""
    once = replace(run.costs, recompute=run.costs.forward, state_pass=OperationCost(0.0, 0.0, 0.0))
    return rank_seconds(rank, run.costs) - rank_seconds(rank, once)


def _fixed_seconds(rank: RankPlan, run: RunPlan) -> float:
    costs = run.costs
    return (
        len(rank.chunks) * (costs.forward.fixed_seconds + costs.backward.fixed_seconds)
        + len(rank.recomputed) * costs.state_pass.fixed_seconds
    )
