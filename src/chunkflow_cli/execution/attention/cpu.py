"""Attention on the CPU, by torch's own kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import (
    AttentionRule,
    _accumulation_dtype,
    _unsupported,
    repeat_heads,
    sum_heads,
    visible,
)
from chunkflow_cli.execution.attention.reference import _BlockBackend


class CpuBackend(_BlockBackend):
    """The flash kernels that torch has for the CPU: bfloat16, float32 and float64, windows by mask, no soft cap.

    Backward of bfloat16 goes through float32: 3.6 times faster here than the kernel's own bfloat16 path, and rounded
    less (benchmarks/LOG.md).
    """

    name = "cpu"

    def _arrange(
        self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], dict[str, Any]]:
        """How queries and keys are laid out for the kernel, which wants equally many heads of both, and its options.

        Queries of the heads that share a key head are laid one after the other, so that the past, the larger side, is
        never copied; under the kernel's causal mask that cannot be, and keys are repeated instead.
        """
        if rule.softcap is not None:
            raise _unsupported(self.name, "soft-capped attention scores")
        if values.shape[3] != queries.shape[3]:
            raise _unsupported(self.name, "values of another head_dim than keys")
        group, count = queries.shape[1] // keys.shape[1], queries.shape[2]
        options: dict[str, Any] = {"scale": rule.scale, "attn_mask": None}
        folded = offset > 0
        if rule.window is not None and count - 1 + offset >= rule.window:
            mask = visible(count, keys.shape[2], offset, rule.window, queries.device)
            additive = torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
            options["attn_mask"] = additive.repeat(group, 1) if folded else additive
        if folded:
            return (lambda query: query.unflatten(1, (-1, group)).flatten(2, 3)), (lambda key: key), options
        return (lambda query: query), (lambda key: repeat_heads(key, group)), options

    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        lay_queries, lay_keys, options = self._arrange(queries, keys, values, offset, rule)
        is_causal = offset == 0 and options["attn_mask"] is None
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            lay_queries(queries), lay_keys(keys), lay_keys(values), 0.0, is_causal, **options
        )
        return out.reshape(queries.shape), log_sum_exp.reshape(queries.shape[:3])

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
        dtype = _accumulation_dtype(queries)
        grad_out, queries, keys, values, out = (tensor.to(dtype) for tensor in (grad_out, queries, keys, values, out))
        lay_queries, lay_keys, options = self._arrange(queries, keys, values, offset, rule)
        grad_queries, grad_keys, grad_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            lay_queries(grad_out),
            lay_queries(queries),
            lay_keys(keys),
            lay_keys(values),
            lay_queries(out),
            log_sum_exp.reshape(1, -1, lay_queries(queries).shape[2]),
            0.0,
            offset == 0 and options["attn_mask"] is None,
            **options,
        )
        group = grad_keys.shape[1] // keys.shape[1]
        return grad_queries.reshape(queries.shape), sum_heads(grad_keys, group), sum_heads(grad_values, group)
