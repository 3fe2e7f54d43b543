"""Activation checkpointing: layers keep less for backward, and compute the rest again."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from chunkflow_cli.config.schema import ActivationCheckpointing
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.forward_scope import computes_once, recompute_contexts

COSTLY = frozenset({"aten::mm", "aten::addmm", "aten::bmm"})
"""Operations whose results are small compared with the work of computing them again. Attention is kept as a whole, by
itself: it computes the past in blocks, and each would be kept (`computed_once`)."""


def enable_activation_checkpointing(model: Any, mode: ActivationCheckpointing) -> None:
    """Make the layers of a Hugging Face model keep only their inputs, or also the results of costly operations.

    The recompute is not reentrant, so that the state of earlier chunks goes through it. It runs in the scope of its
    forward, so that recurrent layers know their chunk.

    Raises:
        UsageError: the model does not support it.
    """
    if mode is ActivationCheckpointing.none:
        return
    others = None
    if mode is ActivationCheckpointing.selective:
        others = functools.partial(create_selective_checkpoint_contexts, _policy)
    arguments = {"use_reentrant": False, "context_fn": functools.partial(recompute_contexts, others)}
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise UsageError(
            f"model.activation_checkpointing={mode.value}: {error}\n  set model.activation_checkpointing=none"
        ) from error


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Keep the results of costly operations, and compute all others again."""
    is_kept = operation.name() in COSTLY and not computes_once()
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
