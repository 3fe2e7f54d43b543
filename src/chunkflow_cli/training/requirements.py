"""Check before a run begins that everything it needs is there and fits together."""

from __future__ import annotations

from typing import Any

import torch

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.engine import EngineSettings, check_pipeline_settings, check_settings
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import check_adapters, check_files
from chunkflow_cli.model.positions import check_positions
from chunkflow_cli.training.setup import checked_topology


def check_requirements(loaded: LoadedConfig) -> Any:
    """Check that the run can start, and return the Hugging Face configuration of its model.

    Raises:
        UsageError: something is missing (one error names everything that is), or settings do not fit together.
    """
    config = loaded.config
    hf_config = _check_inputs(loaded)
    processes = checked_topology(config, hf_config).processes
    if config.launch.processes < processes:
        raise UsageError(
            f"launch.processes={config.launch.processes}: parallel.sequence={config.parallel.sequence} x "
            f"parallel.pipeline={config.parallel.pipeline} needs {processes} processes, or a multiple of {processes}\n"
            f"  set launch.processes={processes}, or start the run with torchrun or deepspeed"
        )
    if config.model.lora.enabled:
        check_adapters(config.model, hf_config)
    settings = EngineSettings(config.engine, config.optim, config.model.dtype, training_device())
    if config.parallel.pipeline == 1:
        check_settings(settings)
    else:
        check_pipeline_settings(settings, config.parallel.pipeline)
    return hf_config


def _check_inputs(loaded: LoadedConfig) -> Any:
    """Check that model, data and hardware are there, and return the Hugging Face configuration."""
    config = loaded.config
    missing: list[str] = []
    hf_config = None
    if not config.model.path:
        missing.append("model.path is not set: a Hugging Face id, a folder or a GGUF file")
    else:
        try:
            hf_config = load_config(config.model)
            check_files(config.model)
            check_positions(config, hf_config)
        except UsageError as error:
            missing.append(str(error))
    if not config.data.path:
        missing.append("data.path is not set: your training data (.jsonl, .json, .parquet, a folder, or a data set id)")
    if missing and config.hardware and not torch.cuda.is_available():
        missing.append(f"a GPU: this machine has none, and the recipe is made for {config.hardware}")
    if len(missing) == 1:
        raise UsageError(missing[0])
    if missing:
        lines = "\n".join(f"- {text}" for text in missing)
        raise UsageError(f"recipe {loaded.recipe} cannot run here yet. Missing:\n{lines}")
    return hf_config
