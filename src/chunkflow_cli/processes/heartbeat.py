"""Records of what every rank is doing, by which a hang can be found and explained.

Before every operation, and while it moves bytes, a rank writes its step and operation into a file of its own. The
launcher reads the files. A record has a fixed size and is written with one `pwrite`, so it costs microseconds and can
be read from another node that shares the run's folder. Records hold no times: the launcher notes on its own clock when
a record changed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RECORD = struct.Struct("<qq112s")
"""128 bytes: number of beats, step (0 before the first), and operation as UTF-8 padded with zeros."""


class Heartbeat:
    """Tells the launcher what this rank is doing. With None for its file, which nobody reads then, it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._beats, self._at = 0, (0, "starting")

    def at(self, step: int, doing: str) -> None:
        """Record what this rank does next. Call it before anything that may take long or wait for other ranks.

        Args:
            step: counted from 1; 0 before the first.
            doing: an operation (`B5`) or a few words (`saving a checkpoint`); cut after 112 bytes.
        """
        if self._file is not None:
            self._at = step, doing
            self.again()

    def again(self) -> None:
        """Record that this rank is still at the same operation and makes progress."""
        if self._file is not None:
            self._beats += 1
            step, doing = self._at
            os.pwrite(self._file, RECORD.pack(self._beats, step, doing.encode()[:112]), 0)


@dataclass(frozen=True)
class Place:
    """The step and operation of a rank when its file was read."""

    beats: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}" if self.step else self.doing


STARTING = Place(0, 0, "starting")


def read_place(path: Path) -> Place:
    """Return the last record of a rank; `STARTING` if it has written none, or if it cannot be read."""
    try:
        with path.open("rb") as file:
            record = file.read(RECORD.size)
    except OSError:
        return STARTING
    if len(record) < RECORD.size:
        return STARTING
    beats, step, doing = RECORD.unpack(record)
    return Place(beats, step, doing.rstrip(b"\0").decode(errors="replace"))


@dataclass(frozen=True)
class Standstill:
    """The place of a rank, and the seconds since it got there."""

    place: Place
    seconds: float


class Watchdog:
    """Remembers when each rank last moved, by a clock of monotonic seconds."""

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float]) -> None:
        self._paths = paths
        self._clock = clock
        self._moved = [(STARTING, clock()) for _ in paths]

    def look(self) -> list[Standstill]:
        """Read all files and return the place of each rank."""
        now = self._clock()
        for rank, path in enumerate(self._paths):
            place = read_place(path)
            if place != self._moved[rank][0]:
                self._moved[rank] = place, now
        return [Standstill(place, now - since) for place, since in self._moved]
