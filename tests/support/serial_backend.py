"""A backend of torch.distributed that keeps NCCL's rules on a CPU: gloo, one operation of a group at a time.

DeepSpeed binds a device to the process group of a run on GPUs, and from then on NCCL is "eager":

- the operations of a group run strictly in the order in which this process has issued them, sends and receives included;
- a send is over only when the other side has received it (NCCL may buffer a small one, but nobody may rely on that);
- issuing an operation returns at once, and groups do not wait for each other.

gloo by itself keeps none of these: its operations run side by side and its sends end in a buffer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo

from chunkflow_cli.engine import PATIENCE, import_deepspeed
from chunkflow_cli.engine.distributed import quiet

NAME = "serial"
RECEIVED = 1 << 20
"""Added to the tag of a message: the tag of the answer that it has been received."""

COLLECTIVES = (
    "broadcast", "allreduce", "allreduce_coalesced", "reduce", "allgather", "allgather_coalesced", "all_gather_single",
    "all_gather_single_coalesced", "gather", "scatter", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "alltoall", "all_to_all_single", "barrier",
)  # fmt: skip
"""The methods of a process group that `torch.distributed` calls, besides send and recv."""


class _Work(dist.Work):
    """An operation that waits for its turn, runs, or is over."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self._run = run
        self._over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        self._over.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._over.wait()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        return self._over.is_set()

    def is_success(self) -> bool:
        return self._over.is_set() and self._error is None


class SerialGroup(dist.ProcessGroup):
    """A gloo group whose operations one thread runs in turn."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.timeout = timeout
        self._size = size
        self._gloo = dist.ProcessGroup(store, rank, size)
        backend = ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        self._issued: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> dist.Work:
        def run() -> None:
            self._gloo.send(tensors, to, tag).wait()
            self._gloo.recv([torch.empty(1)], to, tag + RECEIVED).wait()

        return self._issue(run)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> dist.Work:
        def run() -> None:
            self._gloo.recv(tensors, source, tag).wait()
            self._gloo.send([torch.zeros(1)], source, tag + RECEIVED).wait()

        return self._issue(run)

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return NAME

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def _issue(self, run: Callable[[], Any]) -> dist.Work:
        work = _Work(run)
        self._issued.put(work)
        return work

    def _work(self) -> None:
        torch.set_num_threads(1)
        while True:
            self._issued.get().run()


def _collective(name: str) -> Callable[..., dist.Work]:
    def issue(group: SerialGroup, *arguments: Any, **named: Any) -> dist.Work:
        return group._issue(lambda: getattr(group._gloo, name)(*arguments, **named).wait())

    return issue


for _name in COLLECTIVES:
    setattr(SerialGroup, _name, _collective(_name))


def start_process_group() -> None:
    """Start the process group of the run on this backend, through DeepSpeed, as `engine.init_process_group` does."""
    dist.Backend.register_backend(NAME, SerialGroup, devices=["cpu"])
    with quiet():
        import_deepspeed().init_distributed(NAME, timeout=PATIENCE, verbose=False)


def patience_of_groups() -> set[timedelta]:
    """Return how long operations wait in the groups of this process that are on this backend."""
    groups = dist.distributed_c10d._world.pg_map
    return {group.timeout for group in groups if isinstance(group, SerialGroup)}
