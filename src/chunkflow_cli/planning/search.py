"""The best (ChunkSize, K), and layout: every choice of a grid planned, simulated and ranked. No torch, no device.

Each choice plans the same global batches with the code that training plans them with, so what is ranked is what would
run. The predicted seconds of a step are those of the slowest rank, or of the slowest pipeline, and the optimizer step;
they are split into what a person can act on: useful work, recompute, the fixed cost of each chunk, waiting (bubbles of
a pipeline, ranks that wait for the slowest).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import cut_points
from chunkflow_cli.planning.costs import OperationCost
from chunkflow_cli.planning.prediction import operation_seconds, rank_seconds, stage_seconds, step_seconds
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.simulate import Timeline, simulate


@dataclass(frozen=True)
class Candidate:
    """A choice of the grid, or one that was refused."""

    chunk_size: int
    k: int
    stages: int
    """Of the pipeline; 1 without one."""
    sequence: int
    """Ranks of a sequence-parallel group; 1 without."""
    cuts: str
    """Long sequences are cut into pieces of equal `tokens` or equal `time`, as `chunk.cuts`."""
    data_parallel: int
    """Ranks, or pipelines, among which samples are divided; those of all sequence-parallel groups together."""
    step_seconds: float
    """Mean over the sampled steps."""
    memory_bytes: int
    fits: bool
    recompute_share: float
    """Chunks that are forwarded twice, of all chunks."""
    bubble_ratio: float
    """Share of the machine's time in which a stage or rank waits."""
    fill: float
    """Share of the chunks' room that holds tokens."""
    recompute_seconds: float
    """Of a mean step, as those below: what second forwards add on the slowest rank."""
    fixed_seconds: float
    """What chunks cost however few tokens they hold."""
    waiting_seconds: float
    """Of all stages and ranks, their mean."""
    bubble_seconds: float
    """Of the slowest rank's pipeline: what its stages wait for each other."""
    optimizer_seconds: float
    """Of the optimizer step, gradients summed over the ranks: of the stage that takes longest."""

    def is_like(self, other: Candidate) -> bool:
        """Whether only chunk size and K may differ: one heat map shows both."""
        return (self.layout, self.cuts) == (other.layout, other.cuts)

    def is_at(self, other: Candidate) -> bool:
        """Whether only the cuts may differ."""
        return (self.layout, self.chunk_size, self.k) == (other.layout, other.chunk_size, other.k)

    @property
    def layout(self) -> tuple[int, int]:
        """How the devices are divided, however many there are."""
        return self.sequence, self.stages


def grid(
    chunk_sizes: Sequence[int], ks: Sequence[int], longest: int, pair_weight: float = 0.0
) -> list[tuple[int, int]]:
    """All pairs that differ in what they do: beyond the chunks of the longest sequence, a larger K changes nothing.

    Args:
        chunk_sizes: to try.
        ks: to try.
        longest: tokens of the longest sequence.
        pair_weight: as `build_chunks` takes it; above 0, sequences have more pieces.

    Raises:
        ValueError: one of the lists is empty, or holds a number below 1.
    """
    for name, values in (("chunk_sizes", chunk_sizes), ("ks", ks)):
        if not values:
            raise ValueError(f"{name} is empty: there is nothing to search")
        if min(values) < 1:
            raise ValueError(f"{name}={list(values)} must be positive numbers")
    pairs = []
    for size in sorted(set(chunk_sizes)):
        most_chunks = len(cut_points(longest, size, pair_weight)) - 1
        useful: dict[int, None] = {}
        for k in sorted(set(ks)):
            useful.setdefault(min(k, most_chunks))
        pairs += [(size, k) for k in useful]
    return pairs


class SimulatedStep:
    """A step of a pipeline: what its ranks do, and when. A rank is simulated when it is first asked for.

    On long-tailed data one rank decides the step, and hundreds of others need not be simulated to know that. The ranks
    of a sequence-parallel group do the same (in a pipeline every chunk is spread): the first stands for all.
    """

    def __init__(self, run: RunPlan, plan: StepPlan) -> None:
        self.run = run
        self.plan = plan
        self._timelines: dict[int, Timeline] = {}

    def timeline(self, rank: int) -> Timeline:
        """Of one rank, alone."""
        rank -= self.plan.ranks[rank].sequence_rank
        if rank not in self._timelines:
            planned = self.plan.ranks[rank]
            self._timelines[rank] = simulate(planned.schedules, operation_seconds(self.run, planned))
        return self._timelines[rank]

    @property
    def simulated_ranks(self) -> list[int]:
        return sorted(self._timelines)

    @property
    def first_of_groups(self) -> list[int]:
        """Of each sequence-parallel group its first rank; all ranks without groups."""
        return [index for index, rank in enumerate(self.plan.ranks) if rank.sequence_rank == 0]

    def makespan(self, stage_seconds: NDArray[np.float64]) -> float:
        """Seconds until the last rank is done.

        Args:
            stage_seconds: (ranks,) for how long the stages of a rank run something, their mean.
        """
        most = 0.0
        first = np.array(self.first_of_groups)
        for rank in first[np.argsort(-stage_seconds[first], kind="stable")].tolist():
            if self._one_after_the_other(rank, stage_seconds[rank]) > most:
                most = max(most, self.timeline(rank).makespan)
        return most

    def _one_after_the_other(self, rank: int, stage_seconds: float) -> float:
        """No order takes longer than all operations and messages of all stages in turn."""
        pipeline, costs, chunks = self.run.pipeline, self.run.costs, self.plan.ranks[rank].chunks
        assert pipeline is not None
        messages = 2 * (pipeline.stages - 1)
        sent = len(chunks) * costs.transfer_latency_seconds + chunks.tokens * costs.transfer_seconds_per_token
        return 1.001 * (pipeline.stages * stage_seconds + messages * sent)  # sums in another order round otherwise


