"""What no type can check of a configuration."""

from __future__ import annotations

from chunkflow_cli.config.schema import Attention, Config, CostModelName, Device, Dtype, Spread
from chunkflow_cli.errors import UsageError


def check(config: Config) -> None:
    """Reject values that no run can use.

    Raises:
        UsageError: names the key, the value and what it may be.
    """
    at_least = {
        "chunk.size": (config.chunk.size, 1),
        "chunk.k": (config.chunk.k, 1),
        "data.max_length": (config.data.max_length, 2),
        "data.num_workers": (config.data.num_workers, 1),
        "train.steps": (config.train.steps, 1),
        "train.epochs": (config.train.epochs, 1),
        "train.global_batch_size": (config.train.global_batch_size, 1),
        "train.seed": (config.train.seed, 0),
        "eval.every": (config.eval.every, 1),
        "checkpoint.every": (config.checkpoint.every, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "log.every": (config.log.every, 1),
        "launch.processes": (config.launch.processes, 1),
        "parallel.sequence": (config.parallel.sequence, 1),
        "launch.grace_seconds": (config.launch.grace_seconds, 0),
        "launch.hang_seconds": (config.launch.hang_seconds, 0),
        "parallel.pipeline": (config.parallel.pipeline, 1),
        "parallel.warmup_extra": (config.parallel.warmup_extra, 0),
        "tune.memory_gib": (config.tune.memory_gib, 0),
        "cluster.gpus_per_node": (config.cluster.gpus_per_node, 1),
        "tune.samples": (config.tune.samples, 1),
        "tune.measure": (config.tune.measure, 0),
        "tune.budget_seconds": (config.tune.budget_seconds, 0),
        "model.lora.r": (config.model.lora.r, 1),
        "verify.length": (config.verify.length, 8),
        "optim.lr": (config.optim.lr, 0),
        "optim.weight_decay": (config.optim.weight_decay, 0),
        "optim.momentum": (config.optim.momentum, 0),
        "optim.grad_clip": (config.optim.grad_clip, 0),
    }
    for key, (value, smallest) in at_least.items():
        if value is not None and value < smallest:
            raise UsageError(f"{key}={value} must be at least {smallest}")
    for key, rate in (
        ("cluster.node_gb_per_second", config.cluster.node_gb_per_second),
        ("cluster.network_gb_per_second", config.cluster.network_gb_per_second),
    ):
        if rate is not None and rate <= 0:
            raise UsageError(f"{key}={rate} must be above 0; null takes the data sheet's")
    shares = {
        "data.eval_fraction": config.data.eval_fraction,
        "optim.warmup_ratio": config.optim.warmup_ratio,
        "model.lora.dropout": config.model.lora.dropout,
    }
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise UsageError(f"{key}={share} must be at least 0 and below 1")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UsageError(f"optim.betas={config.optim.betas} must be two numbers, each at least 0 and below 1")
    if config.engine.zero_stage not in (0, 1, 2, 3):
        raise UsageError(f"engine.zero_stage={config.engine.zero_stage} must be 0, 1, 2 or 3")
    processes, stages, sequence = config.launch.processes, config.parallel.pipeline, config.parallel.sequence
    if processes > 1 and processes % stages:
        raise UsageError(
            f"launch.processes={processes} cannot be divided among pipelines of parallel.pipeline={stages} stages"
        )
    if processes > 1 and processes % (stages * sequence):
        raise UsageError(
            f"launch.processes={processes} cannot be divided into groups of parallel.sequence={sequence}"
            + (f" x parallel.pipeline={stages}" if stages > 1 else "")
        )
    if config.parallel.spread is Spread.all and sequence == 1:
        raise UsageError("parallel.spread=all: there is no group to spread over\n  set parallel.sequence")
    if config.plan.cost_model is CostModelName.measured and config.tune.device is not Device.measured:
        raise UsageError(
            f"plan.cost_model=measured with tune.device={config.tune.device.value}: only the device of this machine "
            "is measured\n  take plan.cost_model=profile, or leave tune.device at measured"
        )
    if config.data.eval_path is not None and config.data.eval_fraction > 0:
        raise UsageError("data.eval_path and data.eval_fraction are both set: hold out one way or the other")
    if config.model.dtype is Dtype.float64 and config.model.attention not in (
        Attention.auto,
        Attention.reference,
        Attention.cpu,
    ):
        raise UsageError(
            f"model.attention={config.model.attention.value} has no float64\n  take model.attention=reference"
        )
