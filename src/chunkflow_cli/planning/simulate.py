"""Simulate the stages of a pipeline before they run: the makespan, bubble ratio and memory of schedules.

Every stage runs its operations one after the other, in the order of its schedule, each as soon as it can:

    F, S    wait for the same chunk's forward on the stage before
    B, I    wait for the same chunk's backward on the stage after, and need live activations
    R, W    wait for no other stage: what they need is on their own
    P       is not run by stages, which take their first pass before the step's schedule

A message takes time, but neither stage waits while it is on its way, because it is sent during computation. The bubble
ratio is 1 - busy / makespan, as in the worked example of ChunkFlow (arXiv 2503.02356, figures 2, 6 and 7).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chunkflow_cli.planning.schedule import OpKind, Schedule
from chunkflow_cli.planning.timeline import Timeline

KINDS = "".join(OpKind)
KIND_NAMES = ("a state pass", "a forward", "a recompute", "a backward", *("a split backward",) * 2, "a first pass")
STATE_PASS, FORWARD, RECOMPUTE, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, FIRST_PASS = range(7)


@dataclass(frozen=True)
class OperationSeconds:
    """Seconds of each operation on each stage, (stages, chunks)."""

    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    recompute: NDArray[np.float64]
    state_pass: NDArray[np.float64]
    input_gradient: NDArray[np.float64] | None = None
    """First half of a split backward; None if backwards cannot be split."""
    weight_gradient: NDArray[np.float64] | None = None
    transfer: NDArray[np.float64] | None = None
    """(stages - 1, chunks) from one stage to the next: a chunk's activations, or its gradient on the way back."""
    first_pass: NDArray[np.float64] | None = None
    """Forward without gradient that keeps log-probabilities; None without preferences."""

    def __post_init__(self) -> None:
        shape = self.forward.shape
        if len(shape) != 2:
            raise ValueError(f"seconds of forwards have shape {shape}, not (stages, chunks)")
        for name, values in vars(self).items():
            expected = (max(0, shape[0] - 1), shape[1]) if name == "transfer" else shape
            if values is None:
                continue
            if values.shape != expected:
                raise ValueError(f"{name} has shape {values.shape}, not {expected}")
            if not (values >= 0).all():
                raise ValueError(f"{name} holds a duration that is not a number of seconds from 0 up")
        if (self.input_gradient is None) != (self.weight_gradient is None):
            raise ValueError("a split backward has two halves: give input_gradient and weight_gradient, or neither")

    @property
    def stages(self) -> int:
        return int(self.forward.shape[0])

    @property
    def chunks(self) -> int:
        return int(self.forward.shape[1])

    def of_kind(self, kind: OpKind) -> NDArray[np.float64] | None:
        """Return the seconds of one kind of operation, (stages, chunks); None if there are none."""
        values: NDArray[np.float64] | None = getattr(self, kind.name)
        return values

    @classmethod
    def proportional(cls, tokens: ArrayLike, stages: int) -> OperationSeconds:
        """Return the assumptions of the paper's worked example: a second per token, twice as long for a backward.

        The halves of a split backward take as long as a forward each. Messages take no time.

        Args:
            tokens: (chunks,) tokens of each chunk.
        """
        forward = np.tile(np.asarray(tokens, dtype=np.float64), (stages, 1))
        return cls(forward, 2 * forward, forward, forward, forward, forward)


def simulate(schedules: Sequence[Schedule], seconds: OperationSeconds) -> Timeline:
    """Run the stages of one pipeline.

    Args:
        schedules: one per stage.

    Raises:
        ValueError: an operation waits for one that never runs or that waits for it (a deadlock); names the stage and
            the operation. Or the durations do not fit the schedules.
    """
    return _run(_Rows.of(schedules, seconds), seconds)


def simulate_ranks(ranks: Sequence[tuple[Sequence[Schedule], OperationSeconds]]) -> Timeline:
    """Run the pipelines of several data-parallel ranks, which meet at the optimizer step.

    Args:
        ranks: the schedules and durations of each rank, as `simulate` takes them.

    Raises:
        ValueError: as `simulate`, or the ranks have different numbers of stages.
    """
    timelines = []
    for rank, (schedules, seconds) in enumerate(ranks):
        try:
            timelines.append(simulate(schedules, seconds))
        except ValueError as error:
            raise ValueError(f"rank {rank}: {error}") from error
    stages = {timeline.stages for timeline in timelines}
    if len(stages) != 1:
        raise ValueError(f"every rank needs the same number of stages, not {sorted(stages)}")
    columns = {
        name: np.concatenate([getattr(timeline, name) for timeline in timelines])
        for name in ("stage", "kind", "chunk", "start_seconds", "stop_seconds")
    }
    rank_of_row = np.repeat(np.arange(len(timelines)), [len(timeline.chunk) for timeline in timelines])
    return Timeline(len(timelines), stages.pop(), rank_of_row, **columns)


