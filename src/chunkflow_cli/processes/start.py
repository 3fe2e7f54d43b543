"""Start the ranks of a run: on this machine, or on the nodes of a hostfile by DeepSpeed's launcher."""

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

from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes import worker
from chunkflow_cli.processes.supervisor import DeepSpeedWorkers, Limits, LocalWorkers, Workers, supervise
from chunkflow_cli.processes.worker import WatchFolder


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int
    """Ranks that it takes."""

    @property
    def is_here(self) -> bool:
        return self.name in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def run_workers(
    words: Sequence[str],
    run_folder: Path,
    processes: int,
    hosts: Sequence[Host] | None,
    limits: Limits,
    *,
    has_gpu: bool = False,
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
        has_gpu: whether this machine has a GPU; DeepSpeed's launcher is told so.
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
        environment = deepspeed_environment(os.environ, watch, has_gpu=has_gpu)
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
        "MASTER_PORT": str(free_port()),
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
        command += ["--no_ssh_check", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
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


def deepspeed_environment(environment: Mapping[str, str], watch: WatchFolder, *, has_gpu: bool) -> dict[str, str]:
    """The launcher's environment; to other nodes it carries what a file names, and that file is ours."""
    return {
        **({} if has_gpu else {"DS_ACCELERATOR": "cpu"}),  # it would look for one, and warn
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


def free_port() -> int:
    """Return a TCP port of this machine that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
