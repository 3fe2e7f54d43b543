"""The tensors of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.noise import SequenceNoise, TokenNoise
from chunkflow_cli.execution.sending import on_device
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.planning.chunks import Chunk

BLOCK_ROWS, FEW_ROWS = 4, 32
"""MKL multiplies blocks of four rows, and sums the one to three rows left over in another order. One to three rows
alone are always left over. More threads leave more rows over, but few if there are 32 rows or more."""


@dataclass(frozen=True)
class ChunkBatch:
    """The tokens of one chunk on the device. If the chunk is spread over a group: this rank's slice of them.

    Only positions that have a target go through the head.
    """

    input_ids: Tensor  # (1, tokens)
    position_ids: Tensor  # (1, tokens), each from the start of its own sequence
    boundaries: tuple[int, ...]  # (segments + 1,) of the whole chunk with its padding: attention sees all of it
    target_positions: Tensor  # (targets,) index into `input_ids`
    targets: Tensor  # (targets,)
    target_weights: Tensor  # (targets,) float32 (float64 in float64): weight of each in the loss
    target_losses: Tensor | None = None  # (targets,) receives the cross entropy of each, without weight
    target_sequences: NDArray[np.int64] | None = None  # (targets,) the sequence of each, on the host
    """Both are None if the losses of sequences are not asked for."""
    target_places: Tensor | None = None  # (targets,) the sum that each one's log-probability is part of
    """None without preferences."""
    noise: TokenNoise | None = None

    @property
    def target_tokens(self) -> int:
        return len(self.targets)


def tokens_of_rank(tokens: int, ranks: int = 1) -> int:
    """Return how many tokens of a chunk of `tokens` each of its ranks gets, with the padding that the chunk needs.

    Ranks get equal shares. A few tokens are padded to whole blocks of rows, so that each token is rounded as in the
    products of a whole sequence. In float32, a chunk of three tokens would otherwise lie up to 1.5 times as far from
    whole-sequence training as that lies from its own float64 gradient (benchmarks/LOG.md).
    """
    rows = -(-tokens // ranks)
    return rows + (-rows % BLOCK_ROWS if rows < FEW_ROWS else 0)


def build_batch(
    chunk: Chunk,
    sequences: Sequence[TokenizedSample],
    sequence_weights: NDArray[np.float64],
    device: torch.device,
    weight_dtype: torch.dtype = torch.float32,
    sequence_group: SequenceGroup | None = None,
    *,
    keeps_losses: bool = False,
    answer_starts: NDArray[np.int64] | None = None,
    noise: SequenceNoise | None = None,
) -> ChunkBatch:
    """Return the tensors of a chunk.

    A chunk may first be padded (`tokens_of_rank`). The padding is a segment of its own, which nothing else attends to
    and which has no targets, so it changes nothing but rounding and is counted nowhere.

    Args:
        chunk: its segments index into `sequences`, the sequences of the step.
        sequence_weights: (sequences,) weight of each target of a sequence in the loss.
        sequence_group: the group whose ranks share the tokens; this rank then gets its slice of them.
        keeps_losses: make room for the loss of each target, to add them up by sequence.
        answer_starts: (sequences,) for preferences, the first position whose target is part of the answer. Log-
            probabilities of other targets are summed up behind those of all sequences.
        noise: what is added to the embeddings.
    """
    ids = np.concatenate([sequences[s.sequence].input_ids[s.start : s.stop] for s in chunk.segments])
    targets = np.concatenate([sequences[s.sequence].targets[s.start : s.stop] for s in chunk.segments])
    positions = np.concatenate([np.arange(s.start, s.stop) for s in chunk.segments])
    weights = np.concatenate([np.full(s.tokens, sequence_weights[s.sequence]) for s in chunk.segments])
    owners = np.array([s.sequence for s in chunk.segments]).repeat([s.tokens for s in chunk.segments])
    places = owners
    if answer_starts is not None:
        places = np.where(positions >= answer_starts[owners], owners, len(answer_starts))
    boundaries = (0, *np.cumsum([segment.tokens for segment in chunk.segments]).tolist())
    ranks = 1 if sequence_group is None else sequence_group.size
    padding = ranks * tokens_of_rank(len(ids), ranks) - len(ids)
    if padding:
        boundaries = (*boundaries, boundaries[-1] + padding)
        # A token of the data: the embedding of token 0 may be all zeros, where some norms have no gradient (gemma3n).
        ids = np.pad(ids, (0, padding), mode="edge")
        weights, owners = np.pad(weights, (0, padding)), np.pad(owners, (0, padding))
        targets = np.pad(targets, (0, padding), constant_values=IGNORED)
        positions, places = np.append(positions, np.arange(padding)), np.pad(places, (0, padding))
    if sequence_group is not None:
        mine = sequence_group.slice_of(len(ids))
        arrays = (ids, targets, positions, weights, owners, places)
        ids, targets, positions, weights, owners, places = (each[mine] for each in arrays)
    counted = np.flatnonzero(targets != IGNORED)

    def tensor(array: NDArray[np.generic], dtype: torch.dtype = torch.int64) -> Tensor:
        return on_device(torch.as_tensor(array).to(dtype), device)

    def token_noise(noise: SequenceNoise) -> TokenNoise:
        lengths = np.array([len(sequence.input_ids) for sequence in sequences])
        scales = noise.alpha / np.sqrt(lengths[owners])
        return TokenNoise(tensor(noise.keys_of(owners, positions)), tensor(scales, torch.float32))

    return ChunkBatch(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        boundaries=boundaries,
        target_positions=tensor(counted),
        targets=tensor(targets[counted]),
        target_weights=tensor(weights[counted], weight_dtype),
        target_losses=torch.zeros(len(counted), dtype=weight_dtype, device=device) if keeps_losses else None,
        target_sequences=owners[counted] if keeps_losses else None,
        target_places=None if answer_starts is None else tensor(places[counted]),
        noise=None if noise is None else token_noise(noise),
    )


def dummy_batch(device: torch.device, weight_dtype: torch.dtype) -> ChunkBatch:
    """Return a chunk of one token without a target."""
    zero, none = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return ChunkBatch(zero, zero, (0, 1), none, none, torch.zeros(0, dtype=weight_dtype, device=device))


def with_idle_target(batch: ChunkBatch) -> ChunkBatch:
    """Give a chunk that has no target one of weight zero, so that it runs the head like every other chunk.

    ZeRO-3 fetches from all ranks the weights that a forward touches: a rank that left the head out would make the
    others wait forever.
    """
    if batch.target_tokens:
        return batch
    zero = batch.target_positions.new_zeros(1)
    return replace(
        batch,
        target_positions=zero,
        targets=zero,
        target_weights=batch.target_weights.new_zeros(1),
        target_losses=None,
        target_places=zero - 1,  # the last place, whose sum counts nowhere
    )
