"""Attention on the CPU, by torch's own kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import (
    AttentionRule,
    Gradients,
    Output,
    Saved,
    narrowed,
    repeat_heads,
    same_width,
    sum_heads,
)
from chunkflow_cli.execution.attention.block import BlockBackend, visible
from chunkflow_cli.execution.precision import accumulation_dtype


class CpuBackend(BlockBackend):
    """The flash kernels that torch has for the CPU: bfloat16, float32 and float64, windows by mask, no soft cap.

    Backward of bfloat16 goes through float32: 3.6 times faster here than the kernel's own bfloat16 path, and rounded
    less (benchmarks/LOG.md).
    """

    name = "cpu"

    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, offset: int, rule: AttentionRule) -> Output:
        if rule.softcap is not None:
            raise self.unsupported("soft-capped attention scores")
        value_dim = values.shape[3]
        queries, keys, values = same_width(queries, keys, values)
        layout = _Layout.of(queries, keys, offset, rule)
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            layout.of_queries(queries), layout.of_keys(keys), layout.of_keys(values), 0.0, layout.is_causal,
            **layout.options,
        )  # fmt: skip
        return narrowed(out.reshape(queries.shape), value_dim), log_sum_exp.reshape(queries.shape[:3])

    def _backward(self, grad_out: Tensor, saved: Saved, offset: int, rule: AttentionRule) -> Gradients:
        dtype = accumulation_dtype(saved.queries.dtype)
        grad_out, queries, keys, values, out = same_width(*(each.to(dtype) for each in (grad_out, *saved[:4])))
        layout = _Layout.of(queries, keys, offset, rule)
        laid_queries = layout.of_queries(queries)
        grad_queries, grad_keys, grad_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            layout.of_queries(grad_out), laid_queries, layout.of_keys(keys), layout.of_keys(values),
            layout.of_queries(out), saved.log_sum_exp.reshape(1, -1, laid_queries.shape[2]), 0.0, layout.is_causal,
            **layout.options,
        )  # fmt: skip
        group = grad_keys.shape[1] // keys.shape[1]
        key_dim, value_dim = saved.keys.shape[3], saved.values.shape[3]
        return (
            grad_queries.reshape(queries.shape)[..., :key_dim],
            sum_heads(grad_keys[..., :key_dim], group),
            sum_heads(grad_values[..., :value_dim], group),
        )


@dataclass(frozen=True)
class _Layout:
    """The arrangement of queries and keys for the kernel, which needs equally many heads of both, and its options.

    For the past, the queries of the heads that share a key head are laid one after the other, so that keys, the larger
    side, are never copied. The kernel's causal mask does not allow that for own attention: there, keys are repeated.
    """

    group: int
    folds_queries: bool
    is_causal: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, offset: int, rule: AttentionRule) -> _Layout:
        group, count = queries.shape[1] // keys.shape[1], queries.shape[2]
        folds_queries = offset > 0
        options: dict[str, Any] = {"scale": rule.scale, "attn_mask": None}
        if rule.window is not None and count - 1 + offset >= rule.window:
            mask = visible(count, keys.shape[2], offset, rule.window, queries.device)
            additive = torch.zeros(mask.shape, dtype=queries.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
            options["attn_mask"] = additive.repeat(group, 1) if folds_queries else additive
        return cls(group, folds_queries, offset == 0 and options["attn_mask"] is None, options)

    def of_queries(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (-1, self.group)).flatten(2, 3) if self.folds_queries else tensor

    def of_keys(self, tensor: Tensor) -> Tensor:
        return tensor if self.folds_queries else repeat_heads(tensor, self.group)
