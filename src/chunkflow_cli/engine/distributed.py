"""The processes of a run: how they find each other and exchange numbers, and how DeepSpeed is imported quietly."""

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

from chunkflow_cli.engine import internals
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.topology import Place, Topology
from chunkflow_cli.processes import environment
from chunkflow_cli.processes.meeting import announce_port, announced_port
from chunkflow_cli.processes.watch_folder import WatchFolder

PATIENCE = timedelta(days=1)
"""Timeout of a collective. A rank may compute on its long sample, or save the model, for hours while others wait.
The launcher's watchdog (`launch.hang_seconds`) finds ranks that hang, and says which operation each is at."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and the numbers that they exchange besides gradients.

    These go over gloo, from the host's memory: a few numbers per step, for which no device needs to wait.
    """

    topology: Topology = field(default_factory=Topology)
    rank: int = 0
    _control: Any = None
    """The gloo group of all processes; None if there is only one process."""

    @property
    def place(self) -> Place:
        """The coordinates of this process."""
        return self.topology.place_of(self.rank)

    @property
    def replica(self) -> int:
        """This process's number among those with the same stage: data-parallel and sequence-parallel rank in one."""
        return self.rank % self.topology.replicas

    @property
    def is_first(self) -> bool:
        """True for the process that prints and writes for all."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each value over all processes."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def maximum(self, *values: float) -> tuple[float, ...]:
        """Return the maximum of each value over all processes."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> tuple[float, ...]:
        if self._control is None:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(numbers, operation, group=self._control)
        return tuple(numbers.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Return the value that each process gives, by rank."""
        if self._control is None:
            return [value]
        values = [None] * self.topology.processes
        torch.distributed.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self._control is not None:
            torch.distributed.barrier(group=self._control)


def join_processes(device: torch.device, topology: Topology) -> Processes:
    """Meet the other processes of the run.

    Raises:
        UsageError: a launcher has started another number of processes than the configuration asks for.
    """
    if environment.processes() != topology.processes:
        raise UsageError(
            f"{environment.processes()} processes were launched, but launch.processes, parallel.sequence and "
            f"parallel.pipeline ask for {topology.processes} ({topology})\n"
            f"  launch {topology.processes} processes, or change these keys"
        )
    if topology.processes == 1:
        return Processes()
    init_process_group(device)
    control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(topology, torch.distributed.get_rank(), control)


def init_process_group(device: torch.device) -> None:
    """Join the process group that the launcher's environment variables describe; without a launcher, one of its own."""
    internals.make_all_groups_wait(PATIENCE)
    if torch.distributed.is_initialized():
        return
    if environment.processes() == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Without all of these, DeepSpeed looks for MPI. A world of one is never taken from the environment: it may be
        # that of the process that started this one, which still listens there.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    elif (folder := environment.worker_folder()) is not None:
        meet(WatchFolder(folder))
    # NCCL would warn that messages of one group wait for each other; those of `Links` have a group each.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    deepspeed = import_deepspeed()
    with quiet():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, verbose=False)


_meeting_place: Any = None
"""The store of rank 0 through which the ranks of our launcher find each other; they need it until they end."""


def meet(watch: WatchFolder) -> None:
    """Have rank 0 listen at a free port, and tell torch which one that is on all ranks of our launcher."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    global _meeting_place
    if environment.rank() == 0:
        _meeting_place = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        announce_port(watch, _meeting_place.port)
    # As under torchrun, the store is there already: rank 0 must not make another one at this port.
    os.environ.update(MASTER_PORT=str(announced_port(watch)), TORCHELASTIC_USE_AGENT_STORE="True")


def close_process_group() -> None:
    """Leave the process group, if there is one, and undo what the engine did to torch."""
    internals.give_linear_back()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # DeepSpeed's own, so that it forgets its groups, and the next run of this process makes new ones.
        import_deepspeed().comm.destroy_process_group()


def broadcast_from_first(value: Any) -> Any:
    """Return on every rank the value that rank 0 gives; any object that can be pickled."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def import_deepspeed() -> Any:
    """Return the module `deepspeed`, prepared for this machine. All other imports of it come after this one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed

        internals.turn_off_shared_memory_collectives()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch has since changed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what DeepSpeed prints and warns while it starts; none of it helps a user. Errors still raise."""
    level = logging.root.manager.disable
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
