"""The temporary folder in which a cache entry is built, and the removal of those that killed processes left behind.

A folder that is being built, `.<key>.<host>-<random>`, has a lock next to it, `<folder>.lock`, which the kernel
releases when the process ends. So a leftover is a folder whose lock is free. A lock may not reach other machines of a
network file system; their folders count as leftovers only when nothing in them has changed for a day.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

QUIET_SECONDS = 86_400.0
"""Age in seconds of the newest file after which a folder of another machine counts as abandoned."""
_LOCK = ".lock"


@contextmanager
def folder_to_build_in(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder next to the entry `name`, which no other process removes. Its remains are removed at the end.

    Raises:
        OSError: the folder cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _new_lock(parent, name) as held:
        lock = Path(held.name)
        folder = _folder_of(lock)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _new_lock(parent: Path, name: str) -> IO[str]:
    while True:
        held = (parent / f".{name}.{_host()}-{secrets.token_hex(4)}{_LOCK}").open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.fstat(held.fileno()).st_nlink:
            return held
        held.close()  # another process took it for a leftover before it was locked


def _folder_of(lock: Path) -> Path:
    return Path(str(lock).removesuffix(_LOCK))


def remove_leftovers(parent: Path) -> None:
    """Remove the folders below `parent` that no process builds any more."""
    for lock in parent.glob(f".*.*-????????{_LOCK}"):
        folder = _folder_of(lock)
        is_ours = f".{_host()}-" in folder.name
        try:
            if not is_ours and time.time() - _newest(lock, folder) < QUIET_SECONDS:
                continue
            with lock.open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except OSError:
            continue  # being built, removed by another process, or of another user


def _newest(lock: Path, folder: Path) -> float:
    files = [lock, *folder.glob("*")]
    return max(file.stat().st_mtime for file in files)


def _host() -> str:
    return "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter in "-_") or "localhost"
