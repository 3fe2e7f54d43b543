"""Write files and folders completely or not at all, check their content, and report that bytes move.

A run whose ranks begin no new operation for `launch.hang_seconds` counts as hanging. Loading a large model takes longer
on a slow disk. So the places that move bytes call `bytes_moved`, and the heartbeat of a rank listens.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from chunkflow_cli.errors import UsageError

Item = TypeVar("Item")

SECONDS_APART = 1.0
"""Least time between two calls of the listener: a beat is a write into a file that may be on a network."""

_listener: Callable[[], None] | None = None
_next_call = 0.0


def on_bytes_moved(listener: Callable[[], None] | None) -> None:
    """Have `listener` called when bytes move, at most once in `SECONDS_APART`; None ends this."""
    global _listener, _next_call
    _listener, _next_call = listener, 0.0


def bytes_moved() -> None:
    """Say that this process has read, written or tokenized another part of its bytes; it costs 0.1 µs."""
    global _next_call
    if _listener is not None and (now := time.monotonic()) >= _next_call:
        _next_call = now + SECONDS_APART
        _listener()


def moving(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, and call `bytes_moved` after each has been worked on."""
    for item in items:
        yield item
        bytes_moved()


@contextmanager
def to_be_writable(what: str, remedy: str) -> Iterator[None]:
    """Run a block that writes files; if the file system refuses, the user has to fix it.

    Args:
        what: what is written, with the key or option that decides where: `--output=exported`.
        remedy: what to set instead.

    Raises:
        UsageError: the folder cannot be made or written to, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error.strerror or error}\n  {remedy}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file. Readers, and a machine that loses power, see the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document, as `write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end; if the block raises, `folder` stays as it was.

    If `folder` is a link, the folder that it leads to is written.
    """
    folder = folder.resolve()
    temporary = _aside(folder)
    delete_aside(folder)
    temporary.mkdir(parents=True)
    yield temporary
    readable = temporary.stat().st_mode & 0o666  # as the umask says; safetensors 0.8 makes files for the owner alone
    for file in moving(temporary.rglob("*")):  # on the disk before the folder gets its name
        if file.is_file():
            if (mode := file.stat().st_mode) & readable != readable:
                file.chmod(mode | readable)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file's content, which damage changes: flipped bits, a hole of zeros, a missing end.

    A file that is in memory is read at 2 to 7 GB/s. It is no protection against people.
    """
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
            bytes_moved()
    return f"{crc:08x}"


def describe_file(path: Path) -> str:
    """Return size and checksum of a file, for lists of what was written."""
    return f"{path.stat().st_size} {checksum(path)}"


def change_of(path: Path, written: str) -> str | None:
    """Return how a file differs from what `describe_file` said when it was written; None if it does not.

    Raises:
        OSError: it cannot be read.
    """
    size, before = path.stat().st_size, int(written.partition(" ")[0])
    if size != before:
        return f"it has {size:,} bytes, {before:,} were written"
    return None if describe_file(path) == written else "its content is not what was written (checksum)"


def delete_aside(folder: Path) -> None:
    """Delete what a killed or failed `written_aside` has left of a folder."""
    if (temporary := _aside(folder.resolve())).exists():
        shutil.rmtree(temporary)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")
