"""The whole model's weights, collected on rank 0 from all ranks that hold parts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.agreement import own_rank


def whole_weights(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
    """Return the state dict of a model of which every process holds all layers: on rank 0, None elsewhere.

    What ZeRO-3 has divided is gathered one parameter at a time and kept in host memory. The rest is not copied. All
    ranks call it.

    Args:
        model: may be a part of the engine's module.
        trained_only: leave out frozen weights, such as the base under adapters.
    """
    import deepspeed

    is_first = own_rank() == 0
    weights: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}  # tied weights are one parameter with several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        if not internals.is_divided(tensor):
            weights[name] = tensor.detach()
            continue
        if id(tensor) not in gathered:
            with deepspeed.zero.GatheredParameters([tensor]):
                gathered[id(tensor)] = tensor.detach().to("cpu", copy=True) if is_first else torch.empty(0)
        weights[name] = gathered[id(tensor)]
    return weights if is_first else None


def collect_stages(
    weights: Mapping[str, Tensor], leaders: Sequence[int], device: torch.device
) -> dict[str, Tensor] | None:
    """Return the state dict of a model whose stages are on different ranks: on rank 0, None elsewhere.

    One tensor travels at a time. All leaders call it; other ranks may.

    Args:
        weights: of this rank's stage, by their names in the whole model. Several stages may hold a tied weight.
        leaders: one rank of each stage, in the order of the stages; the first is rank 0.
        device: where tensors can be sent from and received.
    """
    assert leaders[0] == 0
    rank = own_rank()
    if rank == 0:
        whole = dict(weights)
        for leader in leaders[1:]:
            listed: list[Any] = [None]
            distributed.recv_object_list(listed, src=leader, device=device)
            for name, shape, dtype in listed[0]:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                distributed.recv(tensor, src=leader)
                whole.setdefault(name, tensor.cpu())
        return whole
    if rank in leaders:
        listing = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
        distributed.send_object_list([listing], dst=0, device=device)
        for tensor in weights.values():
            distributed.send(tensor.detach().to(device).contiguous(), dst=0)
    return None
