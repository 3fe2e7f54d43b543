"""The two ways a command can end badly, each with its exit code.

`UsageError` is the user's to mend: a command, a configuration key, a row of the data. `RunError` is a run that
failed although it was asked for rightly. Both are printed without a traceback: what is wrong, where, what to do.
"""


class ChunkflowError(Exception):
    """Base of every error that is shown to the user as a few lines instead of a traceback."""

    exit_code = 1


class UsageError(ChunkflowError, ValueError):
    """The command, configuration or data is at fault (exit code 2)."""

    exit_code = 2


class RunError(ChunkflowError, RuntimeError):
    """A run failed: a loss that is not finite, an accounting that does not add up (exit code 1)."""

    exit_code = 1


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, ChunkflowError) else 1


def describe(error: BaseException) -> str:
    """An error in a few lines, for whoever looks at the screen."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ChunkflowError):
        return str(error)
    text = str(error).strip().splitlines()
    if _is_out_of_memory(error):
        return (
            f"out of memory. {text[0] if text else ''}\n"
            "  memory follows chunk.size x chunk.k: lower them, or set model.activation_checkpointing=full"
        )
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def is_unexpected(error: BaseException) -> bool:
    """Whether only its traceback tells what was done when it was raised."""
    return not isinstance(error, (ChunkflowError, KeyboardInterrupt)) and not _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
