"""Make a model's layers faster with `model.kernels` and `model.compile`, which change only rounding."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ActivationCheckpointing, Config, Kernels, PipelineSchedule
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.chunk_model import base_model
from chunkflow_cli.execution.compilation import compile_layers
from chunkflow_cli.model.kernels import check_kernels, use_liger


@dataclass(frozen=True)
class Acceleration:
    """How the layers of a model are run."""

    kernels: Kernels = Kernels.none
    compiles: bool = False

    @classmethod
    def of(cls, config: Config) -> Acceleration:
        """Return the acceleration that a configuration asks for."""
        return cls(config.model.kernels, config.model.compile)

    def __bool__(self) -> bool:
        return self.kernels is not Kernels.none or self.compiles

    def use_kernels(self, model: nn.Module) -> None:
        """Give a whole model, with its adapters, other kernels, in place."""
        if self.kernels is Kernels.liger:
            use_liger(base_model(model))

    def compile(self, model: nn.Module) -> None:
        """Compile the layers of a model, or of what a stage holds of it, in place."""
        if self.compiles:
            compile_layers(model)


def check_acceleration(config: Config, hf_config: Any, device: torch.device) -> None:
    """Refuse kernels and compilation where they cannot run, or would not be exact.

    Raises:
        UsageError: names the key and what to set instead.
    """
    check_kernels(config.model, hf_config.get_text_config().model_type, device)
    check_compilation(config)
    if config.model.compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UsageError(
            "model.compile=true needs a C++ compiler on a CPU, and there is none\n  set model.compile=false"
        )


def check_compilation(config: Config) -> None:
    """Refuse compilation with settings under which it cannot run anywhere, or would not be exact.

    Raises:
        UsageError: names the key and what to set instead.
    """
    if not config.model.compile:
        return
    remedy = "set model.compile=false"
    if config.engine.zero_stage == 3:
        raise UsageError(
            "model.compile=true with engine.zero_stage=3, which gathers weights within each layer\n"
            f"  {remedy}, or engine.zero_stage=1"
        )
    if config.model.activation_checkpointing is ActivationCheckpointing.selective:
        raise UsageError(
            "model.compile=true with model.activation_checkpointing=selective, which chooses by operations that "
            "compiled code does not show\n  set model.activation_checkpointing=full or none"
        )
    if config.parallel.schedule is PipelineSchedule("zero_bubble") and config.parallel.pipeline > 1:
        raise UsageError(
            "model.compile=true with parallel.schedule=zero_bubble, which splits the backward of linear layers\n"
            f"  {remedy}, or parallel.schedule=state_aware_1f1b"
        )
    if config.model.lora.enabled and config.model.lora.dropout > 0:
        raise UsageError(
            f"model.compile=true with model.lora.dropout={config.model.lora.dropout:g}: compiled code draws other "
            f"random numbers when a chunk is recomputed\n  {remedy}, or model.lora.dropout=0"
        )
