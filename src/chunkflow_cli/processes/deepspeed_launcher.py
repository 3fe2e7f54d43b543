"""Start ranks on the nodes of a hostfile with DeepSpeed's launcher, and reach them through files."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from chunkflow_cli.files import write_atomically
from chunkflow_cli.processes.environment import RUN_FOLDER, THREADS_OF_USER, WORKING_FOLDER, module_command
from chunkflow_cli.processes.failures import read_failure
from chunkflow_cli.processes.hostfile import Host
from chunkflow_cli.processes.node_variables import (
    OF_THE_LOADER,
    for_other_nodes,
    leave_variables,
    remove_variables,
)
from chunkflow_cli.processes.watch_folder import Order, WatchFolder, write_order
from chunkflow_cli.processes.workers import GONE, REAP_SECONDS


class DeepSpeedWorkers:
    """Ranks that DeepSpeed's launcher starts on any nodes; they and this process communicate through files."""

    def __init__(
        self,
        module: str,
        words: Sequence[str],
        watch: WatchFolder,
        hosts: Sequence[Host],
        environment: Mapping[str, str],
        variables: Mapping[str, str],
    ) -> None:
        """Start the launcher.

        Args:
            watch: on a file system that all nodes share.
            environment: of this process.
            variables: more variables for each rank.
        """
        self.watch = watch
        self.processes = sum(host.slots for host in hosts)
        self._renewed = float("-inf")
        self._renew_lease()
        for rank in range(self.processes):
            watch.log(rank).write_text("")
        listed = variables_of_user(environment)  # the command line sets these
        ours = {name: value for name, value in for_other_nodes(environment).items() if name not in listed}
        leave_variables(watch, {**ours, **variables})
        self._are_variables_gone = False
        hostfile, exported = watch.path / "hostfile", watch.path / "environment"
        hostfile.write_text("".join(f"{host}\n" for host in hosts))
        exported.write_text(exported_environment(environment, watch), encoding="utf-8")
        self._launcher = subprocess.Popen(
            deepspeed_command(hosts, hostfile=hostfile, module=module, words=words),
            env=launcher_environment(environment, watch, exported),
            cwd="/",  # the launcher adds its current folder to PYTHONPATH; workers go back to ours (`worker.enter`)
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _renew_lease(self) -> None:
        now = time.monotonic()
        if now - self._renewed >= 1.0:
            self._renewed = now
            write_atomically(self.watch.lease, str(now))

    def exit_codes(self) -> Mapping[int, int]:
        self._renew_lease()
        self._are_variables_gone = self._are_variables_gone or remove_variables(self.watch, range(self.processes))
        launcher = self._launcher.poll()  # before the records: a rank whose death it saw has written one by then
        records = {rank: read_failure(self.watch.failure(rank)) for rank in range(self.processes)}
        codes = {rank: record.exit_code for rank, record in records.items() if record is not None}
        if launcher is not None:
            rest = 0 if launcher == 0 else GONE
            codes = {rank: codes.get(rank, rest) for rank in range(self.processes)}
        return codes

    def order(self, order: Order) -> None:
        write_order(self.watch, order)

    def end(self) -> None:
        remove_variables(self.watch)
        self.order(Order.END)
        if self._launcher.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(2.0)  # meanwhile workers on other nodes read the order
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)  # together with its workers on this machine
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(REAP_SECONDS)


def launcher_environment(environment: Mapping[str, str], watch: WatchFolder, exported: Path) -> dict[str, str]:
    """Return the environment of DeepSpeed's launcher, which passes variables that begin with PYTHON to other nodes.

    Args:
        environment: of this process.
        exported: the file with the other variables for other nodes.
    """
    own = {
        RUN_FOLDER: str(watch.run_folder),
        WORKING_FOLDER: os.getcwd(),
        "DS_ENV_FILE": str(exported),
        "PYTHONSAFEPATH": "1",  # workers import nothing from their current folder
    }
    if "PYTHONPATH" in environment:
        paths = [os.path.abspath(path) for path in environment["PYTHONPATH"].split(os.pathsep) if path]
        own["PYTHONPATH"] = os.pathsep.join(paths)
    return {**environment, **own}


def deepspeed_command(hosts: Sequence[Host], *, hostfile: Path, module: str, words: Sequence[str]) -> list[str]:
    """Return the command line of DeepSpeed's launcher, which runs `python -m MODULE WORDS` for each rank of `hosts`."""
    is_here = len(hosts) == 1 and hosts[0].is_here
    command = module_command("deepspeed.launcher.runner", [f"--hostfile={hostfile}", "--quiet"])
    if is_here:
        command += ["--no_ssh_check", "--master_addr=127.0.0.1"]
    elif len(hosts) == 1:
        command += ["--force_multi"]  # else the launcher takes a single host for this machine
    command += ["--module", "--no_local_rank", module]
    return [*command, *(words if is_here else map(_quoted_for_remote_shell, words))]


def _quoted_for_remote_shell(word: str) -> str:
    """Quote a word so that the shell of the other node yields it unchanged.

    The launcher itself puts words that contain a space in double quotes and escapes the double quotes in them, and
    nothing else.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def _in_double_quotes(value: str) -> str:
    """Quote a variable's value, which the launcher puts in double quotes if it has unusual characters, and no more."""
    return re.sub(r'([\\$`"])', r"\\\1", value)


def variables_of_user(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for other nodes that the user has listed for DeepSpeed, in `.deepspeed_env`."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    lines: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        if (folder / name).is_file():
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                key, separator, value = line.partition("=")
                if separator:
                    lines[key.strip()] = value
    return lines


def exported_environment(environment: Mapping[str, str], watch: WatchFolder) -> str:
    """Return the text of the file that lists the variables for the command lines of other nodes.

    The rest is in a file that only the user can read (`node_variables.py`). DeepSpeed reads only one list of this kind,
    so this one includes the user's own.
    """
    lines = {name: _in_double_quotes(environment[name]) for name in OF_THE_LOADER if environment.get(name)}
    lines |= variables_of_user(environment)
    lines[RUN_FOLDER] = _in_double_quotes(str(watch.run_folder))
    lines[WORKING_FOLDER] = _in_double_quotes(os.getcwd())
    lines[THREADS_OF_USER] = environment.get("OMP_NUM_THREADS", "")
    if "OMP_NUM_THREADS" in environment:
        lines["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    return "".join(f"{key}={value}\n" for key, value in lines.items())
