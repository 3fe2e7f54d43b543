"""What schedules cost before they run: a discrete-event simulation of the stages of a pipeline.

    schedules, OperationSeconds -> Timeline: makespan, bubble ratio, live activations, live bytes

Every stage runs its operations one after the other, in the order of its schedule, each as soon as it can:

    F, S    wait for the same chunk's forward on the stage before
    B, I    wait for the same chunk's backward on the stage after, and for live activations
    R, W    wait for nothing from other stages: what they need lies on their own

A message takes time on its way but holds up neither stage (it is sent and received beside the computation). What the
worked example of ChunkFlow (arXiv 2503.02356, figures 2, 6 and 7) calls the bubble ratio is 1 - busy / makespan.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chunkflow_cli.planning.schedule import Op, Schedule

KINDS = "SFRBIW"
STATE_PASS, FORWARD, RECOMPUTE, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(6)


@dataclass(frozen=True)
class OperationSeconds:
    """How long each operation takes on each stage."""

    forward: NDArray[np.float64]
    """(stages, chunks), as all of these."""
    backward: NDArray[np.float64]
    recompute: NDArray[np.float64]
    state_pass: NDArray[np.float64]
    input_gradient: NDArray[np.float64] | None = None
    """First half of a split backward; None where backwards cannot be split."""
    weight_gradient: NDArray[np.float64] | None = None
    transfer: NDArray[np.float64] | None = None
    """(stages - 1, chunks): a chunk's activations from one stage to the next, or its gradient back."""

    def __post_init__(self) -> None:
        shape = self.forward.shape
        if len(shape) != 2:
            raise ValueError(f"seconds of forwards have shape {shape}, not (stages, chunks)")
        for name, expected in {
            "forward": shape, "backward": shape, "recompute": shape, "state_pass": shape, "input_gradient": shape,
            "weight_gradient": shape, "transfer": (max(0, shape[0] - 1), shape[1]),
        }.items():  # fmt: skip
            values = getattr(self, name)
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

    @classmethod
    def proportional(cls, tokens: ArrayLike, stages: int, *, seconds_per_token: float = 1.0) -> OperationSeconds:
        """The assumptions of the paper's worked example: time proportional to tokens, backward twice the forward.

        The halves of a split backward take as long as a forward each; messages take no time.

        Args:
            tokens: (chunks,) tokens of each chunk.
            stages: of the pipeline.
            seconds_per_token: of a forward through one stage.
        """
        one = np.asarray(tokens, dtype=np.float64) * seconds_per_token
        forward = np.broadcast_to(one, (stages, len(one))).copy()
        return cls(forward, 2 * forward, forward, forward, forward, forward)


