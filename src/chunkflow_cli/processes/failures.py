"""What a worker died of: it writes it down, and its launcher shows that of the rank that was first."""

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
from chunkflow_cli.processes.worker import WatchFolder, rank, worker_folder


@dataclass(frozen=True)
class FailureRecord:
    """What a worker died of, in its own words."""

    exit_code: int
    """1 the run failed, 2 the user is at fault, 130 it was asked to stop."""
    message: str
    is_follower: bool
    """Whether it only lost its connection to another rank, as all do when one has died."""
    at: float
    """Seconds since the epoch, when the error was seen: before the connections to the others were closed."""
    log_bytes: int
    """How long the rank's log was then; the traceback follows."""


_BROKEN_CONNECTION = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|gloo/transport|ncclRemoteError|ncclSystemError|"
    r"NCCL communicator was aborted|process group.* (watchdog|aborted)|ProcessGroup(NCCL|Gloo)|failed to recv|"
    r"timed out waiting .* for (recv|send) operation|remote process has exited",
    re.IGNORECASE,
)
"""What torch.distributed says where a peer has gone: gloo and NCCL raise plain RuntimeErrors as well."""
_CONNECTION_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "BrokenPipeError")


def reads_like_broken_connection(text: str) -> bool:
    return _BROKEN_CONNECTION.search(text) is not None


@contextmanager
def failures_recorded() -> Iterator[None]:
    """Records what passes through it, for the launcher; in place before a process group is closed by the error.

    The other ranks notice at once that this one has gone: of what all of them say then, the launcher shows the first.
    """
    try:
        yield
    except BaseException as error:
        record_failure(error)
        raise


def record_failure(error: BaseException) -> None:
    """Write down what this worker dies of, once; in a process without a launcher of ours nothing is done."""
    folder = worker_folder()
    if folder is None or WatchFolder(folder).failure(rank()).exists():
        return
    watch = WatchFolder(folder)
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


def read_failure(path: Path) -> FailureRecord | None:
    """None if the rank has written none."""
    try:
        return FailureRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _is_follower(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if kinds & set(_CONNECTION_ERRORS) or (
            isinstance(cause, RuntimeError) and not isinstance(cause, ChunkflowError)
            and reads_like_broken_connection(str(cause))
        ):  # fmt: skip
            return True
        cause = cause.__cause__
    return False
