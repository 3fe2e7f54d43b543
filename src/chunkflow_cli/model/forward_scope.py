"""A value for everything that runs within a forward, and within its recomputes: the chunk.

A keyword argument of the model does not reach every layer, and the recompute of activation checkpointing runs during
backward, on a GPU in a thread of its own. So the value is a context variable, and `recompute_contexts` gives it to
torch for the recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

_VALUE: ContextVar[object | None] = ContextVar("forward_value", default=None)

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""The contexts of a forward and of its recompute, as torch.utils.checkpoint takes them."""


class ForwardScope:
    """Context within which `forward_value()` is the given value. It may be entered again, in whatever thread."""

    def __init__(self, value: object | None) -> None:
        self._value = value
        self._tokens: list[Token[object | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_VALUE.set(self._value))

    def __exit__(self, *_: object) -> None:
        _VALUE.reset(self._tokens.pop())


def forward_value() -> object | None:
    """Return the value of the forward or recompute that is running; None outside of any."""
    return _VALUE.get()


def recompute_contexts(others: Callable[[], Contexts] | None = None) -> Contexts:
    """Return contexts under which a recompute has the value of its forward.

    Args:
        others: makes further contexts to enter.
    """
    scope = ForwardScope(forward_value())
    if others is None:
        return nullcontext(), scope
    forward, recompute = others()
    return forward, _within_both(scope, recompute)


@contextmanager
def _within_both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
