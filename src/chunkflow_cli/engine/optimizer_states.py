"""The states of an optimizer as flat arrays, one number for each number of a weight, whatever form it keeps them in.

| optimizer | kept for a stepped tensor | as arrays |
|---|---|---|
| AdamW, SGD, and AdamW next to Muon | tensors shaped like it | the same |
| AdamW in 8 bits (bitsandbytes) | codes, and a scale for each block of 256 | codes, and the scale of each |
| Muon, Adafactor | nothing; `whole_parameters` keeps them by parameter | `whole_states` |

Codes are restored to the bit where a block holds the same numbers as before. Another layout cuts other blocks, whose
numbers are rounded to the 8 bits of the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.agreement import own_rank, process_count
from chunkflow_cli.engine.state_files import Part, StateFiles
from chunkflow_cli.engine.whole_parameters import Whole, WholeParameters, choose_owners
from chunkflow_cli.files import moving

STEP = "step"
"""Name of the optimizer state that counts the steps of a parameter."""
BLOCK = 256
"""Number of 8-bit values in a block, which share a scale."""


def flat_states(optimizer: torch.optim.Optimizer, stepped: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the states of a stepped tensor: kind -> tensor shaped like it, and kind -> number."""
    states = optimizer.state.get(stepped, {})
    numbers = {STEP: float(states[STEP])} if STEP in states else {}
    if not is_in_8_bits(optimizer):
        return {kind: state for kind, state in states.items() if kind != STEP and torch.is_tensor(state)}, numbers
    tensors = {}
    for which in ("1", "2") if states else ():
        tensors[f"state{which}"] = states[f"state{which}"]
        scale = states[f"absmax{which}"].repeat_interleave(BLOCK)[: stepped.numel()]
        tensors[f"absmax{which}"] = scale.view_as(stepped)
    return tensors, numbers


@torch.no_grad()
def set_flat_states(
    optimizer: torch.optim.Optimizer, stepped: Tensor, tensors: Mapping[str, Tensor], step: float | None
) -> None:
    """Give an optimizer what `flat_states` returned for a tensor; numbers that no parameter has are zero."""
    optimizer.state.pop(stepped, None)
    if is_in_8_bits(optimizer) and tensors:
        assert step is not None
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[0], "params": [stepped]}]  # ZeRO-3 empties them between two steps
        optimizer.init_state(optimizer.param_groups[0], stepped, 0, 0)  # type: ignore[attr-defined]
        optimizer.param_groups = groups
        states = optimizer.state[stepped]
        for which in ("1", "2"):
            codes, scales = _blocks(tensors[f"state{which}"], tensors[f"absmax{which}"], states[f"qmap{which}"])
            states[f"state{which}"].view(-1).copy_(codes)
            states[f"absmax{which}"].copy_(scales)
        states[STEP] = int(step)
        return
    states = dict(tensors)
    if step is not None:
        states[STEP] = _step_state(optimizer, stepped, step)
    if states:
        optimizer.state[stepped] = states


