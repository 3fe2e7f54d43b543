"""What runs the steps of a training run, put together: model, engine and runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chunkflow_cli.config import Config
from chunkflow_cli.costs import ModelShape
from chunkflow_cli.engine import Engine, EngineSettings
from chunkflow_cli.execution import attention
from chunkflow_cli.execution.backends import Backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import convert_linear_layers
from chunkflow_cli.execution.runner import Runner, has_dropout
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.model import add_lora, enable_activation_checkpointing, load_model, model_shape, with_adapters


@dataclass(frozen=True)
class Assembly:
    model: Any
    """With adapters, if any; its parameters are the engine's."""
    engine: Engine
    runner: Runner
    shape: ModelShape


def assemble(
    config: Config,
    hf_config: Any,
    backend: Backend,
    device: torch.device,
    *,
    sequence_group: SequenceGroup | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    announce: Callable[[str], None] = lambda doing: None,
) -> Assembly:
    """Load the model and make the engine around it.

    Args:
        hf_config: the model's configuration.
        backend: the attention that it runs with.
        device: where it runs.
        sequence_group: over which chunks may be spread.
        stop_requested: asked before every operation.
        announce: told every operation before it begins.

    Raises:
        UsageError: the model's weights are not to be had, or its settings do not fit it.
    """
    attention.register()
    torch.manual_seed(config.train.seed)
    dtype: torch.dtype = getattr(torch, config.model.dtype.value)
    model: Any = load_model(config.model, hf_config, dtype=dtype, attention=attention.NAME, seed=config.train.seed)
    enable_activation_checkpointing(model, config.model.activation_checkpointing)
    shape = model_shape(model)
    if config.model.lora.enabled:
        model = add_lora(model, config.model.lora)
        shape = with_adapters(shape, model)
    if device.type == "cpu":
        convert_linear_layers(model)
    model.to(device)
    settings = EngineSettings(config.engine, config.optim, config.model.dtype, device)
    engine = Engine(ChunkModel(model, backend), settings)
    runner = Runner(
        engine,
        device,
        replay_random=has_dropout(model),
        lockstep=engine.needs_lockstep,
        sequence_group=sequence_group,
        stop_requested=stop_requested,
        announce=announce,
    )
    return Assembly(model, engine, runner, shape)
