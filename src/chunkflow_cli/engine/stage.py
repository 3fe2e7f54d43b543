"""The engine of one stage of a pipeline.

It does not know chunks and passes no messages: the runner gives it what came from the neighbors. Between two steps it
takes any number of forwards and backwards, in any order. ZeRO 0 and 1 only: the others reduce within every backward.

DeepSpeed's pipeline provides the process grid, the sums over tied weights and replicas, and the optimizer step. Its
schedules, message passing and backward are not used: they assume one loss, a fixed number of equal micro-batches, and
shapes that are exchanged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.agreement import own_rank, process_count
from chunkflow_cli.engine.base import BaseEngine
from chunkflow_cli.engine.distributed import PATIENCE, import_deepspeed, init_process_group, quiet
from chunkflow_cli.engine.optimizers import check_optimizer, make_optimizer
from chunkflow_cli.engine.settings import EngineSettings, check_pipeline_settings, deepspeed_config
from chunkflow_cli.files import moving


class Stage(Protocol):
    """The interface of the module that the engine runs, in addition to `torch.nn.Module`."""

    tied_weight: nn.Parameter | None
    """The weight that the first and the last stage share, on these two."""
    hf_parameter_names: dict[str, str]
    """Name of each parameter of the module -> its name in the whole Hugging Face model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class PipelineEngine(BaseEngine):
    """A training engine around one stage of a pipeline. The gradients are those of the whole pipeline's loss."""

    is_stage = True
    is_divided = False
    needs_lockstep = False  # pipelines next to each other communicate at the step only

    def __init__(self, module: Stage, settings: EngineSettings, *, stages: int) -> None:
        """
        Args:
            module: this process's stage, on its device.
            stages: number of stages. Ranks count stages slowest; the ranks of a stage are its replicas.

        Raises:
            UsageError: see `check_pipeline_settings`.
        """
        check_pipeline_settings(settings, stages)
        check_optimizer(settings)
        init_process_group(settings.device)
        assert isinstance(module, nn.Module)
        replicas = process_count() // stages
        with quiet():
            # Its "layers" are whole stages, of which each process builds its own.
            pipeline = import_deepspeed().PipelineModule(
                [module] * stages, num_stages=stages, partition_method="uniform"
            )
        self._pipeline_group = internals.pipeline_group(pipeline)
        self._leaders = [stage * replicas for stage in range(stages)]
        self._tied_weight = module.tied_weight
        self._is_first = own_rank() < replicas
        ends = [[replica, self._leaders[-1] + replica] for replica in range(replicas)]
        tied_group, _ = distributed.new_subgroups_by_enumeration(ends, timeout=PATIENCE)
        if self._tied_weight is not None:
            internals.sum_tied_gradients(pipeline, self._tied_weight, tied_group, counts_in_norm=self._is_first)
        config = deepspeed_config(settings)
        config.pop("managed_gradient_accumulation", None)  # DeepSpeed refuses it for a pipeline, which does not need it
        super().__init__(
            module, pipeline, make_optimizer(module, settings, module.hf_parameter_names), settings, config,
            hf_names=module.hf_parameter_names, replicas=replicas, replica_group=internals.replica_group(pipeline),
        )  # fmt: skip
        if internals.is_zero_optimizer(self._engine.optimizer):
            internals.sum_norm_once(self._engine.optimizer, self._pipeline_group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not through DeepSpeed's forward, which prepares one backward per forward.
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those of the step; for the last stage."""
        self.backward_from(loss * self._replicas, None)

    def backward_from(self, outputs: Tensor, gradient: Tensor | None) -> None:
        """Add the gradients of what this stage sent on; for all stages but the last.

        Args:
            outputs: hidden states.
            gradient: what the next stage has found for them, in their shape; None for a scalar.
        """
        if self._zero_stage >= 1:
            internals.begin_backward(self._engine.optimizer)
        with internals.without_reduction(self._engine):
            torch.autograd.backward(outputs, gradient)
        self._keep_gradients()

    def add_gradients(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Add gradients of the module's parameters that a backward has put off."""
        for parameter, gradient in gradients:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        self._keep_gradients()

    def share_from_last(self, tensor: Tensor) -> None:
        """Overwrite the tensor of every stage with that of the last one."""
        last = self._leaders[-1] + own_rank() % self._leaders[1]
        distributed.broadcast(tensor, last, group=self._pipeline_group)

    def whole_weights(self, model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
        hf_names = {id(parameter): self._hf_names[own] for own, parameter in self.module.named_parameters()}
        weights = {
            hf_names.get(id(tensor), name): tensor.detach()
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.requires_grad or not trained_only
        }
        return collect_stages(weights, self._leaders, self.device)

    def _keep_gradients(self) -> None:
        if internals.is_bf16_optimizer(self._engine.optimizer):
            internals.move_gradients_to_float32(self._engine.optimizer)

    def _reduce(self) -> None:
        self._add_missing_gradients()
        self._keep_gradients()
        internals.reduce_gradients(self._engine)

    def _update(self) -> None:
        internals.update_weights(self._engine)

    def _gradient_norm(self) -> float:
        """Return the norm over all stages; of a tied weight, the first stage's copy counts."""
        second_copy = None if self._is_first else self._tied_weight
        own = [p.grad for p in self._trained.values() if p.grad is not None and p is not second_copy]
        squares = torch.nn.utils.get_total_norm(own).to(device=self.device, dtype=torch.float64).square()
        distributed.all_reduce(squares, group=self._pipeline_group)
        return float(squares.sqrt())

    def _saved_elsewhere(self) -> frozenset[str]:
        if self._is_first:
            return frozenset()
        return frozenset(name for name, parameter in self._trained.items() if parameter is self._tied_weight)


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
    rank = own_rank()
    if rank == 0:
        whole = dict(weights)
        for leader in leaders[1:]:
            listed: list[Any] = [None]
            distributed.recv_object_list(listed, src=leader, device=device)
            for name, shape, dtype in moving(listed[0]):
                tensor = torch.empty(shape, dtype=dtype, device=device)
                distributed.recv(tensor, src=leader)
                whole.setdefault(name, tensor.cpu())
        return whole
    if rank in leaders:
        listing = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
        distributed.send_object_list([listing], dst=0, device=device)
        for tensor in moving(weights.values()):
            distributed.send(tensor.detach().to(device).contiguous(), dst=0)
    return None
