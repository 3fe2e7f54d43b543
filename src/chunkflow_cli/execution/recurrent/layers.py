"""Find the recurrent layers of a model, and exchange the functions of their modeling files that cross tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.recurrent.convolution import convolve_in_chunks
from chunkflow_cli.execution.recurrent.mamba1 import pass_state_as_tokens
from chunkflow_cli.execution.recurrent.mixers import mix_in_chunks
from chunkflow_cli.execution.recurrent.running import running_chunk
from chunkflow_cli.execution.recurrent.scans import scan_in_chunks
from chunkflow_cli.model.exchange import exchanged
from chunkflow_cli.model.mixers import mixer_of
from chunkflow_cli.model.recurrent_functions import CONVOLUTION, FUSED, SCANS, SELECTIVE_SCAN
from chunkflow_cli.model.scan_shapes import modeling_files

STATE_KEEPERS = {"update_conv_state", "update_recurrent_state", "set_linear_cache"}
"""Methods of transformers' caches with which a layer keeps a state between tokens."""
_FOUND, _SHARED, _UNCUT = "_is_recurrent_layer", "_notes_its_layer", "_runs_as_in_training"
"""Attributes of modules with a hook, so that none gets two."""


def prepare_recurrent_layers(model: nn.Module) -> tuple[str, ...]:
    """Make the recurrent layers of a Hugging Face model run in chunks; return their module names.

    A model that was prepared stays as it is. So does one without recurrent layers.

    Raises:
        UsageError: a layer keeps a state between tokens without these functions.
    """
    found: list[str] = []
    names_in_code = {cls: _names_in_code(cls) for cls in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        cls = type(module)
        if hasattr(module, "_rescale_layers"):  # rwkv divides its weights for evaluation, and they could be saved so
            assert not module.layers_are_rescaled, "it has run in evaluation before"
            module._rescale_layers = _leave_weights
        if "max_inference_chunksize" in names_in_code[cls]:  # xlstm cuts long inputs in evaluation
            _hook_once(module, _UNCUT, _run_as_in_training)
        if hasattr(module, "layer_idx") and "layer_idx" in inspect.signature(module.forward).parameters:
            _hook_once(module, _SHARED, _note_layer)
        mixer = mixer_of(cls)
        if mixer is not None or names_in_code[cls] & {CONVOLUTION, *SCANS}:
            if mixer is not None:
                cls.forward = exchanged(cls.forward, functools.partial(mix_in_chunks, mixer=mixer))
            for file in modeling_files(cls):
                _exchange_functions(file)
            _hook_once(module, _FOUND, functools.partial(_begin_layer, name))
            found.append(name)
        elif names_in_code[cls] & STATE_KEEPERS and not any(name.startswith(f"{each}.") for each in found):
            raise UsageError(
                f"{cls.__name__} keeps a state between tokens by means of its own: it cannot be trained in chunks"
            )
    return tuple(found)


def comes_after_attention(model: nn.Module, layer: int) -> bool:
    """Return true if a layer of a prepared model holds a recurrent layer, which may take what its attention returns."""
    recurrent = [module for module in model.modules() if hasattr(module, _FOUND)]
    return any(getattr(module, "layer_idx", layer) == layer for module in recurrent)


def _hook_once(module: nn.Module, mark: str, hook: Callable[..., None]) -> None:
    if not hasattr(module, mark):
        module.register_forward_pre_hook(hook, with_kwargs=True)
        setattr(module, mark, True)


def _names_in_code(cls: type) -> set[str]:
    """Return the names of functions and attributes in the compiled code of a class's methods."""
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        functions = (inspect.unwrap(value) for value in vars(base).values() if inspect.isfunction(value))
        names |= {name for function in functions if inspect.isfunction(function) for name in function.__code__.co_names}
    return names


def _begin_layer(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    chunk = running_chunk()
    if chunk is not None:
        chunk.begin_layer(name)


def _note_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell an attention module that several layers share for which of them it runs (zamba2)."""
    if kwargs.get("layer_idx") is not None:
        module.layer_idx = kwargs["layer_idx"]


def _leave_weights() -> None:
    """Change no weight."""


def _run_as_in_training(module: nn.Module, args: Any, kwargs: Any) -> None:
    if running_chunk() is not None:
        module.training = True


def _exchange_functions(home: Any) -> None:
    """Exchange the functions of a modeling file, for all models of its kind, once."""
    for name in vars(home).keys() & {CONVOLUTION, *FUSED, *SCANS}:
        if name == CONVOLUTION:
            wrap: Callable[..., Any] = convolve_in_chunks
        elif name in FUSED:
            wrap = _none_in_chunks
        else:
            wrap = functools.partial(_scan_in_chunks, name)
        setattr(home, name, exchanged(getattr(home, name), wrap))


def _scan_in_chunks(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    with_state = pass_state_as_tokens(function) if name == SELECTIVE_SCAN else function
    return scan_in_chunks(with_state, SCANS[name])


def _none_in_chunks(fused: Callable[..., Any]) -> Callable[..., Any]:
    def unless_in_a_chunk(*args: Any, **options: Any) -> Any:
        return None if running_chunk() is not None else fused(*args, **options)

    return unless_in_a_chunk