def simulate_lockstep(ranks: Sequence[tuple[Schedule, OperationSeconds]], dummy: OperationSeconds) -> Timeline:
    """Run ranks without a pipeline that wait for each other at every operation, as they do with ZeRO-3.

    Dummies take time but have no row.

    Args:
        ranks: the schedule and durations of each rank; at each position, all run the same kind of operation.
        dummy: durations of one chunk of one token.
    """

    def lists(seconds: OperationSeconds) -> dict[OpKind, list[float]]:
        return {kind: values[0].tolist() for kind in OpKind if (values := seconds.of_kind(kind)) is not None}

    seconds_of, dummy_seconds = [lists(seconds) for _, seconds in ranks], lists(dummy)
    rows: list[list[tuple[int, int, float, float, str, int]]] = [[] for _ in ranks]
    begin = end = 0.0
    for ops in zip(*(schedule.ops for schedule, _ in ranks), strict=True):
        for rank, op in enumerate(ops):
            now = begin
            for chunk in op.real_chunks:  # joined chunks run one after the other
                start, now = now, now + seconds_of[rank][op.kind][chunk]
                rows[rank].append((rank, 0, start, now, op.kind.value, chunk))
            end = max(end, now + (len(op.chunks) - len(op.real_chunks)) * dummy_seconds[op.kind][0])
        begin = end
    return Timeline.of_rows(len(ranks), 1, itertools.chain.from_iterable(rows))


