"""Watch the workers of a run until all have ended, and say how the run ended: well, failed, hung or interrupted.

torch's own launcher (`torch.distributed.elastic`) is not used, for three reasons: it ends workers with SIGTERM, which
here means "save a checkpoint"; it names the rank whose death it sees first, which is as often a rank that merely lost
its connection; and its workers survive when it is killed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes.failures import FailureRecord, read_failure
from chunkflow_cli.processes.first_cause import explained, first_cause, silent_failure
from chunkflow_cli.processes.hang_watch import STACKS_SECONDS, hang_message, look_every, places
from chunkflow_cli.processes.heartbeat import Watchdog
from chunkflow_cli.processes.stop_signals import is_second
from chunkflow_cli.processes.watch_folder import Order
from chunkflow_cli.processes.worker import has_parent
from chunkflow_cli.processes.workers import GONE, Workers

POLL_SECONDS = 0.05
SETTLE_SECONDS = 2.0
"""When a rank has lost its connection, longest wait for the rank at the other end to report why."""
LEAVING_SECONDS = 15.0
"""Longest wait for a rank that reported a saved checkpoint to exit, which NCCL may prevent. A failed rank gets only
SETTLE_SECONDS."""


@dataclass(frozen=True)
class Limits:
    """How long a launcher waits for its ranks."""

    grace_seconds: float
    """From the first signal until all ranks must have ended."""
    hang_seconds: float
    """Without a new operation of any rank; 0 means no limit."""


class Supervision:
    """The watch over one run's workers, from their start to their end."""

    def __init__(self, workers: Workers, limits: Limits, received: Sequence[int], show_traceback: bool) -> None:
        """Watch `workers`. The caller adds each stop signal that it gets to `received` while `run` is running."""
        self._workers = workers
        self._watch = workers.watch
        self._ranks = range(workers.processes)
        self._limits = limits
        self._received = received
        self._show_traceback = show_traceback
        self._watchdog = Watchdog([self._watch.heartbeat(rank) for rank in self._ranks], time.monotonic)
        self._asked_at: float | None = None
        """When the ranks were asked to stop; monotonic clock."""
        self._died_at: dict[int, float] = {}
        """When the end of each rank was seen; seconds since the epoch."""
        self._leaving_since: dict[int, float] = {}
        """When the report of each rank that is about to end was first seen; monotonic clock."""

    def run(self) -> None:
        """Return when all ranks have ended well.

        Raises:
            UsageError: a rank reports a mistake of the user.
            RunError: a rank failed or was killed, all hang, or they did not stop when they were asked to.
            KeyboardInterrupt: the ranks were asked to stop, and have done so; or they were asked twice.
        """
        look_at = 0.0
        while True:
            codes = self._exit_codes()
            self._pass_on_signals()
            if any(self._is_failure(code) for code in codes.values()):
                raise self._failure()
            if any(codes.values()):
                self._ask_to_stop()  # one rank was asked to stop by someone else: all of them stop together
                if any(code < 0 for code in codes.values()):
                    raise KeyboardInterrupt  # that rank had nothing to save yet, and the others cannot save without it
            if len(codes) == len(self._ranks):
                if any(codes.values()):
                    raise KeyboardInterrupt
                return
            running = [rank for rank in self._ranks if rank not in codes]
            self._check_grace(running)
            if time.monotonic() >= look_at:
                self._check_hang(running)
                look_at = time.monotonic() + look_every(self._limits.hang_seconds)
            time.sleep(POLL_SECONDS)

    def _exit_codes(self) -> Mapping[int, int]:
        """Return the exit codes of the ranks that have ended.

        What a rank reports about its end counts, even if it crashes or hangs on the way out.
        """
        codes = dict(self._workers.exit_codes())
        for rank in self._ranks:
            if codes.get(rank) != 0 and (record := read_failure(self._watch.failure(rank))) is not None:
                since = self._leaving_since.setdefault(rank, time.monotonic())
                patience = LEAVING_SECONDS if record.exit_code == 130 else SETTLE_SECONDS
                if rank in codes or time.monotonic() - since > patience:
                    codes[rank] = record.exit_code
            if rank in codes:
                self._died_at.setdefault(rank, time.time())
        return codes

    def _is_failure(self, code: int) -> bool:
        if code in (0, 130):
            return False
        return self._asked_at is None or code not in (-signal.SIGTERM, GONE)

    def _pass_on_signals(self) -> None:
        if self._received:
            self._ask_to_stop()
        if is_second(self._received) and not has_parent():
            raise KeyboardInterrupt

    def _ask_to_stop(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._workers.order(Order.STOP)

    def _check_grace(self, running: Sequence[int]) -> None:
        limit = self._limits.grace_seconds
        if self._asked_at is not None and time.monotonic() - self._asked_at > limit:
            raise RunError(
                f"the ranks did not stop within launch.grace_seconds={limit:g} and were killed\n"
                f"{places(self._watchdog.look(), running)}\n"
                "  the last checkpoint is from before the signal; if saving takes longer, raise launch.grace_seconds"
            )

    def _check_hang(self, running: Sequence[int]) -> None:
        message = hang_message(self._watchdog.look(), running, self._limits.hang_seconds, self._watch)
        if message is not None:
            self._workers.order(Order.STACKS)
            time.sleep(STACKS_SECONDS)
            raise RunError(message)

    def _failure(self) -> Exception:
        """Return the error of the rank that failed first. If others report before it does, give it a moment to."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            codes = self._exit_codes()
            failures = self._failures(codes)
            rank = first_cause(failures)
            is_clear = not failures[rank].is_follower and failures[rank].exit_code != UsageError.exit_code
            if is_clear or len(codes) == len(self._ranks) or time.monotonic() > deadline:
                place, log = self._watchdog.look()[rank].place, self._watch.log(rank)
                return explained(rank, failures, len(self._ranks), place, log, show_traceback=self._show_traceback)
            time.sleep(POLL_SECONDS)

    def _failures(self, codes: Mapping[int, int]) -> dict[int, FailureRecord]:
        failures = {}
        for rank in self._ranks:
            record = read_failure(self._watch.failure(rank))
            if record is None and self._is_failure(codes.get(rank, 0)):
                # The kernel closes the connections of a process before its death can be seen.
                at = self._died_at[rank] - 2 * POLL_SECONDS
                failures[rank] = silent_failure(codes[rank], at, self._watch.log(rank))
            elif record is not None and self._is_failure(record.exit_code):
                failures[rank] = record
        return failures
