"""The runner of one stage of a pipeline.

    S, F    take what the stage before sends (the first stage: token ids), send hidden states on
    R       forward once more from the stage's own input of the state pass, which it has kept: nothing is sent
    B       take the gradient that the next stage sends (the last stage: the loss), send the input's gradient back
    I, W    a backward in two halves: I sends the input's gradient back, W computes the gradients of the weights

The plan sets the order of operations, and `messages` delivers what they exchange. Each stage keeps the state of its own
layers, for all sequences in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from chunkflow_cli.engine import PipelineEngine
from chunkflow_cli.execution.batch import tokens_of_rank
from chunkflow_cli.execution.loss import SharedHeadGradient
from chunkflow_cli.execution.messages import Links, Messages
from chunkflow_cli.execution.runner import ScheduleRunner, Step
from chunkflow_cli.execution.split_backward import PutOff
from chunkflow_cli.execution.stages import StageModel
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepContext, StepResult
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule


class StageRunner(ScheduleRunner):
    """Runs the schedule of one stage; all stages of the pipeline run theirs at the same time.

    No stage may stop within a step, because the others would wait for it. So every process must answer
    `stop_requested` with false until the step is over.
    """

    def __init__(
        self, engine: PipelineEngine, links: Links, settings: RunnerSettings, *, splits_backwards: bool = False
    ) -> None:
        """
        Args:
            engine: drives the `StageModel` of this process.
            settings: all chunks are spread over its sequence group, if there is one.
            splits_backwards: prepare the linear layers for I and W, which the schedules of zero_bubble hold.
        """
        super().__init__(settings, stage=links.stage, stages=len(links.ranks))
        assert isinstance(engine.module, StageModel)
        self._engine = engine
        self._model: StageModel = engine.module
        self._links = links
        self._put_off = self._model.put_off_products() if splits_backwards else None

    def _begin(self, schedules: tuple[Schedule, ...], batch: StepBatch, *, keeps_activations: bool) -> Step:
        context = StepContext(self._settings, batch)
        group = self._settings.sequence_group
        assert group is None or batch.spread is None, "chunks of a pipeline are all spread, or none is"

        def empty(index: int) -> Tensor:
            tokens = tokens_of_rank(batch.chunks[index].tokens, 1 if group is None else group.size)
            shape = (1, tokens, self._model.hidden_size)
            return torch.empty(shape, dtype=self._model.dtype, device=self._settings.device)

        messages = Messages(self._links, schedules, empty)
        return _StageStep(context, self._engine, self._links, messages, self._put_off, keeps_activations)


@dataclass(frozen=True)
class _Live:
    """A chunk that holds activations."""

    received: Tensor | None
    """(1, tokens, hidden_size) input of the stage, a leaf that collects gradient; None on the first stage."""
    output: Tensor
    """Hidden states for the next stage, or the loss."""


@dataclass
class _StageStep(Step):
    """Activations, kept inputs and losses of this stage, and its messages."""

    _engine: PipelineEngine
    _links: Links
    _messages: Messages
    _put_off: PutOff | None
    _keeps_activations: bool
    _live: dict[int, _Live] = field(default_factory=dict)
    _kept_inputs: dict[int, Tensor | None] = field(default_factory=dict)
    _received: Tensor | None = None
    _losses: dict[int, Tensor] = field(default_factory=dict)
    _head_gradient: SharedHeadGradient = field(default_factory=SharedHeadGradient)
    """Shared by all chunks in flight: each would otherwise hold a gradient of the head's size."""

    def receive(self, op: Op) -> None:
        self._received = self._messages.receive(op)

    def execute(self, op: Op) -> None:
        (index,) = op.chunks
        match op.kind:
            case OpKind.state_pass:
                self._state_pass(index, self._received)
            case OpKind.forward:
                output = self._forward(index, self._received)
                if not self._links.is_last:
                    self._messages.send(output.detach(), onward=True)
            case OpKind.recompute:
                with self.context.random.replay(index):
                    self._forward(index, self._kept_inputs.pop(index))
            case OpKind.backward:
                self._backward(index, self._received)
            case OpKind.input_gradient:
                assert self._put_off is not None, f"{op}: this runner was not made for split backwards"
                with self._put_off.of_chunk(index):
                    self._backward(index, self._received)
            case OpKind.weight_gradient:
                assert self._put_off is not None
                self._engine.add_gradients(self._put_off.gradients(index))
        self._received = None

    def _state_pass(self, index: int, received: Tensor | None) -> None:
        self.context.random.remember(index)
        with torch.no_grad():
            call = self.context.call(index, self._head_gradient)
            output = self._engine.forward(call, received, state_pass=True)
        self._kept_inputs[index] = received
        if not self._links.is_last:
            self._messages.send(output, onward=True)

    def _forward(self, index: int, received: Tensor | None) -> Tensor:
        if received is not None and self._keeps_activations:
            received.requires_grad_()
        call = self.context.call(index, self._head_gradient, is_first=not self._keeps_activations)
        output: Tensor = self._engine.forward(call, received)
        if self._keeps_activations:
            self._live[index] = _Live(received, output)
        if self._links.is_last:
            self._losses[index] = output.detach()
        self.context.measure_state()
        return output

    def _backward(self, index: int, gradient: Tensor | None) -> None:
        live = self._live.pop(index)
        if gradient is None:
            self._engine.backward(live.output)
        else:
            self._engine.backward_from(live.output, gradient)
        if live.received is not None:
            assert live.received.grad is not None
            self._messages.send(live.received.grad, onward=False)
        self.context.gone_backward([index])

    def result(self) -> StepResult:
        """Return the result, the same on all stages but for the bytes of state."""
        self._messages.close()
        assert not self._live, "the schedule left activations behind"
        assert not self._kept_inputs, "the schedule left inputs behind"
        assert not self._put_off or not len(self._put_off), "the schedule left weight gradients behind"
        count = len(self.context.batch.chunks)
        # (2, chunks): losses, and targets as the last stage has counted them; the others learn them from it.
        sums = torch.zeros(2, count, dtype=torch.float64, device=self.context.settings.device)
        if self._links.is_last and count:
            sums[0] = torch.stack([self._losses[index].double() for index in range(count)])
            sums[1] = torch.tensor([self.context.target_tokens[index] for index in range(count)])
        if count:
            self._engine.share_from_last(sums)
        if (preferences := self.context.batch.preferences) is not None and not self._keeps_activations:
            self._engine.share_from_last(preferences.sums)
        losses, targets = sums.tolist()
        return self.context.result([((index,), loss) for index, loss in enumerate(losses)], int(sum(targets)))
