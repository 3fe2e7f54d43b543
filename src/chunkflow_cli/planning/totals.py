"""Sums over all steps of a plan, and the plain pipeline that the gain of a step is measured against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.pipeline import PipelineLayout, plan_pipeline, sequences_as_chunks
from chunkflow_cli.planning.prediction import rank_seconds, seconds_of_whole_samples
from chunkflow_cli.planning.prediction import step_seconds as predicted_seconds
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.simulate import simulate
from chunkflow_cli.planning.timeline import Timeline


@dataclass(frozen=True)
class Counts:
    """Numbers of all steps together. A chunk that several ranks share counts once."""

    samples: int
    tokens: int
    target_tokens: int
    chunks: int
    standalone: int
    dependent: int
    long_samples: int
    filled_tails: int
    """Long samples whose last chunk also holds short samples."""
    recomputed_chunks: int
    first_passed_chunks: int
    """Chunks of preferences that are forwarded for their log-probabilities before they are forwarded with gradient."""
    lower_bound_chunks: int
    """Chunks that no plan can do without, if samples stay on their ranks."""
    operations: int
    dummies: int
    most_operations: int
    """Operations of the busiest rank in a step."""


@dataclass(frozen=True)
class Totals:
    """Sums over all steps of a run, and its predicted times."""

    counts: Counts
    room: int
    """Tokens that the chunks can hold."""
    run_tokens: int
    """Tokens that they hold."""
    spread_samples: int
    """Samples that whole sequence-parallel groups run together."""
    seconds: NDArray[np.float64]  # (steps, ranks), predicted; in units of tokens if costs are proportional
    step_seconds: NDArray[np.float64]  # (steps,), predicted until the last rank is done
    whole_seconds: NDArray[np.float64]  # (steps, ranks), predicted for ranks that run whole samples alone


def add_up(plan: RunPlan, progress: Callable[[int], None]) -> Totals:
    """Plan every step and return the totals; `progress` is called with the number of steps done."""
    count: Counter[str] = Counter()
    room = run_tokens = spread_samples = most_operations = 0
    seconds, whole_seconds = np.zeros((2, plan.steps, plan.ranks))
    step_seconds = np.zeros(plan.steps)
    for index, step in enumerate(plan):
        count.update(
            samples=len(step.samples),
            tokens=step.tokens,
            target_tokens=step.target_tokens,
            recomputed_chunks=step.recomputed_chunks,
            dummies=step.dummies,
        )
        run_tokens += step.run_tokens
        room += step.room
        for rank in step.ranks:
            count.update(_counts_of(rank))
        most_operations = max(most_operations, *(len(rank.schedule.ops) for rank in step.ranks))
        seconds[index] = [rank_seconds(rank, plan.costs) for rank in step.ranks]
        step_seconds[index] = predicted_seconds(plan, step) if plan.is_in_lockstep else seconds[index].max()
        if plan.sequence > 1:
            spread_samples += step.spread_samples
            whole_seconds[index] = seconds_of_whole_samples(plan, step.samples)
        progress(index + 1)
    counts = Counts(**count, most_operations=most_operations)
    return Totals(
        counts, room, run_tokens, spread_samples, seconds, step_seconds, whole_seconds if plan.sequence > 1 else seconds
    )


def _counts_of(rank: RankPlan) -> dict[str, int]:
    groups = [group for group in rank.chunks.dependent_groups() if group.start in rank.counted]
    segments = np.diff(rank.chunks.first_segment)
    dependent = sum(map(len, groups))
    return {
        "chunks": len(rank.counted),
        "standalone": len(rank.counted) - dependent,
        "dependent": dependent,
        "long_samples": len(groups),
        "filled_tails": sum(int(segments[group[-1]] > 1) for group in groups),
        "first_passed_chunks": int((rank.first_passed >= rank.counted.start).sum()),
        "lower_bound_chunks": rank.lower_bound,
        "operations": len(rank.schedule.ops),
    }


def baseline_timeline(step: StepPlan, plan: RunPlan, pipeline: PipelineLayout) -> Timeline:
    """Predict a step under plain 1F1B: one sequence per micro-batch, in the data's order.

    Samples are dealt to the ranks in turn, and the timeline is that of the slowest rank.
    """
    lengths, targets = plan.lengths_of(step.samples), plan.targets_of(step.samples)
    plain = PipelineLayout(pipeline.stages, "1f1b")
    cut = replace(plan, pipeline=plain).cut
    timelines = []
    for rank in range(min(plan.ranks, len(lengths))):
        chunks = sequences_as_chunks(lengths[rank :: plan.ranks])
        seconds = plan.costs.of_chunks(chunks, targets[rank :: plan.ranks], pipeline.stages, cut)
        timelines.append(simulate(plan_pipeline(chunks, 1, plain), seconds))
    return max(timelines, key=lambda timeline: timeline.makespan)
