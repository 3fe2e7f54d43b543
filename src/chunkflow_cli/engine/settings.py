"""What an engine is made from: the checked settings, DeepSpeed's configuration and the optimizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class EngineSettings:
    engine: EngineConfig
    optim: OptimConfig
    dtype: Dtype
    device: torch.device


def check_settings(settings: EngineSettings) -> None:
    """Refuse combinations that DeepSpeed would run wrongly or not at all.

    Raises:
        UsageError: names the key and what to set instead.
    """
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    if settings.dtype is Dtype.float64:
        raise UsageError("model.dtype=float64 is for `chunkflow verify`: DeepSpeed trains in bfloat16 or float32")
    if stage in (0, 2) and settings.dtype is Dtype.bfloat16:  # 257 gradients 1, 2^-9, 2^-9... sum to 1.0 there, not 1.5
        raise UsageError(
            f"engine.zero_stage={stage} would add up the gradients of all chunks in bfloat16 and lose the small ones\n"
            "  take engine.zero_stage=1 or 3, which add them up in float32"
        )
    if offload is not Offload.none and settings.device.type == "cpu":
        raise UsageError(
            f"engine.offload={offload.value} moves data from a GPU to the host, and this machine has no GPU"
        )
    if offload is Offload.optimizer and stage not in (1, 2, 3):
        raise UsageError(f"engine.offload=optimizer needs engine.zero_stage=1, 2 or 3, not {stage}")
    if offload is Offload.parameters and stage != 3:
        raise UsageError(f"engine.offload=parameters needs engine.zero_stage=3, not {stage}")


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ours, with `engine.deepspeed` merged over it."""
    stage, offload = settings.engine.zero_stage, settings.engine.offload
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 50_000_000}
    if offload is not Offload.none:
        zero["offload_optimizer"] = host
    if offload is Offload.parameters:
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optim.grad_clip if stage > 0 else 0.0,  # the engine clips without ZeRO itself
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if settings.dtype is Dtype.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"  # or the float32 sum is rounded to bfloat16 before it is used
    if stage in (0, 1):
        config["managed_gradient_accumulation"] = False
    return _merge(config, settings.engine.deepspeed)


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def make_optimizer(module: nn.Module, settings: EngineSettings) -> torch.optim.Optimizer:
    """Weight decay is for matrices; norms and biases have none, as in the Hugging Face trainer."""
    optim = settings.optim
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    betas = (optim.betas[0], optim.betas[1])
    if settings.engine.offload is not Offload.none:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=betas, eps=optim.eps, adamw_mode=True)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
