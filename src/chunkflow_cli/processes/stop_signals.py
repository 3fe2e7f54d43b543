"""Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed) as requests that a command answers when it can."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from chunkflow_cli.processes.environment import is_started_by_launcher
from chunkflow_cli.processes.worker import has_parent

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals_handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` on Ctrl-C, SIGTERM and SIGHUP within the block; restore the earlier handlers at its end.

    SIGHUP stays ignored in a process that was started with nohup. `handle` gets one SIGHUP at most: when a terminal is
    closed, the kernel and the shell may both send it.
    """
    numbers = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]

    def handle_one_hang_up(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        handle(number, frame)

    before = {number: signal.signal(number, handle_one_hang_up) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, SIGTERM and SIGHUP within the block, so that it cleans up.

    SIGTERM and SIGHUP still end a rank at once: the others wait for it in native code, which no exception leaves.
    Ctrl-C stays ignored in a process that a script has started in the background.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_background = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    before = None if is_background else signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if is_started_by_launcher():
            yield
        else:
            with stop_signals_handled(interrupt):
                if is_background:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def is_second(received: Sequence[int]) -> bool:
    """Return whether the last of these stop signals asks to stop at once: not the first, and not a hang-up."""
    return len([number for number in received if number != signal.SIGHUP]) > 1


@contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Ask the run to stop at the first stop signal; raise KeyboardInterrupt at the second Ctrl-C or SIGTERM.

    A process that another one of ours or a launcher has started ignores the second and leaves it to that one: the first
    signal may reach it twice, once from there and once from a scheduler.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            request_stop()
        elif is_second(received) and not (is_started_by_launcher() or has_parent()):
            raise KeyboardInterrupt

    with stop_signals_handled(handle):
        yield
