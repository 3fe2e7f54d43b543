"""Compile the layers of a model with `torch.compile`, except for functions that mix tokens.

Attention and recurrent layers read and write the state of a long sample, so they run as they are, between two compiled
parts of a layer. Sizes are symbolic: chunks of other lengths need no other code. Layers of one class share their code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.chunk_model import base_model
from chunkflow_cli.execution.recurrent import prepare_recurrent_layers
from chunkflow_cli.model.language_part import decoder_of

BACKEND = "inductor"
MOST_VARIANTS = 64
"""Versions of a function that are compiled before torch runs it as it is: with and without gradient, of one token, and
by the memory layout of what attention returns."""


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers of a Hugging Face or peft model in place; code is made when they first run.

    Call it after activation checkpointing has been set up: what is recomputed is then compiled as well.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    attention.register(wrap=torch.compiler.disable)
    base = base_model(model)
    modules = dict(base.named_modules())
    for name in prepare_recurrent_layers(base):
        modules[name].forward = torch.compiler.disable(modules[name].forward)
    decoder = decoder_of(base)
    checkpointed = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in getattr(decoder, "layers", None) or checkpointed:  # gpt2, rwkv and xlstm call them otherwise
        if next(layer.parameters(), None) is None:  # another stage holds it
            continue
        if getattr(layer, "gradient_checkpointing", False):
            layer._gradient_checkpointing_func = _compiling(layer._gradient_checkpointing_func)
        else:
            layer.compile(dynamic=True, backend=BACKEND)


def _compiling(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checkpoints a layer's forward, as transformers calls it, in compiled form."""

    def checkpoint_compiled(forward: functools.partial[Any], *args: Any) -> Any:
        return checkpoint(functools.partial(_compiled(forward.func), *forward.args, **forward.keywords), *args)

    return checkpoint_compiled


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True, backend=BACKEND)
