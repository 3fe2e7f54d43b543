"""Convolutions and scans of a chunk whose tokens the ranks of a group share.

A scan needs all tokens, but its heads are independent, and so are the channels of a convolution. So ranks
exchange tokens for heads and back, as in attention (`sequence_parallel`). Each then runs a part of the heads, keeps
their state, and has its share of the gradients of weights. Where heads do not divide evenly among the ranks, each rank
runs all of them for all tokens, and takes its slice of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from chunkflow_cli.execution.sequence_parallel import SequenceGroup

Name = TypeVar("Name")


@dataclass(frozen=True)
class Sharing:
    """How the tokens of a chunk are shared, for one function that crosses tokens."""

    group: SequenceGroup | None
    """None if this rank has all of them: every method then returns what it is given."""
    tokens: int
    """Axis of tokens."""
    heads: int
    """Axis of heads, or of channels."""

    def divides(self, counts: Sequence[int]) -> bool:
        """Return true if each of these numbers of heads divides evenly among the ranks."""
        return self.group is None or all(count % self.group.size == 0 for count in counts)

    def to_heads(self, tensors: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """Exchange all heads of this rank's tokens for this rank's heads of all tokens."""
        if self.group is None:
            return dict(tensors)
        exchanged = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):  # one message for each dtype
            names = [name for name, tensor in tensors.items() if tensor.dtype is dtype]
            arrived = self.group.exchange(*(self._flat(tensors[name]) for name in names), to_heads=True)
            for name, tensor in zip(names, arrived, strict=True):
                exchanged[name] = self._unflat(tensor, tensors[name])
        return exchanged

    def to_tokens(self, out: Tensor) -> Tensor:
        """Undo `to_heads` for the output: return all heads of this rank's tokens."""
        if self.group is None:
            return out
        (exchanged,) = self.group.exchange(self._flat(out), to_heads=False)
        return self._unflat(exchanged, out)

    def own_heads(self, weight: Tensor) -> Tensor:
        """Return the part of a weight, (heads, ...), that belongs to this rank's heads."""
        return weight if self.group is None else weight[self.group.slice_of(len(weight))]

    def all_tokens(self, tensor: Tensor) -> Tensor:
        """Return all heads of the tokens of all ranks."""
        if self.group is None:
            return tensor
        gathered: Tensor = _Gather.apply(tensor.movedim(self.tokens, 0), self.group)
        return gathered.movedim(0, self.tokens)

    def own_tokens(self, tensor: Tensor) -> Tensor:
        """Return this rank's slice of all tokens."""
        if self.group is None:
            return tensor
        mine = self.group.slice_of(tensor.shape[self.tokens])
        return tensor.narrow(self.tokens, mine.start, mine.stop - mine.start)

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return a view (1, heads, tokens, head_dim)."""
        ordered = tensor.movedim((self.heads, self.tokens), (1, 2))
        return ordered.unsqueeze(3) if ordered.ndim == 3 else ordered.flatten(3)

    def _unflat(self, tensor: Tensor, like: Tensor) -> Tensor:
        shaped = tensor.squeeze(3) if like.ndim == 3 else tensor.unflatten(3, like.shape[3:])
        return shaped.movedim((1, 2), (self.heads, self.tokens))


class _Gather(torch.autograd.Function):
    """The tokens (tokens, ...) of all ranks. In backward, their gradients are summed over the ranks.

    The gradients that a rank computes, those of states included, are its share, as everywhere in sequence parallelism.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group.process_group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group.process_group)
        return total[ctx.group.slice_of(len(total))], None
