"""Backwards in two: input gradients first, weight gradients into the waits."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.pipeline_orders import live_activations, state_aware_1f1b
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def zero_bubble(
    chunks: Chunks,
    k: int,
    stages: int,
    seconds: OperationSeconds,
    warmup_extra: int = 0,
    *,
    most_live: int | None = None,
) -> tuple[Schedule, ...]:
    """State-aware 1F1B with split backwards: `I` sends the gradient on, `W` waits until its stage has nothing to do.

    After ZB-H1 (Qi et al. 2024, arXiv 2401.10241). A stage runs a `W` while it waits for a message, if that takes up
    enough of the `W`; how much is enough is chosen by simulation. Activations live until their `W`, so a stage
    that has no more room runs one first: no stage holds more than the fullest stage of state-aware 1F1B.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        seconds: with both halves of the backward.
        warmup_extra: warm-up forwards more than P - 1 - s.
        most_live: live activations that a stage has room for, instead of those of the fullest stage.

    Raises:
        ValueError: `seconds` has no split backward, or `most_live` is less than state-aware 1F1B needs.
    """
    if seconds.input_gradient is None or seconds.weight_gradient is None:
        raise ValueError("zero_bubble needs the seconds of input_gradient and weight_gradient")
    whole = state_aware_1f1b(chunks, k, stages, warmup_extra)
    needed = max((live_activations(schedule) for schedule in whole), default=0)
    room = needed if most_live is None else most_live
    if room < needed:
        raise ValueError(f"most_live={room}: state-aware 1F1B with this warm-up holds {needed} live activations")
    candidates = [_delay_weight_gradients(whole, seconds, room, share) for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    return min(candidates, key=lambda schedules: simulate(schedules, seconds).makespan)  # the first of equals


def _delay_weight_gradients(
    whole: Sequence[Schedule], seconds: OperationSeconds, room: int, least_share: float
) -> tuple[Schedule, ...]:
    """Split every backward; run a `W` in a wait that lasts for at least that share of it, or when room runs out.

    Stages are run as `simulate` runs them: when a stage decides, it knows how long it will wait.
    """
    stages = [_SplitStage(schedule, stage, seconds, room, least_share) for stage, schedule in enumerate(whole)]
    forward_stop: dict[tuple[int, int], float] = {}
    gradient_stop: dict[tuple[int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for stage in itertools.chain(stages, reversed(stages)):
            moved |= stage.run(forward_stop, gradient_stop, len(stages))
    return tuple(Schedule((*stage.ops, *map(_weight_gradient, stage.pending))) for stage in stages)


def _weight_gradient(chunk: int) -> Op:
    return Op(OpKind.weight_gradient, (chunk,))


class _SplitStage:
    """One stage on its way through a schedule with whole backwards, which it splits."""

    def __init__(
        self, schedule: Schedule, stage: int, seconds: OperationSeconds, room: int, least_share: float
    ) -> None:
        self.ops: list[Op] = []
        self.pending: deque[int] = deque()
        """Chunks that wait for their weight gradient, the oldest first."""
        self._left = deque(schedule.ops)
        self._stage = stage
        self._room = room
        self._least_share = least_share
        self._now = 0.0
        self._live = 0
        self._transfer = seconds.transfer
        assert seconds.input_gradient is not None
        assert seconds.weight_gradient is not None
        self._weight_seconds = seconds.weight_gradient[stage]
        self._seconds = {
            OpKind.state_pass: seconds.state_pass[stage],
            OpKind.forward: seconds.forward[stage],
            OpKind.recompute: seconds.recompute[stage],
            OpKind.backward: seconds.input_gradient[stage],
        }

    def run(
        self,
        forward_stop: dict[tuple[int, int], float],
        gradient_stop: dict[tuple[int, int], float],
        stages: int,
    ) -> bool:
        """Go on until a message is missing; whether anything ran.

        Args:
            forward_stop: when the forward of (stage, chunk) stopped; extended.
            gradient_stop: the same of backwards.
            stages: of the pipeline.
        """
        before = len(self._left)
        while self._left:
            op = self._left[0]
            chunk = op.chunks[0]
            is_forward = op.kind in (OpKind.state_pass, OpKind.forward)
            if is_forward:
                ready = self._arrival(forward_stop, self._stage - 1, chunk, self._stage - 1) if self._stage else 0.0
            elif self._stage < stages - 1:
                ready = self._arrival(gradient_stop, self._stage + 1, chunk, self._stage)
            else:
                ready = 0.0
            if ready is None:
                break
            if op.kind is OpKind.recompute:
                # Its backward follows at once, so nothing may come between: what can wait is both together.
                ready -= float(self._seconds[op.kind][chunk])
            self._fill(ready)
            if op.kind in (OpKind.forward, OpKind.recompute):
                if self._live == self._room:
                    self._run_weight_gradient()
                self._live += 1
            self._left.popleft()
            # A recompute waits for no message, its backward does.
            start = self._now if op.kind is OpKind.recompute else max(self._now, ready)
            self._now = start + float(self._seconds[op.kind][chunk])
            if is_forward:
                forward_stop[self._stage, chunk] = self._now
            if op.kind is OpKind.backward:
                gradient_stop[self._stage, chunk] = self._now
                self.pending.append(chunk)
                op = Op(OpKind.input_gradient, op.chunks)
            self.ops.append(op)
        return len(self._left) < before

    def _arrival(self, stops: dict[tuple[int, int], float], stage: int, chunk: int, edge: int) -> float | None:
        stop = stops.get((stage, chunk))
        if stop is None:
            return None
        return stop + (float(self._transfer[edge, chunk]) if self._transfer is not None else 0.0)

    def _fill(self, until: float) -> None:
        """Run weight gradients in the time that the stage would wait."""
        if self.ops and self.ops[-1].kind is OpKind.recompute:
            return
        while self.pending and until > self._now:
            if until - self._now < self._least_share * self._weight_seconds[self.pending[0]]:
                return
            self._run_weight_gradient()

    def _run_weight_gradient(self) -> None:
        chunk = self.pending.popleft()
        self.ops.append(_weight_gradient(chunk))
        self._now += float(self._weight_seconds[chunk])
        self._live -= 1
