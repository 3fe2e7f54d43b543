"""Consoles and progress bars, and numbers as people read them. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """Lines are broken at the width of the terminal, or at COLUMNS; in a pipe without either they stay whole."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty() and "COLUMNS" not in os.environ)


def counted(count: int, word: str) -> str:
    """`1 sample`, `1,234 samples`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def shortened(path: str, width: int) -> str:
    """The end of a path, which tells more than its beginning, if all of it is wider than that."""
    return path if len(path) <= width else "…" + path[len(path) - width + 1 :]


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def human_seconds(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Shows that something without steps of its own is going on."""
    if not console.is_terminal:
        yield
        return
    with Progress(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), console=console, transient=True) as progress:
        progress.add_task("")
        yield


QUIET_SECONDS = 1.0


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes how much of `total` is done.

    Nothing is shown before `QUIET_SECONDS` have passed, nor where stderr is not a terminal.
    """
    started = time.monotonic()
    with ExitStack() as shown:
        show: Callable[[int], None] | None = None

        def update(done: int) -> None:
            nonlocal show
            if show is None and sys.stderr.isatty() and time.monotonic() - started > QUIET_SECONDS:
                show = _start_bar(shown, what, total)
            if show is not None:
                show(done)

        yield update


def _start_bar(shown: ExitStack, what: str, total: int) -> Callable[[int], None]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = shown.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = progress.add_task(escape(what), total=total)
    return lambda done: progress.update(task, completed=done)
