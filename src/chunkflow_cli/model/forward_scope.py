"""A value for everything that runs within a forward, and within its recomputes: the chunk; and results that are kept.

A keyword argument of the model does not reach every layer, and the recompute of activation checkpointing runs during
backward, on a GPU in a thread of its own. So the value is a context variable, and `recompute_contexts` gives it to
torch for the recompute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar, Token
from typing import Any, TypeAlias, TypeVar

_VALUE: ContextVar[object | None] = ContextVar("forward_value", default=None)
_IS_RECOMPUTE: ContextVar[bool] = ContextVar("is_recompute", default=False)
_RESULTS: ContextVar[deque[Any] | None] = ContextVar("kept_results", default=None)
_COMPUTES_ONCE: ContextVar[bool] = ContextVar("computes_once", default=False)

Result = TypeVar("Result")

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""The contexts of a forward and of its recompute, as torch.utils.checkpoint takes them."""


class _Setting:
    """Context within which a variable has a value. It may be entered again, in whatever thread."""

    def __init__(self, variable: ContextVar[Result], value: Result) -> None:
        self._variable, self._value = variable, value
        self._tokens: list[Token[Result]] = []

    def __enter__(self) -> None:
        self._tokens.append(self._variable.set(self._value))

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._tokens.pop())


class ForwardScope(_Setting):
    """Context within which `forward_value()` is the given value. It may be entered again, in whatever thread."""

    def __init__(self, value: object | None) -> None:
        super().__init__(_VALUE, value)


class _All:
    """Several contexts, entered one after the other. It may be entered again if they may be."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self._contexts = contexts
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            self._stacks.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().__exit__(*error)


def forward_value() -> object | None:
    """Return the value of the forward or recompute that is running; None outside of any."""
    return _VALUE.get()


def is_recompute() -> bool:
    """Return whether activation checkpointing runs a layer again, for its backward."""
    return _IS_RECOMPUTE.get()


def computed_once(compute: Callable[[], Result]) -> Result:
    """Return the result of `compute`; in a recompute of selective checkpointing, that of the forward, which was kept.

    Operations within `compute` are not kept by themselves (`computes_once`).
    """
    results = _RESULTS.get()
    if results is None:
        return compute()
    if is_recompute():
        return results.popleft()  # type: ignore[no-any-return]
    with _Setting(_COMPUTES_ONCE, True):
        result = compute()
    results.append(result)
    return result


def keeps_products() -> bool:
    """Return whether selective checkpointing keeps the results of products, or hands out those that it has kept."""
    return _RESULTS.get() is not None


def computes_once() -> bool:
    """Return whether what runs is within `computed_once`, which keeps its result as a whole."""
    return _COMPUTES_ONCE.get()


def recompute_contexts(others: Callable[[], Contexts] | None = None) -> Contexts:
    """Return contexts under which a recompute has the value of its forward.

    Args:
        others: makes further contexts to enter, for selective checkpointing; `computed_once` then keeps results.
    """
    scope = ForwardScope(forward_value())
    again = _Setting(_IS_RECOMPUTE, True)
    if others is None:
        return nullcontext(), _All(scope, again)
    forward, recompute = others()
    results: deque[Any] = deque()
    return _All(_Setting(_RESULTS, results), forward), _All(scope, again, _Setting(_RESULTS, results), recompute)
