"""Real processes for tests: `run_ranks(4, "test_module:function", {...})` runs a function on four gloo ranks.

Each rank is a process with the environment that torchrun sets. It calls `function(arguments)`, which starts the process
group as the code under test does. `run_ranks` returns the results, a list by rank. With `serial=True` the process group
has started already, on a backend with NCCL's rules (`serial_backend`).
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


def run_ranks(
    processes: int, function: str, arguments: Any = None, *, serial: bool = False, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Return what the function returns on each rank.

    Args:
        processes: the number of ranks.
        function: "module:name"; the module is found through the current `sys.path`.
        arguments: passed to every rank, pickled.
        serial: run on the backend that keeps NCCL's rules.
        timeout: seconds until the ranks count as hung.

    Raises:
        AssertionError: a rank failed or hung; the message shows what every rank printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
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
                        [sys.executable, __file__, function, folder, *["serial"] * serial],
                        env=environment,
                        stdout=log,
                        stderr=log,
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


def free_port() -> int:
    """Return a free port below the range from which the kernel takes ports for connections.

    A connection could take a port of that range before the first rank listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait(workers: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Return the exit codes when all ranks have ended, one has failed, or time is up (None: still running)."""
    while True:
        codes = [worker.poll() for worker in workers]
        if all(code is not None for code in codes) or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _work(function: str, folder: str, *, serial: bool) -> None:
    sys.path[:] = Path(folder, "path").read_text().split("\n")
    import torch

    torch.set_num_threads(1)
    if serial:
        from support.serial_backend import start_process_group

        start_process_group()
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(pickle.loads(Path(folder, "arguments").read_bytes()))
    Path(folder, f"{os.environ['RANK']}.result").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of an open process group may abort a normal exit; the result is already written


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], serial="serial" in sys.argv[3:])
