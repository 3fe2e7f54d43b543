"""Head and cross entropy in tiles, so that the logits of a whole chunk never exist.

Only rows that have a target are multiplied with the head at all. Each tile's gradient is formed in forward, while its
logits are there, so the product with the head is computed once, not again in backward (as in Liger Kernel's fused
linear cross entropy, arXiv 2410.10989, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkflow_cli.execution.cpu_quirks import LinearThroughFloat32, matrix_dtype

TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Most bytes of float32 logits that exist at once. Several tensors of this size live within a tile."""


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to their logits: multiply them, then squash them with softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that go through the head at once."""
    return max(1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * vocab_size))


def weighted_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor,
    transform: LogitTransform,
    *,
    keep_head_gradient: bool,
) -> Tensor:
    """Sum over rows of weight x cross entropy, a scalar in float32 (float64 in float64).

    Args:
        hidden: (targets, hidden_size) rows that have a target.
        head: the module that makes logits of them; a plain linear layer takes the fused path.
        targets: (targets,) token ids.
        weights: (targets,) what each target counts.
        transform: what the model does to its logits.
        keep_head_gradient: whether the gradient of the head's weight, one more tensor of its size, may be kept from
            forward to backward. Retained chunks would each keep one: they compute the logits twice instead.
    """
    rows = tile_rows(_head_rows(head), hidden.device)
    if type(head) in FUSED_HEADS and (keep_head_gradient or not torch.is_grad_enabled()):
        differentiate = torch.is_grad_enabled()
        fused: Tensor = _FusedCrossEntropy.apply(
            hidden, head.weight, head.bias, targets, weights, transform, rows, differentiate
        )
        return fused
    total = hidden.new_zeros((), dtype=_accumulation_dtype(hidden)) + hidden.sum() * 0
    for start in range(0, len(targets), rows):
        tile = slice(start, start + rows)
        total = total + checkpoint(
            _tile_loss, hidden[tile], head, targets[tile], weights[tile], transform, use_reentrant=False
        )
    return total


FUSED_HEADS: set[type[nn.Module]] = {nn.Linear, LinearThroughFloat32}
"""Heads whose product is just weight and bias; a LoRA or quantised head goes through its own forward."""


def _head_rows(head: nn.Module) -> int:
    rows = getattr(head, "out_features", None)
    return int(rows if isinstance(rows, int) else head.get_parameter("weight").shape[0])


def _tile_loss(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, transform: LogitTransform) -> Tensor:
    logits = transform(head(hidden)).to(_accumulation_dtype(hidden))
    return torch.dot(nn.functional.cross_entropy(logits, targets, reduction="none"), weights.to(logits.dtype))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        transform: LogitTransform,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (differentiate and needed for needed in ctx.needs_input_grad[:3])
        accumulate = _accumulation_dtype(hidden)
        through_float32 = matrix_dtype(hidden)
        head = weight.to(through_float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=accumulate)
        for start in range(0, len(targets), rows):
            tile = slice(start, start + rows)
            tile_hidden = hidden[tile].to(through_float32)
            logits = nn.functional.linear(tile_hidden, head, None if bias is None else bias.to(through_float32))
            # The model's own head would round its logits to the model's dtype: so do these.
            logits = transform(logits.to(hidden.dtype)).to(accumulate)
            log_sum_exp = logits.logsumexp(dim=-1)
            picked = logits.gather(1, targets[tile, None]).squeeze(1)
            tile_weights = weights[tile].to(accumulate)
            total += torch.dot(log_sum_exp - picked, tile_weights)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            slope = None if transform.softcap is None else 1 - (logits / transform.softcap).square()
            grad_logits = logits.sub_(log_sum_exp[:, None]).exp_()  # softmax, in the logits' memory
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[tile]] -= 1
            grad_logits *= tile_weights[:, None] * transform.scale
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype).to(through_float32)
            if grad_hidden is not None:
                grad_hidden[tile] = (grad_logits @ head).to(hidden.dtype)
            if grad_weight is not None:
                if through_float32 is accumulate:
                    grad_weight.addmm_(grad_logits.T, tile_hidden)
                else:
                    grad_weight += grad_logits.T @ tile_hidden
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
