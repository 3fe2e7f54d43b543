"""Modules whose code takes it for granted that their weight is in float32.

transformers keeps such weights in float32 when it loads a model. The engine has all weights in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from chunkflow_cli.model.exchange import exchanged

IN_FLOAT32 = {"Inkling2TopKRouter"}
"""Names of their classes."""


def widen_float32_weights(model: nn.Module) -> None:
    """Let these modules of a model multiply with a copy of their weight in float32, whatever dtype it has."""
    for cls in {type(module) for module in model.modules() if type(module).__name__ in IN_FLOAT32}:
        if cls.__module__.startswith("transformers."):
            cls.forward = exchanged(cls.forward, _with_wide_weight)  # type: ignore[method-assign]


def _with_wide_weight(forward: Callable[..., Any]) -> Callable[..., Any]:
    def widened(module: nn.Module, hidden: Tensor) -> Any:
        vars(module)["weight"] = module.get_parameter("weight").float()  # it is found before the parameter
        try:
            return forward(module, hidden)
        finally:
            del vars(module)["weight"]

    return widened