PeakMemory = Callable[[RunPlan, Sequence[SimulatedStep]], int]
"""Bytes of the fullest rank, given the run and, with a pipeline, its planned steps."""


def search(
    runs: Sequence[RunPlan],
    steps: Sequence[int],
    memory_bytes: PeakMemory,
    memory_limit_bytes: int,
    on_candidate: Callable[[int], None] = lambda done: None,
) -> list[Candidate]:
    """Predict every choice, in the order given.

    Args:
        runs: the same run under different chunk sizes, K and layouts.
        steps: which of its steps are planned; they stand for all.
        memory_bytes: predicts what a choice takes.
        memory_limit_bytes: choices above it do not fit.
        on_candidate: called after each choice with the number of choices done.
    """
    candidates = []
    for run in runs:
        candidates.append(_predict(run, steps, memory_bytes, memory_limit_bytes))
        on_candidate(len(candidates))
    return candidates


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, fastest first; of equal ones the one that needs less memory."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    return sorted(fitting, key=lambda candidate: (candidate.step_seconds, candidate.memory_bytes))


def best_of_layouts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the fastest candidate that fits for each layout; if none fits, the one that needs the least memory."""
    found = []
    for layout in sorted({each.layout for each in candidates}):
        rows = [each for each in candidates if each.layout == layout]
        found.append((best_first(rows) or sorted(rows, key=lambda each: each.memory_bytes))[0])
    return found


def _predict(run: RunPlan, steps: Sequence[int], memory_bytes: PeakMemory, limit: int) -> Candidate:
    seconds, busy, recompute, fixed, bubbles = [], [], [], [], []
    simulated: list[SimulatedStep] = []
    stages = 1 if run.pipeline is None else run.pipeline.stages
    chunks = recomputed = tokens = room = 0
    for step in steps:
        planned = run[step]
        chunks += planned.chunks
        recomputed += planned.recomputed_chunks
        tokens += planned.tokens
        room += planned.room
        share = 1.0 if run.costs.is_of_one_stage else 1.0 / stages
        of_stages = _stage_seconds(run, planned)
        of_ranks = of_stages.mean(axis=1)
        if run.pipeline is None:
            seconds.append(step_seconds(run, planned) if run.is_in_lockstep else float(of_ranks.max()))
        else:
            simulated.append(SimulatedStep(run, planned))
            seconds.append(simulated[-1].makespan(of_ranks))
        busy.append(float(of_ranks.mean()))
        slowest = planned.ranks[int(of_ranks.argmax())]
        recompute.append(_recompute_seconds(slowest, run) * share)
        fixed.append(_fixed_seconds(slowest, run) * share)
        bubbles.append(seconds[-1] - float(of_stages.max()))
    needed = memory_bytes(run, simulated)
    waiting = np.array(seconds) - np.array(busy)
    return Candidate(
        chunk_size=run.chunk_size,
        k=run.k,
        stages=stages,
        sequence=run.sequence,
        cuts="time" if run.equal_time else "tokens",
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
    """(ranks, stages) for how long each runs something."""
    group = 1 if run.pipeline is None else run.sequence  # of which all ranks do the same
    return np.repeat([stage_seconds(run, rank) for rank in step.ranks[::group]], group, axis=0)


def _recompute_seconds(rank: RankPlan, run: RunPlan) -> float:
    """What a rank would save if no chunk were forwarded twice."""
    once = replace(run.costs, recompute=run.costs.forward, state_pass=OperationCost(0.0, 0.0, 0.0))
    return rank_seconds(rank, run.costs) - rank_seconds(rank, once)


def _fixed_seconds(rank: RankPlan, run: RunPlan) -> float:
    twice = len(rank.recomputed)
    costs = run.costs
    return (
        len(rank.chunks) * (costs.forward.fixed_seconds + costs.backward.fixed_seconds)
        + twice * costs.state_pass.fixed_seconds
    )
