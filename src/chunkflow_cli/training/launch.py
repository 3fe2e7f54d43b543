"""`chunkflow train` with several ranks: one process prepares the run, starts its workers and watches over them.

What must be right before anything is started (configuration, requirements, data in the cache, the run's folder) is
settled here, once. A worker is the same command again, `python -m chunkflow_cli train <the same words>`, which finds
itself to be one by its environment (`worker.py`). On one machine this process starts the workers; with
`launch.hostfile`, DeepSpeed's launcher does, on every node. Under torchrun or deepspeed nothing is started: the process
joins the others (`joining.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from chunkflow_cli.config.load import LoadedConfig, convert
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes import worker
from chunkflow_cli.processes.start import Host, read_hostfile, run_workers
from chunkflow_cli.processes.supervisor import Limits


def is_needed(loaded: LoadedConfig) -> bool:
    """Whether workers are to be started: several ranks are asked for, and this process is none of them yet."""
    launch = loaded.config.launch
    return not worker.is_started_by_launcher() and (launch.processes > 1 or launch.hostfile is not None)


def with_processes(loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with the number of ranks that there are: where `launch.processes` is left at 1, a hostfile or
    the launcher that has started this process says it.

    Raises:
        UsageError: they contradict each other, or the hostfile cannot be read.
    """
    launch = loaded.config.launch
    if worker.is_started_by_launcher():
        count, source = worker.processes(), "the launcher has started"
    elif launch.hostfile is not None:
        count, source = sum(host.slots for host in read_hostfile(launch.hostfile)), f"{launch.hostfile} has slots for"
    else:
        return loaded
    if launch.processes not in (1, count):
        raise UsageError(
            f"launch.processes={launch.processes}, but {source} {count}\n"
            "  leave launch.processes out, or give the same number to both"
        )
    if launch.processes == count:
        return loaded
    tree = loaded.tree.copy()
    tree.launch.processes = count
    return convert(tree, recipe=loaded.recipe, overrides=loaded.overrides)


def run(
    loaded: LoadedConfig, *, config_dir: str | None = None, debug: bool = False, json_output: bool = False
) -> dict[str, Any]:
    """Fine-tune with several ranks; returns what stands in report.json.

    Args:
        loaded: with `launch.processes` as `with_processes` gives it.
        config_dir: passed on to the workers.
        debug: show the traceback of a rank that failed.
        json_output: print no summary.

    Raises:
        UsageError: configuration, data or hostfile is at fault.
        RunError: a rank failed, died or hangs; the message names it and what it stood at.
        KeyboardInterrupt: the user stopped the run, and the ranks have saved a checkpoint.
    """
    import json

    import torch

    from chunkflow_cli.console import stderr_console, stdout_console
    from chunkflow_cli.training.display import print_training_summary
    from chunkflow_cli.training.inputs import load_run_data
    from chunkflow_cli.training.requirements import check_requirements
    from chunkflow_cli.training.run_folder import open_run_folder

    config = loaded.config
    hosts = None if config.launch.hostfile is None else read_hostfile(config.launch.hostfile)
    hf_config = check_requirements(loaded)
    _check_devices(config.launch.processes, hosts)
    load_run_data(config, hf_config)  # into the cache, where every rank finds it: a collective would not wait so long
    folder = open_run_folder(loaded)
    try:
        if folder.report.exists():
            stderr_console().print(
                f"This run is finished already. To run it again: checkpoint.resume=never\n  {folder.path}"
            )
        else:
            options = ["--config-dir", config_dir] if config_dir is not None else []
            limits = Limits(config.launch.grace_seconds, config.launch.hang_seconds)
            words = ["train", "--json", *options, *loaded.overrides]
            run_workers(
                words,
                folder.path,
                config.launch.processes,
                hosts,
                limits,
                has_gpu=torch.cuda.is_available(),
                show_traceback=debug,
            )
        if not folder.report.exists():
            raise RunError(f"all ranks have ended, but without a report\n  what they printed: {folder.path / 'logs'}")
        report: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
    finally:
        folder.close()
    if not json_output:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def _check_devices(processes: int, hosts: Sequence[Host] | None) -> None:
    import torch

    if hosts is not None and len(hosts) > 1 and shutil.which("pdsh") is None:
        raise UsageError(
            f"launch.hostfile names {len(hosts)} nodes, which DeepSpeed reaches by pdsh: it is not installed\n"
            "  install it (apt-get install pdsh), or start chunkflow train with torchrun on every node"
        )
    if hosts is None and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f"launch.processes={processes}: each needs a GPU of its own, and here are {torch.cuda.device_count()}"
        )
