"""Exchange functions and methods of transformers by ones that do more, once for all models in the process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
"""The forward of a class, as transformers defines it. Its first argument is the module."""
_EXCHANGED = "_is_exchanged"


def exchanged(function: Callable[..., Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Return what `wrap` makes of a function, with its name and signature; itself if it was made here before."""
    if hasattr(function, _EXCHANGED):
        return function
    made = functools.wraps(function)(wrap(function))
    setattr(made, _EXCHANGED, True)
    return made


def arguments_of(forward: Forward, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a module's forward by name, without the module."""
    signature = inspect.signature(forward)
    arguments = signature.bind(module, *args, **options).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    del arguments[next(iter(signature.parameters))]
    return arguments


def has_gradient(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Return whether what a module returns can have a gradient."""
    given = (value for value in arguments.values() if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for each in (given, module.parameters()) for tensor in each
    )
