"""Ctrl-C and SIGTERM as a request that a run answers when it can."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from chunkflow_cli.processes.environment import is_started_by_launcher

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals_handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` on Ctrl-C and SIGTERM within the block; restore the earlier handlers at its end."""
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Ask the run to stop at the first Ctrl-C or SIGTERM; stop at once at the second.

    A rank that a launcher started ignores the second and leaves it to the launcher: the first signal may reach a rank
    twice, once from the launcher and once from a scheduler.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN if is_started_by_launcher() else before[each])
        request_stop()

    with stop_signals_handled(handle):
        yield
