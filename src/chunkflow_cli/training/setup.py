"""Read once what planning needs besides the data: configuration, model sizes, device and costs.

`plan`, `tune-chunk-size`, `train` and `training.measure` all plan from a `RunSetup`, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chunkflow_cli.config.schema import (
    ActivationCheckpointing,
    Config,
    CostModelName,
    Cuts,
    Device,
    EngineConfig,
    OffloadState,
    Spread,
)
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.calibration import CALIBRATION_VERSION, Calibration
from chunkflow_cli.planning.costs import CostModel
from chunkflow_cli.planning.devices import DEVICES, DeviceProfile
from chunkflow_cli.planning.memory_parts import offload_seconds
from chunkflow_cli.planning.memory_settings import ELEMENT_BYTES, Buffers, MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.optimizer_states import state_numbers
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.processes.environment import threads_of_user
from chunkflow_cli.training.global_batches import global_batches_of
from chunkflow_cli.training.judgement import answers_of


@dataclass(frozen=True)
class RunSetup:
    """Everything except the data that decides what each step of a run does, and what it costs."""

    config: Config
    shape: ModelShape | None
    """Sizes of the model; None if no model is named."""
    device: DeviceProfile
    """The device to plan for, in the cluster that the configuration describes."""
    costs: CostModel
    topology: Topology
    calibration: Calibration | None = None
    """Measured costs and memory of this model on this device; None if both come from formulas."""

    def plan(self, data: TokenizedData) -> RunPlan:
        """Return the plan of all steps over these samples, which `plan` prints and `train` runs."""
        config = self.config
        batches = global_batches_of(config, data)
        is_recurrent = self.shape is not None and self.shape.recurrent.has_edges
        answers = answers_of(config, data, batches, can_share=not is_recurrent)
        return RunPlan(
            batches=batches,
            steps=config.train.steps or batches.steps_of_epochs(config.train.epochs),
            lengths=data.lengths,
            target_counts=data.target_counts if answers is None else answers.targets.sum(axis=1),
            chunk_size=config.chunk.size,
            k=config.chunk.k,
            fill_tails=config.chunk.fill_tails,
            equal_time=config.chunk.cuts is Cuts.time,
            is_zero_3=config.engine.zero_stage == 3,
            pipeline=self.pipeline if self.topology.pipeline > 1 else None,
            ranks=self.topology.replicas,
            sequence=self.topology.sequence,
            spread_all=config.parallel.spread is Spread.all,
            costs=self.costs,
            answers=answers,
        )

    @property
    def pipeline(self) -> PipelineLayout:
        """How the stages of the run take turns; with a single stage, how more stages would."""
        parallel = self.config.parallel
        return PipelineLayout(self.topology.pipeline, parallel.schedule.value, parallel.warmup_extra)

    @property
    def memory(self) -> MemorySettings:
        """The settings that a rank's memory depends on."""
        config = self.config
        return MemorySettings(
            element_bytes=ELEMENT_BYTES[config.model.dtype.value],
            optimizer_states=state_numbers(config.optim.name.value, config.optim.momentum, self.shape),
            zero_stage=config.engine.zero_stage,
            data_parallel=self.topology.replicas,
            offload=config.engine.offload.value,
            checkpointing=config.model.activation_checkpointing.value,
            chunk_size=config.chunk.size,
            device_type="cpu" if "CPU" in self.device.name else "cuda",
            buffers=_buffers(config.engine),
            offload_state=config.chunk.offload_state.value,
            multiprocessors=self.device.multiprocessors if config.train.deterministic else 0,
        )


def read_setup(
    config: Config, hf_config: Any | None, device: DeviceProfile, *, measure: Callable[[Path], None] | None = None
) -> RunSetup:
    """Read the model's sizes from its configuration, and choose the costs that `plan.cost_model` names.

    Args:
        hf_config: the model's configuration; None if no model is named. Time is then proportional to tokens.
        measure: measures the model on this device and saves the calibration to a file; called if there is no
            whole file. Costs and memory then come from the calibration.

    Raises:
        UsageError: `plan.cost_model=measured`, and this model has not been measured on this device.
    """
    topology, cost_model = planned_topology(config), config.plan.cost_model
    is_measured = measure is not None or cost_model is CostModelName.measured
    if is_measured and hf_config is None:
        raise UsageError("plan.cost_model=measured needs a model: set model.path")
    shape = None
    if hf_config is not None:
        from chunkflow_cli.model.shape import shape_without_weights  # imports torch

        kernels = scan_kernels(config, device)
        shape = shape_without_weights(config.model, hf_config, kernels, config.optim)
    setup = RunSetup(config, shape, device, CostModel.proportional(), topology)
    if is_measured:
        setup = _with_calibration(setup, hf_config, measure)
    elif shape is not None and cost_model is CostModelName.profile:
        is_checkpointed = config.model.activation_checkpointing is not ActivationCheckpointing.none
        costs = CostModel.profile(shape, device, checkpointed=is_checkpointed)
        copies = offload_seconds(shape, setup.memory, device)
        setup = replace(setup, costs=costs.with_seconds_of_passes(*copies))
    if config.chunk.offload_state is OffloadState.host:
        setup = replace(setup, costs=setup.costs.with_state_on_host(device))
    return setup


