"""Attention backends behind one signature, with their backward passes and log-sum-exp.

Shapes, as Hugging Face models hand them over:
    queries, out       (1, heads, queries, head_dim)
    keys, values       (1, kv_heads, keys, head_dim)
    log_sum_exp        (1, heads, queries), float32 (float64 in float64)

A backend computes two kinds of attention. *Own*: causal attention within each segment of a packed chunk. *Past*:
attention of a segment to earlier positions of its sequence, all of which it may see unless a window hides them. Each
backward takes `out` and `log_sum_exp` from outside: given those of own and past merged, it yields exactly that part's
share of the gradients (FlashAttention-2, arXiv 2307.08691, section 3.1.2: only dO * O and log-sum-exp are needed).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class AttentionRule:
    """What a layer's attention is, beyond causal."""

    scale: float
    window: int | None = None
    """A query sees itself and the `window - 1` positions before it; None is all."""
    softcap: float | None = None
    """Scores are squashed: softcap * tanh(score / softcap)."""


@dataclass(frozen=True)
class Packing:
    """Where the segments of a chunk lie."""

    boundaries: tuple[int, ...]
    """(segments + 1,): segment i is tokens `boundaries[i]` up to `boundaries[i + 1]` of the chunk."""
    device: torch.device

    @property
    def spans(self) -> list[slice]:
        return [slice(start, stop) for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False)]

    @property
    def longest(self) -> int:
        return max(stop - start for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False))

    @cached_property
    def cumulative(self) -> Tensor:
        """`boundaries` as int32 on the device, the form that variable-length kernels take."""
        return torch.tensor(self.boundaries, dtype=torch.int32, device=self.device)


class Backend(ABC):
    """One way to compute attention. `past` calls see at least one key in every row; the caller cuts the others off."""

    name: str

    @abstractmethod
    def own_forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of causal attention within each segment."""

    @abstractmethod
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
        """Gradients of queries, keys and values."""

    @abstractmethod
    def past_forward(self, queries: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        """The same for keys that lie right before the first query."""

    @abstractmethod
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
        """Gradients of queries, keys and values."""


def repeat_heads(tensor: Tensor, group: int) -> Tensor:
    """Give each query head its own copy of the key or value head that it shares."""
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def sum_heads(gradient: Tensor, group: int) -> Tensor:
    """The gradient of a shared head: the sum over the query heads that share it."""
    return gradient if group == 1 else gradient.unflatten(1, (-1, group)).sum(2)


def visible(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) mask: query i stands at key position `i + offset` and sees what is not after it or too far."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


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


BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (FlashAttnBackend, TorchFlashBackend, CpuBackend, ReferenceBackend)
}


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


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _unsupported(backend: str, what: str) -> UsageError:
    return UsageError(
        f"model.attention={backend} does not support {what}, which this model uses\n"
        "  take model.attention=auto or model.attention=reference"
    )
