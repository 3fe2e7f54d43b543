"""Activation checkpointing: layers keep less for backward, and compute the rest again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
        others = _selective_contexts
    arguments = {"use_reentrant": False, "context_fn": functools.partial(recompute_contexts, others)}
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise UsageError(
            f"model.activation_checkpointing={mode.value}: {error}\n  set model.activation_checkpointing=none"
        ) from error


@contextmanager
def without_activation_checkpointing(model: Any) -> Iterator[None]:
    """Let the layers of a Hugging Face model keep everything within the block."""
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_Policy())


class _Policy:
    """Keeps the results of costly operations of one layer, and lets it compute all others again.

    The recompute would get a result as it was left. torch notices that one was changed in place, but not the result of
    a product of more than two dimensions, whose views have a version of their own.
    """

    def __init__(self) -> None:
        self._kept: set[int] = set()
        """Addresses of the storages of kept results, which live until the backward."""

    def __call__(self, context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        if operation._schema.is_mutable:
            for declared, given in zip(operation._schema.arguments, arguments, strict=False):
                if declared.is_write and isinstance(given, torch.Tensor) and _storage(given) in self._kept:
                    raise UsageError(
                        "model.activation_checkpointing=selective: a layer changes the result of a matrix product in "
                        f"place ({operation.name()}), which the recompute would get changed\n"
                        "  set model.activation_checkpointing=full"
                    )
        if operation.name() not in COSTLY or computes_once():
            return CheckpointPolicy.PREFER_RECOMPUTE
        self._kept.add(_storage(context.op_output))
        return CheckpointPolicy.MUST_SAVE


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
