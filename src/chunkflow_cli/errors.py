"""The two kinds of error that a command shows to its user, each with its exit code.

A `UsageError` is for the user to fix: a command, a configuration key, a row of the data. A `RunError` is a run that
failed although it was requested correctly. Both are printed without a traceback: what is wrong, where, and what to do.
A path that the file system refuses is for the user to fix, too.
"""

from __future__ import annotations

import errno

_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says on a CPU, where page-locked memory runs out, and where cuBLAS gets none."""

_IN_ONE_ORDER = "does not have a deterministic implementation"
"""What torch says of operations that `train.deterministic` forbids."""


class ChunkflowError(Exception):
    """Base of all errors that are shown as a few lines instead of a traceback."""

    exit_code = 1


class UsageError(ChunkflowError, ValueError):
    """A mistake in the command, the configuration or the data (exit code 2)."""

    exit_code = 2


class RunError(ChunkflowError, RuntimeError):
    """A run that failed, such as one with a loss that is not finite or samples that are missing (exit code 1)."""

    exit_code = 1


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that an error ends; 130 for Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, ChunkflowError):
        return error.exit_code
    return 2 if _is_refused_by_file_system(error) else 1


def describe(error: BaseException) -> str:
    """Return an error as the few lines that a user reads."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ChunkflowError):
        return str(error)
    text = str(error).strip().splitlines()
    if is_out_of_memory(error):
        return (
            f"out of memory. {text[0] if text else ''}\n"
            "  memory follows chunk.size x chunk.k: lower them, or set model.activation_checkpointing=full"
        )
    if _is_not_deterministic(error):
        return (
            f"train.deterministic=true: {text[0].partition(', but')[0]} on this device\n  set train.deterministic=false"
        )
    if _is_refused_by_file_system(error):
        assert isinstance(error, OSError)
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_unexpected(error: BaseException) -> bool:
    """Return whether you need the traceback to understand an error."""
    is_told = isinstance(error, (ChunkflowError, KeyboardInterrupt)) or _is_refused_by_file_system(error)
    return not is_told and not is_out_of_memory(error) and not _is_not_deterministic(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; outside of its allocator for GPUs, torch says it in words."""
    is_said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or is_said


def _is_not_deterministic(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _IN_ONE_ORDER in str(error)


def _is_refused_by_file_system(error: BaseException) -> bool:
    """Whether a path was refused for what it is or where it is: not writable, full, too long, no folder, a loop."""
    return isinstance(error, OSError) and error.filename is not None and error.errno in _REFUSED
