"""Check before a run begins that everything it needs is there and fits together."""

from __future__ import annotations

from typing import Any

import torch

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.engine import EngineSettings, check_pipeline_settings, check_settings
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.layouts import check_layouts
from chunkflow_cli.training.setup import planned_topology


def check_requirements(loaded: LoadedConfig) -> Any:
    """Check that the run can start, and return the Hugging Face configuration of its model.

    Raises:
        UsageError: something is missing (one error names everything that is), or settings do not fit together.
    """
    hf_config = _check_inputs(loaded)
    _check_layout(loaded.config, hf_config)
    return hf_config


def _check_inputs(loaded: LoadedConfig) -> Any:
    """Check that model, data and hardware are there, and return the Hugging Face configuration.

    Raises:
        UsageError: names everything that is missing.
    """
    config = loaded.config
    missing: list[str] = []
    hf_config = None
    if not config.model.path:
        missing.append("model.path is not set: a Hugging Face id, a folder or a GGUF file")
    else:
        try:
            hf_config = load_config(config.model)
        except UsageError as error:
            missing.append(str(error))
    if not config.data.path:
        missing.append("data.path is not set: your training data (.jsonl, .json, .parquet, a folder, or a data set id)")
    if missing and config.hardware and not torch.cuda.is_available():
        missing.append(f"a GPU: this machine has none, and the recipe is made for {config.hardware}")
    if missing:
        lines = "\n".join(f"- {text}" for text in missing)
        raise UsageError(
            f"recipe {loaded.recipe} cannot run here yet. Missing:\n{lines}" if len(missing) > 1 else missing[0]
        )
    return hf_config


def _check_layout(config: Config, hf_config: Any) -> None:
    """Check that the model can be divided among the processes, and that the engine's settings suit the layout.

    Raises:
        UsageError: names the key that does not fit, and the remedy.
    """
    check_layouts(config, hf_config, [planned_topology(config)])
    group = config.parallel.sequence * config.parallel.pipeline
    if config.launch.processes < group:
        raise UsageError(
            f"launch.processes={config.launch.processes}: parallel.sequence={config.parallel.sequence} x "
            f"parallel.pipeline={config.parallel.pipeline} needs {group} processes, or a multiple of {group}\n"
            f"  set launch.processes={group}, or start the run with torchrun or deepspeed"
        )
    settings = EngineSettings(config.engine, config.optim, config.model.dtype, training_device())
    stages = config.parallel.pipeline
    if stages == 1:
        check_settings(settings)
        return
    check_pipeline_settings(settings, stages)