def _with_calibration(setup: RunSetup, hf_config: Any, measure: Callable[[Path], None] | None) -> RunSetup:
    """Return the setup with measured costs; with measured sizes and memory as well, if this process may measure."""
    path = calibration_path(setup.config, hf_config, setup.device)
    calibration = Calibration.load(path)
    if calibration is None and measure is not None:
        measure(path)
        calibration = Calibration.load(path)
    if calibration is None:
        raise UsageError(
            f"plan.cost_model=measured: this model, as configured, has not been measured on {setup.device.name}\n"
            "  run chunkflow tune-chunk-size with the same recipe and keys: it measures the model and keeps the result"
        )
    if measure is None:
        return replace(setup, costs=calibration.costs)
    return replace(setup, costs=calibration.costs, shape=calibration.shape, calibration=calibration)


def scan_kernels(config: Config, device: DeviceProfile) -> frozenset[str]:
    """Return the packages whose kernels run the model's recurrent layers on the device.

    They are for GPUs. Those of this machine have what is installed here; others are taken to have all of them.
    """
    from chunkflow_cli.model.recurrent_functions import KERNEL_PACKAGES, installed_kernels

    if "CPU" in device.name:
        return frozenset()
    return installed_kernels() if config.tune.device is Device.measured else KERNEL_PACKAGES


def planned_topology(config: Config) -> Topology:
    """Return how the processes of the run are divided; by default there are as many as one group needs."""
    sequence, pipeline = config.parallel.sequence, config.parallel.pipeline
    return Topology.of(max(config.launch.processes, sequence * pipeline), sequence=sequence, pipeline=pipeline)


def planned_device(config: Config) -> DeviceProfile:
    """Return the device that `tune.device` names; by default, the device of this machine."""
    if config.tune.device is not Device.measured:
        return described_device(config, DEVICES[config.tune.device.value])
    from chunkflow_cli.model.device import present_device  # imports torch

    return described_device(config, present_device())


def _buffers(engine: EngineConfig) -> Buffers:
    """Return the sizes of DeepSpeed's buffers: its own, unless `engine.deepspeed` has others."""
    given = engine.deepspeed.get("zero_optimization", {})
    keys = {"reduce": "reduce_bucket_size", "gathered": "stage3_max_live_parameters", "sub_group": "sub_group_size"}
    return Buffers(**{name: int(given[key]) for name, key in keys.items() if key in given})


def described_device(config: Config, device: DeviceProfile) -> DeviceProfile:
    """Return the device with the memory of `tune.memory_gib` and the links of `cluster.*`, where these are set."""
    cluster, memory_gib = config.cluster, config.tune.memory_gib
    changes: dict[str, Any] = {"devices_of_node": cluster.gpus_per_node}
    if memory_gib is not None:
        changes["memory_bytes"] = int(memory_gib * 2**30)
    if cluster.node_gb_per_second is not None:
        changes["node_bytes_per_second"] = cluster.node_gb_per_second * 1e9
    if cluster.network_gb_per_second is not None:
        changes["link_bytes_per_second"] = cluster.network_gb_per_second * 1e9
    return replace(device, **changes)


def calibration_path(config: Config, hf_config: Any, device: DeviceProfile) -> Path:
    """Return the file of the calibration of this model, as configured, on this device."""
    facts = {
        "version": CALIBRATION_VERSION,
        "model": hf_config.to_json_string(),
        "settings": repr((config.model.dtype, config.model.attention, config.model.activation_checkpointing,
                          config.model.kernels, config.model.compile, config.model.lora, config.engine,
                          config.optim.name, config.optim.freeze, config.train.deterministic)),
        "device": device.name,
        "threads": threads_of_user(),
    }  # fmt: skip
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_root(config.data.cache_dir).parent / "calibrations" / f"{key}.json"
