"""Let the processes of a run agree on values before any of them continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import distributed

from chunkflow_cli.errors import RunError, UsageError

Value = TypeVar("Value")


def own_rank() -> int:
    """Return this process's rank; 0 outside of a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count() -> int:
    """Return the number of processes in the run; 1 outside of a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gather(value: Value) -> list[Value]:
    """Return the value that each process gives, by rank; any object that can be pickled. Every rank calls it."""
    if process_count() == 1:
        return [value]
    values: list[Value | None] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Wait for the other processes at the end of the block; if it has failed in one, it fails in all.

    Without this, the processes that succeeded would wait at the next collective for one that never comes.

    Raises:
        RunError: the block failed on another rank; names `what` failed, that rank and its error. The failed rank raises
            its own error.
        UsageError: the same, if that rank raised a `UsageError`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures: list[tuple[bool, str] | None] = [None] * process_count()
    if process_count() > 1:
        own = None if failure is None else (isinstance(failure, UsageError), f"{type(failure).__name__}: {failure}")
        try:
            distributed.all_gather_object(failures, own)
        except RuntimeError:  # another rank has gone; what failed here is what matters
            if failure is None:
                raise
    if failure is not None:
        raise failure
    for rank, found in enumerate(failures):
        if found is not None:
            is_usage, message = found
            raise (UsageError if is_usage else RunError)(f"{what} failed on rank {rank}: {message}")
