"""`chunkflow train` with several ranks: one process prepares the run, starts its workers and watches over them.

What must be right before anything is started (configuration, requirements, data in the cache, the run's folder) is
settled here, once. A worker is the same command again, `python -m chunkflow_cli train <the same words>`, which finds
itself to be one by its environment (`worker.py`). On one machine this process starts the workers; with
`launch.hostfile`, DeepSpeed's launcher does, on every node. Under torchrun or deepspeed nothing is started: the process
joins the others (`joining.py`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkflow_cli import worker
from chunkflow_cli.config import LoadedConfig, convert
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.supervisor import DeepSpeedWorkers, Limits, LocalWorkers, Workers, supervise
from chunkflow_cli.worker import WatchFolder


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """Ranks that it takes."""

    @property
    def is_here(self) -> bool:
        return self.name in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


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

    from chunkflow_cli.report import stderr_console, stdout_console
    from chunkflow_cli.report.training import print_training_summary
    from chunkflow_cli.requirements import check_requirements
    from chunkflow_cli.run_data import load_run_data
    from chunkflow_cli.run_folder import open_run_folder

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
            run_workers(words, folder.path, config.launch.processes, hosts, limits, show_traceback=debug)
        if not folder.report.exists():
            raise RunError(f"all ranks have ended, but without a report\n  what they printed: {folder.path / 'logs'}")
        report: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
    finally:
        folder.close()
    if not json_output:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def run_workers(
    words: Sequence[str],
    run_folder: Path,
    processes: int,
    hosts: Sequence[Host] | None,
    limits: Limits,
    *,
    show_traceback: bool = False,
    module: str = "chunkflow_cli",
) -> None:
    """Start the ranks of a run and stay until all have ended.

    Args:
        words: of each rank's command line.
        run_folder: opened and locked.
        processes: ranks, over all hosts.
        hosts: None for this machine without a hostfile.
        limits: of patience.
        show_traceback: of a rank that failed.
        module: what each rank runs, as in `python -m`.

    Raises:
        UsageError, RunError, KeyboardInterrupt: as `supervise`.
    """
    watch = WatchFolder(run_folder.resolve())
    start: Callable[[], Workers]
    if hosts is None:
        command = [sys.executable, "-m", module, *words]
        environment = local_environment(os.environ, processes)
        start = lambda: LocalWorkers(command, watch, processes, environment)  # noqa: E731
    else:
        command = deepspeed_command(hosts, hostfile=watch.path / "hostfile", module=module, words=words)
        environment = deepspeed_environment(os.environ, watch)
        start = lambda: _start_deepspeed(command, watch, hosts, environment)  # noqa: E731
    try:
        supervise(start, watch, limits, show_traceback=show_traceback)
    finally:
        if hosts is None:  # workers on other nodes may still be reading theirs
            shutil.rmtree(watch.path)


def local_environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """What the ranks of one machine have in common, as torchrun would set it."""
    return {
        worker.THREADS_OF_USER: environment.get("OMP_NUM_THREADS", ""),
        "OMP_NUM_THREADS": str(worker.threads_of_each(processes)),
        # What torchrun says of a world of its own, such as of one rank, would make ours look for each other there.
        **{name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")},
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


# DeepSpeed's launcher


def read_hostfile(path: str) -> list[Host]:
    """The nodes of a hostfile: lines of `HOST slots=N`, as of MPI and DeepSpeed; `#` begins a comment.

    Raises:
        UsageError: there is no such file, or a line of it is nothing of the kind.
    """
    if not Path(path).is_file():
        raise UsageError(f"launch.hostfile={path}: there is no such file\n  it holds lines such as: node-1 slots=8")
    hosts: list[Host] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UsageError(f"launch.hostfile={path}, line {number}: {text!r} is not of the kind: node-1 slots=8")
        if match.group(1) in {host.name for host in hosts}:
            raise UsageError(f"launch.hostfile={path}, line {number}: {match.group(1)} is there twice")
        hosts.append(Host(match.group(1), int(match.group(2))))
    if not hosts:
        raise UsageError(f"launch.hostfile={path} names no host\n  it holds lines such as: node-1 slots=8")
    return hosts


def deepspeed_command(hosts: Sequence[Host], *, hostfile: Path, module: str, words: Sequence[str]) -> list[str]:
    """The command line of DeepSpeed's launcher.

    Args:
        hosts: the nodes.
        hostfile: where they are written down for the launcher.
        module: what each rank runs, as in `python -m`.
        words: of each rank's command line.
    """
    is_here = len(hosts) == 1 and hosts[0].is_here
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--quiet"]
    if is_here:
        command += ["--no_ssh_check", "--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    elif len(hosts) == 1:
        command += ["--force_multi"]  # it takes a single host for this machine
    command += ["--module", "--no_local_rank", module]
    return [*command, *(words if is_here else map(_quoted_for_remote_shell, words))]


def _quoted_for_remote_shell(word: str) -> str:
    """A word as the launcher must get it, so that the shell of the other node gives it back.

    The launcher itself puts words with a space between double quotes and escapes those within, and nothing else.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def deepspeed_environment(environment: Mapping[str, str], watch: WatchFolder) -> dict[str, str]:
    """The launcher's environment; to other nodes it carries what a file names, and that file is ours."""
    import torch

    return {
        **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),  # it would look for one, and warn
        **environment,
        worker.RUN_FOLDER: str(watch.run_folder),
        "DS_ENV_FILE": str(watch.path / "environment"),
    }


def exported_environment(environment: Mapping[str, str], watch: WatchFolder) -> str:
    """What the launcher sets on other nodes: the user's own such file if there is one, and what workers need."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    lines: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        if (folder / name).is_file():
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                key, separator, value = line.partition("=")
                if separator:
                    lines[key.strip()] = value
    lines[worker.RUN_FOLDER] = str(watch.run_folder)
    lines[worker.THREADS_OF_USER] = environment.get("OMP_NUM_THREADS", "")
    if "OMP_NUM_THREADS" in environment:
        lines["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def _start_deepspeed(
    command: Sequence[str], watch: WatchFolder, hosts: Sequence[Host], environment: Mapping[str, str]
) -> Workers:
    (watch.path / "hostfile").write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
    (watch.path / "environment").write_text(exported_environment(os.environ, watch), encoding="utf-8")
    return DeepSpeedWorkers(command, watch, sum(host.slots for host in hosts), environment)


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
