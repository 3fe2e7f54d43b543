"""Consoles, progress displays, tables of facts, and numbers in units that people read.

Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 1.0
"""Seconds before a progress bar appears: work that is done by then needs none."""


def stderr_console() -> Console:
    """Return a console on stderr, for messages and progress. It prints text as it is: brackets are no markup."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def stdout_console() -> Console:
    """Return a console on stdout, for results. It prints text as it is, as `stderr_console` does.

    It breaks lines at the width of the terminal, or at COLUMNS. In a pipe without COLUMNS lines stay whole.
    """
    is_whole = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=is_whole)


def counted(count: int, word: str, plural: str | None = None) -> str:
    """Return `1 sample` or `1,234 samples`; `plural` is for words that take more than an s."""
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def shortened(path: str, width: int) -> str:
    """Return a path in at most `width` characters: its end, which says more than its beginning."""
    return path if len(path) <= width else "…" + path[len(path) - width + 1 :]


def human_bytes(count: float) -> str:
    """Return a number of bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def human_seconds(seconds: float) -> str:
    """Return a duration as `7.2 ms`, `1.5 s`, `2 min 5 s` or `3 h 4 min`."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def percent(share: float) -> str:
    """Return a share in percent, with two decimals near 0 and 1, where the long tail is, and with one between."""
    value = 100 * share
    decimals = 0 if value in (0, 100) else 1 if 1 <= value <= 99 else 2
    return f"{value:.{decimals}f} %"


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return a table of names in bold, each with a sentence about it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, sentence in rows:
        table.add_row(name, sentence)
    return table


@contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Show a spinner within the block, for work without countable steps. Does nothing without a terminal."""
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), plain_column("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text)
        yield


def plain_column(template: str) -> TextColumn:
    """Return a column of a progress display that shows text as it is; `template` is as for `TextColumn`."""
    return TextColumn(template, markup=False)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the amount done so far, out of `total`; it moves a progress bar on stderr.

    The bar appears after `QUIET_SECONDS`, and only if stderr is a terminal.
    """
    columns = (plain_column("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=stderr_console(), transient=True)
    task = progress.add_task(what, total=total)
    started, is_shown = time.monotonic(), False

    def update(done: int) -> None:
        nonlocal is_shown
        if not is_shown and sys.stderr.isatty() and time.monotonic() - started > QUIET_SECONDS:
            progress.start()
            is_shown = True
        if is_shown:
            progress.update(task, completed=done)

    try:
        yield update
    finally:
        if is_shown:
            progress.stop()
