"""Building blocks of screens: tables without lines, and bars."""

from __future__ import annotations

from rich.table import Table

BLOCKS = " ▏▎▍▌▋▊▉█"
"""Eighths of a character."""
SHORTEST_BAR = 1
"""Shortest bar for a value above zero, in eighths of a character, so that a long tail of few samples is visible."""


def columns(*names: str, gap: int = 2) -> Table:
    """Return a table without lines, with `gap` spaces between columns. Those named ">..." are aligned to the right."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def bar_of(value: float, largest: float, width: int) -> str:
    """Return a horizontal bar of at most `width` characters, in eighths of a character."""
    if value <= 0 or largest <= 0:
        return ""
    eighths = max(SHORTEST_BAR, round(8 * width * value / largest))
    return BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")
