"""Attention on CUDA: the kernels inside torch, and those of the flash-attn package."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import (
    AttentionRule,
    Backend,
    Packing,
    _unsupported,
    repeat_heads,
    sum_heads,
)


class _VariableLengthBackend(Backend):
    """Flash kernels that take a whole packed chunk in one call, as (tokens, heads, head_dim) and segment boundaries."""

    @abstractmethod
    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_packing: Packing, key_packing: Packing,
        causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @abstractmethod
    def _backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum_exp: Tensor,
        query_packing: Packing, key_packing: Packing, causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def own_forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = self._forward(
            _tokens_first(queries), _tokens_first(keys), _tokens_first(values),
            packing, packing, True, _window_left(rule, None), rule,
        )  # fmt: skip
        return _heads_first(out), log_sum_exp.unsqueeze(0)

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
        grads = self._backward(
            _tokens_first(grad_out), _tokens_first(queries), _tokens_first(keys), _tokens_first(values),
            _tokens_first(out), log_sum_exp[0].contiguous(), packing, packing, True, _window_left(rule, None), rule,
        )  # fmt: skip
        return _heads_first(grads[0]), _heads_first(grads[1]), _heads_first(grads[2])

    def past_forward(self, queries: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = self._forward(
            _tokens_first(queries), _tokens_first(keys), _tokens_first(values),
            _one_segment(queries), _one_segment(keys), False, _window_left(rule, queries), rule,
        )  # fmt: skip
        return _heads_first(out), log_sum_exp.unsqueeze(0)

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
        grads = self._backward(
            _tokens_first(grad_out), _tokens_first(queries), _tokens_first(keys), _tokens_first(values),
            _tokens_first(out), log_sum_exp[0].contiguous(), _one_segment(queries), _one_segment(keys),
            False, _window_left(rule, queries), rule,
        )  # fmt: skip
        return _heads_first(grads[0]), _heads_first(grads[1]), _heads_first(grads[2])


class TorchFlashBackend(_VariableLengthBackend):
    """The flash kernels inside torch, for bfloat16 on CUDA; float32 goes through its memory-efficient kernels."""

    name = "torch_flash"

    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_packing: Packing, key_packing: Packing,
        causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self._refuse(values, queries, rule)
        if queries.dtype is torch.float32:
            return _EfficientKernel.forward(queries, keys, values, query_packing, key_packing, causal, rule)
        out, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            queries, keys, values, query_packing.cumulative, key_packing.cumulative,
            query_packing.longest, key_packing.longest, 0.0, causal, False,
            scale=rule.scale, window_size_left=window_left, window_size_right=0 if causal else -1,
        )  # fmt: skip
        return out, log_sum_exp

    def _backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum_exp: Tensor,
        query_packing: Packing, key_packing: Packing, causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if queries.dtype is torch.float32:
            return _EfficientKernel.backward(
                grad_out, queries, keys, values, out, log_sum_exp, query_packing, key_packing, causal, rule
            )
        no_random_state = torch.zeros(2, dtype=torch.uint64, device=queries.device)  # read only under dropout
        unused = torch.empty(0, dtype=torch.uint64, device=queries.device)
        grad_queries, grad_keys, grad_values = torch.ops.aten._flash_attention_backward(
            grad_out, queries, keys, values, out, log_sum_exp, query_packing.cumulative, key_packing.cumulative,
            query_packing.longest, key_packing.longest, 0.0, causal, no_random_state, unused,
            scale=rule.scale, window_size_left=window_left, window_size_right=0 if causal else -1,
        )  # fmt: skip
        return grad_queries, grad_keys, grad_values

    def _refuse(self, values: Tensor, queries: Tensor, rule: AttentionRule) -> None:
        if rule.softcap is not None:
            raise _unsupported(self.name, "soft-capped attention scores")
        if values.shape[-1] != queries.shape[-1]:
            raise _unsupported(self.name, "values of another head_dim than keys")
        if queries.dtype is torch.float32 and rule.window is not None:
            raise _unsupported(self.name, "sliding windows in float32")


class _EfficientKernel:
    """torch's memory-efficient attention, one call a segment: the only fused kernel for float32 on CUDA."""

    ALIGNMENT = 32  # the kernel pads the rows of its log-sum-exp to a multiple of this

    @classmethod
    def forward(
        cls, queries: Tensor, keys: Tensor, values: Tensor, query_packing: Packing, key_packing: Packing,
        causal: bool, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        group = queries.shape[1] // keys.shape[1]
        outs, log_sum_exps = [], []
        for rows, columns in zip(query_packing.spans, key_packing.spans, strict=True):
            out, log_sum_exp, *_ = torch.ops.aten._efficient_attention_forward(
                queries[None, rows],
                repeat_heads(keys[columns], group)[None],
                repeat_heads(values[columns], group)[None],
                None, None, None, None, None, 0.0, int(causal), True, scale=rule.scale,
            )  # fmt: skip
            outs.append(out[0])
            log_sum_exps.append(log_sum_exp[0, :, : rows.stop - rows.start])
        return torch.cat(outs), torch.cat(log_sum_exps, dim=1)

    @classmethod
    def backward(
        cls, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum_exp: Tensor,
        query_packing: Packing, key_packing: Packing, causal: bool, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        group = queries.shape[1] // keys.shape[1]
        no_random_state = torch.zeros((), dtype=torch.int64, device=queries.device)  # read only under dropout
        parts = []
        for rows, columns in zip(query_packing.spans, key_packing.spans, strict=True):
            count = rows.stop - rows.start
            padded = torch.nn.functional.pad(log_sum_exp[None, :, rows], (0, -count % cls.ALIGNMENT), value=math.inf)
            grad_queries, grad_keys, grad_values, _ = torch.ops.aten._efficient_attention_backward(
                grad_out[None, rows], queries[None, rows],
                repeat_heads(keys[columns], group)[None], repeat_heads(values[columns], group)[None], None,
                out[None, rows], None, None, count, columns.stop - columns.start, padded, 0.0,
                no_random_state, no_random_state, int(causal), False, scale=rule.scale,
            )  # fmt: skip
            parts.append((grad_queries[0], sum_heads(grad_keys[0], group), sum_heads(grad_values[0], group)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


class FlashAttnBackend(_VariableLengthBackend):
    """The flash-attn package: float16 and bfloat16 on CUDA, windows and soft caps."""

    name = "flash_attn"

    def _forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_packing: Packing, key_packing: Packing,
        causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        if values.shape[-1] != queries.shape[-1]:
            raise _unsupported(self.name, "values of another head_dim than keys")
        out, log_sum_exp, *_ = _flash_attn_varlen_forward(
            queries, keys, values, query_packing.cumulative, key_packing.cumulative,
            query_packing.longest, key_packing.longest, dropout_p=0.0, softmax_scale=rule.scale, causal=causal,
            window_size_left=window_left, window_size_right=0 if causal else -1, softcap=rule.softcap or 0.0,
        )  # fmt: skip
        return out, log_sum_exp

    def _backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sum_exp: Tensor,
        query_packing: Packing, key_packing: Packing, causal: bool, window_left: int, rule: AttentionRule,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        _flash_attn_varlen_backward(
            grad_out, queries, keys, values, out, log_sum_exp, *grads, query_packing.cumulative, key_packing.cumulative,
            query_packing.longest, key_packing.longest, dropout_p=0.0, softmax_scale=rule.scale, causal=causal,
            window_size_left=window_left, window_size_right=0 if causal else -1, softcap=rule.softcap or 0.0,
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return grads


def _window_left(rule: AttentionRule, past_queries: Tensor | None) -> int:
    """How far to the left the flash kernels let a query see; -1 is without limit.

    They align the last query with the last key. In a past call the last key lies right before the *first* query, so
    the last query stands `queries` positions further right than the kernel believes.
    """
    if rule.window is None:
        return -1
    if past_queries is None:
        return rule.window - 1
    left = rule.window - 1 - past_queries.shape[2]
    assert left >= 0, "queries that the window cuts off from all of the past were not left out"
    return left


def _one_segment(tensor: Tensor) -> Packing:
    return Packing((0, tensor.shape[2]), tensor.device)


def _tokens_first(tensor: Tensor) -> Tensor:
    """(1, heads, tokens, head_dim) -> (tokens, heads, head_dim); the kernels want head_dim contiguous."""
    flat = tensor[0].transpose(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _heads_first(tensor: Tensor) -> Tensor:
    """(tokens, heads, head_dim) -> (1, heads, tokens, head_dim)"""
    return tensor.transpose(0, 1).unsqueeze(0)
