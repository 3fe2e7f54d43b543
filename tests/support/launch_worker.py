"""Ranks for the tests in tests/processes, which need no torch, and the process that launches them.

`python launch_worker.py FOLDER PROCESSES SCENARIO [key=value]` launches the ranks. `python -m launch_worker SCENARIO
FOLDER` is a rank, and runs the function of that name below.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from chunkflow_cli.cli.command import run_command
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes.failures import failures_recorded
from chunkflow_cli.processes.hostfile import read_hostfile
from chunkflow_cli.processes.start import run_workers
from chunkflow_cli.processes.supervisor import Limits
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.worker import enter, heartbeat

CONNECTION_LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
RANK = int(os.environ.get("RANK", "-1"))


def wait_for(path: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def wait_for_death(pid: int) -> None:
    """Wait until the kernel has ended a process, reaped or not: its connections close then."""
    while "(zombie)" not in (text := _status(pid)) and text:
        time.sleep(0.002)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def fine(folder: Path) -> None:
    print(f"stdout of rank {RANK}")
    print(f"stderr of rank {RANK}", file=sys.stderr)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    (folder / f"environment-{RANK}").write_text(" ".join(os.environ.get(name, "?") for name in names))


def error_then_slow_end(folder: Path) -> None:
    """Rank 1 fails; the others lose their connection at once and end before rank 1 does."""
    if RANK == 1:
        print("the last thing that rank 1 did")
        try:
            with failures_recorded():
                raise ValueError("spoiled")
        finally:
            time.sleep(1.0)
    wait_for(WatchFolder(folder).failure(1))
    raise RuntimeError(CONNECTION_LOST)


def error_that_never_ends(folder: Path) -> None:
    """Rank 1 fails and then hangs while it closes its connections; the others wait for it."""
    heartbeat(folder).at(3, "B5")
    if RANK == 1:
        try:
            with failures_recorded():
                raise ValueError("spoiled")
        finally:
            time.sleep(60)
    time.sleep(60)


def killed(folder: Path) -> None:
    """Rank 1 is killed as the kernel does when memory runs out; the others lose their connection."""
    if RANK == 1:
        (folder / "pid.tmp").write_text(str(os.getpid()))
        (folder / "pid.tmp").rename(folder / "pid")
        print("before the end")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(folder / "pid")
    wait_for_death(int((folder / "pid").read_text()))
    raise RuntimeError(CONNECTION_LOST)


def crash(folder: Path) -> None:
    """Rank 1 reads an invalid address and crashes; the others hang, as with NCCL."""
    heartbeat(folder).at(3, "B5")
    if RANK == 1:
        ctypes.string_at(0)
    time.sleep(60)


def connection_only(folder: Path) -> None:
    """Rank 0 loses its connection, and no rank reports why."""
    if RANK == 0:
        raise ConnectionResetError("Connection reset by peer")
    time.sleep(60)


def all_wrong(folder: Path) -> None:
    raise UsageError("chunk.size=0 must be at least 1")


def one_wrong(folder: Path) -> None:
    if RANK == 1:
        raise UsageError("data.path=/data: there is no such file")
    time.sleep(60)


def early_death(folder: Path) -> None:
    if RANK == 1:
        os._exit(3)
    time.sleep(60)


def sleeping(folder: Path) -> None:
    """Every rank ignores SIGTERM and sleeps."""
    (folder / f"pid-{RANK}").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heartbeat(folder).at(2, "saving a checkpoint")
    time.sleep(60)


def unprepared(folder: Path) -> None:
    """Every rank is still importing and handles no signals yet."""
    (folder / f"pid-{RANK}").write_text(str(os.getpid()))
    time.sleep(60)


def stopping(folder: Path) -> None:
    """Every rank does what `train` does: it counts signals, and saves after the current operation."""
    signals = []

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    (folder / f"pid-{RANK}").write_text(str(os.getpid()))
    beat = heartbeat(folder)
    operation = 0
    while not signals and operation < 6000:
        operation += 1
        beat.at(1, f"F{operation}")
        time.sleep(0.01)
    time.sleep(0.5)  # saving; a second signal would show up here
    (folder / f"saved-{RANK}").write_text(" ".join(map(str, signals)))
    raise KeyboardInterrupt


def stopping_and_aborting(folder: Path) -> None:
    """Every rank does the same; then native code aborts its exit, as threads of a connection may."""
    try:
        with failures_recorded():
            stopping(folder)
    finally:
        os.abort()


def hanging(folder: Path) -> None:
    beat = heartbeat(folder)
    beat.at(3, "F5")
    if RANK == 1:
        beat.at(3, "B5")
    time.sleep(60)


def one_moves(folder: Path) -> None:
    """Rank 0 waits for rank 1, which works: this is no hang."""
    beat = heartbeat(folder)
    beat.at(1, "optimizer step")
    for operation in range(60 if RANK == 1 else 1):
        beat.at(1, f"B{operation}")
        time.sleep(0.1)
    if RANK == 0:
        wait_for(folder / "done")
    (folder / "done").touch()


def main(words: list[str]) -> None:
    if RANK >= 0:
        scenario, folder = words

        def command() -> None:
            enter()
            globals()[scenario](Path(folder))
    else:
        folder, processes, scenario, *options = words
        settings: dict[str, Any] = {"grace": 20.0, "hang": 0.0, "debug": 0.0, "hostfile": ""}
        settings.update(option.split("=", 1) for option in options)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        hosts = read_hostfile(settings["hostfile"]) if settings["hostfile"] else None

        def command() -> None:
            run_workers(
                [scenario, folder], Path(folder), int(processes), hosts,
                Limits(float(settings["grace"]), float(settings["hang"])),
                show_traceback=bool(float(settings["debug"])), module="launch_worker",
            )  # fmt: skip

    try:
        run_command(command, json_output=False, debug=False)  # type: ignore[arg-type]
    except typer.Exit as end:
        sys.exit(end.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
