"""Facts that a process of a run finds in its environment: its launcher, its rank, the number of ranks, its threads.

Three kinds of process run `chunkflow train`:

- a process on its own;
- a *worker*, which our launcher (`training/launch.py`) starts with `CHUNKFLOW_RUN_FOLDER` in its environment;
- a rank that another launcher (torchrun, deepspeed) starts with only `WORLD_SIZE` and `RANK`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from chunkflow_cli.errors import UsageError

RUN_FOLDER = "CHUNKFLOW_RUN_FOLDER"
"""Environment variable of a worker: the folder of its run."""
LAUNCHER_PID = "CHUNKFLOW_LAUNCHER_PID"
"""Environment variable of a worker that our launcher started as its own child: the launcher's process id."""
SWEEP = "CHUNKFLOW_SWEEP"
"""Environment variable of a run that `train --multirun` started."""
THREADS_OF_USER = "CHUNKFLOW_OMP_NUM_THREADS"
"""Environment variable: the user's OMP_NUM_THREADS, before the cores were divided among ranks; empty if unset."""


def rank() -> int:
    """Return the rank of this process; 0 if it is on its own."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher.

    Raises:
        UsageError: some of a launcher's variables are set and others are missing.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return 1
    if "RANK" not in os.environ or not count.isdigit() or int(count) < 1:
        raise UsageError(
            f"WORLD_SIZE={count} and RANK={os.environ.get('RANK', '')} in the environment say that a launcher started "
            "this process, but not which rank it is\n  unset them, or start the run with torchrun or deepspeed"
        )
    return int(count)


def processes_here() -> int:
    """Return the number of ranks on this machine."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # LOCAL_SIZE: deepspeed
    return int(local or processes())


def worker_folder() -> Path | None:
    """Return the run folder that our launcher opened and locked for this worker; None in any other process."""
    path = os.environ.get(RUN_FOLDER)
    return None if path is None else Path(path)


def is_run_of_sweep() -> bool:
    """Return whether `train --multirun` started this run."""
    return SWEEP in os.environ


def is_started_by_launcher() -> bool:
    """Return whether our launcher or another one started this process.

    A world of one rank does not count: the engine of a process on its own sets the same variables.
    """
    return worker_folder() is not None or os.environ.get("WORLD_SIZE", "1") != "1"


def threads_of_user() -> str:
    """Return OMP_NUM_THREADS as the user set it; empty if unset.

    Ranks have another value: our launcher keeps the user's in a variable of its own, and torchrun sets 1 where the
    user set nothing.
    """
    if THREADS_OF_USER in os.environ:
        return os.environ[THREADS_OF_USER]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return "" if threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ else threads


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(local_processes: int) -> int:
    """Return the number of threads for each of the processes that share the cores of this machine."""
    return max(1, cores() // local_processes)


def local_environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return the launcher's variables with those that its workers on this machine share, named as torchrun does."""
    return {
        THREADS_OF_USER: environment.get("OMP_NUM_THREADS", ""),
        "OMP_NUM_THREADS": str(threads_of_each(processes)),
        # If torchrun started the launcher (as a world of one), these would make the workers look for each other at
        # torchrun's address.
        **{name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")},
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def free_port() -> int:
    """Return a TCP port of this machine that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
