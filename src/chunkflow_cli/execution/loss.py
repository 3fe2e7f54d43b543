"""Head and cross entropy in tiles, so that the logits of a whole chunk never exist.

Only rows that have a target are multiplied with the head. Each tile's gradient is computed in forward, while its logits
exist, so the product with the head is computed once and not again in backward (as in Liger Kernel's fused linear cross
entropy, arXiv 2410.10989, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkflow_cli.execution.cpu_quirks import LinearThroughFloat32, matrix_dtype
from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.planning.memory_parts import HEAD_TILE_BYTES

PRODUCT_BYTES = 64 * 2**20
"""Maximum number of bytes of a product that is added to the head's float32 gradient."""
FUSED_HEADS: set[type[nn.Module]] = {nn.Linear, LinearThroughFloat32}
"""Heads that only multiply with their weight and add their bias. Others (LoRA, quantized) run their own forward."""


@dataclass(frozen=True)
class LogitTransform:
    """A change that some models make to their logits: scale them, then squash with softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    tokens: int | None = None
    """Rows of the head that are tokens, the first ones; None for all. Others only make its size a round number."""

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits[..., : self.tokens]
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Return the number of rows of logits that go through the head at once."""
    return max(1, HEAD_TILE_BYTES.get(device.type, HEAD_TILE_BYTES["cuda"]) // (4 * vocab_size))


@dataclass
class SharedHeadGradient:
    """The gradient of the head's weight and bias, summed over chunks that hold activations at the same time.

    Each chunk adds its share in forward; the last one to go backward hands the sum to autograd. So K retained chunks
    keep one tensor of the head's size, not K. All of them must get the same gradient of their loss.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    pending: int = 0
    """Chunks that have added their share and not gone backward yet."""

    def buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum called `name`, zeros at first."""
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(like, dtype=dtype)
        return self.sums[name]


def weighted_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor,
    transform: LogitTransform,
    *,
    shared: SharedHeadGradient | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """Return the sum over rows of weight x cross entropy, a scalar in float32 (float64 in float64).

    Args:
        hidden: (targets, hidden_size) rows that have a target.
        head: the module that turns them into logits; a plain linear layer takes the fused path.
        targets: (targets,) token ids.
        weights: (targets,) weight of each target in the loss.
        transform: the model's change of its logits.
        shared: receives this chunk's share of the head's gradient; None for a chunk that is alone.
        losses: (targets,) receives the cross entropy of each row.
    """
    if type(head) in FUSED_HEADS:
        rows = tile_rows(head.get_parameter("weight").shape[0], hidden.device)
        gradient = (shared or SharedHeadGradient()) if torch.is_grad_enabled() else None
        fused: Tensor = _FusedCrossEntropy.apply(
            hidden, head.weight, head.bias, targets, weights, transform, rows, gradient, losses
        )
        return fused
    rows = tile_rows(_head_rows(head), hidden.device)
    total = hidden.new_zeros((), dtype=accumulation_dtype(hidden.dtype)) + hidden.sum() * 0
    for start in range(0, len(targets), rows):
        tile = slice(start, start + rows)
        loss, each = checkpoint(
            _tile_loss, hidden[tile], head, targets[tile], weights[tile], transform, use_reentrant=False
        )
        total = total + loss
        if losses is not None:
            losses[tile] = each
    return total


@torch.no_grad()
def log_probabilities(hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return the log-probability of each target, (targets,), without gradient.

    Args:
        hidden: (targets, hidden_size) rows that have a target.
    """
    rows = tile_rows(_head_rows(head), hidden.device)
    result = hidden.new_empty(len(targets), dtype=accumulation_dtype(hidden.dtype))
    for start in range(0, len(targets), rows):
        tile = slice(start, start + rows)
        if type(head) in FUSED_HEADS:  # as in training, where it multiplies in this dtype
            through = matrix_dtype(hidden)
            weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
            bias = None if bias is None else bias.to(through)
            logits = nn.functional.linear(hidden[tile].to(through), weight.to(through), bias).to(hidden.dtype)
        else:
            logits = head(hidden[tile])
        logits = transform(logits).to(result.dtype)
        result[tile] = logits.gather(1, targets[tile, None]).squeeze(1) - logits.logsumexp(dim=-1)
    return result


def _head_rows(head: nn.Module) -> int:
    rows = getattr(head, "out_features", None)
    return int(rows if isinstance(rows, int) else head.get_parameter("weight").shape[0])


def _tile_loss(
    hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum, and the cross entropy of each row without its graph."""
    logits = transform(head(hidden)).to(accumulation_dtype(hidden.dtype))
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.dot(each, weights.to(logits.dtype)), each.detach()


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add the transposed (rows, vocabulary) times (rows, channels) to `total` (vocabulary, channels).

    A product in a narrower dtype than the sum is made for some tokens of the vocabulary at a time: as a whole it would
    be as large as the head.
    """
    if total.dtype is hidden.dtype:
        total.addmm_(grad_logits.T, hidden)
        return
    tokens = max(1, PRODUCT_BYTES // (hidden.shape[1] * hidden.element_size()))
    for start in range(0, len(total), tokens):
        total[start : start + tokens] += grad_logits[:, start : start + tokens].T @ hidden


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
        shared: SharedHeadGradient | None,
        losses: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (shared is not None and needed for needed in ctx.needs_input_grad[:3])
        accumulate = accumulation_dtype(hidden.dtype)
        through_float32 = matrix_dtype(hidden)
        used = slice(transform.tokens)
        head, bias_used = weight[used].to(through_float32), None if bias is None else bias[used].to(through_float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        if shared is not None:
            shared.pending += 1
            grad_weight = shared.buffer("weight", weight, accumulate) if needs_weight else None
            grad_bias = shared.buffer("bias", bias, accumulate) if needs_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=accumulate)
        for start in range(0, len(targets), rows):
            tile = slice(start, start + rows)
            tile_hidden = hidden[tile].to(through_float32)
            logits = nn.functional.linear(tile_hidden, head, bias_used)
            # The model's own head would round its logits to the model's dtype, so these are rounded, too.
            logits = transform(logits.to(hidden.dtype)).to(accumulate)
            log_sum_exp = logits.logsumexp(dim=-1)
            picked = logits.gather(1, targets[tile, None]).squeeze(1)
            tile_weights = weights[tile].to(accumulate)
            total += torch.dot(log_sum_exp - picked, tile_weights)
            if losses is not None:
                losses[tile] = log_sum_exp - picked
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            slope = None if transform.softcap is None else 1 - (logits / transform.softcap).square()
            grad_logits = logits.sub_(log_sum_exp[:, None]).exp_()  # softmax, in the logits' memory
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[tile]] -= 1
            grad_logits *= tile_weights[:, None] * transform.scale
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias[used] += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype).to(through_float32)
            if grad_hidden is not None:
                grad_hidden[tile] = (grad_logits @ head).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight[used], grad_logits, tile_hidden)
        ctx.save_for_backward(grad_hidden)
        ctx.shared, ctx.head_dtype = shared, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shared: SharedHeadGradient = ctx.shared
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        shared.pending -= 1
        grad_weight = grad_bias = None
        if shared.pending == 0:
            sums = {name: shared.sums.pop(name).mul_(grad_total).to(ctx.head_dtype) for name in list(shared.sums)}
            grad_weight, grad_bias = sums.get("weight"), sums.get("bias")
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None
