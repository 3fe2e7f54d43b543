"""Attention by plain matrix products: the truth that the other backends are tested against."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import (
    AttentionRule,
    Backend,
    Packing,
    _accumulation_dtype,
    repeat_heads,
    sum_heads,
    visible,
)


class _BlockBackend(Backend):
    """Backends whose kernel takes one block of queries and keys at a time."""

    @abstractmethod
    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self,
        grad_out: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        log_sum_exp: Tensor,
        offset: int,
        rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def own_forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        spans = packing.spans
        if len(spans) == 1:
            return self._forward(queries, keys, values, 0, rule)
        parts = [self._forward(queries[:, :, s], keys[:, :, s], values[:, :, s], 0, rule) for s in spans]
        return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def own_backward(
        self,
        grad_out: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        log_sum_exp: Tensor,
        packing: Packing,
        rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spans = packing.spans
        if len(spans) == 1:
            return self._backward(grad_out, queries, keys, values, out, log_sum_exp, 0, rule)
        parts = [
            self._backward(
                grad_out[:, :, s], queries[:, :, s], keys[:, :, s], values[:, :, s],
                out[:, :, s], log_sum_exp[:, :, s], 0, rule,
            )
            for s in spans
        ]  # fmt: skip
        grad_queries, grad_keys, grad_values = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return grad_queries, grad_keys, grad_values

    def past_forward(self, queries: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        return self._forward(queries, keys, values, keys.shape[2], rule)

    def past_backward(
        self,
        grad_out: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        log_sum_exp: Tensor,
        rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(grad_out, queries, keys, values, out, log_sum_exp, keys.shape[2], rule)


class ReferenceBackend(_BlockBackend):
    """Plain matrix products, in any dtype: slow, quadratic in memory, supports everything. The truth of the tests."""

    name = "reference"

    def _scores(self, queries: Tensor, keys: Tensor, offset: int, rule: AttentionRule) -> tuple[Tensor, Tensor | None]:
        """Masked scores (1, heads, queries, keys), and the derivative of the soft cap."""
        scores = (queries @ keys.transpose(2, 3)).to(_accumulation_dtype(queries)) * rule.scale
        slope = None
        if rule.softcap is not None:
            squashed = torch.tanh(scores / rule.softcap)
            scores, slope = rule.softcap * squashed, 1 - squashed * squashed
        mask = visible(queries.shape[2], keys.shape[2], offset, rule.window, queries.device)
        return scores.masked_fill(~mask, -math.inf), slope

    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        group = queries.shape[1] // keys.shape[1]
        scores, _ = self._scores(queries, repeat_heads(keys, group), offset, rule)
        log_sum_exp = scores.logsumexp(dim=-1)
        probabilities = torch.exp(scores - log_sum_exp.unsqueeze(-1)).to(values.dtype)
        return probabilities @ repeat_heads(values, group), log_sum_exp

    def _backward(
        self,
        grad_out: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        log_sum_exp: Tensor,
        offset: int,
        rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = queries.shape[1] // keys.shape[1]
        all_keys, all_values = repeat_heads(keys, group), repeat_heads(values, group)
        scores, slope = self._scores(queries, all_keys, offset, rule)
        probabilities = torch.exp(scores - log_sum_exp.unsqueeze(-1))
        grad_values = probabilities.to(values.dtype).transpose(2, 3) @ grad_out
        grad_probabilities = (grad_out @ all_values.transpose(2, 3)).to(scores.dtype)
        delta = (grad_out.to(scores.dtype) * out.to(scores.dtype)).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta) * rule.scale
        if slope is not None:
            grad_scores = grad_scores * slope
        grad_scores = grad_scores.to(queries.dtype)
        grad_keys = grad_scores.transpose(2, 3) @ queries
        return grad_scores @ all_keys, sum_heads(grad_keys, group), sum_heads(grad_values, group)
