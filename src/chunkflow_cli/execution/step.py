"""One optimizer step of a rank: its sequences, its state, the model calls of its chunks, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.execution.batch import build_batch, dummy_batch, with_idle_target
from chunkflow_cli.execution.branch_state import BranchState
from chunkflow_cli.execution.chunk_model import ChunkCall
from chunkflow_cli.execution.dropout import RandomReplay
from chunkflow_cli.execution.loss import SharedHeadGradient
from chunkflow_cli.execution.noise import SequenceNoise
from chunkflow_cli.execution.preferences import PreferenceStep
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import SequenceState, StatePiece, StateStore
from chunkflow_cli.execution.state_home import Home, OnDevice
from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.schedule import DUMMY


@dataclass(frozen=True)
class StepBatch:
    """The sequences of one optimizer step and how they are cut."""

    chunks: Chunks
    sequences: Sequence[TokenizedSample]
    weights: NDArray[np.float64]
    """(sequences,): what each target of a sequence counts in the loss."""
    spread: range | None = None
    """Chunks that the ranks of the sequence-parallel group share. None: all of them, if there is a group."""
    by_sequence: bool = False
    """Also add up the loss of each sequence."""
    preferences: PreferenceStep | None = None
    """What weighs the targets of preferences besides `weights`; None in supervised training."""
    noise: SequenceNoise | None = None
    """What is added to the embeddings."""


@dataclass(frozen=True)
class StepResult:
    """The result of the operations of one step."""

    loss: float
    """Weighted sum over all targets of the step. If chunks are spread over a group: over this rank's share of them."""
    target_tokens: int
    """Targets that went through the loss and backward, counted from the tensors that did."""
    peak_state_bytes: int
    """Most bytes that this rank's state store held."""
    not_finite: tuple[int, ...]
    """Chunks whose loss is NaN or infinite."""
    sequence_losses: NDArray[np.float64] | None = None
    """(sequences,) sum of the cross entropy of each sequence's targets, without weights, as far as this process has
    computed it: summed over the ranks of a group and the stages of a pipeline, it is whole. None unless
    `StepBatch.by_sequence`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Rewards of preferences, by TRL's names: this rank's shares."""


@dataclass(frozen=True)
class RunnerSettings:
    """How a runner works, the same in every step."""

    device: torch.device
    """Device of the model and its batches."""
    weight_dtype: torch.dtype = torch.float32
    """Data type of target weights: float32, or float64 for a float64 model."""
    dummy_token: int = 0
    """The token of forwards that hold no chunk (`batch.dummy_token`)."""
    lockstep: bool = False
    """Let every forward touch the same weights, whichever chunk it runs, because other ranks run theirs at the same
    time."""
    sequence_group: SequenceGroup | None = None
    """The group over which chunks may be spread. All of its ranks run the same operations on such chunks; the losses
    and target counts of each rank are its shares."""
    state_home: Home = field(default_factory=OnDevice)
    """Where the state of long sequences is kept."""
    stop_requested: Callable[[], bool] = lambda: False
    """Called before every operation; if it returns True, the run stops."""
    announce: Callable[[str], None] = lambda doing: None
    """Called with every operation before it begins, and before it waits for a message."""


