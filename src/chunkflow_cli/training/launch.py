"""`chunkflow train` with several ranks: one process prepares the run, starts its workers and watches them.

It checks the configuration, the requirements, the data and the run's folder once, before any worker starts. A worker
runs the same command again, `python -m chunkflow_cli train <the same words>`, and recognizes itself by its environment
(`processes/environment.py`). On one machine this process starts the workers; with `launch.hostfile`, DeepSpeed's
launcher starts them on every node. Under torchrun or deepspeed nothing is started: the process joins the other ranks
(`joining.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chunkflow_cli.config.load import LoadedConfig, convert
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes import environment, streams
from chunkflow_cli.processes.hostfile import Host, read_hostfile
from chunkflow_cli.processes.start import run_workers
from chunkflow_cli.processes.supervisor import Limits

if TYPE_CHECKING:
    from chunkflow_cli.training.run_folder import RunFolder


def is_needed(loaded: LoadedConfig) -> bool:
    """Return whether this process must start workers: several ranks are wanted, and it is not one of them."""
    launch = loaded.config.launch
    return not environment.is_started_by_launcher() and (launch.processes > 1 or launch.hostfile is not None)


def with_processes(loaded: LoadedConfig) -> LoadedConfig:
    """Return the configuration with the actual number of ranks.

    The launcher that started this process, or else a hostfile, sets `launch.processes` if it is left at 1.

    Raises:
        UsageError: the two numbers contradict each other, or the hostfile cannot be read.
    """
    launch = loaded.config.launch
    if environment.is_started_by_launcher():
        environment.check_variables()
        count, source = environment.processes(), "the launcher has started"
    elif launch.hostfile is not None:
        count, source = sum(host.slots for host in read_hostfile(launch.hostfile)), f"{launch.hostfile} has slots for"
    else:
        return loaded
    if launch.processes not in (1, count):
        raise UsageError(
            f"launch.processes={launch.processes}, but {source} {count}\n"
            "  leave launch.processes out, or give both the same number"
        )
    if launch.processes == count:
        return loaded
    tree = loaded.tree.copy()
    tree.launch.processes = count
    return convert(tree, recipe=loaded.recipe, overrides=loaded.overrides)


def run(
    loaded: LoadedConfig,
    *,
    keys: Sequence[str] = (),
    config_dir: str | None = None,
    debug: bool = False,
    json_output: bool = False,
) -> dict[str, Any]:
    """Fine-tune with several ranks, print a summary unless `json_output` is set, and return the content of report.json.

    Args:
        loaded: the configuration that `with_processes` returns.
        keys: `FoundData.keys`, if this process has read the data before.
        config_dir: passed on to the workers.
        debug: show the traceback of a rank that failed.

    Raises:
        UsageError: the configuration, the data or the hostfile is wrong.
        RunError: a rank failed, died or hangs; the message names it and its last operation.
        KeyboardInterrupt: the user stopped the run, and the ranks have saved a checkpoint.
    """
    # These import torch, which takes seconds: a mistake in the configuration is found and shown before.
    import torch

    from chunkflow_cli.console import stdout_console
    from chunkflow_cli.training.display import print_training_summary
    from chunkflow_cli.training.inputs import FoundData
    from chunkflow_cli.training.joining import read_and_open
    from chunkflow_cli.training.requirements import check_requirements

    config = loaded.config
    hosts = None if config.launch.hostfile is None else read_hostfile(config.launch.hostfile)
    is_here = hosts is None or all(host.is_here for host in hosts)
    hf_config = check_requirements(loaded, device=None if is_here else torch.device("cuda")).hf_config
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _check_devices(config.launch.processes, hosts, gpus)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed's launcher searches for a GPU, and warns
    # Ranks that see the same cache do not read or hash the data again.
    folder, data = read_and_open(loaded, hf_config, keys)
    streams.fall_back_to(folder.path / "logs" / "launcher.log")
    try:
        report = folder.report_of_finished()
        if report is None:
            options = ["--config-dir", config_dir] if config_dir is not None else []
            run_workers(
                ["train", "--json", *options, *loaded.overrides],
                folder.path,
                config.launch.processes,
                hosts,
                Limits(config.launch.grace_seconds, config.launch.hang_seconds),
                show_traceback=debug,
                variables={environment.FOUND_DATA: str(FoundData.of(data))},
            )
            report = _report_of_workers(folder)
    finally:
        folder.close()
    if not json_output:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def _report_of_workers(folder: RunFolder) -> dict[str, Any]:
    if not folder.report.exists():
        raise RunError(
            f"all ranks have ended, but did not write a report\n  see what they printed: {folder.path / 'logs'}"
        )
    return folder.read_report()


def _check_devices(processes: int, hosts: Sequence[Host] | None, gpus: int) -> None:
    if hosts is not None and len(hosts) > 1 and shutil.which("pdsh") is None:
        raise UsageError(
            f"launch.hostfile names {len(hosts)} nodes, and DeepSpeed needs pdsh to reach them: it is not installed\n"
            "  install it (apt-get install pdsh), or start chunkflow train with torchrun on every node"
        )
    if hosts is None and 0 < gpus < processes:
        raise UsageError(
            f"launch.processes={processes}: each process needs a GPU of its own, and this machine has {gpus}\n"
            f"  set launch.processes={gpus}, or name more nodes in launch.hostfile"
        )
