"""Describe a run in plain values, for trackers and reports: its configuration, plan and environment."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from chunkflow_cli import __version__
from chunkflow_cli.config.keys import as_plain
from chunkflow_cli.config.schema import Config
from chunkflow_cli.planning.peak_memory import memory_of_fullest
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.training.setup import RunSetup

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "flash-attn", "flash-linear-attention", "liger-kernel")


def describe_plan(setup: RunSetup, plan: RunPlan) -> dict[str, Any]:
    """Return what a run will do, as `plan` prints it, without planning its single steps."""
    memory = None
    if setup.shape is not None:
        memory = memory_of_fullest(setup.shape, setup.memory, plan, []).device_total
    return {
        "steps": plan.steps,
        "steps_per_epoch": plan.batches.steps_per_epoch,
        "samples": len(plan.lengths),
        "tokens": int(plan.lengths.sum()),
        "target_tokens": int(plan.target_counts.sum()),
        "longest_sample": int(plan.sequence_lengths.max()),
        "chunk_size": plan.chunk_size,
        "k": plan.k,
        "processes": setup.topology.processes,
        "layout": str(setup.topology),
        "schedule": None if plan.pipeline is None else plan.pipeline.schedule,
        "cost_model": plan.costs.source,
        "predicted_memory_bytes": memory,
    }


def describe_environment(device: str, attention: str) -> dict[str, Any]:
    """Return the device and the versions that a run uses; nothing that says where it runs or whose it is."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": device,
        "attention": attention,
        "chunkflow": __version__,
        "python": platform.python_version(),
        **versions,
    }


def describe_config(config: Config) -> dict[str, Any]:
    """Return the configuration as plain values."""
    plain: dict[str, Any] = as_plain(asdict(config))
    return plain
