"""Which modules of a model are recurrent layers, and the functions of their modeling file that cross tokens."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from chunkflow_cli.execution.recurrent.convolution import convolve_in_chunks
from chunkflow_cli.execution.recurrent.mamba1 import pass_state_as_tokens
from chunkflow_cli.execution.recurrent.running import running_chunk
from chunkflow_cli.execution.recurrent.scans import Scan, scan_in_chunks

CONVOLUTION = "causal_conv1d_fn"
_DELTA_RULE = Scan(1, "initial_state", "output_final_state", always_pair=True, block=64, packing_package="fla")
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": Scan(1, "initial_states", "return_final_states", block=256),
    "mamba_selective_scan": Scan(2, "initial_state", "return_last_state"),
}
FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Convolution, scan and projection in one kernel. Where one returns None, models call convolution and scan."""
_EXCHANGED, _FOUND, _SHARED = "_runs_in_chunks", "_is_recurrent_layer", "_notes_its_layer"
"""Attributes of functions and modules that are prepared."""


def prepare_recurrent_layers(model: nn.Module) -> tuple[str, ...]:
    """Make the recurrent layers of a Hugging Face model run in chunks; return their module names.

    A model that was prepared stays as it is. So does one without recurrent layers.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and "layer_idx" in inspect.signature(module.forward).parameters:
            _hook_once(module, _SHARED, _note_layer)
        if _crosses_tokens(type(module)):
            _exchange_functions(sys.modules[type(module).__module__])
            _hook_once(module, _FOUND, functools.partial(_begin_layer, name))
            found.append(name)
    return tuple(found)


def comes_after_attention(model: nn.Module, layer: int) -> bool:
    """Return true if a layer of the model holds a recurrent layer, which may take the output of its attention."""
    return any(
        getattr(module, "layer_idx", layer) == layer for module in model.modules() if _crosses_tokens(type(module))
    )


def _hook_once(module: nn.Module, mark: str, hook: Callable[..., None]) -> None:
    if not hasattr(module, mark):
        module.register_forward_pre_hook(hook, with_kwargs=True)
        setattr(module, mark, True)


def _crosses_tokens(cls: type) -> bool:
    """Return true if the class calls one of the functions: their names are in its compiled code."""
    return any({CONVOLUTION, *SCANS} & set(function.__code__.co_names) for function in _methods(cls))


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            if inspect.isfunction(value):
                yield inspect.unwrap(value)


def _begin_layer(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    chunk = running_chunk()
    if chunk is not None:
        chunk.begin_layer(name)


def _note_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell an attention module that several layers share for which of them it runs (zamba2)."""
    if kwargs.get("layer_idx") is not None:
        module.layer_idx = kwargs["layer_idx"]


def _exchange_functions(home: Any) -> None:
    """Exchange the functions of a modeling file, for all models of its kind, once."""
    for name in vars(home).keys() & {CONVOLUTION, *FUSED, *SCANS}:
        function = getattr(home, name)
        if hasattr(function, _EXCHANGED):
            continue
        if name == CONVOLUTION:
            exchanged = convolve_in_chunks(function)
        elif name in FUSED:
            exchanged = _none_in_chunks(function)
        else:
            with_state = pass_state_as_tokens(function) if name == "mamba_selective_scan" else function
            exchanged = scan_in_chunks(with_state, SCANS[name])
        setattr(exchanged, _EXCHANGED, True)
        setattr(home, name, exchanged)


def _none_in_chunks(fused: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fused)
    def unless_in_a_chunk(*args: Any, **options: Any) -> Any:
        return None if running_chunk() is not None else fused(*args, **options)

    return unless_in_a_chunk
