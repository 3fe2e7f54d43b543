"""What ranks need to know on any node: the user's variables, the port at which they meet, the memory they may use."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from chunkflow_cli.config.load import load
from chunkflow_cli.engine.distributed import meet
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes import deepspeed_launcher
from chunkflow_cli.processes.deepspeed_launcher import DeepSpeedWorkers, exported_environment
from chunkflow_cli.processes.environment import check_variables, local_environment
from chunkflow_cli.processes.heartbeat import Heartbeat
from chunkflow_cli.processes.host_memory import usable_memory_bytes
from chunkflow_cli.processes.hostfile import Host
from chunkflow_cli.processes.meeting import announced_port
from chunkflow_cli.processes.node_variables import for_other_nodes, take_variables
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.training import launch
from chunkflow_cli.training.requirements import check_requirements

OF_THE_USER = {
    "HF_HOME": "/scratch/my models", "HF_TOKEN": "hf_secret", "HUGGING_FACE_HUB_TOKEN": "hf_old", "XDG_CACHE_HOME": "/s",
    "GLOO_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5_0:1", "NCCL_DEBUG": "INFO", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "FI_PROVIDER": "efa",
    "https_proxy": "http://me:pa$$word@proxy:3128", "NO_PROXY": "localhost", "SSL_CERT_FILE": "/etc/our.pem",
}  # fmt: skip
"""Variables that decide what a rank downloads, where it looks, and over which network it talks."""
OF_THIS_MACHINE = {
    "CUDA_VISIBLE_DEVICES": "3",
    "HOME": "/home/me",
    "HOSTNAME": "head",
    "SSH_AUTH_SOCK": "/tmp/a",
    "A": "b",
}


class FakeLauncher:
    """DeepSpeed's launcher, which would need other nodes."""

    pid = 2**30

    def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
        self.command, self.env = command, env

    def poll(self) -> int | None:
        return None

    def wait(self, timeout: float) -> int:
        return 0


def test_variables_of_the_user_reach_other_nodes_and_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the hub in a command line can be read by every user of the machine; a rank without it cannot load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(deepspeed_launcher.subprocess, "Popen", FakeLauncher)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\n")
    watch = WatchFolder(tmp_path / "run")
    watch.prepare()
    given = {**OF_THE_USER, **OF_THIS_MACHINE, "LD_LIBRARY_PATH": '/opt/my "$libs"'}
    workers = DeepSpeedWorkers("echo", [], watch, [Host("node-1", 2)], given, {"CHUNKFLOW_FOUND_DATA": "k:1"})
    lines = (watch.path / "environment").read_text()
    assert r"LD_LIBRARY_PATH=/opt/my \"\$libs\"" in lines  # the loader reads it before the rank can set anything
    assert not any(f"{name}={value}" in lines for name, value in OF_THE_USER.items())
    assert lines == exported_environment(given, watch)
    assert stat.S_IMODE(watch.variables.stat().st_mode) == 0o600
    for name in OF_THE_USER:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")  # from the user's own list, by the command line
    monkeypatch.setenv("CHUNKFLOW_FOUND_DATA", "")
    before = dict(os.environ)
    take_variables(watch)
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert changed == {**{n: v for n, v in OF_THE_USER.items() if n != "NCCL_DEBUG"}, "CHUNKFLOW_FOUND_DATA": "k:1"}
    workers.exit_codes()
    assert watch.variables.exists()  # a rank may still need them
    for rank in (0, 1):
        Heartbeat(watch.heartbeat(rank)).at(0, "starting")
    workers.exit_codes()
    assert not watch.variables.exists()


def test_what_belongs_to_a_machine_stays_there() -> None:
    assert for_other_nodes({**OF_THE_USER, **OF_THIS_MACHINE}) == OF_THE_USER


def test_ranks_meet_at_a_port_that_rank_0_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that the launcher chooses can be taken by another process before rank 0 listens: the run failed then."""
    watch = WatchFolder(tmp_path)
    watch.prepare()
    assert "MASTER_PORT" not in local_environment({}, 2)
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**variables, "CHUNKFLOW_RUN_FOLDER": str(tmp_path), "TORCHELASTIC_USE_AGENT_STORE": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT")
    check_variables()  # a worker of ours needs none
    monkeypatch.setenv("MASTER_PORT", "29500")  # from DeepSpeed's launcher: the same for every run
    assert watch.port.read_text() == ""
    meet(watch)
    port = int(os.environ["MASTER_PORT"])
    assert port == announced_port(watch) != 29500
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    meet(watch)
    assert int(os.environ["MASTER_PORT"]) == port


GIB = 2**30


@pytest.mark.parametrize(("cgroup", "files", "limit"), [
    ("0::/", {"sys/fs/cgroup/memory.max": str(GIB)}, GIB),  # a container, or docker run --memory
    ("0::/", {"sys/fs/cgroup/memory.max": "max"}, None),
    ("0::/slurm/job_7/step_0", {
        "sys/fs/cgroup/slurm/job_7/memory.max": str(GIB), "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max",
    }, GIB),
    ("4:cpu,cpuacct:/a\n3:memory:/slurm/job_7\n0::/", {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1",
    }, GIB),
    ("3:memory:/docker/abc", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB)}, GIB),  # the host's name for it
    (None, {}, None),
])  # fmt: skip
def test_memory_is_what_the_container_may_use(
    cgroup: str | None, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    """`plan` counted on all memory of the machine, and the kernel killed the run."""
    if cgroup is not None:
        files = {**files, "proc/self/cgroup": cgroup}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory_bytes(tmp_path) == (machine if limit is None else limit)


def test_a_head_node_without_a_gpu_leaves_it_to_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node has no GPU, and refused `engine.offload`, which its nodes can do."""

    class StartedError(Exception):
        pass

    def start(*_: object, variables: dict[str, str], **__: object) -> None:
        raise StartedError(variables["CHUNKFLOW_FOUND_DATA"])

    monkeypatch.setattr(launch, "run_workers", start)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    hosts = tmp_path / "hosts"
    words = ["recipe=tiny_random", "engine.offload=optimizer", "engine.zero_stage=1", f"launch.hostfile={hosts}",
             f"train.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path}"]  # fmt: skip
    hosts.write_text("node-1 slots=8\n")
    with pytest.raises(StartedError) as found:
        launch.run(launch.with_processes(load(words)))
    (entry,) = (tmp_path / "tokens").glob("[0-9a-f]*")
    meta = (entry / "meta.json").stat()
    assert str(found.value) == f"{entry.name}:{meta.st_ino}-{meta.st_mtime_ns}"  # so no rank needs to look for it
    assert json.loads((entry / "meta.json").read_text())["samples"] > 0
    hosts.write_text("localhost slots=8\n")
    loaded = launch.with_processes(load(words))
    for check in (launch.run, check_requirements):
        with pytest.raises(UsageError, match="this machine has no GPU"):
            check(loaded)
