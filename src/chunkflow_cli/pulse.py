"""Report signs of life during work without operations: reading and tokenizing data, loading and saving weights.

A run whose ranks begin no new operation for `launch.hang_seconds` counts as hanging. Loading a large model takes longer
on a slow disk. So the places that move bytes call `bytes_moved`, and the heartbeat of a rank listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

SECONDS = 1.0
"""Least time between two calls of the listener: a beat is a write into a file that may be on a network."""

_listener: Callable[[], None] | None = None
_next = 0.0


def listen(listener: Callable[[], None] | None) -> None:
    """Have `listener` called when bytes move, at most once in `SECONDS`; None ends this."""
    global _listener, _next
    _listener, _next = listener, 0.0


def bytes_moved() -> None:
    """Say that this process has read, written or tokenized another part of its bytes; it costs 0.1 µs."""
    global _next
    if _listener is not None and (now := time.monotonic()) >= _next:
        _next = now + SECONDS
        _listener()


def each(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, and call `bytes_moved` after each has been worked on."""
    for item in items:
        yield item
        bytes_moved()
