"""Backends whose kernel takes one block of queries and keys at a time."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Gradients, Output, Saved, Sight


class BlockBackend(Backend):
    """Calls its kernel for each segment, and once for the past.

    In a kernel call, query i has the position of key `i + offset`. For own attention `offset` is 0, for the past it is
    the number of keys.
    """

    @abstractmethod
    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule) -> Output: ...

    @abstractmethod
    def _backward(self, grad_out: Tensor, saved: Saved, offset: int, rule: AttentionRule) -> Gradients: ...

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
        if sight.packing is None:
            return self._forward(queries, keys, values, keys.shape[2], sight.rule)
        spans = sight.packing.spans
        if len(spans) == 1:
            return self._forward(queries, keys, values, 0, sight.rule)
        parts = [self._forward(queries[:, :, s], keys[:, :, s], values[:, :, s], 0, sight.rule) for s in spans]
        return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        if sight.packing is None:
            return self._backward(grad_out, saved, saved.keys.shape[2], sight.rule)
        spans = sight.packing.spans
        if len(spans) == 1:
            return self._backward(grad_out, saved, 0, sight.rule)
        parts = [self._backward(grad_out[:, :, s], _segment(saved, s), 0, sight.rule) for s in spans]
        grad_queries, grad_keys, grad_values = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return grad_queries, grad_keys, grad_values


def _segment(saved: Saved, s: slice) -> Saved:
    return Saved(
        saved.queries[:, :, s], saved.keys[:, :, s], saved.values[:, :, s], saved.out[:, :, s],
        saved.log_sum_exp[:, :, s],
    )  # fmt: skip


def visible(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Return a (queries, keys) mask: query i has key position `i + offset` and sees no later key and none too far."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
