"""Find the rank that failed first, and explain it. The failures of other ranks usually follow from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes.failures import FailureRecord, reads_like_broken_connection
from chunkflow_cli.processes.heartbeat import Place
from chunkflow_cli.processes.workers import GONE

LAST_LINES = 10
"""Number of lines of the failed rank's log in an error message."""
LAST_LINES_WITH_TRACEBACK = 60


def silent_failure(exit_code: int, at: float, log: Path) -> FailureRecord:
    """Return the record of a rank that left none, such as one that was killed."""
    is_follower = exit_code == -signal.SIGABRT and reads_like_broken_connection("\n".join(_last_lines(log)))
    return FailureRecord(exit_code, None, is_follower, at, None)


def first_cause(failures: Mapping[int, FailureRecord]) -> int:
    """Return the rank that failed first; one that only lost its connection counts only if all of them did."""
    return min(failures, key=lambda rank: (failures[rank].is_follower, failures[rank].at, rank))


def explained(
    rank: int, failures: Mapping[int, FailureRecord], processes: int, place: Place, log: Path, *, show_traceback: bool
) -> UsageError | RunError:
    """Return the error to show for a run that failed.

    Args:
        rank: the rank that failed first, with the `place` of its last operation and its `log`.
        failures: the failures known so far, by rank.
        show_traceback: show the traceback; if False, say where to find it.
    """
    cause = failures[rank]
    if cause.exit_code == UsageError.exit_code and cause.message is not None:
        # Rank 0 is on this machine: a mistake that it sees is one that every process here would see.
        is_everywhere = 0 in failures and failures[0].message == cause.message
        return UsageError(cause.message if is_everywhere else f"rank {rank}: {cause.message}")
    lines = [f"rank {rank} {_ending(cause.exit_code)}" if cause.message is None else f"rank {rank}: {cause.message}"]
    if place.beats:
        lines.append(f"  last seen at: {place}")
    if cause.is_follower:
        silent = [str(other) for other in range(processes) if other not in failures]
        lines.append(
            "  it lost its connection to another rank, and no rank reported why"
            + (f"; nothing is known of rank {', '.join(silent)}: killed, out of memory?" if silent else "")
        )
    printed = _last_lines(log, LAST_LINES_WITH_TRACEBACK) if show_traceback else _last_lines(log, end=cause.log_bytes)
    if printed:
        lines += [f"  its last lines ({log}):", *(f"    {line}" for line in printed)]
    if cause.message is not None and not show_traceback:
        lines.append(f"  its traceback: {log}")
    return RunError("\n".join(lines))


def _ending(code: int) -> str:
    if code == GONE:
        return (
            "exited without an error message, probably killed (out of memory?); "
            "see the output of DeepSpeed's launcher above"
        )
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        "SIGKILL": ": out of memory? (dmesg shows the kernel's log)",
        "SIGBUS": ": is shared memory (/dev/shm) full?",
        "SIGSEGV": ": a crash in native code",
        "SIGABRT": ": native code aborted",
    }
    return f"was killed by {name}{hints.get(name, '')}"


def _last_lines(log: Path, count: int = LAST_LINES, *, end: int | None = None) -> list[str]:
    """Return the last lines of a log, or of its first `end` bytes."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END) if end is None else end
            file.seek(max(0, size - 8192))
            text = file.read(min(size, 8192)).decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
