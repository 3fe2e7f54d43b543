"""The files through which workers and their launcher communicate, in the folder of the run."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from chunkflow_cli.files import write_atomically

LEASE_SECONDS = 180.0
"""A worker out of reach of the launcher's signals kills itself if the lease is not renewed for this many seconds."""
ORDERS_SECONDS = 0.5
"""Seconds between two looks of such a worker for orders."""


class Order(Enum):
    """An order of a launcher to its workers. The value is the signal that makes a worker carry it out."""

    STOP = signal.SIGTERM
    """Save a checkpoint and exit."""
    STACKS = signal.SIGUSR1
    """Write the Python stacks of all threads to the rank's log."""
    END = signal.SIGKILL
    """Exit at once."""


@dataclass(frozen=True)
class WatchFolder:
    """The paths of the files that workers and their launcher exchange."""

    run_folder: Path

    @property
    def path(self) -> Path:
        """The folder of all these files except the logs."""
        return self.run_folder / ".watch"

    def log(self, rank: int) -> Path:
        """Return the file that takes what a rank prints."""
        return self.run_folder / "logs" / f"rank-{rank}.log"

    def heartbeat(self, rank: int) -> Path:
        """Return the file in which a rank says what it is doing (`heartbeat.py`)."""
        return self.path / f"rank-{rank}.heartbeat"

    def failure(self, rank: int) -> Path:
        """Return the file in which a rank says why it failed (`failures.py`)."""
        return self.path / f"rank-{rank}.failure.json"

    @property
    def order(self) -> Path:
        """The name of an `Order`, for workers that no signal of the launcher reaches."""
        return self.path / "order"

    @property
    def lease(self) -> Path:
        """A file whose content changes as long as the launcher lives."""
        return self.path / "lease"

    @property
    def port(self) -> Path:
        """The port at which rank 0 listens (`meeting.py`); empty before it does."""
        return self.path / "port"

    @property
    def variables(self) -> Path:
        """The environment variables of ranks on other nodes (`node_variables.py`)."""
        return self.path / "variables.json"

    def prepare(self) -> None:
        """Make the folders, and delete all files of an earlier run except its logs. Call it before any rank starts."""
        self.log(0).parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink() or self.path.is_file():
            self.path.unlink()  # never what a link in a stranger's folder points to
        elif self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir()
        self.port.touch()  # a network file system takes a while to see a file that was not there before


def write_order(watch: WatchFolder, order: Order) -> None:
    """Give an order to all workers that follow orders."""
    if watch.order.is_dir():  # not ours, and in the way
        shutil.rmtree(watch.order)
    write_atomically(watch.order, order.name)


def follow_orders(watch: WatchFolder, ended: threading.Event, lease_seconds: float = math.inf) -> None:
    """Carry out the orders in the watch folder until `ended` is set.

    Files replace signals and the parent-death signal for workers that are on another machine than their launcher.

    Args:
        watch: on a file system that all nodes share.
        lease_seconds: kill this process if the launcher does not renew its lease for this many seconds.
    """
    obeyed = ""
    lease, renewed = "", time.monotonic()
    while not ended.wait(ORDERS_SECONDS):
        order = _read(watch.order)
        if order in Order.__members__ and order != obeyed:  # anything else is no order of a launcher
            obeyed = order
            os.kill(os.getpid(), Order[order].value)
        text = _read(watch.lease)
        if text and text != lease:
            lease, renewed = text, time.monotonic()
        elif time.monotonic() - renewed > lease_seconds:
            os.kill(os.getpid(), signal.SIGKILL)


def _read(path: Path) -> str:
    """Return the text of a file; empty if it is no text, does not exist, or cannot be read at the moment."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
