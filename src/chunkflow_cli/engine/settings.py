"""Check the settings of an engine, and make DeepSpeed's configuration from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.memory_settings import Buffers


@dataclass(frozen=True)
class EngineSettings:
    """The keys of the configuration that decide an engine, and its device."""

    engine: EngineConfig
    optim: OptimConfig
    dtype: Dtype
    """Data type of weights and activations."""
    device: torch.device
    matrices: frozenset[str] = frozenset()
    """Names in the whole Hugging Face model of the trained weights that Muon steps."""
    gathered_modules: frozenset[str] = frozenset()
    """Names in that model of the modules in which ranks call others more or less often. With ZeRO-3 on several ranks,
    the weights of each are gathered together."""


FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""DeepSpeed's keys that sum bfloat16 gradients in float32: over the chunks of a step, and over the ranks.

Without the second one, DeepSpeed rounds the float32 sum to bfloat16 before the optimizer uses it. ZeRO-1 and 3 obey;
ZeRO-0 and 2 would still sum in bfloat16, where 1 + 256 x 2^-9 comes out as 1.0 and not 1.5, and are refused.
"""
STAGES_WITH_FLOAT32_SUMS = (1, 3)


def check_settings(settings: EngineSettings) -> None:
    """Refuse combinations that DeepSpeed would run wrongly or not at all.

    Raises:
        UsageError: names the key and what to set instead.
    """
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    if settings.dtype is Dtype.float64:
        raise UsageError("model.dtype=float64 is for `chunkflow verify`: DeepSpeed trains in bfloat16 or float32")
    if settings.dtype is Dtype.bfloat16 and stage not in STAGES_WITH_FLOAT32_SUMS:
        raise UsageError(
            f"engine.zero_stage={stage} would add up the gradients of all chunks in bfloat16 and lose the small ones\n"
            "  set engine.zero_stage=1 or 3, which add them up in float32"
        )
    if offload is not Offload.none and settings.device.type == "cpu":
        raise UsageError(
            f"engine.offload={offload.value} moves data from a GPU to the host, and this machine has no GPU\n"
            "  set engine.offload=none"
        )
    if offload is Offload.optimizer and stage not in (1, 2, 3):
        raise UsageError(f"engine.offload=optimizer needs engine.zero_stage=1, 2 or 3, not {stage}")
    if offload is Offload.parameters and stage != 3:
        raise UsageError(f"engine.offload=parameters needs engine.zero_stage=3, not {stage}")


def check_pipeline_settings(settings: EngineSettings, stages: int) -> None:
    """Refuse combinations that DeepSpeed would run wrongly or not at all in a pipeline.

    Raises:
        UsageError: names the key and what to set instead.
    """
    check_settings(settings)
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    if stage > 1:
        raise UsageError(
            f"engine.zero_stage={stage} with parallel.pipeline={stages}: it reduces gradients within every backward, "
            "and the stages of a pipeline are never at the same one\n  set engine.zero_stage=1 (or 0)"
        )
    if offload is not Offload.none:
        raise UsageError(
            f"engine.offload={offload.value} with parallel.pipeline={stages} is not supported\n"
            "  set engine.offload=none: each stage already keeps the optimizer states of its own layers only"
        )


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: ours, with `engine.deepspeed` merged over it."""
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": Buffers.reduce}
    if stage == 3:
        # By default DeepSpeed treats blocks of experts of some architectures as leaves: it reduces their gradients once
        # per call of the block, not once per backward. A backward through several chunks would reduce partial sums.
        # Experts need no leaf: Hugging Face stacks them in one parameter, which every forward uses.
        zero["leaf_module"] = {"classes": []}
    if offload is not Offload.none:
        zero["offload_optimizer"] = host
    if offload is Offload.parameters:
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optim.grad_clip if stage > 0 else 0.0,  # without ZeRO the engine clips
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if settings.dtype is Dtype.bfloat16:
        config |= {"bf16": {"enabled": True}, **FLOAT32_SUMS}
    if stage != 2:
        # A step ends where `step` is called. Otherwise ZeRO-3 with the optimizer on the host would copy all gradients
        # to where the optimizer reads them after every backward, and not once per step.
        config["managed_gradient_accumulation"] = False
    merged = OmegaConf.merge(config, settings.engine.deepspeed)
    return cast("dict[str, Any]", OmegaConf.to_container(merged))
