"""Record why a worker failed. The launcher shows the record of the rank that failed first."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from chunkflow_cli.errors import ChunkflowError, describe, exit_code_of
from chunkflow_cli.files import write_json
from chunkflow_cli.processes.environment import rank, worker_folder
from chunkflow_cli.processes.watch_folder import WatchFolder


@dataclass(frozen=True)
class FailureRecord:
    """The reason why a worker failed, from its own record or, if there is none, as its launcher sees it."""

    exit_code: int
    """1: the run failed; 2: a mistake of the user; 130: the worker was asked to stop; -N: signal N killed it."""
    message: str | None
    """None if the worker left none."""
    is_follower: bool
    """True if the worker only lost its connection to another rank, as all ranks do when one has died."""
    at: float
    """When the error was raised, before the connections to other ranks were closed; seconds since the epoch."""
    log_bytes: int | None
    """Length of the rank's log at that time, after which the traceback follows; None if there is no traceback."""


_BROKEN_CONNECTION = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|gloo/transport|ncclRemoteError|ncclSystemError|"
    r"NCCL communicator was aborted|process group.* (watchdog|aborted)|ProcessGroup(NCCL|Gloo)|failed to recv|"
    r"timed out waiting .* for (recv|send) operation|remote process has exited",
    re.IGNORECASE,
)
"""The messages of torch.distributed when another rank is gone; gloo and NCCL also raise plain RuntimeErrors."""
_CONNECTION_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "BrokenPipeError"}


def reads_like_broken_connection(text: str) -> bool:
    """Return whether a message says that the connection to another rank broke."""
    return _BROKEN_CONNECTION.search(text) is not None


@contextmanager
def failures_recorded() -> Iterator[None]:
    """Record an error that leaves the block, for the launcher. Use it inside the block that closes the process group.

    Once the process group is closed the other ranks fail too, and the launcher shows the record with the earliest time.
    """
    try:
        yield
    except BaseException as error:
        record_failure(error)
        raise


def record_failure(error: BaseException) -> bool:
    """Write down why this worker fails, unless it has done so before.

    Return whether there is a record: not in a process that is no worker, or whose launcher's folder is not there.
    """
    folder = worker_folder()
    if folder is None or not WatchFolder(folder).path.is_dir():
        return False
    watch = WatchFolder(folder)
    if watch.failure(rank()).exists():
        return True
    log = watch.log(rank())
    sys.stdout.flush()
    record = FailureRecord(
        exit_code=exit_code_of(error),
        message=describe(error),
        is_follower=_is_follower(error),
        at=time.time(),
        log_bytes=log.stat().st_size if log.exists() else 0,
    )
    write_json(watch.failure(rank()), asdict(record))
    if not isinstance(error, KeyboardInterrupt):
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    return True


def read_failure(path: Path) -> FailureRecord | None:
    """Return the record of a rank; None if it has written none, or if the file holds something else."""
    try:
        record = FailureRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if type(record.exit_code) is int and type(record.at) is float else None


def _is_follower(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        is_plain = isinstance(cause, RuntimeError) and not isinstance(cause, ChunkflowError)
        if kinds & _CONNECTION_ERRORS or (is_plain and reads_like_broken_connection(str(cause))):
            return True
        cause = cause.__cause__
    return False
