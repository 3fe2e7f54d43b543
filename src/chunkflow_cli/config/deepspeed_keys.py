"""The keys of DeepSpeed that `engine.deepspeed` takes: those that change speed or memory and that a run passes on.

DeepSpeed itself accepts unknown keys in silence, and chunkflow would override others. Both would be without effect, so
they are refused. tests/engine/test_internals.py compares the names with DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkflow_cli.config.keys import as_written, did_you_mean
from chunkflow_cli.config.overrides import in_one
from chunkflow_cli.config.schema import EngineConfig, Offload
from chunkflow_cli.errors import UsageError

_ZERO: dict[str, Any] = {
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "sub_group_size": int,
    "round_robin_gradients": bool,
    "memory_efficient_linear": bool,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "offload_optimizer": {"pin_memory": bool, "buffer_count": int},
    "offload_param": {"pin_memory": bool, "buffer_count": int, "buffer_size": int, "max_in_cpu": int},
}
KEYS: dict[str, Any] = {
    "zero_optimization": _ZERO,
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool},
    "dump_state": bool,
    "memory_breakdown": bool,
}
"""Keys with their type, or with the keys below them."""

_DTYPE = "set model.dtype"
_BATCH = "set train.global_batch_size"
_OFFLOAD = "set engine.offload"
_LOGGERS = "set log.backends"
_FIXED = "chunkflow needs it as it is"
OWN = {
    "optimizer": "set optim.name, optim.lr and the other optim keys",
    "scheduler": "set optim.schedule and optim.warmup_ratio",
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_average"),
        _BATCH,
    ),
    "gradient_clipping": "set optim.grad_clip",
    **dict.fromkeys(
        ("bf16", "bfloat16", "fp16", "float16", "amp", "torch_autocast", "data_types", "communication_data_type",
         "seq_parallel_communication_data_type", "fp16_master_weights_and_gradients"),
        _DTYPE,
    ),
    "steps_per_print": "set log.every",
    "activation_checkpointing": "set model.activation_checkpointing",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config"), _LOGGERS),
    "checkpoint": "set checkpoint.every and checkpoint.keep",
    "sequence_parallel_size": "set parallel.sequence",
    "pipeline": "set parallel.pipeline",
    "zero_optimization.stage": "set engine.zero_stage",
    **dict.fromkeys(
        ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device",
         "zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param",
         "zero_optimization.cpu_offload_use_pin_memory"),
        _OFFLOAD,
    ),
    **dict.fromkeys(
        ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "managed_gradient_accumulation"), _FIXED
    ),
}  # fmt: skip
"""Keys that chunkflow sets itself, with what to do instead."""


def check_deepspeed(engine: EngineConfig) -> None:
    """Refuse keys in `engine.deepspeed` that would have no effect, or whose value has the wrong type.

    Raises:
        UsageError: names each of them, with the key of chunkflow to set instead.
    """
    problems = _problems(engine.deepspeed, KEYS, "")
    zero = engine.deepspeed.get("zero_optimization")
    for name, needed in (("offload_optimizer", Offload.optimizer), ("offload_param", Offload.parameters)):
        is_on = engine.offload in (needed, Offload.parameters)
        if isinstance(zero, Mapping) and name in zero and not is_on and not problems:
            problems.append(
                f"engine.deepspeed.zero_optimization.{name} has no effect with engine.offload={engine.offload.value}\n"
                f"  set engine.offload={needed.value}"
            )
    if problems:
        raise UsageError(in_one(problems))


def _problems(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for key, value in given.items():
        name = f"{prefix}{key}"
        full, kind = f"engine.deepspeed.{name}", known.get(str(key))
        if name in OWN:
            problems.append(f"{full} is set by chunkflow\n  {OWN[name]}")
        elif kind is None:
            hint = did_you_mean(str(key), list(known), f"engine.deepspeed.{prefix}")
            examples = f"\n  it passes on {', '.join(list(known)[:4])}{', ...' if len(known) > 4 else ''}"
            problems.append(f"{full} is not a key that chunkflow passes to DeepSpeed{hint or examples}")
        elif isinstance(kind, Mapping):
            if isinstance(value, Mapping):
                problems += _problems(value, kind, f"{name}.")
            else:
                problems.append(f"{full}={as_written(value)} must be a mapping such as {{{next(iter(kind))}: VALUE}}")
        elif kind is bool and not isinstance(value, bool):
            problems.append(f"{full}={as_written(value)} must be true or false")
        elif kind is int and not _is_count(value):
            problems.append(f"{full}={as_written(value)} must be an integer of at least 0")
    return problems


def _is_count(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < 2**63 and float(value).is_integer()
