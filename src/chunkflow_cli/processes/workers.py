"""The running ranks of a run, as their launcher sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO, Protocol

from chunkflow_cli.processes.environment import LAUNCHER_PID, RUN_FOLDER
from chunkflow_cli.processes.watch_folder import Order, WatchFolder

GONE = -1000
"""Exit code of a rank that failed and whose real exit code is unknown."""
REAP_SECONDS = 10.0
"""Longest wait for killed workers to disappear; a process inside a driver call may never do so."""


class Workers(Protocol):
    """The running ranks of a run."""

    watch: WatchFolder
    processes: int

    def exit_codes(self) -> Mapping[int, int]:
        """Return the exit code of each rank that has ended; -N if signal N killed it."""

    def order(self, order: Order) -> None:
        """Give an order to all ranks that are alive."""

    def end(self) -> None:
        """Kill the ranks that are alive, and wait until they are gone."""


class LocalWorkers:
    """Ranks that this process starts on this machine.

    Each is in a session of its own, so that Ctrl-C in a terminal reaches only the launcher, which passes it on once.
    """

    def __init__(
        self, command: Sequence[str], watch: WatchFolder, processes: int, environment: Mapping[str, str]
    ) -> None:
        """Start the ranks. Their output goes to their logs, except that rank 0 shares the stderr of this process."""
        self.watch = watch
        self.processes = processes
        self._workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), RUN_FOLDER: str(watch.run_folder)}
                with self._new_log(rank) as log:
                    self._workers.append(
                        subprocess.Popen(
                            command,
                            env={**environment, **own, LAUNCHER_PID: str(os.getpid())},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=None if rank == 0 else log,
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.end()
            raise

    def _new_log(self, rank: int) -> IO[str]:
        path = self.watch.log(rank)
        path.unlink(missing_ok=True)
        return path.open("a")  # appending: the rank opens the file again, for its tracebacks

    def exit_codes(self) -> Mapping[int, int]:
        codes = {rank: worker.poll() for rank, worker in enumerate(self._workers)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def order(self, order: Order) -> None:
        for worker in self._workers:
            if worker.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                if order is Order.END:
                    os.killpg(worker.pid, signal.SIGKILL)  # together with the processes that it started
                else:
                    os.kill(worker.pid, order.value)

    def end(self) -> None:
        self.order(Order.END)
        deadline = time.monotonic() + REAP_SECONDS
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))