def is_in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is one of bitsandbytes, which keep states in 8 bits."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def _blocks(codes: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (numbers,) in 8 bits and the scale of each block.

    A block whose numbers had one scale keeps its codes. Others are rounded anew, as bitsandbytes does.

    Args:
        codes: index into `table` of each number, as floats.
        scale: what each number's entry of the table is multiplied by; zero where there is no number.
        table: (256,) ascending.
    """
    numel = codes.numel()
    padding = -numel % BLOCK
    indices = nn.functional.pad(codes.view(-1), (0, padding)).long()
    scales = nn.functional.pad(scale.view(-1), (0, padding)).view(-1, BLOCK)
    values = table[indices].view(-1, BLOCK) * scales
    largest = scales.amax(1, keepdim=True)
    is_same = ((scales == largest) | (scales == 0)).all(1, keepdim=True)
    new = torch.where(is_same, largest, values.abs().amax(1, keepdim=True))
    middle = (table[1:] + table[:-1]) / 2
    rounded = torch.bucketize(values / new.clamp(min=torch.finfo(new.dtype).tiny), middle)
    kept = torch.where(is_same & (scales > 0), indices.view(-1, BLOCK), rounded)
    return kept.view(-1)[:numel].to(torch.uint8), new.view(-1)


def _step_state(optimizer: torch.optim.Optimizer, stepped: Tensor, step: float) -> Tensor | int:
    """Return the count of steps as the optimizer itself would hold it."""
    if "fused" not in optimizer.defaults:  # DeepSpeed's Adam on the host counts in Python
        return int(step)
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.tensor(step, dtype=torch.float32, device=stepped.device if on_device else "cpu")


# Parameters that are stepped whole


def place_whole_parameters(
    optimizer: WholeParameters,
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    group_of: Mapping[int, int],
    ranks: distributed.ProcessGroup | None,
) -> None:
    """Tell the optimizer where DeepSpeed has put its whole parameters, and choose their owners. Every rank calls it.

    Args:
        engine: DeepSpeed's own.
        parameters: the trained ones, by their names in the whole Hugging Face model.
        group_of: id of a parameter -> index of its group in the optimizer.
        ranks: the ranks that hold the same layers; None for all.
    """
    count, rank = process_count(), own_rank()
    if ranks is not None:
        count, rank = distributed.get_world_size(ranks), distributed.get_rank(ranks)
    found: list[tuple[str, tuple[int, ...], Tensor, int]] = []
    held: list[tuple[int, int]] = []
    for name, parameter in parameters.items():
        group = optimizer.param_groups[group_of[id(parameter)]]
        if not group["whole"]:
            continue
        kept = internals.kept_numbers(engine, parameter)
        if kept is None:  # others keep it; this rank steps its own part of the same group
            (stepped,) = group["params"]
            start, numbers, offset = 0, 0, 0
        else:
            start, numbers, stepped, offset = kept
        held.append((start, max(0, numbers)) if numbers > 0 else (0, 0))
        found.append((name, internals.whole_shape(parameter), stepped, offset))
    of_ranks = [held]
    if count > 1:
        of_ranks = [held] * count
        distributed.all_gather_object(of_ranks, held, group=ranks)
    by_parameter = [tuple(of_rank[index] for of_rank in of_ranks) for index in range(len(found))]
    work = [float(torch.Size(shape).numel() * min(shape[-2:], default=1)) for _, shape, _, _ in found]
    owners = choose_owners([[numbers for _, numbers in each] for each in by_parameter], work)
    wholes = [
        Whole(name, shape, by_parameter[index], owners[index], stepped, offset)
        for index, (name, shape, stepped, offset) in enumerate(found)
    ]
    optimizer.place(wholes, rank, ranks)


def owned(optimizer: torch.optim.Optimizer) -> Sequence[Whole]:
    """Return the parameters that this rank steps whole."""
    if not isinstance(optimizer, WholeParameters):
        return ()
    return [whole for whole in optimizer.wholes if whole.owner == optimizer.rank]


def whole_states(optimizer: torch.optim.Optimizer) -> Iterator[Part]:
    """Yield the states of the parameters that this rank steps whole; their weights are in the partitions."""
    for whole in moving(owned(optimizer)):
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        numbers: dict[str, float] = {}
        for kind in whole.states[0] if whole.states else ():
            if kind == STEP:
                numbers[STEP] = float(whole.states[0][STEP])
                continue
            stacked = torch.stack([states[kind] for states in whole.states])
            tensors[kind], shapes[kind] = stacked.view(-1), tuple(stacked.shape)
        yield Part(whole.name, whole.shape, 0, tensors, numbers, shapes)


def read_whole_states(optimizer: torch.optim.Optimizer, files: StateFiles) -> None:
    """Set the states of the parameters that this rank steps whole."""
    for whole in moving(owned(optimizer)):
        step = files.scalars[whole.name].get(STEP)
        by_kind: dict[str, Tensor] = {}
        for kind in files.states(whole.name):
            shape = files.state_shapes[whole.name][kind]
            by_kind[kind] = torch.empty(shape, device=whole.stepped.device)
            files.read(whole.name, kind, 0, by_kind[kind].view(-1))
        count = len(next(iter(by_kind.values()), ()))
        whole.states = [{kind: stacked[index] for kind, stacked in by_kind.items()} for index in range(count)]
        if step is not None:
            for states in whole.states:
                states[STEP] = torch.tensor(step, dtype=torch.float32)
