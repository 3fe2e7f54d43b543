"""Check before a run begins that its model, its settings and this machine fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.engine import EngineSettings, check_optimizer, check_pipeline_settings, check_settings
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.acceleration import check_acceleration, check_compilation
from chunkflow_cli.model.checks import check_model
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.layouts import check_fits
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.setup import planned_topology


@dataclass(frozen=True)
class CheckedModel:
    """The model of a run that can start."""

    hf_config: Any
    """Its Hugging Face configuration."""
    lines: Sequence[str]
    """What there is to say of it at the start."""


def check_requirements(loaded: LoadedConfig, device: torch.device | None = None) -> CheckedModel:
    """Check that the run can start, and return its model.

    Args:
        device: what the ranks will have, as far as is known; by default, the device of this process. Each rank checks
            its own.

    Raises:
        UsageError: the model cannot be read, or settings do not fit together.
    """
    config = loaded.config
    topology, device = planned_topology(config), device or training_device()
    if config.launch.processes < topology.processes:
        raise UsageError(
            f"launch.processes={config.launch.processes}: parallel.sequence={config.parallel.sequence} x "
            f"parallel.pipeline={config.parallel.pipeline} needs {topology.processes} processes, or a multiple of "
            f"{topology.processes}\n"
            f"  set launch.processes={topology.processes}, or start the run with torchrun or deepspeed"
        )
    _check_engine(config, device, config.parallel.pipeline)
    check_optimizer(EngineSettings(config.engine, config.optim, config.model.dtype, device))
    hf_config = load_config(config.model)
    check_acceleration(config, hf_config, device)
    return CheckedModel(hf_config, check_model(config, hf_config, topology))


def check_planned(config: Config, hf_config: Any, layouts: Sequence[Topology]) -> None:
    """Check for a plan that the model, the settings and these layouts fit together, on whatever machine.

    What depends on this machine (its device, its packages) is left out: a plan may be for another one.

    Raises:
        UsageError: as `check_requirements`.
    """
    for stages in sorted({layout.pipeline for layout in layouts}):
        _check_engine(config, torch.device("cuda"), stages)
    check_compilation(config)
    check_fits(config, hf_config, layouts)


def _check_engine(config: Config, device: torch.device, stages: int) -> None:
    settings = EngineSettings(config.engine, config.optim, config.model.dtype, device)
    if stages == 1:
        check_settings(settings)
    else:
        check_pipeline_settings(settings, stages)
