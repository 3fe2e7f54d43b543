"""What of DeepSpeed's pipeline is used: its process grid, tied weights, reduction of gradients and optimizer step.

Its own schedules, message passing and backward are not: they know one loss, a fixed number of equal micro-batches and
shapes that are exchanged once. This module imports deepspeed; `engine.pipeline` imports it late.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from deepspeed import comm
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from chunkflow_cli.engine.distributed import PATIENCE


class StageModule(PipelineModule):
    """DeepSpeed's idea of a pipeline whose "layers" are whole stages; this process builds its own one only."""

    def __init__(self, stage: nn.Module, stages: int, tied_weight: nn.Parameter | None) -> None:
        """
        Args:
            stage: this process's.
            stages: how many there are; ranks count stages slowest.
            tied_weight: of the first and of the last stage, if they hold the same one.
        """
        replicas = comm.get_world_size() // stages
        topology = PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
        super().__init__([stage] * stages, topology=topology, partition_method="uniform")
        self.stage = stage
        self.tied_weight = tied_weight
        self._tied_group = self._make_tied_group(stages, replicas)
        is_second_copy = tied_weight is not None and self.stage_id > 0
        if is_second_copy:
            tied_weight.ds_pipe_replicated = True  # type: ignore[union-attr]  # counted once in the norm

    def _make_tied_group(self, stages: int, replicas: int) -> torch.distributed.ProcessGroup | None:
        """Of the first and the last stage of this process's pipeline; every process takes part in making all."""
        own = None
        for replica in range(replicas):
            ranks = [replica, (stages - 1) * replicas + replica]
            group = torch.distributed.new_group(ranks, timeout=PATIENCE)
            if self.global_rank in ranks:
                own = group
        return own

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, torch.distributed.ProcessGroup]]:
        """What `ReduceTiedGrads` sums over."""
        if self.tied_weight is None:
            return []
        assert self._tied_group is not None
        return [(self.tied_weight, self._tied_group)]


class _Instructions(instructions.PipeSchedule):
    """The end of a step, in DeepSpeed's instructions."""

    def __init__(self, *steps: list[instructions.PipeInstruction]) -> None:
        super().__init__(micro_batches=1, stages=1, stage_id=0)
        self._steps = steps

    def steps(self):  # type: ignore[no-untyped-def]
        return iter(self._steps)


class StageEngine(DeepSpeedPipelineEngine):
    """Takes any number of backwards, from a loss or from given gradients, and then steps."""

    @property
    def pipeline_group(self) -> torch.distributed.ProcessGroup:
        group: torch.distributed.ProcessGroup = self.mpu.get_pipe_parallel_group()
        return group

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def accumulate(self, outputs: Tensor, gradient: Tensor | None) -> None:
        """Backward from `outputs`, whose gradient is given unless they are a loss; parameters add theirs up."""
        if isinstance(self.optimizer, ZeROOptimizer):
            self.optimizer.clear_backward_seen_flag()
        # Otherwise DeepSpeed takes this backward for one of its own and reduces after it.
        self._running_engine_backward = True
        try:
            torch.autograd.backward(outputs, gradient)
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads(clear_lp_grads=True)

    def add(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Add gradients that were made outside of a backward to those of the step."""
        for parameter, gradient in gradients:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads(clear_lp_grads=True)

    def reduce(self) -> None:
        """Gradients are whole after it: summed over tied copies, averaged over the replicas of the stage."""
        for parameter in self.trained:
            # A pipeline without samples, or an expert that no token visited: others wait for its share all the same.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads(clear_lp_grads=True)
        self._exec_schedule(_Instructions([instructions.ReduceTiedGrads(), instructions.ReduceGrads()]))

    def update(self) -> None:
        """The optimizer step; gradients are forgotten."""
        self._exec_schedule(_Instructions([instructions.OptimizerStep()]))

    def discard_gradients(self) -> None:
        self.zero_grad()
        if isinstance(self.optimizer, ZeROOptimizer):
            self.optimizer.zero_grad()
        if self.using_bf16_optimizer:
            self.optimizer.clear_hp_grads()

    def clip(self, most: float) -> float:
        """Norm of all stages' gradients, a tied weight counted once; they are scaled down to `most` unless it is 0.

        For ZeRO-0 in float32, where DeepSpeed counts a tied weight twice and averages norms of different stages.
        """
        device = self.trained[0].device
        own = [p.grad for p in self.trained if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
        squares = torch.nn.utils.get_total_norm(own).to(device=device, dtype=torch.float64).square()
        comm.all_reduce(squares, group=self.pipeline_group)
        norm = float(squares.sqrt())
        if most > 0:
            torch.nn.utils.clip_grads_with_norm_(self.trained, most, torch.tensor(norm, device=device))
        return norm
