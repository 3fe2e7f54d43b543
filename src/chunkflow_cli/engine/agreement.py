"""What the processes of a run must all know before one of them goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import distributed

from chunkflow_cli.errors import RunError


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
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if process_count() > 1:
        errors: list[str | None] = [None] * process_count()
        distributed.all_gather_object(errors, None if failure is None else f"{type(failure).__name__}: {failure}")
    else:
        errors = []
    if failure is not None:
        raise failure
    for rank, error_text in enumerate(errors):
        if error_text is not None:
            raise RunError(f"{what} failed on rank {rank}: {error_text}")
