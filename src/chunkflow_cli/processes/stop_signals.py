"""Ctrl-C and SIGTERM as a request that the run answers when it can."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from chunkflow_cli.processes.worker import is_started_by_launcher


@contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop; the second stops it at once.

    A rank among others leaves the second to its launcher: the first may reach it twice, from a scheduler as well.
    """
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN if is_started_by_launcher() else before[each])
        request_stop()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, before[number])
