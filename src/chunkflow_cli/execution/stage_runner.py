"""The runner of one stage of a pipeline: its Schedule, operation by operation.

    S, F    take what the stage before sends (the first stage: token ids), send hidden states on
    R       forward once more from the stage's own input of the state pass, which it has kept: nothing is sent
    B       take the gradient that the next stage sends (the last stage: the loss), send the input's gradient back
    I, W    a backward in two halves: I sends the input's gradient back, W gives the weights theirs

The order of operations is the plan's; messages come as `messages` says. Each stage keeps the state of its own layers,
of as many sequences as are in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chunkflow_cli.engine import PipelineEngine
from chunkflow_cli.execution.batch import build_batch
from chunkflow_cli.execution.chunk_model import ChunkCall
from chunkflow_cli.execution.loss import SharedHeadGradient
from chunkflow_cli.execution.messages import Links, Messages
from chunkflow_cli.execution.runner import StepBatch, StepResult, call_of, random_state, set_random_state
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.stages import StageModel
from chunkflow_cli.execution.state import StateStore
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule


class PipelineRunner:
    """Runs the schedules of one stage on its engine; all stages of the pipeline run theirs at the same time."""

    def __init__(
        self,
        engine: PipelineEngine,
        links: Links,
        device: torch.device,
        *,
        weight_dtype: torch.dtype = torch.float32,
        replay_random: bool = False,
        splits_backwards: bool = False,
        sequence_group: SequenceGroup | None = None,
        announce: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """
        Args:
            engine: around this process's `StageModel`.
            links: to the stages before and after.
            device: where batches go.
            weight_dtype: of target weights.
            replay_random: give a recompute the random numbers of its state pass; needed under dropout.
            splits_backwards: whether schedules hold I and W, as zero_bubble's do; linear layers are changed for it.
            sequence_group: over which every chunk is spread; all of its ranks run the same schedules.
            announce: told every operation before it begins, its wait for a message included.
        """
        assert isinstance(engine.module, StageModel)
        self._engine = engine
        self._model: StageModel = engine.module
        self._put_off = self._model.put_off_products() if splits_backwards else None
        self._links = links
        self._device = device
        self._weight_dtype = weight_dtype
        self._replay_random = replay_random
        self._sequence_group = sequence_group
        self._announce = announce

    def run(
        self,
        schedules: Sequence[Schedule],
        batch: StepBatch,
        on_backward: Callable[[int], None] = lambda tokens: None,
        on_operation: Callable[[Op, float], None] | None = None,
    ) -> StepResult:
        """All operations of one optimizer step; gradients are left in the engine.

        Args:
            schedules: of all stages; valid together for `batch.chunks`.
            batch: the sequences of the step, the same on all stages.
            on_backward: told the tokens of each chunk that has gone backward.
            on_operation: told each operation and the seconds that it took, without its wait for a message; the device
                is then waited for after each.

        Returns:
            Loss, targets and the chunks whose loss is not finite, the same on all stages; state bytes of this stage.

        Within it no stage may stop, for the others would wait for it.
        """
        assert self._sequence_group is None or batch.spread is None, "chunks of a pipeline are all spread, or none is"
        step = _StageStep(self, schedules, batch)
        for op in schedules[self._links.stage].ops:
            self._announce(str(op))
            step.receive(op)
            start = time.perf_counter()
            step.execute(op)
            if on_operation is not None:
                self._synchronize()
                on_operation(op, time.perf_counter() - start)
            if op.kind in (OpKind.backward, OpKind.input_gradient):
                on_backward(sum(batch.chunks[index].tokens for index in op.chunks))
        return step.result()

    @torch.no_grad()
    def evaluate(
        self, batch: StepBatch, *, forwards: int = 0, on_chunk: Callable[[int], None] = lambda tokens: None
    ) -> float:
        """The weighted loss of whole sequences, chunk by chunk through all stages, without gradient.

        Args:
            batch: the sequences and their chunks, the same on all stages.
            forwards: of other ranks; pipelines side by side need not run equally many, so nothing is filled up.
            on_chunk: told the tokens of each chunk.
        """
        schedule = Schedule(tuple(Op(OpKind.forward, (index,)) for index in range(len(batch.chunks))))
        step = _StageStep(self, [schedule] * len(self._links.ranks), batch, keeps_activations=False)
        for op in schedule.ops:
            self._announce(f"held-out chunk {op.chunks[0]}")
            step.receive(op)
            step.execute(op)
            chunk = batch.chunks[op.chunks[0]]
            if chunk.long_sequence is not None and not chunk.segments[0].continues:
                step.forget(chunk.long_sequence)
            on_chunk(chunk.tokens)
        return step.result().loss

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class _Live:
    """A chunk that holds activations."""

    received: Tensor | None
    """(1, tokens, hidden_size) input of the stage, a leaf that collects gradient; None on the first."""
    output: Tensor
    """Hidden states for the next stage, or the loss."""


class _StageStep:
    """What is alive on this stage while a step runs: activations, kept inputs, state, random states, losses."""

    def __init__(
        self,
        runner: PipelineRunner,
        schedules: Sequence[Schedule],
        batch: StepBatch,
        *,
        keeps_activations: bool = True,
    ) -> None:
        self._runner = runner
        self._batch = batch
        self._links = runner._links
        self._keeps_activations = keeps_activations
        self._store = StateStore()
        self._live: dict[int, _Live] = {}
        self._kept_inputs: dict[int, Tensor | None] = {}
        self._received: Tensor | None = None
        self._random_states: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        self._targets: dict[int, int] = {}
        # One for all chunks in flight: each would otherwise hold a gradient of the head's size.
        self._head_gradient = SharedHeadGradient() if keeps_activations else None
        self._peak_state_bytes = 0
        self._group_of = {index: group for group in batch.chunks.dependent_groups() for index in group}
        model = runner._model
        self._put_off = runner._put_off
        self._messages = Messages(self._links, schedules, self._shape, model.dtype)

    def receive(self, op: Op) -> None:
        """Wait for what the operation needs from another stage."""
        self._received = None
        if op.kind in (OpKind.state_pass, OpKind.forward) and not self._links.is_first:
            self._received = self._messages.receive(op.chunks[0], onward=True)
        elif op.kind in (OpKind.backward, OpKind.input_gradient) and not self._links.is_last:
            self._received = self._messages.receive(op.chunks[0], onward=False)

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
                self._recompute(index)
            case OpKind.backward:
                self._backward(index, self._received)
            case OpKind.input_gradient:
                assert self._put_off is not None, f"{op}: this runner was not made for split backwards"
                with self._put_off.of_chunk(index):
                    self._backward(index, self._received)
            case OpKind.weight_gradient:
                assert self._put_off is not None
                self._runner._engine.add_gradients(self._put_off.gradients(index))
        self._received = None

    def _state_pass(self, index: int, received: Tensor | None) -> None:
        if self._runner._replay_random:
            self._random_states[index] = random_state(self._runner._device)
        with torch.no_grad():
            output = self._runner._engine.forward(self._call(index), received, state_pass=True)
        self._kept_inputs[index] = received
        if not self._links.is_last:
            self._messages.send(output, onward=True)

    def _forward(self, index: int, received: Tensor | None) -> Tensor:
        if received is not None and self._keeps_activations:
            received.requires_grad_()
        output: Tensor = self._runner._engine.forward(self._call(index), received)
        if self._keeps_activations:
            self._live[index] = _Live(received, output)
        if self._links.is_last:
            self._losses[index] = output.detach()
        self._peak_state_bytes = max(self._peak_state_bytes, self._store.nbytes)
        return output

    def _recompute(self, index: int) -> None:
        received = self._kept_inputs.pop(index)
        state = self._random_states.pop(index, None)
        if state is None:
            self._forward(index, received)
            return
        after = random_state(self._runner._device)
        set_random_state(self._runner._device, state)
        self._forward(index, received)
        set_random_state(self._runner._device, after)

    def _backward(self, index: int, gradient: Tensor | None) -> None:
        live = self._live.pop(index)
        if gradient is None:
            self._runner._engine.backward(live.output)
        else:
            self._runner._engine.backward_from(live.output, gradient)
        if live.received is not None:
            assert live.received.grad is not None
            self._messages.send(live.received.grad, onward=False)
        self._peak_state_bytes = max(self._peak_state_bytes, self._store.nbytes)
        group = self._group_of.get(index)
        if group is not None and index == group.start:
            sequence = self._batch.chunks[index].long_sequence
            assert sequence is not None
            self.forget(sequence)

    def forget(self, sequence: int) -> None:
        """Nothing reads its state any more."""
        self._store.close(sequence)

    def _call(self, index: int) -> ChunkCall:
        runner, chunk = self._runner, self._batch.chunks[index]
        group = runner._sequence_group
        tensors = build_batch(
            chunk, self._batch.sequences, self._batch.weights, runner._device, runner._weight_dtype, group
        )
        self._targets[index] = tensors.target_tokens
        return call_of(chunk, tensors, self._batch.chunks, self._store, self._head_gradient, group)

    def _shape(self, index: int) -> tuple[int, ...]:
        tokens, group = self._batch.chunks[index].tokens, self._runner._sequence_group
        if group is not None:
            tokens = (tokens + group.padding(tokens)) // group.size
        return (1, tokens, self._runner._model.hidden_size)

    def result(self) -> StepResult:
        self._messages.close()
        assert not self._live, "the schedule left activations behind"
        assert not self._kept_inputs, "the schedule left inputs behind"
        assert not len(self._store), "the schedule left state behind"
        assert not self._put_off or not len(self._put_off), "the schedule left weight gradients behind"
        count = len(self._batch.chunks)
        # (2, chunks): losses, and targets as the last stage has counted them; the others learn them from it.
        sums = torch.zeros(2, count, dtype=torch.float64, device=self._runner._device)
        if self._links.is_last and count:
            sums[0] = torch.stack([self._losses[index].double() for index in range(count)])
            sums[1] = torch.tensor([self._targets[index] for index in range(count)])
        if count:
            self._links.share(sums)
        losses, targets = sums.tolist()
        return StepResult(
            loss=float(sum(losses)),
            target_tokens=int(sum(targets)),
            peak_state_bytes=self._peak_state_bytes,
            not_finite=tuple(index for index, loss in enumerate(losses) if not np.isfinite(loss)),
        )
