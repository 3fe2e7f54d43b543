"""The port at which the ranks of a run meet: rank 0 takes a free one, and tells the others in the folder of the run.

A launcher that looks for a free port gives it back before rank 0 listens there, and meanwhile another process may take
it. A fixed port, such as DeepSpeed's 29500, stops the second run on a node.
"""

from __future__ import annotations

import time

from chunkflow_cli.processes.watch_folder import WatchFolder

POLL_SECONDS = 0.05


def announce_port(watch: WatchFolder, port: int) -> None:
    """Tell the other ranks at which port rank 0 listens."""
    watch.port.write_text(f"{port}\n")


def announced_port(watch: WatchFolder) -> int:
    """Return the port at which rank 0 listens, once it does. The launcher ends ranks that would wait forever."""
    while not (text := watch.port.read_text()).endswith("\n"):
        time.sleep(POLL_SECONDS)
    return int(text)
