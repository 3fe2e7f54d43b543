"""Assemble the model, engine and runner of a run; in a pipeline, those of one stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from chunkflow_cli.config.schema import Config, OptimizerName, PipelineSchedule, Task
from chunkflow_cli.engine import Engine, EngineSettings, PipelineEngine, Processes
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.acceleration import Acceleration
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.batch import dummy_token
from chunkflow_cli.execution.chunk_model import ChunkModel, head_of
from chunkflow_cli.execution.cpu_quirks import convert_linear_layers
from chunkflow_cli.execution.dropout import remove_dropout
from chunkflow_cli.execution.loss import FUSED_HEADS
from chunkflow_cli.execution.messages import Links
from chunkflow_cli.execution.runner import Runner, ScheduleRunner
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.stage_runner import StageRunner
from chunkflow_cli.execution.stages import StageModel, check_stages
from chunkflow_cli.execution.state_home import state_home
from chunkflow_cli.execution.step import RunnerSettings
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.shape import shape_without_weights, with_frozen
from chunkflow_cli.model.trained_weights import layer_matrices
from chunkflow_cli.model.uneven_calls import modules_with_uneven_calls
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.stage_cut import StageLayers
from chunkflow_cli.training.loading import load_on_every_rank


@dataclass(frozen=True)
class Assembly:
    """A model with the engine and the runner that train it."""

    model: Any
    """The model with its adapters; in a pipeline, the part that this stage holds. The engine owns its parameters."""
    engine: Engine | PipelineEngine
    runner: ScheduleRunner
    shape: ModelShape
    """The shape of the whole model."""


def assemble(
    config: Config,
    hf_config: Any,
    backend: Backend,
    device: torch.device,
    *,
    processes: Processes | None = None,
    stages: Sequence[StageLayers] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    announce: Callable[[str], None] = lambda doing: None,
) -> Assembly:
    """Load the model, and make its engine and runner. Every process of a run calls this.

    Args:
        processes: the processes of the run; None if this process is alone.
        stages: the layers that each stage of a pipeline holds; at most one without a pipeline.
        stop_requested: called before every operation, which does not run if the result is True.
        announce: called with the name of every operation before it begins.

    Raises:
        UsageError: the model's weights cannot be loaded, or its settings do not fit it.
    """
    attention.register()
    processes = processes or Processes()
    model, shape = _trained_model(config, hf_config, processes)
    matrices = layer_matrices(model) if config.optim.name is OptimizerName.muon else frozenset()
    gathered = frozenset(modules_with_uneven_calls(model))
    settings = EngineSettings(config.engine, config.optim, config.model.dtype, device, matrices, gathered)
    Acceleration.of(config).use_kernels(model)
    runner_settings = RunnerSettings(
        device,
        dummy_token=dummy_token(model),
        sequence_group=SequenceGroup.join(processes.topology),
        state_home=state_home(config.chunk.offload_state, device),
        stop_requested=stop_requested,
        announce=announce,
    )
    if len(stages) > 1:
        check_stages(model, stages)
        stage = StageModel(model, backend, stages[processes.place.stage])
        return Assembly(model, *_run_stage(config, stage, settings, runner_settings, len(stages), processes), shape)
    if settings.engine.zero_stage == 3 and processes.topology.processes > 1:
        _check_head_in_lockstep(model)
    return Assembly(model, *_run_whole(config, ChunkModel(model, backend), settings, runner_settings), shape)


def _trained_model(config: Config, hf_config: Any, processes: Processes) -> tuple[Any, ModelShape]:
    """Load the model with its adapters, freeze what is not trained, and return it and its shape."""
    torch.manual_seed(config.train.seed)
    dtype: torch.dtype = getattr(torch, config.model.dtype.value)
    if config.train.task is not Task.sft:  # as in TRL: first pass, reference and training must see the same model
        remove_dropout(hf_config.get_text_config())
    model: Any = load_on_every_rank(config, hf_config, processes, dtype=dtype, attention=attention.NAME)
    enable_activation_checkpointing(model, config.model.activation_checkpointing)
    shape = shape_without_weights(config.model, hf_config)
    if config.model.lora.enabled:
        model = add_lora(model, config.model.lora)
    return model, with_frozen(shape, model, config.optim)


def _run_stage(
    config: Config, stage: StageModel, settings: EngineSettings, how: RunnerSettings, stages: int, processes: Processes
) -> tuple[PipelineEngine, StageRunner]:
    """Return the engine and the runner of one stage of a pipeline."""
    _on_device(stage, settings.device)
    Acceleration.of(config).compile(stage.causal_lm)
    engine = PipelineEngine(stage, settings, stages=stages)
    topology = processes.topology
    pipelines = [topology.pipeline_group(first) for first in range(topology.replicas)]
    links, splits = Links(pipelines, settings.device), config.parallel.schedule is PipelineSchedule("zero_bubble")
    return engine, StageRunner(engine, links, replace(how, lockstep=engine.needs_lockstep), splits_backwards=splits)


def _run_whole(
    config: Config, model: ChunkModel, settings: EngineSettings, how: RunnerSettings
) -> tuple[Engine, Runner]:
    """Return the engine and the runner of a model that each rank holds whole, or shares with ZeRO-3."""
    Acceleration.of(config).compile(model.causal_lm)
    if settings.engine.zero_stage < 3:
        _on_device(model, settings.device)
    elif settings.device.type == "cpu":
        convert_linear_layers(model)
    engine = Engine(model, settings)
    return engine, Runner(engine, replace(how, lockstep=engine.needs_lockstep))


def _check_head_in_lockstep(model: Any) -> None:
    """Check that ranks can run the model's head together with ZeRO-3.

    ZeRO-3 fetches the weights of an adapted head for each tile of targets, and ranks have different numbers of tiles.

    Raises:
        UsageError: the head has an adapter.
    """
    if type(head_of(model)) not in FUSED_HEADS:
        raise UsageError(
            "model.lora.target_modules adapts the head, which engine.zero_stage=3 cannot run on several ranks\n"
            "  set engine.zero_stage=1, or leave the head out of model.lora.target_modules"
        )


def _on_device(model: torch.nn.Module, device: torch.device) -> None:
    if device.type == "cpu":
        convert_linear_layers(model)
    model.to(device)
