"""The runner interprets a schedule, operation by operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.execution.batch import ChunkBatch, build_batch, dummy_batch, with_idle_target
from chunkflow_cli.execution.chunk_model import ChunkCall
from chunkflow_cli.execution.loss import SharedHeadGradient
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import StateStore
from chunkflow_cli.planning.chunks import Chunk, Chunks
from chunkflow_cli.planning.schedule import DUMMY, Op, OpKind, Schedule


class Engine(Protocol):
    """What the runner asks of an engine; it knows nothing of chunks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class StepBatch:
    """The sequences of one optimizer step and how they are cut."""

    chunks: Chunks
    sequences: Sequence[TokenizedSample]
    weights: NDArray[np.float64]
    """(sequences,): what each target of a sequence counts in the loss."""
    spread: range | None = None
    """Chunks that the ranks of the sequence-parallel group share; None is all of them, where there is a group."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Weighted sum over all targets of the step; of a rank's share of them, if chunks are spread over a group."""
    target_tokens: int
    """Targets that went through the loss and backward, counted from the tensors that did."""
    peak_state_bytes: int
    not_finite: tuple[int, ...]
    """Chunks whose loss is NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The user asked to stop; raised between two operations."""


class Runner:
    """Runs the schedules of one rank on one engine."""

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        *,
        weight_dtype: torch.dtype = torch.float32,
        replay_random: bool = False,
        lockstep: bool = False,
        sequence_group: SequenceGroup | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        announce: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """
        Args:
            engine: forwards a ChunkModel and takes gradients.
            device: where batches go.
            weight_dtype: float32, or float64 for a float64 model.
            replay_random: give a recompute the random numbers of its state pass; needed under dropout.
            lockstep: every forward touches the same weights, whatever its chunk: other ranks run theirs with it.
            sequence_group: over which chunks may be spread; all of its ranks run the same operations on these, and
                their losses and counts of targets are each rank's share.
            stop_requested: asked before every operation.
            announce: told every operation before it begins.
        """
        self._engine = engine
        self._device = device
        self._weight_dtype = weight_dtype
        self._replay_random = replay_random
        self._lockstep = lockstep
        self._sequence_group = sequence_group
        self._stop_requested = stop_requested
        self._announce = announce

    def run(
        self,
        schedule: Schedule,
        batch: StepBatch,
        on_backward: Callable[[int], None] = lambda tokens: None,
        on_operation: Callable[[Op, float], None] | None = None,
    ) -> StepResult:
        """All operations of one optimizer step; gradients are left in the engine.

        Args:
            schedule: valid for `batch.chunks`.
            batch: the sequences of the step.
            on_backward: told the tokens of each chunk that has gone backward.
            on_operation: told each operation and the seconds that it took; the device is then waited for after each.

        Raises:
            Interrupted: `stop_requested` said so; gradients are incomplete.
        """
        step = _Step(self, batch)
        start = time.perf_counter()
        for op in schedule.ops:
            if self._stop_requested():
                raise Interrupted
            self._announce(str(op))
            step.execute(op)
            if on_operation is not None:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                on_operation(op, time.perf_counter() - start)
                start = time.perf_counter()
            if op.kind is OpKind.backward:
                on_backward(sum(batch.chunks[index].tokens for index in op.real_chunks))
        return step.result()

    @torch.no_grad()
    def evaluate(
        self, batch: StepBatch, *, forwards: int = 0, on_chunk: Callable[[int], None] = lambda tokens: None
    ) -> float:
        """The weighted loss of whole sequences, chunk by chunk, without gradient.

        Args:
            batch: the sequences and their chunks.
            forwards: so many, at least, for other ranks run them too; what the chunks leave over are dummies.
            on_chunk: told the tokens of each chunk that is done.

        Raises:
            Interrupted: `stop_requested` said so.
        """
        store = StateStore()
        total = 0.0
        for chunk_index, chunk in enumerate(batch.chunks):
            if self._stop_requested():
                raise Interrupted
            self._announce(f"held-out chunk {chunk_index}")
            tensors = self.in_step(self.build(chunk_index, batch))
            total += float(self._engine.forward(self.call(chunk_index, tensors, batch, store)))
            sequence = chunk.long_sequence
            if sequence is not None and not chunk.segments[0].continues:
                store.close(sequence)
            on_chunk(chunk.tokens)
        for _ in range(forwards - len(batch.chunks)):
            self._engine.forward(self.dummy())
        return total

    def build(self, index: int, batch: StepBatch) -> ChunkBatch:
        """The tensors of a chunk; this rank's slice of it, if it is spread."""
        return build_batch(
            batch.chunks[index], batch.sequences, batch.weights, self._device, self._weight_dtype,
            self._group_of(index, batch),
        )  # fmt: skip

    def call(
        self,
        index: int,
        tensors: ChunkBatch,
        batch: StepBatch,
        store: StateStore,
        head_gradient: SharedHeadGradient | None = None,
    ) -> ChunkCall:
        """The model call of a chunk."""
        group = self._group_of(index, batch)
        return call_of(batch.chunks[index], tensors, batch.chunks, store, head_gradient, group)

    def _group_of(self, index: int, batch: StepBatch) -> SequenceGroup | None:
        return self._sequence_group if batch.spread is None or index in batch.spread else None

    def in_step(self, tensors: ChunkBatch) -> ChunkBatch:
        """As it is forwarded beside the chunks of other ranks."""
        return with_idle_target(tensors) if self._lockstep else tensors

    def dummy(self) -> ChunkCall:
        return ChunkCall(self.in_step(dummy_batch(self._device, self._weight_dtype)), None, 0, False)


