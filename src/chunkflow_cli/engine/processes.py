"""The processes of a run: how they find each other, and how DeepSpeed is imported without its noise."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def close_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed
        import deepspeed.ops

        # Its shared-memory collectives would be compiled on every start, and a killed build leaves a lock that the
        # next start waits for without end. gloo and NCCL do without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def init_process_group(device: torch.device) -> None:
    """Join the other processes of the run, as the environment that a launcher sets names them; alone without one."""
    if torch.distributed.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        # Without all of these DeepSpeed looks for MPI.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    deepspeed = import_deepspeed()
    with quiet():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def broadcast_from_first(value: Any) -> Any:
    """What rank 0 has given, on every rank; any object that can be pickled."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints and warns while it starts and saves; none of it tells a user anything. Errors still raise."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