@dataclass(frozen=True)
class Timeline:
    """When each operation ran, as arrays: one row for each operation, by rank, then stage, then time.

    An operation on several chunks has a row for each.
    """

    ranks: int
    stages: int
    rank: NDArray[np.int64]
    stage: NDArray[np.int64]
    kind: NDArray[np.str_]
    """The letters of `OpKind`."""
    chunk: NDArray[np.int64]
    start_seconds: NDArray[np.float64]
    stop_seconds: NDArray[np.float64]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop, of all ranks: they meet at the optimizer step."""
        return float(self.stop_seconds.max(initial=0.0))

    @property
    def busy_seconds(self) -> NDArray[np.float64]:
        """(ranks, stages): recompute is work."""
        return self._sum(self.stop_seconds - self.start_seconds)

    @property
    def recompute_seconds(self) -> NDArray[np.float64]:
        """(ranks, stages)"""
        return self._sum(np.where(self.kind == "R", self.stop_seconds - self.start_seconds, 0.0))

    @property
    def bubble_ratio(self) -> float:
        """Share of the machine's time in which it ran nothing, between 0 and 1."""
        return self._idle_share(self.busy_seconds)

    @property
    def bubble_ratio_recompute_idle(self) -> float:
        """The same with recompute counted as idle, for it brings the step no further: fair where K differs."""
        return self._idle_share(self.busy_seconds - self.recompute_seconds)

    @property
    def live_activations(self) -> NDArray[np.int64]:
        """(stages,): most chunks that hold activations at once, of all ranks."""
        most = np.zeros(self.stages, dtype=np.int64)
        for rank in range(self.ranks):
            for stage in range(self.stages):
                _, live = self.live_activations_over_time(rank, stage)
                most[stage] = max(most[stage], int(live.max(initial=0)))
        return most

    def live_activations_over_time(self, rank: int, stage: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Seconds at which the number of live activations may change, and the number from then on.

        Activations come with the start of F or R and go with the end of B, or of W where the backward is split.
        """
        seconds, bytes_held = self.live_bytes(rank, stage, np.ones(int(self.chunk.max(initial=-1)) + 1))
        return seconds, np.rint(bytes_held).astype(np.int64)

    def live_bytes(
        self, rank: int, stage: int, activation_bytes: ArrayLike, state_bytes: ArrayLike | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds at which the memory of a stage changes, and the bytes that it holds from then on.

        Args:
            rank: whose pipeline.
            stage: of that pipeline.
            activation_bytes: (chunks,) from the start of F or R to the end of B (of W, if split).
            state_bytes: the same, from the start of S or F to the end of B (of I, if split): keys and values, their
                gradients, and the input of the stage for a chunk that will be recomputed.
        """
        rows = np.flatnonzero((self.rank == rank) & (self.stage == stage))
        kind, chunk = self.kind[rows], self.chunk[rows]
        activations = np.asarray(activation_bytes, dtype=np.float64)[chunk]
        taken = np.where((kind == "F") | (kind == "R"), activations, 0.0)
        freed = np.where((kind == "B") | (kind == "W"), activations, 0.0)
        if state_bytes is not None:
            state = np.asarray(state_bytes, dtype=np.float64)[chunk]
            taken += np.where((kind == "S") | (kind == "F"), state, 0.0)
            freed += np.where((kind == "B") | (kind == "I"), state, 0.0)
        # A stage runs one operation after the other, so start, stop, start, stop... is already the order of time.
        seconds = np.stack([self.start_seconds[rows], self.stop_seconds[rows]], axis=1).ravel()
        return seconds, np.cumsum(np.stack([taken, -freed], axis=1).ravel())

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        place = self.rank * self.stages + self.stage
        sums = np.bincount(place, values, minlength=self.ranks * self.stages).astype(np.float64)
        return sums.reshape(self.ranks, self.stages)

    def _idle_share(self, busy: NDArray[np.float64]) -> float:
        room = self.ranks * self.stages * self.makespan
        return 1.0 - float(busy.sum()) / room if room else 0.0


def simulate(schedules: Sequence[Schedule], seconds: OperationSeconds) -> Timeline:
    """Run the stages of one pipeline.

    Args:
        schedules: one a stage.
        seconds: of each operation.

    Raises:
        ValueError: an operation waits for one that never runs or that waits for it (a deadlock): names the stage and
            the operation. Or the durations do not fit the schedules.
    """
    rows = _Rows.of(schedules, seconds)
    return _run(rows, rows.durations(seconds), rows.transfers(seconds))


def simulate_ranks(ranks: Sequence[tuple[Sequence[Schedule], OperationSeconds]]) -> Timeline:
    """Run the pipelines of several data-parallel ranks, which have as many stages and meet at the optimizer step.

    Args:
        ranks: schedules and durations, as `simulate` takes them, of each rank.

    Raises:
        ValueError: as `simulate`, and if the ranks have different numbers of stages.
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

    def join(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(timeline, name) for timeline in timelines])

    rank_of_row = np.repeat(np.arange(len(timelines)), [len(timeline.chunk) for timeline in timelines])
    columns = {name: join(name) for name in ("stage", "kind", "chunk", "start_seconds", "stop_seconds")}
    return Timeline(len(timelines), stages.pop(), rank_of_row, **columns)  # type: ignore[arg-type]


def simulate_lockstep(ranks: Sequence[tuple[Schedule, OperationSeconds]], dummy: OperationSeconds) -> Timeline:
    """Run ranks without a pipeline that wait for each other at every operation, as ZeRO-3 makes them.

    Dummies take time but have no row.

    Args:
        ranks: schedule and durations of each; as many operations each, of the same kinds.
        dummy: durations of one chunk, of one token.
    """
    rows = [_Rows.of([schedule], seconds) for schedule, seconds in ranks]
    operations = len(ranks[0][0].ops)
    kinds = [KINDS.index(op.kind.value) for op in ranks[0][0].ops]
    of_dummy = np.array([table[0, 0] for table in (dummy.state_pass, dummy.forward, dummy.recompute, dummy.backward)])
    durations, positions, busy = [], [], np.zeros((len(ranks), operations))
    for index, (schedule, seconds) in enumerate(ranks):
        assert len(schedule.ops) == operations, "ranks in lock-step run as many operations"
        position = np.repeat(np.arange(operations), [len(op.real_chunks) for op in schedule.ops])
        dummies = np.array([len(op.chunks) - len(op.real_chunks) for op in schedule.ops])
        durations.append(rows[index].durations(seconds))
        positions.append(position)
        busy[index] = np.bincount(position, durations[-1], minlength=operations) + dummies * of_dummy[kinds]
    begins = np.concatenate([[0.0], np.cumsum(busy.max(axis=0))])
    starts, stops = [], []
    for duration, position in zip(durations, positions, strict=True):
        ends = np.cumsum(duration)
        before = ends - duration
        first_of_operation = np.searchsorted(position, position)  # joined chunks run one after the other
        starts.append(begins[position] + before - before[first_of_operation])
        stops.append(starts[-1] + duration)

    def join(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(row, name) for row in rows])

    rank_of_row = np.repeat(np.arange(len(ranks)), [len(row) for row in rows])
    return Timeline(
        len(ranks), 1, rank_of_row, join("stage"), np.array(list(KINDS))[join("kind")], join("chunk"),
        np.concatenate(starts), np.concatenate(stops),
    )  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """The operations of all stages as arrays, one row for each chunk of each, stage by stage; none for dummies."""

    schedules: Sequence[Schedule]
    first_row: NDArray[np.int64]
    """(stages + 1,)"""
    stage: NDArray[np.int64]
    kind: NDArray[np.int64]
    """Index into KINDS."""
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
        letters = "".join([op.kind for op in ops])  # a kind is its letter
        code_of_letter = np.full(128, -1, dtype=np.int64)
        code_of_letter[np.frombuffer(KINDS.encode(), dtype=np.uint8)] = np.arange(len(KINDS))
        rows = cls(
            schedules,
            first_row,
            np.repeat(np.arange(stages), np.diff(first_row)),
            np.repeat(code_of_letter[np.frombuffer(letters.encode(), dtype=np.uint8)], rows_of_op),
            np.array(list(itertools.chain.from_iterable(chunks_of_op)), dtype=np.int64),
            seconds.chunks,
        )
        outside = np.flatnonzero((rows.chunk < 0) | (rows.chunk >= rows.chunks))
        if len(outside):
            raise ValueError(f"{rows.describe(int(outside[0]))}: there are only {rows.chunks} chunks")
        return rows

    def __len__(self) -> int:
        return len(self.chunk)

    @property
    def key(self) -> NDArray[np.int64]:
        """What an operation works on: a chunk on a stage."""
        return self.stage * self.chunks + self.chunk

    @property
    def is_first_forward(self) -> NDArray[np.bool_]:
        return np.asarray(self.kind <= FORWARD)

    @property
    def is_gradient(self) -> NDArray[np.bool_]:
        """Operations whose result the previous stage waits for."""
        return np.asarray((self.kind == BACKWARD) | (self.kind == INPUT_GRADIENT))

    def durations(self, seconds: OperationSeconds) -> NDArray[np.float64]:
        """(rows,)"""
        tables = (
            seconds.state_pass, seconds.forward, seconds.recompute, seconds.backward, seconds.input_gradient,
            seconds.weight_gradient,
        )  # fmt: skip
        durations = np.zeros(len(self))
        for code, table in enumerate(tables):
            rows = np.flatnonzero(self.kind == code)
            if table is not None:
                durations[rows] = table[self.stage[rows], self.chunk[rows]]
            elif len(rows):
                raise ValueError(f"{self.describe(int(rows[0]))}: no seconds are given for a split backward")
        return durations

    def transfers(self, seconds: OperationSeconds) -> NDArray[np.float64]:
        """(rows,): how long what an operation receives from another stage is on its way."""
        transfers = np.zeros(len(self))
        if seconds.transfer is None:
            return transfers
        for receives, edge in (
            (self.is_first_forward & (self.stage > 0), self.stage - 1),
            (self.is_gradient & (self.stage < len(self.schedules) - 1), self.stage),
        ):
            transfers[receives] = seconds.transfer[edge[receives], self.chunk[receives]]
        return transfers

    def awaited(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(rows,): the row of another stage that must have stopped (-1: none), and where no such row exists.

        What an operation needs from its own stage lies before it in the schedule, or never comes.
        """
        size = len(self.schedules) * self.chunks
        forward_at, gradient_at = self._row_of(self.is_first_forward), self._row_of(self.is_gradient)
        activations_at = self._row_of((self.kind == FORWARD) | (self.kind == RECOMPUTE))
        state_pass_at = self._row_of(self.kind == STATE_PASS)
        input_gradient_at = self._row_of(self.kind == INPUT_GRADIENT)
        self._row_of(self.kind == WEIGHT_GRADIENT)

        awaited = np.full(len(self), -1, dtype=np.int64)
        sends_on = self.is_first_forward & (self.stage > 0)
        awaited[sends_on] = forward_at[self.key[sends_on] - self.chunks]
        sends_back = self.is_gradient & (self.key < size - self.chunks)
        awaited[sends_back] = gradient_at[self.key[sends_back] + self.chunks]
        never = (sends_on | sends_back) & (awaited < 0)

        row = np.arange(len(self))
        for needs, at in (
            (self.is_gradient, activations_at),
            (self.kind == RECOMPUTE, state_pass_at),
            (self.kind == WEIGHT_GRADIENT, input_gradient_at),
        ):
            needed = at[self.key]
            never |= needs & ((needed < 0) | (needed > row))
        return awaited, never

    def _row_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(stages * chunks,): the row of each chunk's only operation among those chosen, -1 without one."""
        rows = np.flatnonzero(chosen)
        row_of = np.full(len(self.schedules) * self.chunks, -1, dtype=np.int64)
        row_of[self.key[rows]] = rows
        twice = rows[row_of[self.key[rows]] != rows]
        if len(twice):
            raise ValueError(f"{self.describe(int(row_of[self.key[twice[0]]]))}: runs a second time")
        return row_of

    def describe(self, row: int) -> str:
        """Where a row stands: its stage, and its operation."""
        stage = int(np.searchsorted(self.first_row, row, side="right")) - 1
        position, op = self._op_of(row, stage)
        return f"stage {stage}, operation {position} ({op})"

    def _op_of(self, row: int, stage: int) -> tuple[int, Op]:
        left = row - int(self.first_row[stage])
        for position, op in enumerate(self.schedules[stage].ops):
            left -= len(op.real_chunks)
            if left < 0:
                return position, op
        raise IndexError(row)

    def why_never(self, row: int) -> str:
        """What a row waits for in vain."""
        kind, chunk, stage = int(self.kind[row]), int(self.chunk[row]), int(self.stage[row])
        awaited, never = self.awaited()
        if awaited[row] >= 0 and not never[row]:
            return f"{self.describe(int(awaited[row]))}, which never runs"
        gradient, first_forward = self.is_gradient[row], self.is_first_forward[row]
        if first_forward:
            return f"a forward of chunk {chunk} on stage {stage - 1}, which is in no schedule"
        if gradient and stage + 1 < len(self.schedules) and awaited[row] < 0:
            return f"a backward of chunk {chunk} on stage {stage + 1}, which is in no schedule"
        needed = {RECOMPUTE: "a state pass", WEIGHT_GRADIENT: "an input gradient"}.get(
            kind, "a forward with activations"
        )
        return f"{needed} of chunk {chunk} before it on its own stage"


def _run(rows: _Rows, durations: NDArray[np.float64], transfers: NDArray[np.float64]) -> Timeline:
    """Let each stage go as far as it can, then the stages that waited for it: each row is visited about once."""
    awaited_rows, never = rows.awaited()
    count = len(rows)
    awaited_rows = np.where(never, count, awaited_rows)  # a row that does not exist never stops
    awaited, seconds, transfer = awaited_rows.tolist(), durations.tolist(), transfers.tolist()  # lists: numbers, fast
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
                arrived = stopped + transfer[row]
                if arrived > now:
                    now = arrived
            starts[row] = now
            now += seconds[row]
            stops[row] = now
            if row in stage_waiting_for:
                runnable.append(stage_waiting_for.pop(row))
            row += 1
        next_row[stage], free_at[stage] = row, now
    for row, end in zip(next_row, end_row, strict=True):
        if row < end:
            raise ValueError(f"{rows.describe(row)} waits forever: it needs {rows.why_never(row)}")
    kinds = np.array(list(KINDS))
    return Timeline(
        1, len(rows.schedules), np.zeros(count, dtype=np.int64), rows.stage, kinds[rows.kind], rows.chunk,
        np.array(starts), np.array(stops[:-1]),
    )  # fmt: skip
