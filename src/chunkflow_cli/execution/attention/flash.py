"""Attention on CUDA: the kernels inside torch, and those of the flash-attn package."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkflow_cli.execution.attention.backend import (
    AttentionRule,
    Backend,
    Gradients,
    Output,
    Packing,
    Saved,
    Sight,
    narrowed,
    repeat_heads,
    same_width,
    sum_heads,
)
from chunkflow_cli.execution.precision import accumulation_dtype

LARGEST_FLASH_HEAD_DIM = 256
"""Limit of FlashAttention-2's kernels, including those inside torch."""


@functools.lru_cache(maxsize=256)
def _one_segment(tokens: int, device: torch.device) -> Packing:
    """Return the bounds of queries or of a block of the past: the same few for all layers and blocks."""
    return Packing((0, tokens), device)


@dataclass(frozen=True)
class _Kernel:
    """The arguments of a variable-length kernel that say which keys each query sees."""

    queries: Packing
    keys: Packing
    is_causal: bool
    window_left: int
    """How far to the left a query sees; -1 is without limit."""
    rule: AttentionRule

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, sight: Sight) -> _Kernel:
        """Translate `sight` for queries and keys (1, heads, tokens, head_dim).

        The kernels align the last query with the last key. In attention to the past, the last key is `gap + 1`
        positions before the *first* query, so queries are `queries + gap` positions further right than they believe.
        """
        rule, count = sight.rule, queries.shape[2]
        if sight.packing is not None:
            return cls(sight.packing, sight.packing, True, -1 if rule.window is None else rule.window - 1, rule)
        window_left = -1 if rule.window is None else rule.window - 1 - count - sight.gap
        assert rule.window is None or window_left >= 0, "the caller drops queries from which the window hides the past"
        of_queries, of_keys = _one_segment(count, queries.device), _one_segment(keys.shape[2], keys.device)
        return cls(of_queries, of_keys, False, window_left, rule)

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Segment boundaries and longest segments, in the order in which all kernels take them."""
        return self.queries.cumulative, self.keys.cumulative, self.queries.longest, self.keys.longest

    @property
    def window(self) -> dict[str, int]:
        return {"window_size_left": self.window_left, "window_size_right": 0 if self.is_causal else -1}


class _VariableLengthBackend(Backend):
    """Flash kernels that take a whole packed chunk in one call, as (tokens, heads, head_dim) and segment boundaries."""

    @abstractmethod
    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, kernel: _Kernel) -> Output: ...

    @abstractmethod
    def _backward(self, grad_out: Tensor, saved: Saved, kernel: _Kernel) -> Gradients: ...

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
        parts = [
            self._part(queries[:, :, rows], keys, values, of_rows) for rows, of_rows in _calls(queries, keys, sight)
        ]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True))  # type: ignore[return-value]

    def _part(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
        kernel = _Kernel.of(queries, keys, sight)
        value_dim = values.shape[3]
        queries, keys, values = map(_tokens_first, same_width(queries, keys, values))
        out, log_sum_exp = self._forward(queries, keys, values, kernel)
        return _heads_first(narrowed(out, value_dim)), log_sum_exp.unsqueeze(0)

    def backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        parts = []
        for rows, of_rows in _calls(saved.queries, saved.keys, sight):
            queries, out, log_sum_exp = (each[:, :, rows] for each in (saved.queries, saved.out, saved.log_sum_exp))
            of_part = Saved(queries, saved.keys, saved.values, out, log_sum_exp)
            parts.append(self._part_backward(grad_out[:, :, rows], of_part, of_rows))
        if len(parts) == 1:
            return parts[0]
        dtype = accumulation_dtype(saved.keys.dtype)
        grad_queries, *others = zip(*parts, strict=True)
        grad_keys, grad_values = (torch.stack([each.to(dtype) for each in other]).sum(0) for other in others)
        return torch.cat(grad_queries, dim=2), grad_keys, grad_values

    def _part_backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        kernel = _Kernel.of(saved.queries, saved.keys, sight)
        grad_out, queries, keys, values, out = map(_tokens_first, same_width(grad_out, *saved[:4]))
        flat = Saved(queries, keys, values, out, saved.log_sum_exp[0].contiguous())
        grad_queries, grad_keys, grad_values = map(_heads_first, self._backward(grad_out, flat, kernel))
        key_dim, value_dim = saved.keys.shape[3], saved.values.shape[3]
        return grad_queries[..., :key_dim], grad_keys[..., :key_dim], grad_values[..., :value_dim]


def _calls(queries: Tensor, keys: Tensor, sight: Sight) -> list[tuple[slice, Sight]]:
    """Return the rows of each kernel call: one, but two for a past of fewer keys than queries under a window.

    A kernel with a limit to the left also limits how far to the right a query sees, to the number of keys. That hides
    keys from the first of many queries, which see all of them: these go without a window.
    """
    rule, count, past = sight.rule, queries.shape[2], keys.shape[2]
    if sight.packing is not None or rule.window is None or count <= past + 1:
        return [(slice(0, count), sight)]
    see_all = min(count, rule.window - sight.gap - past)
    calls = [(slice(0, see_all), replace(sight, rule=replace(rule, window=None)))]
    return calls if see_all == count else [*calls, (slice(see_all, count), replace(sight, gap=sight.gap + see_all))]


class TorchFlashBackend(_VariableLengthBackend):
    """The flash kernels inside torch, for bfloat16 on CUDA.

    float32 and heads that are too wide for them go through torch's memory-efficient kernels, without sliding windows.
    """

    name = "torch_flash"

    @staticmethod
    def supports_windows(dtype: torch.dtype, head_dim: int) -> bool:
        """Return whether a layer of this head_dim may have a sliding window."""
        return dtype is not torch.float32 and head_dim <= LARGEST_FLASH_HEAD_DIM

    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, kernel: _Kernel) -> Output:
        if kernel.rule.softcap is not None:
            raise self.unsupported("soft-capped attention scores")
        if not self.supports_windows(queries.dtype, queries.shape[-1]):
            if kernel.rule.window is not None:
                raise self.unsupported(f"sliding windows in {queries.dtype} at head_dim {queries.shape[-1]}")
            return _efficient_forward(queries, keys, values, kernel)
        out, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            queries, keys, values, *kernel.bounds, 0.0, kernel.is_causal, False, scale=kernel.rule.scale,
            **kernel.window,
        )  # fmt: skip
        return out, log_sum_exp

    def _backward(self, grad_out: Tensor, saved: Saved, kernel: _Kernel) -> Gradients:
        if not self.supports_windows(saved.queries.dtype, saved.queries.shape[-1]):
            return _efficient_backward(grad_out, saved, kernel)
        no_random_state = torch.empty(2, dtype=torch.uint64, device=grad_out.device)  # read only under dropout
        unused = torch.empty(0, dtype=torch.uint64, device=grad_out.device)
        grad_queries, grad_keys, grad_values = torch.ops.aten._flash_attention_backward(
            grad_out, *saved, *kernel.bounds, 0.0, kernel.is_causal, no_random_state, unused,
            scale=kernel.rule.scale, **kernel.window,
        )  # fmt: skip
        return grad_queries, grad_keys, grad_values


class FlashAttnBackend(_VariableLengthBackend):
    """The flash-attn package: float16 and bfloat16 on CUDA, windows and soft caps."""

    name = "flash_attn"

    def _forward(self, queries: Tensor, keys: Tensor, values: Tensor, kernel: _Kernel) -> Output:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, log_sum_exp, *_ = _flash_attn_varlen_forward(
            queries, keys, values, *kernel.bounds, dropout_p=0.0, softmax_scale=kernel.rule.scale,
            causal=kernel.is_causal, softcap=kernel.rule.softcap or 0.0, **kernel.window,
        )  # fmt: skip
        return out, log_sum_exp

    def _backward(self, grad_out: Tensor, saved: Saved, kernel: _Kernel) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = torch.empty_like(saved.queries), torch.empty_like(saved.keys), torch.empty_like(saved.values)
        _flash_attn_varlen_backward(
            grad_out, *saved, *grads, *kernel.bounds, dropout_p=0.0, softmax_scale=kernel.rule.scale,
            causal=kernel.is_causal, softcap=kernel.rule.softcap or 0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **kernel.window,
        )  # fmt: skip
        return grads


# torch's memory-efficient attention, one call per segment: its only fused kernel for float32 or wide heads on CUDA.

LOG_SUM_EXP_ALIGNMENT = 32
"""The kernel pads the rows of its log-sum-exp to a multiple of this."""


def _efficient_forward(queries: Tensor, keys: Tensor, values: Tensor, kernel: _Kernel) -> Output:
    folded, repeated = _fold_and_repeat(queries, keys, kernel)
    outs, log_sum_exps = [], []
    for rows, columns in zip(kernel.queries.spans, kernel.keys.spans, strict=True):
        few_heads = _fold(queries[rows], folded)
        out, log_sum_exp, *_ = torch.ops.aten._efficient_attention_forward(
            few_heads[None],
            repeat_heads(keys[columns], repeated)[None],
            repeat_heads(values[columns], repeated)[None],
            None, None, None, None, None, 0.0, int(kernel.is_causal), True, scale=kernel.rule.scale,
        )  # fmt: skip
        outs.append(_unfold(out[0], folded))
        log_sum_exps.append(log_sum_exp[0, :, : len(few_heads)].unflatten(1, (folded, -1)).flatten(0, 1))
    return torch.cat(outs), torch.cat(log_sum_exps, dim=1)


def _efficient_backward(grad_out: Tensor, saved: Saved, kernel: _Kernel) -> Gradients:
    folded, repeated = _fold_and_repeat(saved.queries, saved.keys, kernel)
    no_random_state = torch.zeros((), dtype=torch.int64, device=grad_out.device)  # read only under dropout
    parts = []
    for rows, columns in zip(kernel.queries.spans, kernel.keys.spans, strict=True):
        few_heads = _fold(saved.queries[rows], folded)
        count = len(few_heads)
        log_sum_exp = saved.log_sum_exp[:, rows].unflatten(0, (-1, folded)).flatten(1, 2)
        padding = (0, -count % LOG_SUM_EXP_ALIGNMENT)
        padded = torch.nn.functional.pad(log_sum_exp[None], padding, value=math.inf)
        grad_queries, grad_keys, grad_values, _ = torch.ops.aten._efficient_attention_backward(
            _fold(grad_out[rows], folded)[None], few_heads[None],
            repeat_heads(saved.keys[columns], repeated)[None], repeat_heads(saved.values[columns], repeated)[None],
            None, _fold(saved.out[rows], folded)[None], None, None, count, columns.stop - columns.start, padded, 0.0,
            no_random_state, no_random_state, int(kernel.is_causal), False, scale=kernel.rule.scale,
        )  # fmt: skip
        of_keys, of_values = sum_heads(grad_keys[0], repeated), sum_heads(grad_values[0], repeated)
        parts.append((_unfold(grad_queries[0], folded), of_keys, of_values))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _fold_and_repeat(queries: Tensor, keys: Tensor, kernel: _Kernel) -> tuple[int, int]:
    """Return by how much to fold queries and to repeat keys: the kernel needs equally many heads of both.

    Folding copies only queries, which are few next to the keys of the past, but a causal mask does not allow it.
    """
    group = queries.shape[1] // keys.shape[1]
    return (1, group) if kernel.is_causal else (group, 1)


def _fold(tensor: Tensor, group: int) -> Tensor:
    """Lay heads that share a key head one after the other: (tokens, heads, d) to (group x tokens, heads / group, d)."""
    folded: Tensor = tensor.unflatten(1, (-1, group)).permute(2, 0, 1, 3).flatten(0, 1)
    return folded


def _unfold(tensor: Tensor, group: int) -> Tensor:
    """Undo `_fold`."""
    unfolded: Tensor = tensor.unflatten(0, (group, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    return unfolded


def _tokens_first(tensor: Tensor) -> Tensor:
    """Turn (1, heads, tokens, head_dim) into (tokens, heads, head_dim); the kernels need head_dim contiguous."""
    flat = tensor[0].transpose(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _heads_first(tensor: Tensor) -> Tensor:
    """Turn (tokens, heads, head_dim) into (1, heads, tokens, head_dim)."""
    return tensor.transpose(0, 1).unsqueeze(0)
