"""A check of an attention kernel on the device that it runs on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing, Saved, Sight
from chunkflow_cli.execution.attention.flash import TorchFlashBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.precision import float32_products
from chunkflow_cli.model.attention_heads import attention_heads

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOKENS, PAST = 49, 70
WINDOW = TOKENS + 1
"""The smallest window under which all queries see some of the past."""


def head_dims_of(hf_config: Any) -> set[tuple[int, int]]:
    """Return the channels of key and value heads that occur in a model, for `check_backend`."""
    return {(heads.key_dim, heads.value_dim) for heads in attention_heads(hf_config)}


def check_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Iterable[tuple[int, int]] = ((HEAD_DIM, HEAD_DIM),),
) -> None:
    """Compare a kernel in the run's own dtype with plain matrix products in float32.

    Own and past attention, of many queries and of one, with and without a window, forward and backward.

    Args:
        head_dims: channels of key and value heads.

    Raises:
        UsageError: the kernel computes something else on this device, or cannot run on it.
    """
    if isinstance(backend, ReferenceBackend):
        return
    for key_dim, value_dim in sorted(head_dims):
        no_window = isinstance(backend, TorchFlashBackend) and not backend.supports_windows(
            dtype, max(key_dim, value_dim)
        )  # refused by name where a model asks for it
        for window in (None,) if no_window else (None, WINDOW):
            what = f"in {dtype} at head_dim {key_dim}{', with a window' if window else ''}"
            try:
                with float32_products():
                    error = _largest_error(backend, device, dtype, (key_dim, value_dim), window)
            except RuntimeError as failure:
                raise _unusable(backend, f"cannot run on this device {what}: {first_line(failure)}") from failure
            # Kernels take fast exponentials.
            if not error <= (3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4):
                raise _unusable(backend, f"computes wrong results on this device: {error:.1e} off {what}")


def _unusable(backend: Backend, why: str) -> UsageError:
    return UsageError(f"model.attention={backend.name} {why}\n  use another model.attention; reference always works")


def _largest_error(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], window: int | None
) -> float:
    """Return the largest relative error of output, log-sum-exp and gradients, over own and past attention."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int, channels: int) -> Tensor:
        return torch.randn(1, heads, tokens, channels, generator=generator).to(dtype).to(device)

    key_dim, value_dim = head_dims
    rule = AttentionRule(scale=key_dim**-0.5, window=window)
    queries, grad_out = draw(HEADS, TOKENS, key_dim), draw(HEADS, TOKENS, value_dim)
    largest = 0.0
    for past, tokens in ((False, TOKENS), (True, TOKENS), (True, 1)):  # of one query, kernels lay out heads as rows
        count = PAST if past and window is None else TOKENS
        keys, values = draw(KV_HEADS, count, key_dim), draw(KV_HEADS, count, value_dim)
        sight = Sight(rule, None if past else Packing((0, 30, TOKENS), device))
        inputs = (queries[:, :, :tokens], keys, values, grad_out[:, :, :tokens])
        mine = _results(backend, inputs, dtype, sight)
        truth = _results(ReferenceBackend(), inputs, torch.float32, sight)
        for one, other in zip(mine, truth, strict=True):
            error = float((one - other).norm() / other.norm())
            largest = error if not error <= largest else largest  # not a number counts as largest
    return largest


def _results(backend: Backend, inputs: tuple[Tensor, ...], dtype: torch.dtype, sight: Sight) -> list[Tensor]:
    """Return output, log-sum-exp and gradients in float32."""
    queries, keys, values, grad_out = (tensor.to(dtype) for tensor in inputs)
    out, log_sum_exp = backend.forward(queries, keys, values, sight)
    grads = backend.backward(grad_out, Saved(queries, keys, values, out, log_sum_exp), sight)
    return [tensor.float() for tensor in (out, log_sum_exp, *grads)]
