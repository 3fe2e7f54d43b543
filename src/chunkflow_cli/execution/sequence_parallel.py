"""Sequence parallelism: the ranks of a group share the tokens of each chunk, and in attention its heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Everything but attention treats each token alone, so a rank computes its
contiguous slice of a chunk's tokens. Before attention an all-to-all turns "all heads of my tokens" into "my heads of
all tokens", and after it another one turns the output back. Attention and its state store therefore work on whole
chunks of fewer heads and need not know about the group. That is why state shrinks with the group's size.

The losses and gradients of the ranks are shares: their sums over the group are those of the chunk.

Shapes: `tokens` is a rank's share, which is the tokens of the padded chunk / size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from chunkflow_cli.engine import PATIENCE
from chunkflow_cli.planning.topology import Topology, key_value_copies


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of a chunk, as one of them sees them."""

    process_group: torch.distributed.ProcessGroup
    size: int
    rank: int
    """This rank's place in the group, and the place of its slice among the chunk's tokens."""

    @classmethod
    def join(cls, topology: Topology) -> SequenceGroup | None:
        """Return this process's group, or None if ranks share no tokens.

        Collective: every process of the run must call it, because torch requires that all of them create each group, in
        the same order. The process group of the run must have started.
        """
        if topology.sequence == 1:
            return None
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == topology.processes, f"the processes do not form {topology}"
        firsts = range(0, topology.processes, topology.sequence)
        groups = [topology.sequence_group(first) for first in firsts]
        own, _ = torch.distributed.new_subgroups_by_enumeration(groups, timeout=PATIENCE)
        return cls(own, topology.sequence, topology.place_of(rank).sequence_rank)

    def slice_of(self, count: int) -> slice:
        """Return this rank's share of `count` tokens of a padded chunk, or of `count` heads."""
        share = count // self.size
        assert share * self.size == count, f"{count} does not divide evenly among {self.size} ranks"
        return slice(self.rank * share, (self.rank + 1) * share)

    def tokens_to_heads(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange all heads of this rank's tokens for this rank's heads of all tokens, in one message per rank.

        If there are fewer key heads than ranks, they are repeated, so that each rank gets the one that its queries
        share; autograd sums their gradients.

        Each tensor goes from (1, heads, tokens, head_dim) to (1, heads / size, tokens x size, head_dim).
        """
        copies = key_value_copies(queries.shape[1], keys.shape[1], self.size)
        if copies > 1:
            keys, values = keys.repeat_interleave(copies, dim=1), values.repeat_interleave(copies, dim=1)
        queries, keys, values = self.exchange(queries, keys, values, to_heads=True)
        return queries, keys, values

    def heads_to_tokens(self, out: Tensor) -> Tensor:
        """Undo `tokens_to_heads` for the output: return all heads of this rank's tokens."""
        (exchanged,) = self.exchange(out, to_heads=False)
        return exchanged

    def exchange(self, *tensors: Tensor, to_heads: bool) -> tuple[Tensor, ...]:
        """Exchange tokens for heads, or back, in one message per rank. The tensors have one dtype."""
        exchanged: tuple[Tensor, ...] = _Exchange.apply(self, to_heads, *tensors)
        return exchanged


class _Exchange(torch.autograd.Function):
    """An all-to-all of tensors; in backward, their gradients are exchanged the other way."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(group, to_heads, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *_exchange(ctx.group, not ctx.to_heads, gradients)


def _exchange(group: SequenceGroup, to_heads: bool, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut each tensor by heads or by tokens, send each rank its blocks in one message, and join what arrives.

    A block is (tokens, heads / size, head_dim). In memory, results have tokens first, as models produce them and as
    kernels and the state store prefer them.
    """
    cut, joined = (1, 0) if to_heads else (0, 1)  # dimensions of (tokens, heads, head_dim)
    blocks = [each[0].transpose(0, 1).unflatten(cut, (group.size, -1)).movedim(cut, 0) for each in tensors]
    sizes = [block[0].numel() for block in blocks]
    sent = tensors[0].new_empty(group.size, sum(sizes))
    for block, room in zip(blocks, sent.split(sizes, dim=1), strict=True):
        room.view(block.shape).copy_(block)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group.process_group)
    arrived = [part.view(block.shape) for part, block in zip(received.split(sizes, dim=1), blocks, strict=True)]
    return tuple(part.movedim(0, joined).flatten(joined, joined + 1).transpose(0, 1).unsqueeze(0) for part in arrived)