class StepContext:
    """The context that all operations of one step share, for every runner."""

    def __init__(self, settings: RunnerSettings, batch: StepBatch) -> None:
        self.settings = settings
        self.batch = batch
        self.store = StateStore(settings.state_home)
        self.random = RandomReplay(settings.device)
        self.target_tokens: dict[int, int] = {}
        """Chunk -> its targets on this rank, once it was called."""
        self._peak_state_bytes = 0
        self._target_losses: dict[int, tuple[Tensor, NDArray[np.int64]]] = {}
        """Chunk -> (targets,) the loss of each of its targets, and the sequence that it belongs to."""
        self._summed: set[int] = set()
        """Chunks whose log-probabilities are part of the sums of preferences."""
        self.first_of_sequence = {index: group.start for group in batch.chunks.dependent_groups() for index in group}
        """Dependent chunk -> the first chunk of its sequence."""
        self._branches = batch.chunks.branches()

    def sequence_group(self, index: int) -> SequenceGroup | None:
        """Return the group over which a chunk is spread, or None if this rank has all of its tokens."""
        spread = self.batch.spread
        return self.settings.sequence_group if spread is None or index in spread else None

    def call(self, index: int, head_gradient: SharedHeadGradient | None = None, *, is_first: bool = False) -> ChunkCall:
        """Return the model call of a chunk, with the state of the long sequence that it holds a piece of.

        Args:
            index: a chunk of the batch, or DUMMY for one token of zero loss.
            head_gradient: shared with the other chunks that hold activations at the same time.
            is_first: this forward may be the one that adds the chunk's log-probabilities to the sums of preferences.
        """
        preferences, adds_sums = self.batch.preferences, False
        if preferences is not None and is_first and not preferences.is_complete:
            # A dummy in lockstep runs the head, too (`with_idle_target`): ZeRO-3 fetches its weights from all ranks.
            adds_sums = self.settings.lockstep if index == DUMMY else index not in self._summed
            self._summed.add(index)
        device, dtype = self.settings.device, self.settings.weight_dtype
        piece = group = None
        if index == DUMMY:
            tensors = dummy_batch(self.settings.dummy_token, device, dtype)
        else:
            chunk, group = self.batch.chunks[index], self.sequence_group(index)
            starts = None if preferences is None else preferences.starts
            tensors = build_batch(
                chunk,
                self.batch.sequences,
                self.batch.weights,
                device,
                dtype,
                group,
                keeps_losses=self.batch.by_sequence,
                answer_starts=starts,
                noise=self.batch.noise,
            )
            if tensors.target_losses is not None and tensors.target_sequences is not None:
                # A chunk that is called twice computes its loss in the second call.
                self._target_losses[index] = tensors.target_losses, tensors.target_sequences
            self.target_tokens[index] = tensors.target_tokens
            if chunk.is_dependent:
                first = chunk.segments[0]
                state = self._state(first.sequence)
                piece = StatePiece(state, first.start, first.continues)
        if self.settings.lockstep:
            tensors = with_idle_target(tensors)
        return ChunkCall(tensors, piece, head_gradient, group, preferences, adds_sums)

    def _state(self, sequence: int) -> SequenceState:
        stored, shared = self.batch.chunks.stored_tokens(sequence), self._branches.get(sequence)
        if shared is not None and sequence not in self.store:
            self.store.put(sequence, BranchState(self._state(sequence ^ 1), shared, stored))
        state = self.store.open(sequence, stored)
        state.is_shared = sequence ^ 1 in self._branches
        return state

    def measure_state(self) -> None:
        """Count the present size of the state store toward the peak of the step."""
        self._peak_state_bytes = max(self._peak_state_bytes, self.store.nbytes)

    def gone_backward(self, indices: Iterable[int]) -> None:
        """Close the state of each sequence whose first chunk is among those that have just gone backward."""
        self.measure_state()
        for index in indices:
            if index == self.first_of_sequence.get(index):
                self.store.close(self.batch.chunks[index].segments[0].sequence)

    def evaluated(self, index: int) -> None:
        """Close the state of a sequence whose last chunk was evaluated: no later chunk reads it."""
        if index in self.first_of_sequence:
            piece = self.batch.chunks[index].segments[0]
            if not piece.continues:
                self.store.close(piece.sequence)

    def result(self, losses: Sequence[tuple[Sequence[int], float]], target_tokens: int) -> StepResult:
        """Return the result of a step that is complete.

        Args:
            losses: the loss of each engine call, with the chunks that share it.
            target_tokens: the targets of the step.
        """
        assert not len(self.store), "the schedule left state behind"
        bad = {index for indices, loss in losses if not np.isfinite(loss) for index in indices if index != DUMMY}
        metrics = {} if self.batch.preferences is None else self.batch.preferences.outcome()
        return StepResult(
            loss=metrics.pop("loss", float(sum(loss for _, loss in losses))),
            target_tokens=target_tokens,
            peak_state_bytes=self._peak_state_bytes,
            not_finite=tuple(sorted(bad)),
            sequence_losses=self._sequence_losses() if self.batch.by_sequence else None,
            metrics=metrics,
        )

    def _sequence_losses(self) -> NDArray[np.float64]:
        count = len(self.batch.sequences)
        if not self._target_losses:
            return np.zeros(count)
        losses, sequences = zip(*self._target_losses.values(), strict=True)
        values = torch.cat(losses).double().cpu().numpy()
        return np.bincount(np.concatenate(sequences), values, count).astype(np.float64)
