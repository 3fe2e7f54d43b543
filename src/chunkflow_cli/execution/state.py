"""The state store: what one layer must remember of the earlier chunks of a long sequence, and its gradients.

Keys and values are written by the forward of a chunk and read by the chunks after it. Going backward, later chunks add
the gradients that their attention gives them, and the backward of the chunk that wrote them takes them from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SHRINK_BELOW = 0.75
"""A buffer is copied into a smaller one when less than this share of it is still needed: so all copies of a backward
together move about three times the buffer, and at most a third of what is kept is unused."""


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients of state are sums over up to hundreds of chunks: float32, and float64 where the model is."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class _Piece:
    """One named piece of state of one layer, e.g. its keys."""

    values: Tensor  # (stored_tokens, heads, head_dim)
    gradient: Tensor | None = None  # the same shape, in gradient_dtype


@dataclass
class SequenceState:
    """The state of one long sequence. A position is a token's index in its sequence."""

    stored_tokens: int
    """Tokens whose state anyone reads: all before the last chunk."""
    _layers: dict[int, dict[str, _Piece]] = field(default_factory=dict)

    def write(self, layer: int, start: int, pieces: dict[str, Tensor]) -> None:
        """Keep the pieces, each (tokens, heads, head_dim), for positions from `start`.

        Writing the same positions again, as a recompute does, stores the same values.
        """
        stored = self._layers.setdefault(layer, {})
        for name, values in pieces.items():
            if name not in stored:
                stored[name] = _Piece(values.new_empty(self.stored_tokens, *values.shape[1:]))
            stored[name].values[start : start + len(values)].copy_(values)

    def read(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """A view, (stop - start, heads, head_dim)."""
        return self._layers[layer][name].values[start:stop]

    def add_gradient(self, layer: int, name: str, start: int, gradient: Tensor) -> None:
        """Add a later chunk's gradient, (tokens, heads, head_dim), of the positions from `start`."""
        piece = self._layers[layer][name]
        if piece.gradient is None:
            piece.gradient = torch.zeros_like(piece.values, dtype=gradient_dtype(piece.values.dtype))
        piece.gradient[start : start + len(gradient)].add_(gradient)

    def gradient(self, layer: int, name: str, start: int, stop: int) -> Tensor | None:
        """What later chunks have added: a view, (stop - start, heads, head_dim), in gradient_dtype.

        None if they added nothing, because a window of one token hides the past from them.
        """
        gradient = self._layers[layer][name].gradient
        return None if gradient is None else gradient[start:stop]

    def release(self, layer: int, start: int) -> None:
        """Nothing reads positions at or past `start` any more: give their memory back."""
        pieces = self._layers.get(layer)
        if pieces is None:
            return
        if start == 0:
            del self._layers[layer]
            return
        for piece in pieces.values():
            if start < SHRINK_BELOW * len(piece.values):
                piece.values = piece.values[:start].clone()
                if piece.gradient is not None:
                    piece.gradient = piece.gradient[:start].clone()

    @property
    def nbytes(self) -> int:
        return sum(
            piece.values.nbytes + (0 if piece.gradient is None else piece.gradient.nbytes)
            for pieces in self._layers.values()
            for piece in pieces.values()
        )


class StateStore:
    """The state of the long sequences in flight, by sequence; one a time on a single stage."""

    def __init__(self) -> None:
        self._sequences: dict[int, SequenceState] = {}

    def open(self, sequence: int, stored_tokens: int) -> SequenceState:
        """The state of a sequence, begun if this is its first chunk."""
        if sequence not in self._sequences:
            self._sequences[sequence] = SequenceState(stored_tokens)
        return self._sequences[sequence]

    def close(self, sequence: int) -> None:
        """Forget a sequence whose first chunk has gone backward."""
        del self._sequences[sequence]

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._sequences.values())
