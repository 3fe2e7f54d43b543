"""A check of an attention kernel on the device that it runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing, Saved, Sight
from chunkflow_cli.execution.attention.reference import ReferenceBackend

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOKENS, PAST = 49, 70
WINDOW = TOKENS + 1
"""The smallest window under which all queries see some of the past."""


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a kernel in the run's own dtype with plain matrix products in float32.

    Own and past attention, with and without a window, forward and backward.

    Raises:
        UsageError: the kernel computes something else on this device.
    """
    if isinstance(backend, ReferenceBackend):
        return
    generator = torch.Generator().manual_seed(0)
    tolerance = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4  # kernels take fast exponentials

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(dtype).to(device)

    for window in (None, WINDOW):
        if window is not None and backend.name == "torch_flash" and dtype is torch.float32:
            continue  # refused by name where a model asks for it
        rule = AttentionRule(scale=0.125, window=window)
        queries, grad_out = draw(HEADS, TOKENS), draw(HEADS, TOKENS)
        for past in (False, True):
            count = PAST if past and window is None else TOKENS
            keys, values = draw(KV_HEADS, count), draw(KV_HEADS, count)
            sight = Sight(rule, None if past else Packing((0, 30, TOKENS), device))
            inputs = (queries, keys, values, grad_out)
            mine = _results(backend, inputs, dtype, sight)
            truth = _results(ReferenceBackend(), inputs, torch.float32, sight)
            for one, other in zip(mine, truth, strict=True):
                error = float((one - other).norm() / other.norm())
                if not error <= tolerance:
                    raise UsageError(
                        f"model.attention={backend.name} computes wrong results on this device: {error:.1e} off in "
                        f"{dtype}{', with a window' if window else ''}\n"
                        "  use another model.attention; reference always works"
                    )


def _results(backend: Backend, inputs: tuple[Tensor, ...], dtype: torch.dtype, sight: Sight) -> list[Tensor]:
    """Return output, log-sum-exp and gradients in float32."""
    queries, keys, values, grad_out = (tensor.to(dtype) for tensor in inputs)
    out, log_sum_exp = backend.forward(queries, keys, values, sight)
    grads = backend.backward(grad_out, Saved(queries, keys, values, out, log_sum_exp), sight)
    return [tensor.float() for tensor in (out, log_sum_exp, *grads)]
