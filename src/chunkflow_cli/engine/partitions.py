"""Find the numbers of parameters that a process keeps, and copy them between DeepSpeed's memory and files.

Every optimizer of DeepSpeed steps flat float32 tensors, and the torch optimizer within keeps its states for these:

| engine | what is stepped | part of a parameter on a rank |
|---|---|---|
| ZeRO-0 | the parameters themselves, on every rank | all of it |
| ZeRO-1 and 2 | a flat partition per group of parameters | where the partition and the parameter overlap |
| ZeRO-3 | a flat tensor per sub-group of parameters | an equal share; the last one is padded |

DeepSpeed's public `safe_get_full_*` and `safe_set_full_*` do not serve. Under ZeRO-3, setting fails for a parameter
whose size the number of ranks does not divide. Under ZeRO-1 and 2 there is nothing to set before the first step. ZeRO-0
is not supported. And getting adds zeros to a value, which loses the sign of a negative zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.optimizer_states import STEP, flat_states, set_flat_states
from chunkflow_cli.engine.state_files import WEIGHT, Part, StateFiles
from chunkflow_cli.engine.whole_parameters import WholeParameters
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import moving


@dataclass(frozen=True)
class Partition:
    """The numbers of one parameter that this process keeps."""

    parameter: str
    """Name in the whole Hugging Face model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """Index of the first kept number in the flattened parameter."""
    count: int
    stepped: Tensor
    """The tensor that the optimizer steps: the parameter itself, or a flat tensor that holds parts of many."""
    offset: int
    """Index of the first kept number in `stepped`, flattened."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view (count,) of the kept numbers in `tensor`, which is shaped like `stepped`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


def kept_partitions(engine: Any, parameters: Mapping[str, nn.Parameter]) -> list[Partition]:
    """Return what this process keeps of the trained parameters, named as in the whole Hugging Face model."""
    partitions = []
    for name, parameter in parameters.items():
        kept = internals.kept_numbers(engine, parameter)
        if kept is not None and kept[1] > 0:
            partitions.append(Partition(name, internals.whole_shape(parameter), *kept))
    return partitions


def equal_share(partitions: Sequence[Partition], rank: int, ranks: int) -> list[Partition]:
    """Return an equal share, counted in numbers, of what each of `ranks` ranks holds whole."""
    total = sum(partition.count for partition in partitions)
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    shares, before = [], 0
    for whole in partitions:
        start, stop = max(begin - before, 0), min(end - before, whole.count)
        if start < stop:
            shares.append(replace(whole, start=start, count=stop - start, offset=start))
        before += whole.count
    return shares


def parts_to_write(partitions: Sequence[Partition], optimizer: torch.optim.Optimizer) -> Iterator[Part]:
    """Yield the partitions with their master weights and the states that `optimizer` keeps for them."""
    states_of = functools.lru_cache(maxsize=1)(functools.partial(flat_states, optimizer))  # of neighbors, the same
    for partition in moving(partitions):
        tensors, numbers = states_of(partition.stepped)
        yield Part(
            partition.parameter,
            partition.shape,
            partition.start,
            {WEIGHT: partition.of(partition.stepped), **{kind: partition.of(state) for kind, state in tensors.items()}},
            numbers,
        )


def check_fits(files: StateFiles, parameters: Mapping[str, nn.Parameter], *, optimizer: str, has_all: bool) -> None:
    """Refuse the state of another model or optimizer.

    Args:
        parameters: the trained ones, by their names in the whole Hugging Face model.
        has_all: false if these are only the parameters of a stage.

    Raises:
        UsageError: names what differs.
    """
    remedy = "\n  use the configuration that it was saved with, or checkpoint.resume=never to start over"
    if files.optimizer != optimizer:
        raise UsageError(f"optim.name={optimizer}: {files.folder} holds the states of {files.optimizer}{remedy}")
    for name, parameter in parameters.items():
        shape = internals.whole_shape(parameter)
        if name not in files.shapes:
            raise UsageError(f"{files.folder} is of another model: it has no {name}{remedy}")
        if files.shapes[name] != shape:
            raise UsageError(
                f"{files.folder} is of another model: {name} is {list(files.shapes[name])} there, here {list(shape)}"
                + remedy
            )
    more = sorted(files.shapes.keys() - parameters.keys())
    if has_all and more:
        raise UsageError(f"{files.folder} is of another model, which also has {more[0]}{remedy}")


@torch.no_grad()
def read_partitions(partitions: Sequence[Partition], optimizer: torch.optim.Optimizer, files: StateFiles) -> None:
    """Set master weights and optimizer states from files. `internals.publish_weights` must follow.

    The optimizer need not have stepped yet.

    Raises:
        RunError: parameters that are stepped together were stepped different numbers of times.
    """
    stepped_whole = {whole.name for whole in optimizer.wholes} if isinstance(optimizer, WholeParameters) else set()
    by_stepped: dict[int, list[Partition]] = {}
    for partition in partitions:
        by_stepped.setdefault(id(partition.stepped), []).append(partition)
    for together in by_stepped.values():
        stepped = together[0].stepped
        states: dict[str, Tensor] = {}
        for partition in moving(together):
            files.read(partition.parameter, WEIGHT, partition.start, partition.of(stepped))
            if partition.parameter in stepped_whole:
                continue
            for kind in files.states(partition.parameter):
                if kind not in states:
                    states[kind] = torch.zeros_like(stepped)
                files.read(partition.parameter, kind, partition.start, partition.of(states[kind]))
        of_parts = [files.scalars[p.parameter].get(STEP) for p in together if p.parameter not in stepped_whole]
        steps = {count for count in of_parts if count is not None}
        if len(steps) > 1:
            raise RunError(f"{files.folder}: parameters were stepped {sorted(map(int, steps))} times")
        set_flat_states(optimizer, stepped, states, next(iter(steps), None))