@dataclass(frozen=True)
class _Rows:
    """The operations of all stages as arrays, stage by stage, with one row per chunk of each and none for dummies."""

    schedules: Sequence[Schedule]
    first_row: NDArray[np.int64]
    """(stages + 1,)"""
    stage: NDArray[np.int64]
    kind: NDArray[np.int64]
    """Indices into KINDS."""
    chunk: NDArray[np.int64]
    chunks: int

    @classmethod
    def of(cls, schedules: Sequence[Schedule], seconds: OperationSeconds) -> _Rows:
        stages = len(schedules)
        if stages == 0 or seconds.stages != stages:
            raise ValueError(f"there are schedules of {stages} stages, and seconds of {seconds.stages}")
        ops = [op for schedule in schedules for op in schedule.ops]
        chunks_of_op = [op.real_chunks for op in ops]
        rows_of_op = np.array([len(chunks) for chunks in chunks_of_op], dtype=np.int64)
        first_op = np.cumsum([0, *(len(schedule.ops) for schedule in schedules)])
        first_row = np.concatenate([[0], np.cumsum(rows_of_op)])[first_op]
        rows = cls(
            schedules,
            first_row,
            np.repeat(np.arange(stages), np.diff(first_row)),
            np.repeat(np.array([KINDS.index(op.kind) for op in ops], dtype=np.int64), rows_of_op),
            np.array(list(itertools.chain.from_iterable(chunks_of_op)), dtype=np.int64),
            seconds.chunks,
        )
        outside = np.flatnonzero((rows.chunk < 0) | (rows.chunk >= rows.chunks))
        if len(outside):
            raise ValueError(f"{rows.describe(int(outside[0]))}: there are only {rows.chunks} chunks")
        return rows

    @property
    def key(self) -> NDArray[np.int64]:
        """A number for each pair of stage and chunk."""
        return self.stage * self.chunks + self.chunk

    @property
    def is_first_forward(self) -> NDArray[np.bool_]:
        return np.asarray(self.kind <= FORWARD)

    @property
    def is_gradient(self) -> NDArray[np.bool_]:
        """Operations whose result the previous stage waits for."""
        return np.asarray((self.kind == BACKWARD) | (self.kind == INPUT_GRADIENT))

    def durations(self, seconds: OperationSeconds) -> NDArray[np.float64]:
        """Return the seconds of each row."""
        durations = np.zeros(len(self.chunk))
        for code, kind in enumerate(OpKind):
            rows, table = np.flatnonzero(self.kind == code), seconds.of_kind(kind)
            if table is not None:
                durations[rows] = table[self.stage[rows], self.chunk[rows]]
            elif len(rows):
                raise ValueError(f"{self.describe(int(rows[0]))}: no seconds are given for {KIND_NAMES[code]}")
        return durations

    def transfers(self, seconds: OperationSeconds, awaited: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how long the message that each row receives from another stage is on its way."""
        transfers = np.zeros(len(self.chunk))
        if seconds.transfer is not None:
            receives = awaited >= 0
            edge = self.stage - self.is_first_forward
            transfers[receives] = seconds.transfer[edge[receives], self.chunk[receives]]
        return transfers

    def awaited(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return for each row the row of another stage that it waits for (-1: none), and if that never comes.

        What an operation needs from its own stage comes before it in the schedule or never.
        """
        forward_at, gradient_at = self._row_of(self.is_first_forward), self._row_of(self.is_gradient)
        activations_at = self._row_of((self.kind == FORWARD) | (self.kind == RECOMPUTE))
        state_pass_at = self._row_of(self.kind == STATE_PASS)
        first_pass_at = self._row_of(self.kind == FIRST_PASS)
        input_gradient_at = self._row_of(self.kind == INPUT_GRADIENT)
        self._row_of(self.kind == WEIGHT_GRADIENT)

        awaited = np.full(len(self.chunk), -1, dtype=np.int64)
        after_forward = self.is_first_forward & (self.stage > 0)
        awaited[after_forward] = forward_at[self.key[after_forward] - self.chunks]
        after_gradient = self.is_gradient & (self.stage < len(self.schedules) - 1)
        awaited[after_gradient] = gradient_at[self.key[after_gradient] + self.chunks]
        never = (after_forward | after_gradient) & (awaited < 0)

        row = np.arange(len(self.chunk))
        for needs, at in (
            (self.is_gradient, activations_at),
            (self.kind == RECOMPUTE, np.maximum(state_pass_at, first_pass_at)),
            (self.kind == WEIGHT_GRADIENT, input_gradient_at),
        ):
            needed = at[self.key]
            never |= needs & ((needed < 0) | (needed > row))
        return awaited, never

    def _row_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the row of the only chosen operation on each stage and chunk, by `key`; -1 where there is none."""
        rows = np.flatnonzero(chosen)
        row_of = np.full(len(self.schedules) * self.chunks, -1, dtype=np.int64)
        row_of[self.key[rows]] = rows
        twice = rows[row_of[self.key[rows]] != rows]
        if len(twice):
            raise ValueError(f"{self.describe(int(row_of[self.key[twice[0]]]))}: runs a second time")
        return row_of

    def describe(self, row: int) -> str:
        """Name the stage and the operation of a row."""
        stage = int(self.stage[row])
        ops = self.schedules[stage].ops
        position = np.repeat(np.arange(len(ops)), [len(op.real_chunks) for op in ops])[row - self.first_row[stage]]
        return f"stage {stage}, operation {position} ({ops[position]})"

    def why_never(self, row: int) -> str:
        """Describe what a row waits for that never comes."""
        chunk, stage = int(self.chunk[row]), int(self.stage[row])
        awaited, never = self.awaited()
        if awaited[row] >= 0 and not never[row]:
            return f"{self.describe(int(awaited[row]))}, which never runs"
        if self.is_first_forward[row]:
            return f"a forward of chunk {chunk} on stage {stage - 1}, which is in no schedule"
        if self.is_gradient[row] and stage + 1 < len(self.schedules) and awaited[row] < 0:
            return f"a backward of chunk {chunk} on stage {stage + 1}, which is in no schedule"
        needed = {RECOMPUTE: "a state pass", WEIGHT_GRADIENT: "an input gradient"}.get(
            int(self.kind[row]), "a forward with activations"
        )
        return f"{needed} of chunk {chunk} before it on its own stage"


def _run(rows: _Rows, seconds: OperationSeconds) -> Timeline:
    """Run each stage as far as it can go, then the stages that waited for it: each row is visited about once."""
    awaited_rows, never = rows.awaited()
    count = len(rows.chunk)
    # A row whose message never comes waits for row `count`, which never stops. Scalars are faster in lists.
    awaited = np.where(never, count, awaited_rows).tolist()
    durations, transfers = rows.durations(seconds).tolist(), rows.transfers(seconds, awaited_rows).tolist()
    starts, stops = [0.0] * count, [-1.0] * (count + 1)
    stage_waiting_for: dict[int, int] = {}
    next_row, end_row = rows.first_row[:-1].tolist(), rows.first_row[1:].tolist()
    free_at = [0.0] * len(next_row)
    runnable = list(reversed(range(len(next_row))))
    while runnable:
        stage = runnable.pop()
        row, end, now = next_row[stage], end_row[stage], free_at[stage]
        while row < end:
            other = awaited[row]
            if other >= 0:
                stopped = stops[other]
                if stopped < 0:
                    stage_waiting_for[other] = stage
                    break
                arrived = stopped + transfers[row]
                if arrived > now:
                    now = arrived
            starts[row] = now
            now += durations[row]
            stops[row] = now
            if row in stage_waiting_for:
                runnable.append(stage_waiting_for.pop(row))
            row += 1
        next_row[stage], free_at[stage] = row, now
    for row, end in zip(next_row, end_row, strict=True):
        if row < end:
            raise ValueError(f"{rows.describe(row)} waits forever: it needs {rows.why_never(row)}")
    rank, kind = np.zeros(count, dtype=np.int64), np.array(list(KINDS))[rows.kind]
    return Timeline(1, len(rows.schedules), rank, rows.stage, kind, rows.chunk, np.array(starts), np.array(stops[:-1]))
