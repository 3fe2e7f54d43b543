"""Send the rows of a run to its trackers. None of them can delay or end the run."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.processes.environment import module_command
from chunkflow_cli.training.description import describe_config
from chunkflow_cli.training.metrics import StepMetrics
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.run_folder import METRICS
from chunkflow_cli.training.trackers.process import CLOSE_SECONDS

FOLDER = "trackers"
"""In the folder of a run: the id of the run in each tracker, and what each tracker's library has printed."""
MOST_WAITING = 100_000
"""Rows that wait for a tracker that hangs. Later ones are missed."""


@contextlib.contextmanager
def followed(
    backends: Sequence[LogBackend], run: dict[str, Any], run_folder: Path, console: Console
) -> Iterator[Callable[[StepMetrics], None]]:
    """Start the trackers among `backends`, and yield a function that hands a row to all of them.

    At the end, each gets `CLOSE_SECONDS` to finish, and a line says how many rows it missed. Whatever a tracker does,
    nothing is raised.

    Args:
        run: what `introduction` returns.
    """
    trackers = [
        TrackerProcess(backend.value, run, run_folder / FOLDER, console, is_kept=LogBackend.jsonl in backends)
        for backend in backends
        if backend is not LogBackend.jsonl
    ]
    status = "failed"

    def follow(row: StepMetrics) -> None:
        for tracker in trackers:
            tracker.write(row)

    try:
        yield follow
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        for tracker in trackers:
            tracker.end(status)
        for tracker in trackers:
            tracker.close()


def introduction(run: Prepared, first_step: int) -> dict[str, Any]:
    """Return what trackers are told about a run before its first row."""
    log, path = run.config.log, run.folder.path
    # By default a folder is named after the time, and the folder around it after the recipe.
    name = path.name if run.config.train.output_dir is not None else f"{path.parent.name}-{path.name}"
    described = {**describe_config(run.config), **{f"run_{name}": value for name, value in run.described.items()}}
    return {
        "run_name": log.run_name or name, "project": log.project, "described": described, "first_step": first_step,
    }  # fmt: skip


class TrackerProcess:
    """A tracker in its own process. Two threads talk to it, so that it never blocks the run."""

    def __init__(self, name: str, run: dict[str, Any], folder: Path, console: Console, *, is_kept: bool) -> None:
        """
        Args:
            is_kept: whether the rows are in metrics.jsonl as well.
        """
        self._name, self._console, self._is_kept = name, console, is_kept
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._rows = self._done = 0
        self._is_finished = self._has_warned = False
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []
        try:
            folder.mkdir(exist_ok=True)
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    module_command("chunkflow_cli.training.trackers.process"),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    start_new_session=True,  # Ctrl-C in a terminal stops the run, which then tells the tracker
                )  # fmt: skip
        except OSError as error:
            self._warn(f"could not be started: {error.strerror}")
            return
        introduction = {"folder": str(folder), **run}
        first = {"tracker": name, "kept": str(folder / f"{name}.json"), "run": introduction}
        self._waiting.put(json.dumps(first))
        for target in (self._send, self._listen):
            thread = threading.Thread(target=target, args=(self._process,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def write(self, row: StepMetrics) -> None:
        """Hand over a row."""
        self._rows += 1
        if self._rows - self._done < MOST_WAITING:
            values = {name: value for name, value in row.values().items() if name != "step"}
            self._waiting.put(json.dumps({"step": row.step, "values": values}))

    def end(self, status: str) -> None:
        """Tell the tracker that the run has ended."""
        self._waiting.put(json.dumps({"end": status}))
        self._waiting.put(None)

    def close(self) -> None:
        """Wait for the tracker to finish, but not for long, and say what it missed."""
        if self._process is not None:
            listener = self._threads[-1]
            listener.join(CLOSE_SECONDS)
            if listener.is_alive():
                what = f"did not finish within {CLOSE_SECONDS:.0f} s, and was stopped"
                self._print(f"warning: {self._name} {what}; what it has not sent is in {self._log.parent}")
                self._has_warned = True
            _kill(self._process)
        if self._done < self._rows:
            kept = f"; {METRICS} has them" if self._is_kept else ""
            self._print(f"warning: {self._name} missed {self._rows - self._done:,} of {self._rows:,} rows{kept}")

    def _send(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        try:
            while (line := self._waiting.get()) is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            process.stdin.close()
        except OSError:  # it has ended, which the other thread reports
            return

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "done" in answer:
                self._done += 1
            elif "where" in answer:
                self._print(f"{self._name}: {answer['where']}")
            elif "finished" in answer:
                self._is_finished = True
            else:
                self._warn(answer.get("failed") or answer["reason"])
        if not self._is_finished:
            self._warn(f"its process has ended; see {self._log}")

    def _warn(self, reason: str) -> None:
        """Print the first thing that goes wrong; what follows from it is in the tracker's log."""
        if not self._has_warned:
            self._has_warned = True
            self._print(f"warning: {self._name}: {reason}; the run continues without it")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a tracker's process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
