"""Starts the workers of a run, watches them, and says what became of them.

torch's own launcher (`torch.distributed.elastic`) was looked at and is not used: it ends workers by SIGTERM, which here
means "save a checkpoint"; it names the rank whose death it sees first, which is as often one that has merely lost its
connection; and its workers outlive it when it is killed.

Workers are sessions of their own, so that Ctrl-C in a terminal reaches the launcher alone, which passes it on once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import write_atomically
from chunkflow_cli.processes.failures import read_failure, reads_like_broken_connection
from chunkflow_cli.processes.hang_watch import STACKS_SECONDS, hang_message, is_hang, look_every, places
from chunkflow_cli.processes.heartbeat import Watchdog
from chunkflow_cli.processes.worker import (
    END,
    LAUNCHER_PID,
    RUN_FOLDER,
    STACKS,
    STACKS_SIGNAL,
    STOP,
    WatchFolder,
    open_log,
    write_order,
)

POLL_SECONDS = 0.05
SETTLE_SECONDS = 2.0
"""After a rank that has lost its connection, so long for the one that it was connected to."""
LEAVING_SECONDS = 15.0
"""For a rank that has saved and said so to end; NCCL may hang in that. One that has failed is given SETTLE_SECONDS."""
REAP_SECONDS = 10.0
"""For killed workers to vanish; one that stands in a driver may take for ever."""
LAST_LINES = 10
"""Of a rank's log that are shown."""
LAST_LINES_WITH_TRACEBACK = 60
GONE = -1000
"""Exit code of a rank of which is known only that it has ended, and not well."""


@dataclass(frozen=True)
class Limits:
    grace_seconds: float
    """From the first signal to the end of all workers."""
    hang_seconds: float
    """Without another operation of any rank; 0: for ever."""


class Workers(Protocol):
    """The running ranks of a run."""

    watch: WatchFolder
    processes: int

    def exit_codes(self) -> Mapping[int, int]:
        """Of the ranks that have ended, by rank; -N where signal N killed it."""

    def order(self, order: str) -> None:
        """`STOP`, `STACKS` or `END`, to all that live."""

    def end(self) -> None:
        """Kill what lives, and wait for it."""


class LocalWorkers:
    """Ranks on this machine, started by this process."""

    def __init__(
        self, command: Sequence[str], watch: WatchFolder, processes: int, environment: Mapping[str, str]
    ) -> None:
        """
        Args:
            command: of every rank.
            watch: its logs take what the ranks print; the stderr of rank 0 is this process's.
            processes: how many.
            environment: of every rank, less what tells them apart.
        """
        self.watch = watch
        self.processes = processes
        self._workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), RUN_FOLDER: str(watch.run_folder)}
                with open_log(watch, rank) as log:
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

    def exit_codes(self) -> Mapping[int, int]:
        codes = {rank: worker.poll() for rank, worker in enumerate(self._workers)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def order(self, order: str) -> None:
        number = {STOP: signal.SIGTERM, STACKS: STACKS_SIGNAL, END: signal.SIGKILL}[order]
        for worker in self._workers:
            if worker.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                if order == END:
                    os.killpg(worker.pid, number)  # with whatever it has started
                else:
                    os.kill(worker.pid, number)

    def end(self) -> None:
        self.order(END)
        deadline = time.monotonic() + REAP_SECONDS
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))


class DeepSpeedWorkers:
    """Ranks that the `deepspeed` launcher has started, on any nodes: they and this process meet by files."""

    def __init__(
        self, command: Sequence[str], watch: WatchFolder, processes: int, environment: Mapping[str, str]
    ) -> None:
        """
        Args:
            command: of the launcher.
            watch: on a file system that all nodes share.
            processes: how many ranks the launcher starts.
            environment: of the launcher.
        """
        self.watch = watch
        self.processes = processes
        self._renewals = 0
        self._renewed = float("-inf")
        self._renew_lease()
        watch.log(0).parent.mkdir(parents=True, exist_ok=True)
        for rank in range(processes):
            watch.log(rank).write_text("")
        self._launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def _renew_lease(self) -> None:
        if time.monotonic() - self._renewed >= 1.0:
            self._renewals += 1
            self._renewed = time.monotonic()
            write_atomically(self.watch.lease, str(self._renewals))

    def exit_codes(self) -> Mapping[int, int]:
        self._renew_lease()
        launcher = self._launcher.poll()  # first: what it has seen die has written its record before
        records = {rank: read_failure(self.watch.failure(rank)) for rank in range(self.processes)}
        codes = {rank: record.exit_code for rank, record in records.items() if record is not None}
        if launcher is not None:
            rest = 0 if launcher == 0 else GONE
            codes = {rank: codes.get(rank, rest) for rank in range(self.processes)}
        return codes

    def order(self, order: str) -> None:
        write_order(self.watch, order)

    def end(self) -> None:
        self.order(END)
        if self._launcher.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(2.0)  # workers on other nodes read the order meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)  # and its workers, where they are on this machine
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(REAP_SECONDS)