class _Step:
    """What is alive while one schedule runs: losses with their graphs, state, random states."""

    def __init__(self, runner: Runner, batch: StepBatch) -> None:
        self._runner = runner
        self._batch = batch
        self._store = StateStore()
        self._live: dict[tuple[int, ...], Tensor] = {}
        self._random_states: dict[int, Tensor] = {}
        self._losses: list[tuple[tuple[int, ...], Tensor]] = []
        self._target_tokens: dict[int, int] = {}
        self._head_gradients: dict[int, SharedHeadGradient] = {}
        self._peak_state_bytes = 0
        groups = batch.chunks.dependent_groups()
        self._group_of = {index: group for group in groups for index in group}

    def execute(self, op: Op) -> None:
        match op.kind:
            case OpKind.state_pass:
                self._state_pass(op.chunks[0])
            case OpKind.forward:
                self._live[op.chunks] = self._forward(op.chunks, self._head_gradient_of(op.chunks))
            case OpKind.recompute:
                self._live[op.chunks] = self._recompute(op.chunks[0])
            case OpKind.backward:
                self._backward(op.chunks)
            case OpKind.input_gradient | OpKind.weight_gradient:
                raise AssertionError(f"{op}: only pipeline stages split backwards")

    def _state_pass(self, index: int) -> None:
        if self._runner._replay_random and index != DUMMY:
            self._random_states[index] = random_state(self._runner._device)
        with torch.no_grad():
            self._runner._engine.forward(self._call(index, None), state_pass=True)

    def _forward(self, indices: tuple[int, ...], head_gradient: SharedHeadGradient | None) -> Tensor:
        loss: Tensor = self._runner._engine.forward(*(self._call(index, head_gradient) for index in indices))
        self._peak_state_bytes = max(self._peak_state_bytes, self._store.nbytes)
        return loss

    def _recompute(self, index: int) -> Tensor:
        state = self._random_states.pop(index, None)
        if state is None:
            return self._forward((index,), None)
        after = random_state(self._runner._device)
        set_random_state(self._runner._device, state)
        loss = self._forward((index,), None)
        set_random_state(self._runner._device, after)
        return loss

    def _backward(self, indices: tuple[int, ...]) -> None:
        loss = self._live.pop(indices if indices in self._live else tuple(reversed(indices)))
        self._losses.append((indices, loss.detach()))
        self._runner._engine.backward(loss)
        self._peak_state_bytes = max(self._peak_state_bytes, self._store.nbytes)
        for index in indices:
            group = self._group_of.get(index)
            if group is not None and index == group.start:
                sequence = self._batch.chunks[index].long_sequence
                assert sequence is not None
                self._store.close(sequence)

    def _call(self, index: int, head_gradient: SharedHeadGradient | None) -> ChunkCall:
        if index == DUMMY:
            return replace(self._runner.dummy(), head_gradient=head_gradient)
        tensors = self._runner.build(index, self._batch)
        self._target_tokens[index] = tensors.target_tokens
        return self._runner.call(index, self._runner.in_step(tensors), self._batch, self._store, head_gradient)

    def _head_gradient_of(self, indices: tuple[int, ...]) -> SharedHeadGradient | None:
        """One for all retained chunks of a sequence, or of a call; none for a chunk that goes backward at once."""
        if len(indices) > 1:
            return SharedHeadGradient()
        group = self._group_of.get(indices[0])
        return None if group is None else self._head_gradients.setdefault(group.start, SharedHeadGradient())

    def result(self) -> StepResult:
        assert not self._live, "the schedule left activations behind"
        assert not len(self._store), "the schedule left state behind"
        values = torch.stack([loss.double() for _, loss in self._losses]).tolist()  # one synchronisation a step
        bad = [indices for (indices, _), value in zip(self._losses, values, strict=True) if not np.isfinite(value)]
        return StepResult(
            loss=float(sum(values)),
            target_tokens=sum(self._target_tokens.values()),
            peak_state_bytes=self._peak_state_bytes,
            not_finite=tuple(sorted(index for indices in bad for index in indices if index != DUMMY)),
        )


def call_of(
    chunk: Chunk,
    tensors: ChunkBatch,
    chunks: Chunks,
    store: StateStore,
    head_gradient: SharedHeadGradient | None = None,
    sequence_group: SequenceGroup | None = None,
) -> ChunkCall:
    """The model call of a chunk, with the state of the long sequence that it holds a piece of."""
    first = chunk.segments[0]
    if not chunk.is_dependent:
        return ChunkCall(tensors, None, 0, False, head_gradient, sequence_group)
    state = store.open(first.sequence, chunks.stored_tokens(first.sequence))
    return ChunkCall(tensors, state, first.start, first.continues, head_gradient, sequence_group)


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in train mode may draw random numbers.

    Some models (seed_oss, starcoder2, opt) have no dropout modules: they keep the rate as a number, for the function.
    """
    return any(
        (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
