"""Which numbers of which parameters a process keeps, and where in DeepSpeed's memory they are.

Every optimizer of DeepSpeed steps flat float32 tensors and keeps its states beside them, under `optimizer.state`:

| engine | what is stepped | part of a parameter |
|---|---|---|
| ZeRO-0 | the parameters themselves, on every rank | the whole |
| ZeRO-1 and 2 | a flat partition for each group of parameters | `_hp_mapping`: where the two overlap |
| ZeRO-3 | a flat tensor for each sub-group | `grad_position`: a rank's equal share, the last one padded |

DeepSpeed's own `safe_get_full_*` and `safe_set_full_*` are not used: under ZeRO-3 setting fails for a parameter whose
size the number of ranks does not divide, under ZeRO-1 and 2 there is nothing to set before the first step, none of them
know ZeRO-0, and getting sums zeros with a value, which loses the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from chunkflow_cli.engine.state_files import WEIGHT, Part, StateFiles
from chunkflow_cli.errors import RunError, UsageError

STEP = "step"
"""The state that is one number: how often the optimizer has stepped."""


@dataclass(frozen=True)
class Partition:
    """The numbers of one parameter that this process keeps."""

    parameter: str
    shape: tuple[int, ...]
    start: int
    """Of the kept numbers within the flattened parameter."""
    count: int
    stepped: Tensor
    """What the optimizer steps: the parameter itself, or a flat tensor that holds parts of many."""
    offset: int
    """Of the kept numbers within it."""

    def of(self, tensor: Tensor) -> Tensor:
        """(count,) the view of `tensor`, which is shaped like `stepped`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


def kept_partitions(engine: Any, names: Mapping[str, str]) -> list[Partition]:
    """All that this process keeps of the trained parameters.

    Args:
        engine: DeepSpeed's.
        names: of each of its module's parameters in the whole Hugging Face model.
    """
    partitions = []
    for own_name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found = _partition(engine.optimizer, names[own_name], parameter)
        if found is not None and found.count > 0:
            partitions.append(found)
    return partitions


def _partition(optimizer: Any, name: str, parameter: Any) -> Partition | None:
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = share * optimizer._get_param_partition_rank(parameter)
        count = min(share, parameter.ds_numel - start)
        return Partition(
            name, tuple(parameter.ds_shape), start, count, optimizer.fp32_partitioned_groups_flat[group], offset
        )
    shape = tuple(parameter.shape)
    if not hasattr(parameter, "_hp_mapping"):  # ZeRO-0
        return Partition(name, shape, 0, parameter.numel(), parameter, 0)
    mapping = parameter._hp_mapping
    if mapping is None:  # it is all on other ranks
        return None
    (stepped,) = optimizer.param_groups[mapping.param_group_index]["params"]
    inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Partition(name, shape, inside.start, inside.numel, stepped, outside.start)


def parts_to_write(engine: Any, names: Mapping[str, str], *, elsewhere: frozenset[str] = frozenset()) -> Iterator[Part]:
    """What this process has to write, so that all processes together write every number once.

    Args:
        engine: DeepSpeed's.
        names: of each of its module's parameters in the whole Hugging Face model.
        elsewhere: names of parameters that another pipeline stage has too, and writes.
    """
    partitions = [partition for partition in kept_partitions(engine, names) if partition.parameter not in elsewhere]
    if engine.zero_optimization_stage() == 0:
        group = engine.seq_data_parallel_group
        partitions = _share(partitions, distributed.get_rank(group), distributed.get_world_size(group))
    for partition in partitions:
        states = engine.basic_optimizer.state.get(partition.stepped, {})
        tensors = {
            kind: partition.of(state) for kind, state in states.items() if kind != STEP and torch.is_tensor(state)
        }
        yield Part(
            partition.parameter,
            partition.shape,
            partition.start,
            {WEIGHT: partition.of(partition.stepped), **tensors},
            {STEP: float(states[STEP])} if STEP in states else {},
        )