def supervise(
    start: Callable[[], Workers], watch: WatchFolder, limits: Limits, *, show_traceback: bool = False
) -> None:
    """Start workers and stay until all have ended well; none is left when this returns or raises.

    Args:
        start: starts them.
        watch: their files; emptied first.
        limits: of patience.
        show_traceback: of a rank that failed; else the message says where it is.

    Raises:
        UsageError: a rank says that the user is at fault.
        RunError: a rank failed or was killed, all hang, or they did not stop when they were asked to.
        KeyboardInterrupt: this process was asked to stop, and the ranks have.
    """
    watch.empty()
    with _signals_counted() as signals:
        workers = start()
        try:
            _Supervision(workers, limits, signals, show_traceback).run()
        finally:
            workers.end()
            _show_cursor()


class _Signals:
    """How many times this process was asked to stop."""

    count = 0


class _Supervision:
    """One run's workers, from their start to their end."""

    def __init__(self, workers: Workers, limits: Limits, signals: _Signals, show_traceback: bool) -> None:
        self._workers = workers
        self._watch = workers.watch
        self._ranks = range(workers.processes)
        self._limits = limits
        self._signals = signals
        self._show_traceback = show_traceback
        self._watchdog = Watchdog([self._watch.heartbeat(rank) for rank in self._ranks], time.monotonic)
        self._asked_at: float | None = None
        """When the ranks were asked to stop."""
        self._died_at: dict[int, float] = {}
        """When each death was seen, seconds since the epoch."""
        self._leaving_since: dict[int, float] = {}
        """When each rank was first seen to have said what it dies of, seconds on this clock."""

    def run(self) -> None:
        look_at = 0.0
        while True:
            codes = self._exit_codes()
            self._pass_on_signals()
            if any(self._is_failure(code) for code in codes.values()):
                raise self._failure()
            if any(codes.values()):
                self._ask_to_stop()  # one was asked to stop from elsewhere: they stop together
                if any(code < 0 for code in codes.values()):
                    raise KeyboardInterrupt  # it had nothing to save yet, and without it no other can
            if len(codes) == len(self._ranks):
                if any(codes.values()):
                    raise KeyboardInterrupt
                return
            self._check_grace()
            if time.monotonic() >= look_at:
                self._check_hang(set(codes))
                look_at = time.monotonic() + look_every(self._limits.hang_seconds)
            time.sleep(POLL_SECONDS)

    def _exit_codes(self) -> Mapping[int, int]:
        """Of the ranks that have ended; what a rank has said of its end holds, even if it crashed on the way out, or
        does not get there."""
        codes = dict(self._workers.exit_codes())
        for rank in self._ranks:
            if rank not in codes and (record := read_failure(self._watch.failure(rank))) is not None:
                since = self._leaving_since.setdefault(rank, time.monotonic())
                patience = LEAVING_SECONDS if record.exit_code == 130 else SETTLE_SECONDS
                if time.monotonic() - since > patience:
                    codes[rank] = record.exit_code
        for rank, code in codes.items():
            self._died_at.setdefault(rank, time.time())
            record = read_failure(self._watch.failure(rank)) if code != 0 else None
            if record is not None:
                codes[rank] = record.exit_code
        return codes

    def _is_failure(self, code: int) -> bool:
        if code in (0, 130):
            return False
        return self._asked_at is None or code not in (-signal.SIGTERM, GONE)

    # Signals

    def _pass_on_signals(self) -> None:
        if self._signals.count > 0:
            self._ask_to_stop()
        if self._signals.count > 1:
            raise KeyboardInterrupt

    def _ask_to_stop(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._workers.order(STOP)

    def _check_grace(self) -> None:
        if self._asked_at is None or time.monotonic() - self._asked_at <= self._limits.grace_seconds:
            return
        raise RunError(
            f"the ranks have not stopped within launch.grace_seconds={self._limits.grace_seconds:g} and were killed\n"
            f"{self._places()}\n"
            "  the last checkpoint is from before; where saving takes longer, raise launch.grace_seconds"
        )

    # Hangs

    def _check_hang(self, ended: set[int]) -> None:
        standing, running = self._watchdog.look(), [rank for rank in self._ranks if rank not in ended]
        if is_hang(standing, running, self._limits.hang_seconds):
            self._workers.order(STACKS)
            time.sleep(STACKS_SECONDS)
            raise RunError(hang_message(standing, running, self._limits.hang_seconds, self._watch))

    def _places(self) -> str:
        ended = self._workers.exit_codes()
        return places(self._watchdog.look(), [rank for rank in self._ranks if rank not in ended])

    # Failures

    def _failure(self) -> Exception:
        """The error of the rank that failed first, after a moment for it to tell if others speak before it does."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            codes = self._exit_codes()
            failures = self._failures(codes)
            cause = first_cause(failures)
            is_clear = not cause.is_follower and cause.exit_code != UsageError.exit_code
            if is_clear or len(codes) == len(self._ranks) or time.monotonic() > deadline:
                return self._explain(cause, failures)
            time.sleep(POLL_SECONDS)

    def _failures(self, codes: Mapping[int, int]) -> list[Failure]:
        failures = []
        for rank in self._ranks:
            record = read_failure(self._watch.failure(rank))
            code = codes.get(rank, 0)
            if record is not None and self._is_failure(record.exit_code):
                failures.append(
                    Failure(
                        rank, record.exit_code, record.message, record.is_follower, record.at,
                        self._last_lines(rank, record.log_bytes),
                    )
                )  # fmt: skip
            elif record is None and self._is_failure(code):
                lines = self._last_lines(rank)
                # The kernel closes a process's connections before it can be seen to have died.
                at = self._died_at[rank] - 2 * POLL_SECONDS
                is_follower = code == -signal.SIGABRT and reads_like_broken_connection("\n".join(lines))
                failures.append(Failure(rank, code, None, is_follower, at, lines))
        return failures

    def _last_lines(self, rank: int, before_traceback: int | None = None) -> tuple[str, ...]:
        if self._show_traceback:
            return _last_lines(self._watch.log(rank), None, LAST_LINES_WITH_TRACEBACK)
        return _last_lines(self._watch.log(rank), before_traceback, LAST_LINES)

    def _explain(self, cause: Failure, failures: Sequence[Failure]) -> Exception:
        if cause.exit_code == UsageError.exit_code and cause.message is not None:
            # What rank 0 sees is what every process would see that runs here, this one too.
            is_everywhere = any(failure.rank == 0 and failure.message == cause.message for failure in failures)
            return UsageError(cause.message if is_everywhere else f"rank {cause.rank}: {cause.message}")
        log = self._watch.log(cause.rank)
        lines = [
            f"rank {cause.rank} {_ending(cause)}" if cause.message is None else f"rank {cause.rank}: {cause.message}"
        ]
        place = self._watchdog.look()[cause.rank].place
        if place.beats:
            lines.append(f"  it stood at: {place}")
        if cause.is_follower:
            silent = [str(rank) for rank in self._ranks if rank not in {failure.rank for failure in failures}]
            lines.append(
                "  it lost its connection to another rank, and no rank has said why"
                + (f"; nothing is known of rank {', '.join(silent)}: killed, out of memory?" if silent else "")
            )
        if cause.lines:
            lines += [f"  its last lines ({log}):", *(f"    {line}" for line in cause.lines)]
        if cause.message is not None and not self._show_traceback:
            lines.append(f"  its traceback: {log}")
        return RunError("\n".join(lines))


@dataclass(frozen=True)
class Failure:
    """How a rank ended that did not end well."""

    rank: int
    exit_code: int
    """-N where signal N killed it; `GONE` where nothing is known."""
    message: str | None
    """In its own words; None if it could not say."""
    is_follower: bool
    """Whether it only lost its connection to another rank."""
    at: float
    """Seconds since the epoch."""
    lines: tuple[str, ...]
    """What it had printed last."""


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: the first that is none of a connection."""
    return min(failures, key=lambda failure: (failure.is_follower, failure.at, failure.rank))


def _ending(failure: Failure) -> str:
    code = failure.exit_code
    if code == GONE:
        return "ended without a word: killed, perhaps out of memory; what its launcher says stands above"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        "SIGKILL": ": out of memory? (the kernel's log tells: dmesg)",
        "SIGBUS": ": is shared memory (/dev/shm) full?",
        "SIGSEGV": ": a crash in native code",
        "SIGABRT": ": native code gave up",
    }
    return f"was killed by {name}{hints.get(name, '')}"


def _last_lines(log: Path, end: int | None, count: int) -> tuple[str, ...]:
    """The last lines of a log, or of its first `end` bytes."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END) if end is None else end
            file.seek(max(0, size - 8192))
            text = file.read(min(size, 8192)).decode(errors="replace")
    except FileNotFoundError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-count:]


def _show_cursor() -> None:
    """A rank that was killed within its progress bar has left the terminal without one."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()


@contextmanager
def _signals_counted() -> Iterator[_Signals]:
    """Ctrl-C and SIGTERM are counted within it, and do nothing else."""
    signals = _Signals()

    def handle(number: int, frame: FrameType | None) -> None:
        signals.count += 1

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield signals
    finally:
        for number in numbers:
            signal.signal(number, before[number])
