"""Activation checkpointing: layers keep less for backward, and compute the rest again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
    # Only reentrant checkpointing needs inputs with a gradient; git adds to its embeddings in place.
    model.disable_input_require_grads()


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


def _selective_contexts() -> tuple[Any, Any]:
    keep, give = create_selective_checkpoint_contexts(_policy)
    watch = _WatchProducts()
    return _both(keep, watch), _both(give, _RefuseChanged(watch.changed))


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Keep the results of costly operations, and compute all others again."""
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operation: Any) -> bool:
    return operation.name() in COSTLY and not computes_once()


class _OutsideCompiledCode(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code alone, as torch's own modes of checkpointing do."""
        return True


class _WatchProducts(_OutsideCompiledCode):
    """Notes, in a layer's forward, which of its kept results are changed in place afterward.

    The recompute would get them changed. torch notices that by the version of a tensor, but not of a product of more
    than two dimensions, whose views have a version of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: dict[int, str] = {}
        """The operations that changed a kept result, by its number in the layer."""
        self._kept: dict[int, int] = {}
        """Numbers of kept results by the addresses of their storages, which live until the backward."""
        self._count = 0

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        schema = getattr(operation, "_schema", None)
        if schema is not None and schema.is_mutable:
            for declared, given in zip(schema.arguments, arguments, strict=False):
                if declared.is_write and isinstance(given, Tensor) and _storage(given) in self._kept:
                    self.changed[self._kept[_storage(given)]] = operation.name()
        result = operation(*arguments, **(keywords or {}))
        if _is_kept(operation):
            self._kept[_storage(result)] = self._count
            self._count += 1
        return result


class _RefuseChanged(_OutsideCompiledCode):
    """Refuses, in a layer's recompute, to use a kept result that its forward has changed.

    Most layers that change one do so at their end, where the recompute has stopped: nothing uses it there.
    """

    def __init__(self, changed: dict[int, str]) -> None:
        super().__init__()
        self._changed = changed
        self._taken = 0
        self._wrong: dict[int, tuple[Tensor, str]] = {}
        """Changed results that were taken, and what changed them, by the addresses of their storages."""

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if self._wrong and not _is_view(operation):
            for given in tree_leaves((arguments, keywords)):
                if isinstance(given, Tensor) and _storage(given) in self._wrong:
                    raise UsageError(
                        "model.activation_checkpointing=selective: a layer changes the result of a matrix product in "
                        f"place ({self._wrong[_storage(given)][1]}), and its recompute would use it changed\n"
                        "  set model.activation_checkpointing=full"
                    )
        result = operation(*arguments, **(keywords or {}))
        if _is_kept(operation):
            if name := self._changed.get(self._taken):
                self._wrong[_storage(result)] = (result, name)
            self._taken += 1
        return result


def _is_view(operation: Any) -> bool:
    schema = getattr(operation, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return operation.name() == "aten::_unsafe_view" or any(each.alias_info is not None for each in schema.returns)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
