"""A bar on stderr for work that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

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
