"""What the processes of a run must all know before one of them goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import distributed

from chunkflow_cli.errors import RunError, UsageError


def own_rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Wait at the end for the other processes; if the block has failed in one, it fails in all.

    Without this, those that succeeded would wait at the next collective for one that never comes.

    Raises:
        RunError: names `what` was done, the rank that failed, and its error. In that rank its own error is raised.
        UsageError: the same, where that rank says that the user is at fault.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    errors: list[tuple[bool, str] | None] = [None] * process_count()
    if process_count() > 1:
        told = None if failure is None else (isinstance(failure, UsageError), f"{type(failure).__name__}: {failure}")
        try:
            distributed.all_gather_object(errors, told)
        except RuntimeError:  # another rank has gone; what failed here is what matters
            if failure is None:
                raise
    if failure is not None:
        raise failure
    for rank, told_by in enumerate(errors):
        if told_by is not None:
            is_usage, text = told_by
            raise (UsageError if is_usage else RunError)(f"{what} failed on rank {rank}: {text}")
