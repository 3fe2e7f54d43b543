"""The engine of one stage of a pipeline.

It knows nothing of chunks and passes no messages: the runner gives it what came from the neighbours. Between two steps
it takes any number of forwards and backwards, in any order; `step()` sums tied weights, reduces over the replicas of
the stage and updates. ZeRO 0 and 1 only: the others would reduce within every backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Offload
from chunkflow_cli.engine.agreement import all_or_none, own_rank, process_count
from chunkflow_cli.engine.distributed import import_deepspeed, init_process_group, quiet
from chunkflow_cli.engine.partitions import check_fits, parts_to_write, publish_weights, read_partitions
from chunkflow_cli.engine.settings import EngineSettings, check_settings, deepspeed_config, make_optimizer
from chunkflow_cli.engine.state_files import StateFiles, write_parts
from chunkflow_cli.engine.whole_weights import collect_stages
from chunkflow_cli.errors import RunError, UsageError


def check_pipeline_settings(settings: EngineSettings, stages: int) -> None:
    """
    Raises:
        UsageError: names the key that does not go with a pipeline, and what to set instead.
    """
    check_settings(settings)
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    if stage > 1:
        raise UsageError(
            f"engine.zero_stage={stage} with parallel.pipeline={stages}: it reduces gradients within every backward, "
            "and the stages of a pipeline are never at the same one\n  take engine.zero_stage=1 (or 0)"
        )
    if offload is not Offload.none:
        raise UsageError(
            f"engine.offload={offload.value} with parallel.pipeline={stages} is not supported\n"
            "  take engine.offload=none: each stage already keeps the optimizer states of its own layers only"
        )


class Stage(Protocol):
    """What an engine asks of the module that it drives."""

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The weight that it shares with another stage."""

    @property
    def hf_parameter_names(self) -> Mapping[str, str]:
        """Of its parameters in the whole Hugging Face model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class PipelineEngine:
    """A DeepSpeed engine around one stage. Its gradients are those of the whole pipeline's loss.

    The loss must already be normalised over the whole step: gradients of all backwards are summed.
    """

    def __init__(self, module: Stage, settings: EngineSettings, *, stages: int) -> None:
        """
        Args:
            module: this process's stage.
            settings: as for `Engine`.
            stages: of the pipeline. The other processes are its replicas.

        Raises:
            UsageError: as `check_pipeline_settings`.
        """
        check_pipeline_settings(settings, stages)
        import_deepspeed()
        init_process_group(settings.device)
        with quiet():
            # Late, for it imports deepspeed, which must have been prepared.
            from deepspeed.runtime.config import DeepSpeedConfig

            from chunkflow_cli.engine.deepspeed_stage import StageEngine, StageModule

            self._zero_stage = settings.engine.zero_stage
            self._clip = settings.optim.grad_clip
            if self._zero_stage == 0:  # DeepSpeed would clip by a wrong norm: `step` does it
                settings = replace(settings, optim=replace(settings.optim, grad_clip=0.0))
            config = deepspeed_config(settings)
            config.pop("managed_gradient_accumulation", None)  # not with a pipeline; the step is where we say anyway
            assert isinstance(module, nn.Module)
            pipeline = StageModule(module, stages, module.tied_weight)
            self._engine = StageEngine(
                args=None,
                model=pipeline,
                optimizer=make_optimizer(pipeline, settings),
                config=config,
                config_class=DeepSpeedConfig(config, pipeline.mpu()),
                mpu=pipeline.mpu(),
                dist_init_required=False,
            )
        self._optimizer: Any = self._engine.optimizer
        self._stages = stages
        self._optimizer_name = settings.optim.name.value
        self.module: nn.Module = module
        self._module: Stage = module
        self.device: torch.device = self._engine.device
        self._averaged_over = self._engine.dp_world_size

    @property
    def needs_joined_retained_chunks(self) -> bool:
        """Forwards and backwards of a pipeline stay apart."""
        return False

    @property
    def needs_lockstep(self) -> bool:
        """Pipelines side by side communicate at the step only."""
        return False

    @property
    def pipeline_group(self) -> torch.distributed.ProcessGroup:
        """The processes of this pipeline, in the order of its stages."""
        return self._engine.pipeline_group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not through DeepSpeed's forward, which prepares one backward for each forward.
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """On the last stage."""
        self._engine.accumulate(loss * self._averaged_over, None)

    def backward_from(self, outputs: Tensor, gradient: Tensor) -> None:
        """On any other: `gradient` is what the next stage has found for the `outputs` that it was sent."""
        self._engine.accumulate(outputs, gradient)

    def add_gradients(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """What a backward has put off, for the parameters of the module."""
        self._engine.add(gradients)

    def step(self) -> float:
        """Clip, update the weights and forget the gradients; returns the gradient norm of all stages before clipping.

        Raises:
            RunError: that norm is not finite.
        """
        self._engine.reduce()
        norm = self._engine.clip(self._clip) if self._zero_stage == 0 else None
        self._engine.update()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm is {norm}: the weights of this step are spoilt and are not saved")
        return norm

    def discard_gradients(self) -> None:
        """Forget what an interrupted step has accumulated."""
        self._engine.discard_gradients()

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def whole_weights(self, model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
        """The whole model's weights: on the first rank, None on others. All call it.

        Args:
            model: this stage's part of the Hugging Face (or peft) model; `causal_lm` of the module.
            trained_only: leave out what is frozen: the base under adapters.
        """
        names = {id(p): self._module.hf_parameter_names[own] for own, p in self._own_parameters()}
        weights = {
            names.get(id(tensor), name): tensor.detach()
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.requires_grad or not trained_only
        }
        replicas = process_count() // self._stages
        return collect_stages(weights, [stage * replicas for stage in range(self._stages)], self.device)

    def save(self, folder: Path) -> None:
        """Write what this rank keeps of weights and optimizer states into `folder`, which exists; every rank does."""
        parts = parts_to_write(self._engine, self._names(), elsewhere=self._second_copies())
        write_parts(folder, own_rank(), parts, optimizer=self._optimizer_name)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, exact to the bit, whatever layout has saved.

        Raises:
            UsageError: it is the state of another model or optimizer.
            RunError: a file of it is missing or damaged.
        """
        with all_or_none(f"reading {folder}"):
            files, names = StateFiles(folder), self._names()
            check_fits(files, self._engine, names, optimizer=self._optimizer_name, has_all=False)
            read_partitions(self._engine, names, files)
        publish_weights(self._engine)

    def _own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def _names(self) -> dict[str, str]:
        """Of the parameters of DeepSpeed's module in the Hugging Face model."""
        own = {id(parameter): self._module.hf_parameter_names[name] for name, parameter in self._own_parameters()}
        return {name: own[id(parameter)] for name, parameter in self._engine.module.named_parameters()}

    def _second_copies(self) -> frozenset[str]:
        """What another stage holds, too, and writes."""
        if self._module.tied_weight is None or self._engine.is_first_stage():
            return frozenset()
        return frozenset(
            self._module.hf_parameter_names[name] for name, p in self._own_parameters() if p is self._module.tied_weight
        )
