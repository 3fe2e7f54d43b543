"""A run that is ready to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from chunkflow_cli.config.schema import Config
from chunkflow_cli.engine import Processes
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.assembly import Assembly
from chunkflow_cli.training.checkpoint import describe_layout
from chunkflow_cli.training.identity import RunIdentity
from chunkflow_cli.training.inputs import RunData, sample_counts
from chunkflow_cli.training.judgement import RunPreferences
from chunkflow_cli.training.recorder import Recorder
from chunkflow_cli.training.run_folder import RunFolder


@dataclass(frozen=True)
class Joined:
    """A process that has joined the others of its run. Nothing is loaded yet."""

    config: Config
    hf_config: Any
    folder: RunFolder
    console: Console
    processes: Processes
    device: torch.device

    @property
    def topology(self) -> Topology:
        return self.processes.topology

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the model."""
        dtype: torch.dtype = getattr(torch, self.config.model.dtype.value)
        return dtype


@dataclass(frozen=True)
class Prepared(Joined):
    """A run that is ready to train, on one process. What changes while it trains is in `RunState`."""

    data: RunData
    plan: RunPlan
    shape: ModelShape
    parts: Assembly
    """The model with its engine and its runner."""
    identity: RunIdentity | None
    """What the run is made of; on the first process, which saves it with each checkpoint."""
    learning_rate: Callable[[int], float]
    """The learning rate of each step, counted from 0."""
    peak_flops: float
    """Operations per second that one device can do."""
    activation_bytes: float | None
    """Bytes of activations per token; None if they cannot be measured."""
    recorder: Recorder | None
    """Records every operation under `train.trace`."""
    described: dict[str, Any]
    """`plan` and `environment` in plain values, for reports and trackers; empty except on the first process."""
    preferences: RunPreferences | None = None
    """What is known of the samples of `train.task=dpo`, `orpo` and `kto`."""

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows that were read, as the report has it."""
        return sample_counts(self.data, self.config.data)

    @property
    def layout(self) -> str:
        """The layout in words, as checkpoints name it."""
        return describe_layout(self.topology, self.config.engine)

    def sum_of_whole(self, *values: float, is_whole: bool) -> list[float]:
        """Return the sum of each value over all processes. Every process calls it.

        Args:
            is_whole: this process was not asked to stop, and has run all operations that the values come from.

        Raises:
            Interrupted: that is not so on a process.
        """
        *sums, whole = self.processes.sum(*values, is_whole)
        if whole < self.topology.processes:
            raise Interrupted
        return sums

    @property
    def stops_between_steps_only(self) -> bool:
        """True if operations wait for other ranks, so that a rank that stops within a step would leave them waiting."""
        return operations_wait(self.plan, self.topology)


def operations_wait(plan: RunPlan, topology: Topology) -> bool:
    """Return whether operations wait for other ranks, which a rank that stops within a step would leave waiting."""
    return plan.is_in_lockstep or topology.sequence > 1 or topology.pipeline > 1
