"""Backwards in two halves, for schedules that run the second one where a pipeline would wait.

    I    the gradient of the stage's input, which the stage before waits for, and all other gradients but those of W
    W    the products that compute the gradients of linear layers' weights: input^T @ gradient of the output

Source: zero-bubble pipelines (Qi et al. 2024, arXiv 2401.10241). A linear layer whose product is put off keeps its
input and the gradient of its output until W. Everything that is not a plain linear layer (norms, biases, embeddings,
stacked experts, the fused head, products through float32 on a CPU) gets its gradient in I. W is then shorter, but never
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PutOff:
    """The products that backwards have put off until W, by chunk."""

    def __init__(self) -> None:
        self._products: dict[int, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        self._chunk: int | None = None

    @property
    def is_on(self) -> bool:
        """True while a first half runs."""
        return self._chunk is not None

    @contextmanager
    def of_chunk(self, chunk: int) -> Iterator[None]:
        """Put off the products of the backward that runs within this context."""
        self._products[chunk] = []
        self._chunk = chunk
        try:
            yield
        finally:
            self._chunk = None

    def add(self, weight: nn.Parameter, input: Tensor, gradient: Tensor) -> None:
        """Put off the gradient of a weight (out, in), from its layer's input (..., in) and the output's gradient."""
        assert self._chunk is not None
        self._products[self._chunk].append((weight, input, gradient))

    @torch.no_grad()
    def gradients(self, chunk: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each weight of the chunk with its gradient, computed now; free the tensors that it comes from."""
        products = self._products.pop(chunk)
        while products:
            weight, input, gradient = products.pop()
            yield weight, gradient.reshape(-1, gradient.shape[-1]).T @ input.reshape(-1, input.shape[-1])

    def __len__(self) -> int:
        """Return the number of chunks whose second half has not run."""
        return len(self._products)


class SplitLinear(nn.Linear):
    """A linear layer whose weight may get its gradient in W."""

    put_off: PutOff

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _SplitProduct.apply(input, self.weight, self.bias, self.put_off)
        return product


def put_off_products(model: nn.Module, *, apart: nn.Module | None) -> PutOff:
    """Make the plain linear layers that are trained put their products off; return what holds these until W.

    The layer `apart` stays as it is: the head, which the loss multiplies with.
    """
    put_off = PutOff()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad and layer is not apart:
            layer.__class__ = SplitLinear
            layer.put_off = put_off  # type: ignore[assignment]
    return put_off


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: nn.Parameter, bias: Tensor | None, put_off: PutOff) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.put_off, ctx.weight, ctx.has_bias = put_off, weight, bias is not None
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        grad_input = grad_out @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.put_off.is_on:
            ctx.put_off.add(ctx.weight, input, grad_out)
        else:
            grad_weight = flat.T @ input.reshape(-1, input.shape[-1])
        grad_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None
