"""Start the ranks of a run and wait for them: on this machine, or on the nodes of a hostfile."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from chunkflow_cli.processes.deepspeed_launcher import DeepSpeedWorkers
from chunkflow_cli.processes.environment import local_environment, module_command
from chunkflow_cli.processes.hostfile import Host
from chunkflow_cli.processes.stop_signals import stop_signals_handled
from chunkflow_cli.processes.supervisor import Limits, Supervision
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.workers import LocalWorkers, Workers


def run_workers(
    words: Sequence[str],
    run_folder: Path,
    processes: int,
    hosts: Sequence[Host] | None,
    limits: Limits,
    *,
    show_traceback: bool = False,
    module: str = "chunkflow_cli",
    variables: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Start the ranks of a run and return when all have ended well. No rank is alive when this returns or raises.

    Args:
        words: the arguments of each rank's command line.
        run_folder: the folder of the run, opened and locked by this process.
        processes: the number of ranks on all hosts together.
        hosts: the nodes, on which DeepSpeed's launcher starts the ranks; None starts them on this machine without it.
        limits: how long to wait for ranks that hang or are asked to stop.
        show_traceback: show the traceback of a rank that failed.
        module: what each rank runs, as in `python -m`.
        variables: environment variables of each rank, besides those of this process.

    Raises:
        UsageError, RunError, KeyboardInterrupt: as `Supervision.run`.
    """
    watch = WatchFolder(run_folder.resolve())
    watch.prepare()
    start: Callable[[], Workers]
    if hosts is None:
        environment = {**local_environment(os.environ, processes), **variables}
        start = partial(LocalWorkers, module_command(module, words), watch, processes, environment)
    else:
        start = partial(DeepSpeedWorkers, module, words, watch, hosts, os.environ, variables)
    received: list[int] = []
    try:
        with stop_signals_handled(lambda number, frame: received.append(number)):
            workers = start()
            try:
                Supervision(workers, limits, received, show_traceback).run()
            finally:
                workers.end()
                _show_cursor()
    finally:
        if hosts is None:  # workers on other nodes may still be reading the folder
            shutil.rmtree(watch.path)


def _show_cursor() -> None:
    """Show the terminal's cursor again, which a rank that is killed while it draws its progress bar leaves hidden."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()
