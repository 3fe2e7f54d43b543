"""Run the command line as a process: its environment, its streams, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from chunkflow_cli.cli.app import app
from chunkflow_cli.errors import ChunkflowError
from chunkflow_cli.processes import environment, streams, worker


@contextmanager
def _output_complete() -> Iterator[None]:
    """Print the error, and exit, if the environment is wrong, or what the block printed cannot be written.

    Such as help to a full disk.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except ChunkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def main() -> None:
    """Run the command line.

    A worker leaves without the end of the interpreter, which its threads could abort; so does an interrupted command,
    for which the interpreter may take another exit code.
    """
    streams.prepare()
    with _output_complete():
        environment.check_own_variables()
    worker.end_with_parent()
    environment.forget_other_ranks()
    if os.environ.get("COLUMNS", "").strip("0") == "":
        os.environ.pop("COLUMNS", None)  # terminals without a size set 0, in which rich would print nothing
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that we or a library start imports files of the current folder
    try:
        with _output_complete():
            app()
    except SystemExit as end:
        if (environment.is_started_by_launcher() or end.code == 130) and not isinstance(end.code, str):
            worker.leave(end.code or 0)
        raise
