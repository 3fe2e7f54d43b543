"""Read facts about a run from the environment: launcher, rank, number of ranks, threads.

Three kinds of process run `chunkflow train`:

- a process on its own;
- a *worker*, which our launcher (`training/launch.py`) starts with `CHUNKFLOW_RUN_FOLDER` in its environment;
- a rank that another launcher (torchrun, deepspeed) starts with only `WORLD_SIZE` and `RANK`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from chunkflow_cli.errors import UsageError

RUN_FOLDER = "CHUNKFLOW_RUN_FOLDER"
"""Environment variable of a worker: the folder of its run."""
LAUNCHER_PID = "CHUNKFLOW_LAUNCHER_PID"
"""Environment variable of a worker that our launcher started as its own child: the launcher's process id."""
FOUND_DATA = "CHUNKFLOW_FOUND_DATA"
"""Environment variable of a worker: where its launcher has found the samples in the token cache."""
SWEEP = "CHUNKFLOW_SWEEP"
"""Environment variable of a run that `train --multirun` started."""
PARENT_PID = "CHUNKFLOW_PARENT_PID"
"""Environment variable of a process that another one of ours started and waits for: that one's process id."""
WORKING_FOLDER = "CHUNKFLOW_WORKING_FOLDER"
"""Environment variable of a worker that DeepSpeed's launcher started: the folder in which the user started the run."""
THREADS_OF_USER = "CHUNKFLOW_OMP_NUM_THREADS"
"""Environment variable: the user's OMP_NUM_THREADS, before the cores were divided among ranks; empty if unset."""


def rank() -> int:
    """Return the rank of this process; 0 if it is on its own."""
    return 0 if processes() == 1 else _number("RANK")


def processes() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher.

    Raises:
        UsageError: the launcher's number is not one.
    """
    count = 1 if _is_world_of_one() else _number("WORLD_SIZE")
    if count < 1:
        raise _wrong("that is not a number of ranks")
    return count


def local_rank() -> int:
    """Return the number of this process among the ranks of its machine; 0 if it is on its own."""
    return 0 if processes() == 1 else _number("LOCAL_RANK")


def rank_in_messages() -> str:
    """Return `rank 3: ` in a rank, and nothing in another process or if a launcher has not said which rank it is."""
    try:
        return f"rank {rank()}: " if is_started_by_launcher() else ""
    except UsageError:
        return ""


def _is_world_of_one() -> bool:
    return (os.environ.get("WORLD_SIZE") or "1") == "1"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _wrong(f"{name}={text} is not a number" if text else f"{name} is not set")
    return int(text)


def _wrong(what: str) -> UsageError:
    return UsageError(
        f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} in the environment says that a launcher has started this process, "
        f"but {what}\n  unset WORLD_SIZE, or start the run with torchrun or deepspeed"
    )


def check_variables() -> None:
    """Check what a launcher has said in the environment; all of it is needed to find the other ranks.

    Raises:
        UsageError: a variable is missing or wrong.
    """
    if processes() == 1:
        return
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name):
            _number(name)
    _number("LOCAL_RANK")
    if rank() >= processes():
        raise _wrong(f"RANK={rank()} is not below it")
    if not os.environ.get("MASTER_ADDR"):
        raise _wrong("MASTER_ADDR is not set")
    if worker_folder() is None and not 0 < _number("MASTER_PORT") < 2**16:  # ours meet elsewhere (`meeting.py`)
        raise _wrong(f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port")


def check_own_variables() -> None:
    """Check that the variables which tell a process of ours who has started it are from that process.

    They may be left in a shell, or belong to a process around this one.

    Raises:
        UsageError: names the variable.
    """
    for name in (PARENT_PID, LAUNCHER_PID):
        if os.environ.get(name, str(os.getppid())) != str(os.getppid()):
            raise _stray(name, "is not the process that started this one")
    if RUN_FOLDER in os.environ and LAUNCHER_PID not in os.environ:  # of DeepSpeed's launcher, then
        missing = next((each for each in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if not os.environ.get(each)), None)
        if missing is not None:
            raise _stray(RUN_FOLDER, f"makes this process a rank of a run, but {missing} is not set")


def _stray(name: str, problem: str) -> UsageError:
    return UsageError(
        f"{name}={os.environ[name]} in the environment {problem}\n"
        f"  unset {name}: chunkflow sets it for the processes that it starts"
    )


def forget_other_ranks() -> None:
    """Delete the variables of a rank from the environment of a process on its own, for which libraries look there.

    They may be left from a script, or belong to the process that started this one.
    """
    if not is_started_by_launcher() and "TORCHELASTIC_RUN_ID" not in os.environ:
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "LOCAL_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            os.environ.pop(name, None)


def processes_here() -> int:
    """Return the number of ranks on this machine."""
    name = next(
        (name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), None
    )  # the 2nd: deepspeed
    return processes() if name is None else max(1, _number(name))


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
    return worker_folder() is not None or not _is_world_of_one()


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
    }


def module_command(module: str, words: Sequence[str] = ()) -> list[str]:
    """Return the command line that runs a module in a new process, which imports nothing from the current folder."""
    return [sys.executable, "-P", "-m", module, *words]


def child_environment() -> dict[str, str]:
    """Return the environment of a process that ends with this one (`worker.end_with_parent`)."""
    return {**os.environ, PARENT_PID: str(os.getpid())}
