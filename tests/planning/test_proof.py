"""The proof of a step accepts what is planned, on every layout, and refuses a plan with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.proof import validate_step
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.schedule import Schedule

LENGTHS = [300, 150, 64, 40, 31, 20, 9, 5, 3]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "K=3, tails alone": {"k": 3, "fill_tails": False},
    "more ranks than samples": {"ranks": 12},
    "ZeRO-3": {"ranks": 4, "is_zero_3": True, "k": 2},
    "sequence-parallel": {"ranks": 4, "sequence": 2},
    "sequence-parallel, everything spread": {"ranks": 4, "sequence": 2, "spread_all": True},
    "1F1B": {"pipeline": PipelineLayout(4, "1f1b")},
    "state-aware 1F1B": {"ranks": 2, "pipeline": PipelineLayout(2), "k": 2},
    "zero bubble": {"ranks": 2, "pipeline": PipelineLayout(2, "zero_bubble")},
    "searched": {"pipeline": PipelineLayout(2, "searched")},
    "pipelines of sequence-parallel groups": {"ranks": 4, "sequence": 2, "pipeline": PipelineLayout(2)},
}


def plan_of(**layout: Any) -> RunPlan:
    batches = GlobalBatches(len(LENGTHS), 4, 0, True)
    lengths = np.array(LENGTHS)
    return RunPlan(batches, 2 * batches.steps_per_epoch, lengths, lengths - 1, **{"chunk_size": 32, "k": 1, **layout})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_planned_step_passes(layout: dict[str, Any]) -> None:
    plan = plan_of(**layout)
    for step in plan:
        validate_step(step, plan)


def change_first(change: Callable[[RankPlan], RankPlan]) -> Callable[[StepPlan], StepPlan]:
    """A change of the plan of rank 0 only."""
    return lambda step: replace(step, ranks=(change(step.ranks[0]), *step.ranks[1:]))


def without_last_operation(rank: RankPlan) -> RankPlan:
    return replace(rank, schedules=tuple(Schedule(schedule.ops[:-1]) for schedule in rank.schedules))


def with_chunks(**arrays: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[[StepPlan], StepPlan]:
    return change_first(
        lambda rank: replace(
            rank,
            chunks=replace(rank.chunks, **{name: edit(getattr(rank.chunks, name)) for name, edit in arrays.items()}),
        )
    )


def lowered(index: int, by: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    return lambda array: array - by * (np.arange(len(array)) == index % len(array))


BROKEN: dict[str, tuple[dict[str, Any], Callable[[StepPlan], StepPlan], str]] = {
    "a rank without its samples": (
        {"ranks": 2},
        lambda step: replace(step, ranks=step.ranks[:1]),
        "do not take each of the 9 samples of the step once",
    ),
    "a sample twice": (
        {"ranks": 2},
        lambda step: replace(step, ranks=(step.ranks[0], step.ranks[0])),
        "do not take each of the 9 samples of the step once",
    ),
    "a lost last token": ({}, with_chunks(stop=lowered(-1, 1)), "rank 0: its chunks do not hold every token"),
    "a token twice": ({}, with_chunks(start=lowered(-1, 1)), r"rank 0: the pieces of sample \d do not follow"),
    "lengths of other samples": ({}, with_chunks(lengths=lowered(0, 1)), "rank 0: its chunks are not made of"),
    "chunks of twice the size": (
        {},
        with_chunks(chunk_size=lambda size: size // 2),  # type: ignore[arg-type, return-value]
        r"rank 0: chunk \d+ holds \d+ tokens and has room for 16",
    ),
    "a backward lost": ({"ranks": 2}, change_first(without_last_operation), r"rank 0: chunk \d+ never goes backward"),
    "a backward lost on every stage": (
        {"pipeline": PipelineLayout(2)},
        change_first(without_last_operation),
        r"rank 0: stage 0: chunk \d+ never goes backward",
    ),
    "an operation that ZeRO-3's other ranks do not run": (
        {"ranks": 2, "is_zero_3": True},
        change_first(
            lambda rank: replace(rank, schedules=(Schedule((*rank.schedule.ops, *Schedule.parse("S-").ops)),))
        ),
        "rank 1 runs",
    ),
    "a rank out of its sequence-parallel group": (
        {"ranks": 2, "sequence": 2},
        change_first(lambda rank: replace(rank, group_size=1)),
        "rank 1 is not where its sequence-parallel group",
    ),
}


@pytest.mark.parametrize(("layout", "damage", "says"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_plan_is_refused(layout: dict[str, Any], damage: Callable[[StepPlan], StepPlan], says: str) -> None:
    plan = replace(plan_of(**layout), batches=GlobalBatches(len(LENGTHS), len(LENGTHS), 0, True), steps=1)
    with pytest.raises(ValueError, match=says):
        validate_step(damage(plan[0]), plan)


def test_more_kept_chunks_than_k_are_refused() -> None:
    """A schedule that is right for K = 2 breaks the memory bound of K = 1."""
    plan = plan_of(k=2)
    step = next(step for step in plan if len(step.ranks[0].recomputed))
    with pytest.raises(ValueError, match=r"rank 0: operation .*: 2 chunks hold activations, K is 1"):
        validate_step(step, replace(plan, k=1))
