"""Two quirks of torch on CPUs: slow bfloat16 products, and a first call that is wrong.

**bfloat16.** On processors without instructions for it, oneDNN computes bfloat16 products at a fifth of the speed of
float32 ones (62 against 300 GFLOP/s on a Xeon without AVX512-BF16, conversions included; benchmarks/LOG.md).
Multiplying in float32 and rounding the result to bfloat16 gives the same result as hardware with bfloat16, which also
accumulates in float32.

**The first call.** The first exp, log, sin, cos or tanh of a process that runs on several threads sometimes goes wrong:
all threads but one compute with reduced accuracy, 1e-4 relative in float32 (seen with torch 2.13.0 and its MKL in a
quarter of fresh processes; every later call is right). One such call at the start, with its result thrown away, avoids
that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def settle_vector_math() -> None:
    """Make the first threaded call of the vector math library, whose result may be wrong, and discard it."""
    torch.ones(2**17).exp_()


@cache
def cpu_has_bfloat16() -> bool:
    """Return true if the processor multiplies bfloat16 natively, or if torch does not report it (not x86)."""
    capabilities = torch.cpu.get_capabilities()
    known = [capabilities[name] for name in ("avx512_bf16", "amx_bf16") if name in capabilities]
    return any(known) if known else True


def matrix_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with this tensor is fastest."""
    if tensor.device.type == "cpu" and tensor.dtype is torch.bfloat16 and not cpu_has_bfloat16():
        return torch.float32
    return tensor.dtype


class LinearThroughFloat32(nn.Linear):
    """A bfloat16 linear layer that multiplies in float32. It keeps the same tensors for backward as `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype is not torch.bfloat16 or self.weight.dtype is not torch.bfloat16:
            return super().forward(input)
        product: Tensor = _ProductThroughFloat32.apply(input, self.weight, self.bias)
        return product


def convert_linear_layers(model: nn.Module) -> int:
    """Make the plain linear layers of a bfloat16 model multiply in float32 if that is faster; return their number."""
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and matrix_dtype(layer.weight) is not layer.weight.dtype
    ]
    for layer in layers:
        layer.__class__ = LinearThroughFloat32
    return len(layers)


class _ProductThroughFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        out = nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
        return out.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        grad = grad_out.float()
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_input = (grad @ weight.float()).to(input.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (flat_grad.T @ input.reshape(-1, input.shape[-1]).float()).to(weight.dtype)
        grad_bias = flat_grad.sum(0).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias
