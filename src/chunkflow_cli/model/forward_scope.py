"""What a forward is about, known to everything that runs within it and within its recomputes.

A keyword argument of the model does not reach every layer, and the recompute of activation checkpointing runs during
backward, on a GPU in a thread of its own. So the value is a context variable, and `recompute_contexts` gives it to
torch for the recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

_ABOUT: ContextVar[object | None] = ContextVar("about", default=None)

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""The contexts of a forward and of its recompute, as torch.utils.checkpoint takes them."""


class ForwardScope:
    """Context within which `about()` is the given value. It may be entered again, in whatever thread."""

    def __init__(self, about: object | None) -> None:
        self._about = about
        self._tokens: list[Token[object | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_ABOUT.set(self._about))

    def __exit__(self, *_: object) -> None:
        _ABOUT.reset(self._tokens.pop())


def about() -> object | None:
    """Return what the forward or recompute that is running is about, or None outside of any."""
    return _ABOUT.get()


def recompute_contexts(others: Callable[[], Contexts] | None = None) -> Contexts:
    """Return contexts under which a recompute is about what its forward is about.

    Args:
        others: contexts that must hold, too.
    """
    scope = ForwardScope(about())
    if others is None:
        return nullcontext(), scope
    forward, recompute = others()
    return forward, _within_both(scope, recompute)


@contextmanager
def _within_both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
