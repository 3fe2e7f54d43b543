"""A process of a run as it knows itself: which one it is, who started it, and what it owes to whom started it.

Three kinds of process run `chunkflow train`: one that is alone; a *worker*, started by our own launcher (`launch.py`),
which sets `CHUNKFLOW_RUN_FOLDER`; and one that a foreign launcher (torchrun, deepspeed) has started, which sets
`WORLD_SIZE` only. A worker uses the run folder that its launcher has opened and locked, dies with its launcher, says
where it stands (`heartbeat`) and what it died of (`failures.py`).

Nothing here may import torch: `enter` must have set the number of threads before.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import fcntl
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import write_atomically
from chunkflow_cli.processes.heartbeat import Heartbeat

RUN_FOLDER = "CHUNKFLOW_RUN_FOLDER"
"""Environment variable: the run's folder, in workers of our launcher."""
LAUNCHER_PID = "CHUNKFLOW_LAUNCHER_PID"
"""Environment variable: the parent of a worker that our launcher has started itself, without another one between."""

THREADS_OF_USER = "CHUNKFLOW_OMP_NUM_THREADS"
"""Environment variable: what OMP_NUM_THREADS was before `enter` has divided the machine's cores; empty if unset."""

STACKS_SIGNAL = signal.SIGUSR1
"""A worker that gets it writes the Python stacks of all its threads into its log."""

LEASE_SECONDS = 180.0
"""A worker that our launcher cannot reach by signals ends when it has not heard of it for so long."""
ORDERS_SECONDS = 0.5
"""How often such a worker looks for orders."""

_PR_SET_PDEATHSIG = 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """Of the run, as its launcher says; 1 without one.

    Raises:
        UsageError: a launcher's variables are there in part.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return 1
    if "RANK" not in os.environ or not count.isdigit() or int(count) < 1:
        raise UsageError(
            f"WORLD_SIZE={count} and RANK={os.environ.get('RANK', '')} in the environment say that a launcher started "
            "this process, but not which one it is\n  unset them, or start it with torchrun or deepspeed"
        )
    return int(count)


def worker_folder() -> Path | None:
    """The run folder that our launcher has opened, locked and passed to this worker; None in any other process."""
    path = os.environ.get(RUN_FOLDER)
    return None if path is None else Path(path)


def is_started_by_launcher() -> bool:
    """By ours or a foreign one. A world of one does not count: an engine that is alone sets it up for itself."""
    return worker_folder() is not None or os.environ.get("WORLD_SIZE", "1") != "1"


@dataclass(frozen=True)
class WatchFolder:
    """The files by which workers and their launcher know of each other, below the run's folder."""

    run_folder: Path

    @property
    def path(self) -> Path:
        return self.run_folder / ".watch"

    def log(self, rank: int) -> Path:
        return self.run_folder / "logs" / f"rank-{rank}.log"

    def heartbeat(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.heartbeat"

    def failure(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.failure.json"

    @property
    def order(self) -> Path:
        """`Order` for workers that no signal of the launcher reaches."""
        return self.path / "order"

    @property
    def lease(self) -> Path:
        """Changes as long as the launcher lives."""
        return self.path / "lease"

    def empty(self) -> None:
        """Before any rank of a new run is there; the logs stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.path.iterdir():
            file.unlink()


STOP, STACKS, END = "stop", "stacks", "end"
"""Orders: save a checkpoint and end; write stacks into the log; end at once."""


# Starting


def enter() -> None:
    """The first thing in a process that trains; does nothing in one that is alone. Before torch is imported."""
    if not is_started_by_launcher():
        return
    local = (
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(processes())
    )  # LOCAL_SIZE: deepspeed
    os.environ.setdefault(THREADS_OF_USER, threads_of_user())
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(int(local))))
    folder = worker_folder()
    if folder is None:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun starts sessions of their own, which would outlive it
            die_with(os.getppid())
        return
    watch = WatchFolder(folder)
    if not watch.path.is_dir():
        raise UsageError(
            f"rank {rank()}: the run's folder {folder} is not there on this node\n"
            "  with launch.hostfile, train.output_dir must lie on a file system that all nodes share"
        )
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None:
        die_with(int(launcher))
    else:
        redirect_output(watch.log(rank()), keep_stderr=rank() == 0)
        never = threading.Event()
        threading.Thread(
            target=follow_orders, args=(watch, never, LEASE_SECONDS), name="orders of the launcher", daemon=True
        ).start()
    stacks = watch.log(rank()).open("a")
    faulthandler.enable(stacks)  # a crash in native code leaves its Python stack behind
    faulthandler.register(STACKS_SIGNAL, stacks)


def threads_of_user() -> str:
    """OMP_NUM_THREADS as the user has it; empty if unset.

    Several processes are not given it as it is: our launcher says what it was, and torchrun has set it to 1 where it
    was not set.
    """
    if THREADS_OF_USER in os.environ:
        return os.environ[THREADS_OF_USER]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return "" if threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ else threads


def threads_of_each(local_processes: int) -> int:
    """Threads of each of the processes that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however it ends. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def redirect_output(log: Path, *, keep_stderr: bool) -> None:
    """Send what this process and its libraries print to a file: one terminal shows one rank."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), sys.stdout.fileno())
        if not keep_stderr:
            sys.stderr.flush()
            os.dup2(file.fileno(), sys.stderr.fileno())


def write_order(watch: WatchFolder, order: str) -> None:
    """To all workers that follow orders."""
    write_atomically(watch.order, order)


def follow_orders(watch: WatchFolder, ended: threading.Event, lease_seconds: float = math.inf) -> None:
    """What signals and the kernel do for workers on the launcher's machine, by files that all nodes see.

    Args:
        watch: where orders are found.
        ended: there are no more to be followed.
        lease_seconds: end this process if the launcher has not renewed its lease for so long.
    """
    obeyed: str | None = None
    lease, renewed = "", time.monotonic()
    while not ended.wait(ORDERS_SECONDS):
        order = _read(watch.order)
        if order and order != obeyed:
            obeyed = order
            os.kill(os.getpid(), {STOP: signal.SIGTERM, STACKS: STACKS_SIGNAL, END: signal.SIGKILL}[order])
        text = _read(watch.lease)
        if text and text != lease:
            lease, renewed = text, time.monotonic()
        elif time.monotonic() - renewed > lease_seconds:
            os.kill(os.getpid(), signal.SIGKILL)


def _read(path: Path) -> str:
    """Empty where there is no such file, or a network file system just now cannot say what is in it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# Running


def leave(code: int) -> NoReturn:
    """End this process without the interpreter's own end, in which threads that gloo and NCCL have left may abort it.

    (benchmarks/kills.py has seen it: one run in fifty.) All has been said and saved by now.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def heartbeat(run_folder: Path) -> Heartbeat:
    """Of this rank, whoever has started it; one that does nothing in a process that is alone: nobody waits for it."""
    return Heartbeat(WatchFolder(run_folder).heartbeat(rank()) if is_started_by_launcher() else None)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Within it, the other processes of this run (and of any other) that want the same file's lock wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def open_log(watch: WatchFolder, rank: int) -> IO[str]:
    """The log of a rank, begun anew."""
    path = watch.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path.open("a")  # the rank's output and its tracebacks are written through files of their own
