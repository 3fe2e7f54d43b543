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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

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


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _unsupported(backend: str, what: str) -> UsageError:
    return UsageError(
        f"model.attention={backend} does not support {what}, which this model uses\n"
        "  take model.attention=auto or model.attention=reference"
    )
