"""Order the operations on each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks, Unit
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule, split_unit


def plain_1f1b(chunks: Chunks, k: int, stages: int, warmup_extra: int = 0) -> tuple[Schedule, ...]:
    """Return 1F1B over whole sequences: the chunks of a long sequence together are one micro-batch.

    Stage `s` keeps up to `P - s + warmup_extra` micro-batches in flight, of up to K live activations each.
    """
    units = chunks.units()
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    sizes = [len(unit) for unit in units]
    unit, end_of_unit = np.repeat(np.arange(len(units)), sizes), np.cumsum(sizes)
    schedules = []
    for stage in range(stages):
        last_ahead = np.minimum(unit + stages - 1 - stage + warmup_extra, len(units) - 1)
        schedules.append(_weave(forwards, backwards, end_of_unit[last_ahead].tolist()))
    return tuple(schedules)


def state_aware_1f1b(
    chunks: Chunks, k: int, stages: int, warmup_extra: int = 0, units: Sequence[Unit] | None = None
) -> tuple[Schedule, ...]:
    """Return 1F1B over chunks, with the dependencies of long sequences; each stage recomputes from its own kept input.

    Stage `s` holds at most K + P - 1 - s + warmup_extra live activations.

    Args:
        k: how many chunks of a long sequence keep their activations.
        warmup_extra: warm-up forwards in addition to P - 1 - s.
        units: standalone chunks and long sequences in the order in which they run; by default that of the chunks.
    """
    units = chunks.units() if units is None else units
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    sizes = np.array([len(unit) for unit in units], dtype=np.int64)
    unit, end_of_unit = np.repeat(np.arange(len(units)), sizes), np.cumsum(sizes)
    # The first backward of a sequence is that of its last chunk, so all of its forwards must have run.
    needed = end_of_unit[unit]
    turn = np.arange(len(backwards)) + 1
    recomputes = np.array([len(ops) == 2 for ops in backwards], dtype=np.int64)
    kept_by_forwards = np.cumsum([0] + [op.kind is OpKind.forward for op in forwards])
    freed_before = np.cumsum(1 - recomputes) - (1 - recomputes)
    schedules = []
    for stage in range(stages):
        warmup = stages - 1 - stage + warmup_extra
        units_ahead = np.where(sizes[unit] > 1, end_of_unit[np.minimum(unit + warmup, len(units) - 1)], 0)
        # Until its own backward, a recompute takes room too, in addition to what is in flight.
        room = k + warmup + freed_before - recomputes
        has_room = np.searchsorted(kept_by_forwards, room, side="right") - 1
        wanted = np.minimum(np.maximum(turn + warmup, units_ahead), has_room)
        before = np.minimum(np.maximum.accumulate(np.maximum(wanted, needed)), len(forwards))
        schedules.append(_weave(forwards, backwards, before.tolist()))
    return tuple(schedules)


def live_activations(schedule: Schedule) -> int:
    """Return the most chunks that hold activations at once on a stage with this schedule."""
    live = most = 0
    for op in schedule.ops:
        if op.kind in (OpKind.forward, OpKind.recompute):
            live += len(op.chunks)
            most = max(most, live)
        elif op.kind in (OpKind.backward, OpKind.weight_gradient):
            live -= len(op.chunks)
    return most


def _first_forwards(units: Iterable[Unit], k: int) -> list[Op]:
    """Return S for the chunks that will be recomputed, F for the last K of a sequence and for standalone chunks."""
    ops: list[Op] = []
    for unit in units:
        early, retained = split_unit(unit, k)
        ops += [Op(OpKind.state_pass, (chunk,)) for chunk in early]
        ops += [Op(OpKind.forward, (chunk,)) for chunk in retained]
    return ops


def _backwards(units: Iterable[Unit], k: int) -> list[list[Op]]:
    """Return the backwards of each unit, descending; those of chunks that had a state pass follow their recompute."""
    steps: list[list[Op]] = []
    for unit in units:
        early, retained = split_unit(unit, k)
        steps += [[Op(OpKind.backward, (chunk,))] for chunk in reversed(retained)]
        steps += [[Op(OpKind.recompute, (chunk,)), Op(OpKind.backward, (chunk,))] for chunk in reversed(early)]
    return steps


def _weave(forwards: Sequence[Op], backwards: Sequence[Sequence[Op]], forwards_before: Sequence[int]) -> Schedule:
    """Return the schedule that runs the first `forwards_before[j]` forwards before the j-th backward."""
    ops: list[Op] = []
    issued = 0
    for backward, before in zip(backwards, forwards_before, strict=True):
        ops += forwards[issued:before]
        issued = max(issued, before)
        ops += backward
    return Schedule(tuple(ops))
