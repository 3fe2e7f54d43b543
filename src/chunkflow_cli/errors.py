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
