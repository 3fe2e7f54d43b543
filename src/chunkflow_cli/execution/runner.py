"""Runners interpret a schedule, operation by operation: what all of them do, and the runner of a whole model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkflow_cli.execution.chunk_model import ChunkCall
from chunkflow_cli.execution.loss import SharedHeadGradient
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepContext, StepResult
from chunkflow_cli.planning.schedule import DUMMY, Op, OpKind, Schedule


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user asked to stop. Raised between two operations."""


class Engine(Protocol):
    """What `Runner` needs of an engine, which knows nothing about chunks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


@dataclass
class Step(ABC):
    """One step while its operations run: activations, losses, and the context that they share."""

    context: StepContext

    def receive(self, op: Op) -> None:  # noqa: B027 - only stages wait for others
        """Wait for what the operation needs from another process."""

    @abstractmethod
    def execute(self, op: Op) -> None:
        """Run one operation."""

    @abstractmethod
    def result(self) -> StepResult:
        """Return the result of the step; all of its operations have run."""


class ScheduleRunner(ABC):
    """Runs the schedules of one process; the subclass knows how to execute an operation."""

    def __init__(self, settings: RunnerSettings, *, stage: int = 0, stages: int = 1) -> None:
        self._settings = settings
        self._stage = stage
        self._stages = stages

    @property
    def settings(self) -> RunnerSettings:
        return self._settings

    @abstractmethod
    def _begin(self, schedules: tuple[Schedule, ...], batch: StepBatch, *, keeps_activations: bool) -> Step:
        """Return a step of which no operation has run."""

    def run(
        self,
        schedules: tuple[Schedule, ...],
        batch: StepBatch,
        on_backward: Callable[[int], None] = lambda tokens: None,
        record: Callable[[Op, float], None] | None = None,
    ) -> StepResult:
        """Run all operations of one optimizer step; gradients are left in the engine.

        Args:
            schedules: one for each stage of the pipeline, or a single one without a pipeline; valid for `batch.chunks`.
            batch: the sequences of the step, the same on all stages.
            on_backward: called with the tokens of the chunks that have just gone backward.
            record: called with each operation and the seconds that it took, without its wait for a message. If given,
                every operation also waits until the device has computed it.

        Raises:
            Interrupted: `stop_requested` returned true; gradients are incomplete.
        """
        assert len(schedules) == self._stages, "a step has one schedule for each stage"
        step = self._begin(schedules, batch, keeps_activations=True)
        for op in schedules[self._stage].ops:
            start = self._execute(step, op, str(op), timed=record is not None)
            if record is not None:
                self._wait_for_device()
                record(op, time.perf_counter() - start)
            if op.kind in (OpKind.backward, OpKind.input_gradient):
                on_backward(sum(batch.chunks[index].tokens for index in op.real_chunks))
        return step.result()

    @torch.no_grad()
    def evaluate(self, batch: StepBatch, *, forwards: int = 0) -> StepResult:
        """Return the weighted loss of whole sequences, computed chunk by chunk without gradient.

        With preferences, that fills their sums, on all stages.

        Args:
            batch: the sequences and their chunks, the same on all stages.
            forwards: run at least this many, because other ranks do; dummies make up for missing chunks.

        Raises:
            Interrupted: `stop_requested` returned true.
        """
        chunks = [*range(len(batch.chunks))] + [DUMMY] * (forwards - len(batch.chunks))
        schedule = Schedule(tuple(Op(OpKind.forward, (index,)) for index in chunks))
        step = self._begin((schedule,) * self._stages, batch, keeps_activations=False)
        for op in schedule.ops:
            (index,) = op.chunks
            self._execute(step, op, "held-out dummy" if index == DUMMY else f"held-out chunk {index}")
            step.context.evaluated(index)
        return step.result()

    def _execute(self, step: Step, op: Op, doing: str, *, timed: bool = False) -> float:
        """Run one operation; return when it began, after its wait for a message."""
        if self._settings.stop_requested():
            raise Interrupted
        self._settings.announce(doing)
        step.receive(op)
        if timed:
            self._wait_for_device()  # with NCCL, only the device has waited for the message
        start = time.perf_counter()
        step.execute(op)
        return start

    def _wait_for_device(self) -> None:
        """Wait for what has been computed. Not for the whole device, where a receive may wait for another stage."""
        if self._settings.device.type == "cuda":
            torch.cuda.current_stream(self._settings.device).synchronize()


class Runner(ScheduleRunner):
    """Runs the schedule of a rank that holds the whole model; the engine forwards a `ChunkModel`."""

    def __init__(self, engine: Engine, settings: RunnerSettings) -> None:
        super().__init__(settings)
        self._engine = engine

    def _begin(self, schedules: tuple[Schedule, ...], batch: StepBatch, *, keeps_activations: bool) -> Step:
        return _WholeModelStep(StepContext(self._settings, batch), self._engine, keeps_activations)


@dataclass
class _WholeModelStep(Step):
    """Losses with their graphs, and the gradients of the head that retained chunks share."""

    _engine: Engine
    _keeps_activations: bool
    _live: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _losses: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    _head_gradients: dict[int, SharedHeadGradient] = field(default_factory=dict)
    """First chunk of a sequence -> the gradient that its retained chunks share."""

    def execute(self, op: Op) -> None:
        match op.kind:
            case OpKind.state_pass:
                self._state_pass(op.chunks[0])
            case OpKind.forward:
                head_gradient = self._head_gradient_of(op.chunks)
                calls = [self.context.call(index, head_gradient, is_first=True) for index in op.chunks]
                self._forward(op.chunks, calls)
            case OpKind.first_pass:
                with torch.no_grad():
                    self._engine.forward(self.context.call(op.chunks[0], is_first=True), first_pass=True)
                self.context.measure_state()
            case OpKind.recompute:
                with self.context.random.replay(op.chunks[0]):
                    self._forward(op.chunks, [self.context.call(op.chunks[0])])
            case OpKind.backward:
                self._backward(op.chunks)
            case OpKind.input_gradient | OpKind.weight_gradient:
                raise AssertionError(f"{op}: only pipeline stages split backwards")

    def _state_pass(self, index: int) -> None:
        if index != DUMMY:
            self.context.random.remember(index)
        with torch.no_grad():
            self._engine.forward(self.context.call(index), state_pass=True)

    def _forward(self, indices: tuple[int, ...], calls: list[ChunkCall]) -> None:
        loss: Tensor = self._engine.forward(*calls)
        self.context.measure_state()
        if self._keeps_activations:
            self._live[indices] = loss
        else:
            self._losses.append((indices, loss))

    def _backward(self, indices: tuple[int, ...]) -> None:
        loss = self._live.pop(indices if indices in self._live else tuple(reversed(indices)))
        self._losses.append((indices, loss.detach()))
        self._engine.backward(loss)
        self.context.gone_backward(indices)

    def _head_gradient_of(self, indices: tuple[int, ...]) -> SharedHeadGradient | None:
        """Return the one that all retained chunks of a sequence, or of a call, share; None for a standalone chunk."""
        if len(indices) > 1:
            return SharedHeadGradient()
        first = self.context.first_of_sequence.get(indices[0])
        return None if first is None else self._head_gradients.setdefault(first, SharedHeadGradient())

    def result(self) -> StepResult:
        assert not self._live, "the schedule left activations behind"
        tensors = [loss.double() for _, loss in self._losses]
        values = torch.stack(tensors).tolist() if tensors else []  # one synchronization per step
        losses = [(indices, value) for (indices, _), value in zip(self._losses, values, strict=True)]
        return self.context.result(losses, sum(self.context.target_tokens.values()))
