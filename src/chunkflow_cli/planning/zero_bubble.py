"""Split backwards in two: input gradients first, weight gradients into the waits."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.pipeline_orders import live_activations, state_aware_1f1b
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def zero_bubble(chunks: Chunks, k: int, seconds: OperationSeconds, warmup_extra: int = 0) -> tuple[Schedule, ...]:
    """Return state-aware 1F1B with split backwards: `I` sends the gradient on, `W` runs when its stage would wait.

    After ZB-H1 (Qi et al. 2024, arXiv 2401.10241). A stage runs a `W` while it waits for a message, if the wait takes
    up enough of the `W`; simulation chooses how much is enough. Activations live until their `W`, so a stage without
    room runs one first: no stage holds more than the fullest stage of state-aware 1F1B.

    Args:
        k: how many chunks of a long sequence keep their activations.
        seconds: durations on every stage, with both halves of the backward.
        warmup_extra: warm-up forwards in addition to P - 1 - s.

    Raises:
        ValueError: `seconds` has no split backward.
    """
    if seconds.input_gradient is None or seconds.weight_gradient is None:
        raise ValueError("zero_bubble needs the seconds of input_gradient and weight_gradient")
    whole = state_aware_1f1b(chunks, k, seconds.stages, warmup_extra)
    candidates = [_delay_weight_gradients(whole, seconds, share) for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    return min(candidates, key=lambda schedules: simulate(schedules, seconds).makespan)  # the first of equals


def _delay_weight_gradients(
    whole: Sequence[Schedule], seconds: OperationSeconds, least_share: float
) -> tuple[Schedule, ...]:
    """Split every backward; run a `W` in a wait that lasts for at least that share of it, or when room runs out.

    Stages run as in `simulate`, so that a stage knows how long it will wait when it decides.
    """
    room = max(map(live_activations, whole))
    arrivals: dict[tuple[OpKind, int, int], float] = {}
    stages = [_SplitStage(stage, ops, seconds, room, least_share, arrivals) for stage, ops in enumerate(whole)]
    moved = True
    while moved:
        moved = False
        for stage in itertools.chain(stages, reversed(stages)):
            moved |= stage.run()
    for stage in stages:
        while stage.pending:
            stage.run_weight_gradient()
    return tuple(Schedule(tuple(stage.ops)) for stage in stages)


class _SplitStage:
    """One stage on its way through a schedule with whole backwards, which it splits."""

    def __init__(
        self,
        stage: int,
        whole: Schedule,
        seconds: OperationSeconds,
        room: int,
        least_share: float,
        arrivals: dict[tuple[OpKind, int, int], float],
    ) -> None:
        self.ops: list[Op] = []
        self.pending: deque[int] = deque()
        """Chunks that wait for their weight gradient, the oldest first."""
        self._left = deque(whole.ops)
        self._stage = stage
        self._stages = seconds.stages
        self._room = room
        self._least_share = least_share
        self._arrivals = arrivals
        """When the message of a forward or backward reaches a stage: by kind, receiving stage and chunk."""
        self._now = 0.0
        self._live = 0
        transfer = np.zeros((seconds.stages + 1, seconds.chunks))
        if seconds.transfer is not None:
            transfer[1:-1] = seconds.transfer
        self._receivers = {
            OpKind.forward: (stage + 1, transfer[stage + 1].tolist()),
            OpKind.backward: (stage - 1, transfer[stage].tolist()),
        }
        tables = {kind: seconds.of_kind(kind) for kind in OpKind}
        self._seconds = {kind: table[stage].tolist() for kind, table in tables.items() if table is not None}

    def run(self) -> bool:
        """Go on until a message is missing. Return True if anything ran."""
        before = len(self._left)
        while self._left:
            op = self._left[0]
            chunk = op.chunks[0]
            ready = self._arrival(op)
            if ready is None:
                break
            if op.kind is OpKind.recompute:
                # Its backward must follow at once, so the wait for the gradient can only be before both.
                ready -= self._seconds[op.kind][chunk]
            self._fill(ready)
            if op.kind in (OpKind.forward, OpKind.recompute):
                if self._live == self._room:
                    self.run_weight_gradient()
                self._live += 1
            self._left.popleft()
            if op.kind is OpKind.recompute:  # it waits for no message itself
                ready = self._now
            if op.kind is OpKind.backward:
                self.pending.append(chunk)
                op = Op(OpKind.input_gradient, op.chunks)
            self._now = max(self._now, ready) + self._seconds[op.kind][chunk]
            self.ops.append(op)
            self._send(op)
        return len(self._left) < before

    def run_weight_gradient(self) -> None:
        """Run the oldest weight gradient."""
        chunk = self.pending.popleft()
        self.ops.append(Op(OpKind.weight_gradient, (chunk,)))
        self._now += self._seconds[OpKind.weight_gradient][chunk]
        self._live -= 1

    def _fill(self, until: float) -> None:
        """Run weight gradients in the time that the stage would wait."""
        if self.ops and self.ops[-1].kind is OpKind.recompute:
            return
        while self.pending and until > self._now:
            if until - self._now < self._least_share * self._seconds[OpKind.weight_gradient][self.pending[0]]:
                return
            self.run_weight_gradient()

    def _arrival(self, op: Op) -> float | None:
        """Return when the message arrives that an operation, or the backward after a recompute, waits for, if known."""
        message = _message(op)
        is_first_to_run = self._stage == (0 if message is OpKind.forward else self._stages - 1)
        return 0.0 if is_first_to_run else self._arrivals.get((message, self._stage, op.chunks[0]))

    def _send(self, op: Op) -> None:
        if op.kind is not OpKind.recompute:
            message = _message(op)
            receiver, transfer = self._receivers[message]
            self._arrivals[message, receiver, op.chunks[0]] = self._now + transfer[op.chunks[0]]


def _message(op: Op) -> OpKind:
    return OpKind.forward if op.kind in (OpKind.state_pass, OpKind.forward) else OpKind.backward