def _share(partitions: list[Partition], rank: int, ranks: int) -> list[Partition]:
    """An equal share, in numbers, of what every rank holds whole."""
    total = sum(partition.count for partition in partitions)
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    shares, before = [], 0
    for whole in partitions:
        start, stop = max(begin - before, 0), min(end - before, whole.count)
        if start < stop:
            shares.append(Partition(whole.parameter, whole.shape, start, stop - start, whole.stepped, start))
        before += whole.count
    return shares


def check_fits(
    files: StateFiles, engine: Any, names: Mapping[str, str], *, optimizer: str, has_all: bool = True
) -> None:
    """Refuse the state of another model or optimizer.

    Args:
        files: what is to be read.
        engine: DeepSpeed's.
        names: of each of its module's parameters in the whole Hugging Face model.
        optimizer: the name of the engine's.
        has_all: whether the engine's module is the whole model, and not a stage of it.

    Raises:
        UsageError: names what differs.
    """
    remedy = "\n  take the configuration that it was saved with, or checkpoint.resume=never to begin anew"
    if files.optimizer != optimizer:
        raise UsageError(f"optim.name={optimizer}: {files.folder} holds the states of {files.optimizer}{remedy}")
    shapes = {
        names[own_name]: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for own_name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    for name, shape in shapes.items():
        if name not in files.shapes:
            raise UsageError(f"{files.folder} is of another model: it has no {name}{remedy}")
        if files.shapes[name] != shape:
            raise UsageError(
                f"{files.folder} is of another model: {name} is {list(files.shapes[name])} there, here {list(shape)}"
                + remedy
            )
    more = sorted(files.shapes.keys() - shapes.keys())
    if has_all and more:
        raise UsageError(f"{files.folder} is of another model, which has {more[0]} too{remedy}")


@torch.no_grad()
def read_partitions(engine: Any, names: Mapping[str, str], files: StateFiles) -> None:
    """Set the master weights and optimizer states of this process from files; `publish_weights` must follow.

    Args:
        engine: DeepSpeed's; it need not have stepped yet.
        names: of each of its module's parameters in the whole Hugging Face model.
        files: hold all of these parameters.
    """
    optimizer = engine.basic_optimizer
    by_stepped: dict[int, list[Partition]] = {}
    for partition in kept_partitions(engine, names):
        by_stepped.setdefault(id(partition.stepped), []).append(partition)
    for partitions in by_stepped.values():
        stepped = partitions[0].stepped
        states: dict[str, Any] = {}
        for partition in partitions:
            files.read(partition.parameter, WEIGHT, partition.start, partition.of(stepped))
            for kind in files.states(partition.parameter):
                if kind not in states:
                    states[kind] = torch.zeros_like(stepped)
                files.read(partition.parameter, kind, partition.start, partition.of(states[kind]))
        steps = {files.scalars[partition.parameter].get(STEP) for partition in partitions} - {None}
        if len(steps) > 1:
            raise RunError(f"{files.folder}: parameters were stepped {sorted(map(int, filter(None, steps)))} times")
        for step in steps:
            assert step is not None
            states[STEP] = _step_state(optimizer, stepped, step)
        optimizer.state.pop(stepped, None)
        if states:
            optimizer.state[stepped] = states


def _step_state(optimizer: torch.optim.Optimizer, stepped: Tensor, step: float) -> Tensor | int:
    """The count as the optimizer itself would hold it."""
    if "fused" not in optimizer.defaults:  # DeepSpeed's Adam on the host counts in Python
        return int(step)
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.tensor(step, dtype=torch.float32, device=stepped.device if on_device else "cpu")


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Master weights into the model's weights, by the very calls that end a step. Every rank calls it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return
    if stage < 3:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # the states are other tensors now
        return
    optimizer.checkpoint_event_prologue()  # small weights, which stay gathered, are given back
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()
