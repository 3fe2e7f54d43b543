"""Backends whose kernel takes one block of queries and keys at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Gradients, Output, Saved, Sight


class BlockBackend(Backend):
    """Calls its kernel for each segment, and once for a block of the past.

    In a kernel call, query i has the position of key `i + offset`. For own attention `offset` is 0, for the past it is
    the number of keys and of positions behind them.
    """

    @abstractmethod
    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule) -> Output: ...

    @abstractmethod
    def _backward(self, grad_out: Tensor, saved: Saved, offset: int, rule: AttentionRule) -> Gradients: ...

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
        if sight.packing is None:
            return self._forward(queries, keys, values, keys.shape[2] + sight.gap, sight.rule)
        parts = [
            self._forward(queries[:, :, s], keys[:, :, s], values[:, :, s], 0, sight.rule) for s in sight.packing.spans
        ]
        out, log_sum_exp = _join(parts)
        return out, log_sum_exp

    def backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        if sight.packing is None:
            return self._backward(grad_out, saved, saved.keys.shape[2] + sight.gap, sight.rule)
        parts = [
            self._backward(grad_out[:, :, s], Saved(*(tensor[:, :, s] for tensor in saved)), 0, sight.rule)
            for s in sight.packing.spans
        ]
        grad_queries, grad_keys, grad_values = _join(parts)
        return grad_queries, grad_keys, grad_values


def _join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join the results of all segments, each (1, heads, tokens, ...). Those of a single segment are not copied."""
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))


def visible(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Return a (queries, keys) mask: query i has key position `i + offset` and sees no later key and none too far."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
