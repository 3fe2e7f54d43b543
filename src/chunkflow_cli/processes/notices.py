"""Print lines once per run: on its first rank, and not again in the same process."""

from __future__ import annotations

import sys
from functools import cache

from chunkflow_cli.processes.environment import rank


@cache
def say_once(line: str) -> None:
    """Print a line on stderr."""
    if rank() == 0:
        print(line, file=sys.stderr)


def warn_once(message: str) -> None:
    """Print a warning on stderr."""
    say_once(f"warning: {message}")
