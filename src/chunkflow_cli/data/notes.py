"""Collect notes about rows that may surprise the user: found row by row, printed once.

A remark neither rejects a row nor changes its tokens. The cache keeps the remarks of a data set with their number of
rows, so a run that finds its tokens in the cache says the same as the one that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from chunkflow_cli.console import counted
from chunkflow_cli.data.source import Location
from chunkflow_cli.processes.notices import say_once


@dataclass(frozen=True, slots=True)
class Remark:
    """A fact about a row, worded the same for all rows that it applies to."""

    text: str
    is_warning: bool = True
    """True if a part of the row is lost or may not work; False if the note is only information."""


@dataclass(frozen=True, slots=True)
class Note:
    """A remark about a data set."""

    text: str
    is_warning: bool
    rows: int
    file: int
    """Index into `Source.names`, of the first of these rows."""
    line: int


def notes_of(rows: Iterable[tuple[int, Iterable[Remark]]], file: int) -> list[Note]:
    """Return the notes of a batch from the remarks on each of its lines."""
    return merged(
        Note(remark.text, remark.is_warning, 1, file, line)
        for line, remarks in rows
        for remark in dict.fromkeys(remarks)  # once a row
    )


def merged(notes: Iterable[Note]) -> list[Note]:
    """Return one note for each text, with all of their rows and the first place, in the order in which they appear."""
    found: dict[str, Note] = {}
    for note in notes:
        known = found.get(note.text)
        found[note.text] = note if known is None else replace(known, rows=known.rows + note.rows)
    return list(found.values())


def announce(notes: Iterable[Note], named: str, location: Callable[[int, int], Location]) -> None:
    """Print each note on a line of stderr, once per process, and on the first rank only. Warnings come first.

    Args:
        named: key and path of the data.
        location: `Source.location`.
    """
    for note in sorted(notes, key=lambda note: not note.is_warning):
        kind = "warning" if note.is_warning else "note"
        where = f"({counted(note.rows, 'row')}, first {location(note.file, note.line)})"
        say_once(f"{kind}: {named}: {note.text} {where}")
