"""The interface of attention backends.

Shapes, as Hugging Face models pass them:
    queries, out       (1, heads, queries, head_dim)
    keys, values       (1, kv_heads, keys, head_dim); values, and so out, may have another head_dim than keys
    log_sum_exp        (1, heads, queries), float32 (float64 in float64)

A backend computes two kinds of attention. *Own*: causal attention within each segment of a packed chunk. *Past*:
attention of a segment to earlier positions of its sequence. It may see all of them unless a window hides them. A
backward may be given the merged `out` and `log_sum_exp` of own and past attention: it then yields exactly that part's
share of the gradients (FlashAttention-2, arXiv 2307.08691, section 3.1.2: only dO * O and log-sum-exp are needed).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.sending import on_device

Output: TypeAlias = tuple[Tensor, Tensor]
"""Output and log-sum-exp."""
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Gradients of queries, keys and values."""


@dataclass(frozen=True)
class AttentionRule:
    """The scores of a layer's attention, and the keys that a query sees, beyond being causal."""

    scale: float
    window: int | None = None
    """A query sees itself and the `window - 1` positions before it. None: all of them."""
    softcap: float | None = None
    """Scores are squashed: softcap * tanh(score / softcap)."""


@dataclass(frozen=True)
class Packing:
    """The segments of a chunk."""

    boundaries: tuple[int, ...]
    """(segments + 1,): segment i is tokens `boundaries[i]` up to `boundaries[i + 1]` of the chunk."""
    device: torch.device

    @property
    def spans(self) -> list[slice]:
        return [slice(start, stop) for start, stop in pairwise(self.boundaries)]

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(stop - start for start, stop in pairwise(self.boundaries))

    @cached_property
    def cumulative(self) -> Tensor:
        """`boundaries` as int32 on the device, the form that variable-length kernels take."""
        return on_device(torch.tensor(self.boundaries, dtype=torch.int32), self.device)


@dataclass(frozen=True)
class Sight:
    """The keys that a chunk's queries may see."""

    rule: AttentionRule
    packing: Packing | None = None
    """For own attention, the segments. None for attention to the past: every query sees at least one of the keys,
    because the caller drops the others."""
    gap: int = 0
    """Positions between the last key and the first query, in attention to the past."""


class Saved(NamedTuple):
    """The tensors of a forward that its backward needs."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    log_sum_exp: Tensor


class Backend(ABC):
    """A way to compute attention."""

    name: str

    @abstractmethod
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
        """Compute attention."""

    @abstractmethod
    def backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        """Compute the gradients of `forward`."""

    def unsupported(self, what: str) -> UsageError:
        """Return the error for a model that uses what this backend does not support."""
        return UsageError(
            f"model.attention={self.name} does not support {what}, which this model uses\n"
            "  use model.attention=auto or model.attention=reference"
        )


def same_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad the channels of heads with zeros to the widest, for kernels that take only one head_dim.

    This is exact: added channels of queries and keys add nothing to a score, because the scale is passed on, and those
    of values only produce channels of the output that are zero. `narrowed` drops them again.
    """
    width = max(tensor.shape[-1] for tensor in tensors)
    return tuple(t if t.shape[-1] == width else torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors)


def narrowed(tensor: Tensor, width: int) -> Tensor:
    """Return the first channels; as a copy if there are more, so that nothing keeps the others in memory."""
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def repeat_heads(tensor: Tensor, group: int) -> Tensor:
    """Give each query head its own copy of the key or value head that it shares."""
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def sum_heads(gradient: Tensor, group: int) -> Tensor:
    """Return the gradient of each shared head: the sum over the query heads that share it."""
    return gradient if group == 1 else gradient.unflatten(1, (-1, group)).sum(2)
