"""Activation checkpointing: layers keep less for backward, and compute the rest again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from chunkflow_cli.config.schema import ActivationCheckpointing
from chunkflow_cli.errors import UsageError

COSTLY_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._efficient_attention_forward.default,
]
"""Operations whose results are small compared with the work of computing them again: selective checkpointing keeps
them."""


def enable_activation_checkpointing(model: Any, mode: ActivationCheckpointing) -> None:
    """Make the layers of a Hugging Face model keep only their inputs, or also the results of costly operations.

    The recompute is not reentrant, so that the state of earlier chunks goes through it.

    Raises:
        UsageError: the model does not support it.
    """
    if mode is ActivationCheckpointing.none:
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, COSTLY_OPERATIONS)
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise UsageError(
            f"model.activation_checkpointing={mode.value}: {error}\n  take model.activation_checkpointing=none"
        ) from error
