"""Muon without the rounding of torch's own, which orthogonalises in bfloat16.

A difference in the last bit of a gradient may round to another bfloat16 number, and so move a step by a thousandth. In
float64 what layouts and implementations really differ in is left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor


def orthogonalise_in_float64(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let torch's Muon run the same five steps of Newton and Schulz (Jordan 2024) in float64.

    Args:
        replace: sets an attribute; by default, for the rest of the process.
    """
    replace(importlib.import_module("torch.optim._muon"), "_zeropower_via_newtonschulz", _orthogonalised)


def _orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    a, b, c = coefficients
    x = matrix.double() / matrix.double().norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.to(matrix.dtype)
