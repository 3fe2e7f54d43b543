"""Real processes for tests: `run_ranks(4, "test_module:function", {...})` runs a function on four gloo ranks.

Each rank is a process of its own with the environment that torchrun gives, and calls `function(arguments)`, which
starts the process group as the code under test does. What it returns comes back, a list by rank.
"""

from __future__ import annotations

import importlib
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 420


def run_ranks(processes: int, function: str, arguments: Any = None, *, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """What the function returned on each rank.

    Args:
        processes: how many.
        function: "module:name", a module of this folder.
        arguments: pickled to every rank.
        timeout: a hang is a failure, and shows what every rank has printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments))
        Path(folder, "path").write_text("\n".join(sys.path))  # where test modules are found
        workers = []
        for rank in range(processes):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            with Path(folder, f"{rank}.log").open("w") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, __file__, function, folder], env=environment, stdout=log, stderr=log
                    )
                )
        try:
            codes = _wait(workers, time.monotonic() + timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if any(codes) or None in codes:
            logs = "\n".join(f"rank {rank}:\n{Path(folder, f'{rank}.log').read_text()}" for rank in range(processes))
            raise AssertionError(f"{function} on {processes} ranks: exit codes {codes}\n{logs}")
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(processes)]


def _free_port() -> int:
    """Below those that the kernel gives to connections, one of which could take it before the first rank listens."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait(workers: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Exit codes once all have ended; one that fails, or the deadline, ends the wait (None: still running)."""
    while True:
        codes = [worker.poll() for worker in workers]
        if all(code is not None for code in codes) or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _work(function: str, folder: str) -> None:
    sys.path[:] = Path(folder, "path").read_text().split("\n")
    import torch

    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(pickle.loads(Path(folder, "arguments").read_bytes()))
    Path(folder, f"{os.environ['RANK']}.result").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the threads of a process group that is still open may abort an orderly exit; the result is there


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2])
