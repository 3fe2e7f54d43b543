"""The state store: what later chunks of long sequences read of earlier ones, layer by layer, and its gradients.

Attention leaves keys and values, which all later chunks read. Recurrent layers leave edges, which the next chunk reads:
the state after a chunk's last token, and the last inputs of a convolution.

The forward of a chunk writes its state, and later chunks read it. Going backward, later chunks add the gradients that
they compute, and the backward of the chunk that wrote the state takes them from the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from chunkflow_cli.execution.precision import accumulation_dtype

SHRINK_BELOW = 0.75
"""A buffer is copied into a smaller one when less than this share of it is still needed. So all copies of a backward
together move about three times the buffer, and at most a quarter of what is kept is unused."""


@dataclass
class _Piece:
    """One named piece of state of one layer, for example its keys."""

    values: Tensor  # (stored_tokens, heads, head_dim)
    gradient: Tensor | None = None  # the same shape; float32 (float64 in float64): a sum over up to hundreds of chunks


class EdgeKey(NamedTuple):
    """The name of an edge."""

    layer: str
    """Module name of the recurrent layer."""
    part: str
    """For example "conv0", for the last inputs of its first convolution."""
    position: int
    """Tokens of the sequence before the edge."""


@dataclass
class _Edge:
    """An edge from the forward of the chunk before it to the backward of that chunk.

    First it has a value. The backward of the chunk behind it replaces that by the gradient, and the backward of the
    chunk before it takes the gradient. It then stays without either: the recompute of activation checkpointing may
    write the edge once more, which must not bring it back.
    """

    value: Tensor | None
    gradient: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.value, self.gradient) if tensor is not None)


@dataclass
class SequenceState:
    """The state of one long sequence. A position is a token's index in its sequence."""

    stored_tokens: int
    """Tokens whose state later chunks read: all before the last chunk."""
    _layers: dict[int, dict[str, _Piece]] = field(default_factory=dict)
    _edges: dict[EdgeKey, _Edge] = field(default_factory=dict)

    def write(self, layer: int, start: int, pieces: dict[str, Tensor]) -> None:
        """Store the pieces, each (tokens, heads, head_dim), for positions from `start`.

        Writing the same positions again, as a recompute does, stores the same values.
        """
        stored = self._layers.setdefault(layer, {})
        for name, values in pieces.items():
            if name not in stored:
                stored[name] = _Piece(values.new_empty(self.stored_tokens, *values.shape[1:]))
            stored[name].values[start : start + len(values)].copy_(values)

    def read(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """Return a view, (stop - start, heads, head_dim)."""
        return self._layers[layer][name].values[start:stop]

    def add_gradient(self, layer: int, name: str, start: int, gradient: Tensor) -> None:
        """Add a later chunk's gradient, (tokens, heads, head_dim), of the positions from `start`."""
        piece = self._layers[layer][name]
        if piece.gradient is None:
            piece.gradient = torch.zeros_like(piece.values, dtype=accumulation_dtype(piece.values.dtype))
        piece.gradient[start : start + len(gradient)].add_(gradient)

    def gradient(self, layer: int, name: str, start: int, stop: int) -> Tensor | None:
        """Return the sum that later chunks have added, as a view, (stop - start, heads, head_dim).

        None if they added nothing, because a window of one token hides the past from them.
        """
        gradient = self._layers[layer][name].gradient
        return None if gradient is None else gradient[start:stop]

    def release(self, layer: int, start: int) -> None:
        """Free the memory of positions at or past `start`, which nothing reads any more."""
        if start == 0:
            self._layers.pop(layer, None)
        for piece in self._layers.get(layer, {}).values():
            if start < SHRINK_BELOW * len(piece.values):
                piece.values = piece.values[:start].clone()
                if piece.gradient is not None:
                    piece.gradient = piece.gradient[:start].clone()

    def write_edge(self, key: EdgeKey, value: Tensor) -> None:
        """Store a copy of the value. An edge that was written before, as a recompute does, stays as it is."""
        if key not in self._edges:
            self._edges[key] = _Edge(value.detach().clone())

    def read_edge(self, key: EdgeKey, *, for_the_last_time: bool = False) -> Tensor:
        """Return the value; free it for the last time, when neither recompute nor backward follows."""
        edge = self._edges[key]
        value = edge.value
        assert value is not None, f"{key} is read after its last use"
        if for_the_last_time:
            edge.value = None
        return value

    def put_edge_gradient(self, key: EdgeKey, gradient: Tensor) -> None:
        """Store the gradient, and free the value: only one chunk reads an edge, and it has gone backward."""
        self._edges[key] = _Edge(None, gradient)

    def take_edge_gradient(self, key: EdgeKey) -> Tensor | None:
        """Return the gradient and free it; None if the chunk behind the edge gave none."""
        gradient = self._edges[key].gradient
        self._edges[key] = _Edge(None)
        return gradient

    @property
    def nbytes(self) -> int:
        return self.edge_nbytes + sum(
            piece.values.nbytes + (0 if piece.gradient is None else piece.gradient.nbytes)
            for pieces in self._layers.values()
            for piece in pieces.values()
        )

    @property
    def edge_nbytes(self) -> int:
        """Bytes of the edges and their gradients."""
        return sum(edge.nbytes for edge in self._edges.values())


@dataclass(frozen=True)
class StatePiece:
    """A chunk's piece of a long sequence, and the state of that sequence."""

    state: SequenceState
    past: int
    """Tokens of the sequence in earlier chunks."""
    continues: bool
    """True if later chunks read the state of this piece."""


class StateStore:
    """The state of the long sequences in flight: several on a pipeline stage, otherwise one at a time."""

    def __init__(self) -> None:
        self._sequences: dict[int, SequenceState] = {}

    def open(self, sequence: int, stored_tokens: int) -> SequenceState:
        """Return the state of a sequence; its first chunk creates it."""
        if sequence not in self._sequences:
            self._sequences[sequence] = SequenceState(stored_tokens)
        return self._sequences[sequence]

    def put(self, sequence: int, state: SequenceState) -> None:
        """Take the state of a sequence that was made elsewhere."""
        self._sequences[sequence] = state

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def close(self, sequence: int) -> None:
        """Drop the state of a sequence whose first chunk has gone backward."""
        del self._sequences[sequence]

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._sequences.values())
