"""The program: `chunkflow`, or `python -m chunkflow_cli` for launchers that start a module."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. Its imports take a moment, in which Ctrl-C must not show a traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)
    if __name__ == "__main__" and sys.path[0] == os.getcwd():  # `python -m`: files there are not our modules
        del sys.path[0]
    from chunkflow_cli.cli.main import main

    main()


def _end(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
