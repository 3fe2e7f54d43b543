"""The order of operations on each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule

Unit = tuple[int, ...]
"""The chunks of a long sequence, ascending, or one standalone chunk: what stays together in any order of chunks."""


def units_of(chunks: Chunks) -> list[Unit]:
    """Standalone chunks and long sequences in the order of the chunks: standalone chunks first."""
    groups = chunks.dependent_groups()
    first_dependent = groups[0].start if groups else len(chunks)
    return [(chunk,) for chunk in range(first_dependent)] + [tuple(group) for group in groups]


def plain_1f1b(chunks: Chunks, k: int, stages: int, warmup_extra: int = 0) -> tuple[Schedule, ...]:
    """1F1B over whole sequences: the chunks of a long sequence together are one micro-batch.

    Stage `s` keeps up to `P - s + warmup_extra` micro-batches in flight, of up to K live activations each.
    """
    units = units_of(chunks)
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    end_of_unit = np.cumsum([len(unit) for unit in units])
    unit_of_backward = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    return tuple(
        _weave(
            forwards,
            backwards,
            end_of_unit[np.minimum(unit_of_backward + stages - 1 - stage + warmup_extra, len(units) - 1)].tolist(),
        )
        for stage in range(stages)
    )


def state_aware_1f1b(
    chunks: Chunks, k: int, stages: int, warmup_extra: int = 0, units: Sequence[Unit] | None = None
) -> tuple[Schedule, ...]:
    """1F1B over chunks, with the dependencies of long sequences; each stage recomputes from its own kept input.

    Stage `s` holds at most K + P - 1 - s + warmup_extra live activations.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        warmup_extra: warm-up forwards more than P - 1 - s.
        units: another order of standalone chunks and long sequences than that of the chunks.
    """
    units = units_of(chunks) if units is None else units
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    sizes = np.array([len(unit) for unit in units], dtype=np.int64)
    unit, end_of_unit = np.repeat(np.arange(len(units)), sizes), np.cumsum(sizes)
    # The first backward of a sequence is that of its last chunk: all of its forwards must have run.
    needed = end_of_unit[unit]
    turn = np.arange(len(backwards)) + 1
    recomputes = np.array([len(ops) == 2 for ops in backwards], dtype=np.int64)
    kept_by_forwards = np.cumsum([0] + [op.kind is OpKind.forward for op in forwards])
    freed_before = np.cumsum(1 - recomputes) - (1 - recomputes)
    schedules = []
    for stage in range(stages):
        warmup = stages - 1 - stage + warmup_extra
        units_ahead = np.where(sizes[unit] > 1, end_of_unit[np.minimum(unit + warmup, len(units) - 1)], 0)
        # A recompute takes room too, beside what is in flight, until its own backward.
        room = k + warmup + freed_before - recomputes
        has_room = np.searchsorted(kept_by_forwards, room, side="right") - 1
        wanted = np.minimum(np.maximum(turn + warmup, units_ahead), has_room)
        before = np.minimum(np.maximum.accumulate(np.maximum(wanted, needed)), len(forwards))
        schedules.append(_weave(forwards, backwards, before.tolist()))
    return tuple(schedules)


def live_activations(schedule: Schedule) -> int:
    """The most chunks that hold activations at once on a stage that runs this."""
    live = most = 0
    for op in schedule.ops:
        if op.kind in (OpKind.forward, OpKind.recompute):
            live += len(op.chunks)
            most = max(most, live)
        elif op.kind in (OpKind.backward, OpKind.weight_gradient):
            live -= len(op.chunks)
    return most


def _first_forwards(units: Iterable[Unit], k: int) -> list[Op]:
    """S for the chunks that will be recomputed, F for the last K of a sequence and for standalone chunks."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return [
        Op(OpKind.state_pass if place < len(unit) - k else OpKind.forward, (chunk,))
        for unit in units
        for place, chunk in enumerate(unit)
    ]


def _backwards(units: Iterable[Unit], k: int) -> list[list[Op]]:
    """Each unit's backwards, descending; those of chunks that had a state pass come right after their recompute."""
    return [
        ([Op(OpKind.recompute, (chunk,))] if place < len(unit) - k else []) + [Op(OpKind.backward, (chunk,))]
        for unit in units
        for place, chunk in reversed(list(enumerate(unit)))
    ]


def _weave(forwards: Sequence[Op], backwards: Sequence[Sequence[Op]], forwards_before: Sequence[int]) -> Schedule:
    """All forwards and backwards of a stage; before the j-th backward stand the first `forwards_before[j]` forwards."""
    ops: list[Op] = []
    issued = 0
    for backward, before in zip(backwards, forwards_before, strict=True):
        ops += forwards[issued:before]
        issued = max(issued, before)
        ops += backward
    return Schedule(tuple(ops))
