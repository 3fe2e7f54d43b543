"""Where every rank of a run stands, so that a hang is found and can be named.

A rank writes its place (step and operation) into a file of its own before every operation, and the launcher reads the
files. A record has one fixed size and is one `pwrite`: it costs microseconds, and another node can read it where the
run's folder is shared. Clocks are not part of it: the launcher notes on its own clock when a record has changed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RECORD = struct.Struct("<qq112s")
"""Beats so far, step (0 before the first), what is being done as UTF-8, padded with zeros: 128 bytes."""


class Heartbeat:
    """Tells the launcher where this rank stands."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: the file of this rank; None where nobody looks: then `at` does nothing.
        """
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._beats = 0

    def at(self, step: int, doing: str) -> None:
        """Called before each operation, and before whatever else may take long or wait for other ranks.

        Args:
            step: from 1; 0 before the first.
            doing: an operation (`B5`) or a few words (`saving a checkpoint`); cut after 112 bytes.
        """
        if self._file is not None:
            self._beats += 1
            os.pwrite(self._file, RECORD.pack(self._beats, step, doing.encode()[:112]), 0)


@dataclass(frozen=True)
class Place:
    """Where a rank stood when its file was read."""

    beats: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}" if self.step else self.doing


STARTING = Place(0, 0, "starting")


def read_place(path: Path) -> Place:
    """`STARTING` where the rank has written nothing yet."""
    try:
        record = path.read_bytes()
    except FileNotFoundError:
        return STARTING
    if len(record) < RECORD.size:
        return STARTING
    beats, step, doing = RECORD.unpack(record[: RECORD.size])
    return Place(beats, step, doing.rstrip(b"\0").decode(errors="replace"))


@dataclass(frozen=True)
class Standstill:
    """A rank's place, and for how long it has been there."""

    place: Place
    seconds: float


class Watchdog:
    """Notes when each rank moved last."""

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float]) -> None:
        """
        Args:
            paths: the file of each rank, in their order.
            clock: seconds, monotonic.
        """
        self._paths = paths
        self._clock = clock
        self._moved = [(STARTING, clock()) for _ in paths]

    def look(self) -> list[Standstill]:
        """Read all files: where each rank stands."""
        now = self._clock()
        for rank, path in enumerate(self._paths):
            place = read_place(path)
            if place != self._moved[rank][0]:
                self._moved[rank] = place, now
        return [Standstill(place, now - since) for place, since in self._moved]
