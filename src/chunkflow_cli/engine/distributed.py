"""The processes of a run: how they find each other, and how DeepSpeed is imported without its noise."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.topology import Place, Topology
from chunkflow_cli.processes import environment

PATIENCE = timedelta(days=1)
"""How long a collective waits. A rank may compute on its long sample, or save the model, for hours while others wait;
what hangs is found by the launcher's watchdog (`launch.hang_seconds`), which says where each rank stands."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and what they tell each other beside gradients.

    That goes over gloo, from the host's memory: a few numbers a step, which no device needs to wait for.
    """

    topology: Topology = field(default_factory=Topology)
    rank: int = 0
    _control: Any = None
    """A gloo group of all processes; None if there is one."""

    @property
    def place(self) -> Place:
        return self.topology.place_of(self.rank)

    @property
    def replica(self) -> int:
        """This one's number among those that hold the same stage: its data-parallel and sequence-parallel rank."""
        return self.rank % self.topology.replicas

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def maximum(self, *values: float) -> tuple[float, ...]:
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> tuple[float, ...]:
        if self._control is None:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(numbers, operation, group=self._control)
        return tuple(numbers.tolist())

    def gather(self, value: Any) -> list[Any]:
        """What each process says, by rank."""
        if self._control is None:
            return [value]
        values = [None] * self.topology.processes
        torch.distributed.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        if self._control is not None:
            torch.distributed.barrier(group=self._control)


def join_processes(device: torch.device, topology: Topology) -> Processes:
    """Meet the other processes of the run.

    Raises:
        UsageError: a launcher has started another number than the configuration asks for.
    """
    if environment.processes() != topology.processes:
        raise UsageError(
            f"{environment.processes()} processes were launched, and the configuration makes {topology.processes} of "
            f"launch.processes, parallel.sequence and parallel.pipeline ({topology})"
        )
    if topology.processes == 1:
        return Processes()
    init_process_group(device)
    control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(topology, torch.distributed.get_rank(), control)


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
    # It calls collectives by names that torch has since changed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed


def init_process_group(device: torch.device) -> None:
    """Join the other processes of the run, as the environment that a launcher sets names them; alone without one."""
    if torch.distributed.is_initialized():
        return
    if environment.processes() == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Without all of these DeepSpeed looks for MPI. A world of one is never taken from the environment: it may be
        # that of the process that started this one, which still listens there.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(environment.free_port())
    deepspeed = import_deepspeed()
    with quiet():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, verbose=False)


def broadcast_from_first(value: Any) -> Any:
    """What rank 0 has given, on every rank; any object that can be pickled."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


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
