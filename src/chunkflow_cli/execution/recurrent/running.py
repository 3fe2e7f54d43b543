"""The running chunk, through which recurrent layers read a state from the store and write one to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import EdgeKey, SequenceState
from chunkflow_cli.model.forward_scope import forward_value


@dataclass
class RunningChunk:
    """A chunk that is forwarded, or forwarded again by the recompute of activation checkpointing."""

    context: ChunkAttentionContext
    is_evaluated: bool = False
    """True if this is the only forward of the chunk, and no backward follows."""
    layer: str | None = None
    """Name of the recurrent layer that is running, or that was the last one to run."""
    calls: Counter[str] = field(default_factory=Counter)
    """Convolutions and scans that it has begun: some models scan each head alone."""

    @property
    def spans(self) -> list[slice]:
        return self.context.packing.spans

    @property
    def tokens(self) -> int:
        """Tokens of the whole chunk, also if ranks share it."""
        return self.context.packing.boundaries[-1]

    @property
    def group(self) -> SequenceGroup | None:
        return self.context.sequence_group

    @property
    def has_piece(self) -> bool:
        """True if the first segment is a piece of a long sequence."""
        return self.context.piece is not None

    @property
    def continues(self) -> bool:
        return self.context.piece is not None and self.context.piece.continues

    def begin_layer(self, name: str) -> None:
        """Record the recurrent layer that now runs."""
        self.layer = name
        self.calls.clear()

    def begin_call(self, kind: str) -> str:
        """Return the name of what the layer's next convolution or scan leaves."""
        self.calls[kind] += 1
        return f"{kind}{self.calls[kind] - 1}"

    def enter(self, part: str, *, needs_gradient: bool) -> Tensor | None:
        """Return the state that the previous chunk stored; None at the beginning of a sequence.

        Args:
            part: the name under which it was left.
            needs_gradient: whether that chunk went through this layer with gradient: this one then does, too.
        """
        piece = self.context.piece
        if piece is None or piece.past == 0:
            return None
        key = self._key(part, piece.past)
        value = piece.state.read_edge(key, for_the_last_time=self.is_evaluated)
        if not (needs_gradient and torch.is_grad_enabled() and value.is_floating_point()):  # ids have none
            return value
        anchor = value.new_empty(0, requires_grad=True)
        entered: Tensor = _Enter.apply(anchor, value, piece.state, key)
        return entered

    def leave(self, part: str, value: Tensor, output: Tensor) -> Tensor:
        """Store a state for the next chunk; return the output, through which that state gets its gradient.

        If only the output has a gradient, that of the state is still taken from the store, where nothing else needs it.
        """
        piece = self.context.piece
        assert piece is not None
        key = self._key(part, piece.past + self.context.dependent_tokens)
        piece.state.write_edge(key, value)
        if not (value.requires_grad or output.requires_grad):
            return output
        left: Tensor = _Leave.apply(output, value, piece.state, key)
        return left

    def _key(self, part: str, position: int) -> EdgeKey:
        assert self.layer is not None, "a function that crosses tokens runs outside of the layers that were found"
        return EdgeKey(self.layer, part, position)


def running_chunk() -> RunningChunk | None:
    """Return the chunk of the forward or recompute that is running, or None for a model that runs by itself."""
    chunk = forward_value()
    assert chunk is None or isinstance(chunk, RunningChunk)
    return chunk


class _Enter(torch.autograd.Function):
    """A state from the store, as the start of a layer. In backward, its gradient goes to the store.

    The anchor is an empty tensor with gradient: the state itself has none, and autograd would skip the function.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, state: SequenceState, key: EdgeKey) -> Tensor:
        ctx.state, ctx.key = state, key
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.state.put_edge_gradient(ctx.key, gradient)
        return None, None, None, None


class _Leave(torch.autograd.Function):
    """The output of a layer, unchanged. In backward, the state that it left gets its gradient from the store."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, state: SequenceState, key: EdgeKey) -> Tensor:
        ctx.state, ctx.key = state, key
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, ctx.state.take_edge_gradient(ctx.key), None, None
