"""Run a rank as a process: enter the run, report what it does, end with its launcher, and leave.

A worker uses the run folder that its launcher opened and locked, is killed when its launcher exits, and reports what it
is doing (`heartbeat.py`) and why it failed (`failures.py`).

Nothing here may import torch, because `enter` sets the number of threads, which torch reads when it is imported.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import on_bytes_moved
from chunkflow_cli.processes import environment
from chunkflow_cli.processes.heartbeat import Heartbeat
from chunkflow_cli.processes.node_variables import take_variables
from chunkflow_cli.processes.watch_folder import LEASE_SECONDS, Order, WatchFolder, follow_orders

_PR_SET_PDEATHSIG = 1


def enter() -> None:
    """Set up this process as a rank of a run. Call it first, before torch is imported.

    Without a launcher it does nothing.

    Raises:
        UsageError: the folder of the run does not exist on this node, or a launcher's variables are incomplete.
    """
    if not environment.is_started_by_launcher():
        return
    os.environ.setdefault(environment.THREADS_OF_USER, environment.threads_of_user())
    os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads_of_each(environment.processes_here())))
    folder = environment.worker_folder()
    if folder is not None:
        _enter_as_worker(WatchFolder(folder), environment.rank())
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun starts each rank in a new session, where it could outlive it
        die_with(os.getppid())


def _enter_as_worker(watch: WatchFolder, rank: int) -> None:
    started_in = os.environ.pop(environment.WORKING_FOLDER, None)
    if started_in is not None:
        try:
            os.chdir(started_in)
        except OSError as error:
            raise UsageError(
                f"rank {rank}: the folder {started_in}, where the run was started, cannot be used on this node: "
                f"{error.strerror}\n  start the run in a folder that all nodes share"
            ) from error
    if not watch.path.is_dir():
        raise UsageError(
            f"rank {rank}: the run's folder {watch.run_folder} does not exist on this node\n"
            "  with launch.hostfile, put train.output_dir on a file system that all nodes share"
        )
    launcher = os.environ.get(environment.LAUNCHER_PID)
    if launcher is not None:
        die_with(int(launcher))
    else:
        take_variables(watch)
        redirect_output(watch.log(rank), keep_stderr=rank == 0)
        never = threading.Event()
        threading.Thread(
            target=follow_orders, args=(watch, never, LEASE_SECONDS), name="orders of the launcher", daemon=True
        ).start()
    stacks = watch.log(rank).open("a")
    faulthandler.enable(stacks)  # a crash in native code leaves its Python stack in the log
    faulthandler.register(Order.STACKS.value, stacks)


_parent: int | None = None


def end_with_parent() -> None:
    """Stop this process when the process of ours that started it ends, however that one ends."""
    global _parent
    parent = os.environ.pop(environment.PARENT_PID, None)  # popped: it is not the parent of this process's children
    if parent is not None:
        _parent = int(parent)
        die_with(_parent, signal.SIGTERM)  # a run saves a checkpoint


def has_parent() -> bool:
    """Return whether `end_with_parent` has found a process of ours, which still lives and passes on signals."""
    return _parent is not None and os.getppid() == _parent


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent exits, however it exits. For Linux only."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # the parent exited before the call
        os._exit(1)


def redirect_output(log: Path, *, keep_stderr: bool) -> None:
    """Send what this process and its native libraries print to a file, so that a terminal shows one rank only."""
    with log.open("a") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), sys.stdout.fileno())
        if not keep_stderr:
            sys.stderr.flush()
            os.dup2(file.fileno(), sys.stderr.fileno())


def heartbeat(run_folder: Path) -> Heartbeat:
    """Return the heartbeat of this rank; without a launcher nobody reads it, and it does nothing.

    It listens to `files.bytes_moved`.
    """
    is_read = environment.is_started_by_launcher()
    own = Heartbeat(WatchFolder(run_folder).heartbeat(environment.rank()) if is_read else None)
    on_bytes_moved(own.again if is_read else None)
    return own


def leave(code: int) -> NoReturn:
    """End this process without the interpreter's own shutdown, which threads left by gloo and NCCL may abort.

    (benchmarks/kills.py saw it in one run of fifty.) Exit handlers run, and output is flushed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
