"""Attention by plain matrix products: the other backends are tested against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import AttentionRule, Gradients, Output, Saved, repeat_heads, sum_heads
from chunkflow_cli.execution.attention.block import BlockBackend, visible
from chunkflow_cli.execution.precision import accumulation_dtype


class ReferenceBackend(BlockBackend):
    """Plain matrix products, in any dtype. Slow and quadratic in memory, but supports everything."""

    name = "reference"

    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule) -> Output:
        group = queries.shape[1] // keys.shape[1]
        scores, _ = _scores(queries, repeat_heads(keys, group), offset, rule)
        # Not exp(scores - log_sum_exp): that of large scores has lost its last digits, and rows would not sum to 1.
        probabilities = scores.softmax(dim=-1).to(values.dtype)
        return probabilities @ repeat_heads(values, group), scores.logsumexp(dim=-1)

    def _backward(self, grad_out: Tensor, saved: Saved, offset: int, rule: AttentionRule) -> Gradients:
        queries, values = saved.queries, saved.values
        group = queries.shape[1] // saved.keys.shape[1]
        all_keys, all_values = repeat_heads(saved.keys, group), repeat_heads(values, group)
        scores, slope = _scores(queries, all_keys, offset, rule)
        probabilities = torch.exp(scores - saved.log_sum_exp.unsqueeze(-1))
        grad_values = probabilities.to(values.dtype).transpose(2, 3) @ grad_out
        grad_probabilities = (grad_out @ all_values.transpose(2, 3)).to(scores.dtype)
        delta = (grad_out.to(scores.dtype) * saved.out.to(scores.dtype)).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta) * rule.scale
        if slope is not None:
            grad_scores = grad_scores * slope
        grad_scores = grad_scores.to(queries.dtype)
        grad_keys = grad_scores.transpose(2, 3) @ queries
        return grad_scores @ all_keys, sum_heads(grad_keys, group), sum_heads(grad_values, group)


def _scores(queries: Tensor, keys: Tensor, offset: int, rule: AttentionRule) -> tuple[Tensor, Tensor | None]:
    """Return masked scores (1, heads, queries, keys), and the derivative of the soft cap."""
    scores = (queries @ keys.transpose(2, 3)).to(accumulation_dtype(queries.dtype)) * rule.scale
    slope = None
    if rule.softcap is not None:
        squashed = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * squashed, 1 - squashed * squashed
    mask = visible(queries.shape[2], keys.shape[2], offset, rule.window, queries.device)
    return scores.masked_fill(~mask, -math.inf), slope
