"""The chunk that is running, and how its recurrent layers take a state from the store and leave one in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import EdgeKey, SequenceState
from chunkflow_cli.model.forward_scope import about


@dataclass
class RunningChunk:
    """A chunk that is forwarded, or forwarded again by the recompute of activation checkpointing."""

    context: ChunkAttentionContext
    is_evaluated: bool = False
    """True if this is the only forward of the chunk, and no backward follows."""
    layer: str | None = None
    """Name of the recurrent layer that is running, or that was the last one to run."""
    scans: int = 0
    """Scans that it has begun: some models scan each head alone."""

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
        """Note the recurrent layer that now runs."""
        self.layer, self.scans = name, 0

    def begin_scan(self) -> str:
        """Return the name of the layer's next scan."""
        self.scans += 1
        return f"scan{self.scans - 1}"

    def enter(self, part: str, *, needs_gradient: bool) -> Tensor | None:
        """Return what the chunk before has left; None at the beginning of a sequence.

        Args:
            part: the name under which it was left.
            needs_gradient: whether that chunk went through this layer with gradient: this one then does, too.
        """
        piece = self.context.piece
        if piece is None or piece.past == 0:
            return None
        key = self._key(part, piece.past)
        value = piece.state.read_edge(key, for_the_last_time=self.is_evaluated)
        if not (needs_gradient and torch.is_grad_enabled()):
            return value
        anchor = value.new_empty(0, requires_grad=True)
        entered: Tensor = _Enter.apply(anchor, value, piece.state, key)
        return entered

    def leave(self, part: str, value: Tensor, output: Tensor) -> Tensor:
        """Leave a state for the next chunk; return the output, through which that state gets its gradient."""
        piece = self.context.piece
        assert piece is not None
        key = self._key(part, piece.past + self.context.dependent_tokens)
        piece.state.write_edge(key, value)
        if not value.requires_grad:
            return output
        left: Tensor = _Leave.apply(output, value, piece.state, key)
        return left

    def _key(self, part: str, position: int) -> EdgeKey:
        assert self.layer is not None, "a function that crosses tokens runs outside of the layers that were found"
        return EdgeKey(self.layer, part, position)


def running_chunk() -> RunningChunk | None:
    """Return the chunk of the forward or recompute that is running, or None for a model that runs by itself."""
    chunk = about()
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


def all_tokens(tensor: Tensor, group: SequenceGroup | None, axis: int) -> Tensor:
    """Return the tokens of all ranks of a group, along `axis`, from the slice of this rank."""
    if group is None:
        return tensor
    gathered: Tensor = _Gather.apply(tensor.movedim(axis, 0), group)
    return gathered.movedim(0, axis)


def own_tokens(tensor: Tensor, group: SequenceGroup | None, axis: int) -> Tensor:
    """Return this rank's slice of all tokens along `axis`."""
    if group is None:
        return tensor
    mine = group.slice_of(tensor.shape[axis])
    return tensor.narrow(axis, mine.start, mine.stop - mine.start)


class _Gather(torch.autograd.Function):
    """The tokens (tokens, ...) of all ranks. In backward, their gradients are summed over the ranks.

    Each rank computes with all tokens and uses its slice of the result. The gradients that it computes, those of
    states included, are therefore its share, as everywhere in sequence parallelism.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group.process_group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group.process_group)
        return total[ctx.group.slice_of(len(total))], None
