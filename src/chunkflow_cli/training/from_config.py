"""What a run trains on and in which order: the samples of `data.*`, those held out, and the plan of every step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import (
    ActivationCheckpointing,
    Config,
    CostModelName,
    Cuts,
    Device,
    LossWeighting,
    OptimizerName,
    Spread,
)
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.data.dataset import TokenizedData
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.calibration import CALIBRATION_VERSION, Calibration
from chunkflow_cli.planning.costs import DEVICES, CostModel, DeviceProfile, ModelShape
from chunkflow_cli.planning.memory_parts import (
    ELEMENT_BYTES,
    MemorySettings,
)
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.schedule import Layout
from chunkflow_cli.planning.topology import Topology, key_value_copies
from chunkflow_cli.processes.environment import threads_of_user


def check_heads(config: Config, hf_config: Any, sequence: int | None = None) -> None:
    """Refuse a sequence-parallel group that the model's heads cannot be divided among.

    Args:
        hf_config: the model's configuration.
        sequence: ranks of the group, where others than `parallel.sequence` are tried.

    Raises:
        UsageError: names the model, its heads, and the sizes that would do.
    """
    text = hf_config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    try:
        key_value_copies(heads, kv_heads, sequence or config.parallel.sequence)
    except ValueError as error:
        name = config.model.path or text.model_type
        key = "parallel.sequence" if sequence is None else "cluster.sequences"
        raise UsageError(
            f"{key}={sequence or config.parallel.sequence} does not suit {name}:\n  its {error}"
        ) from error


def plan_run(config: Config, data: TokenizedData, costs: CostModel) -> RunPlan:
    """The plan of all steps over the training samples: what `plan` prints and `train` runs.

    Args:
        data: the samples to train on.
        costs: by which sequences are given to ranks.
    """
    stages, topology = config.parallel.pipeline, planned_topology(config)
    batches = GlobalBatches(len(data), config.train.global_batch_size, config.train.seed, config.train.shuffle)
    return RunPlan(
        batches=batches,
        steps=config.train.steps or config.train.epochs * batches.steps_per_epoch,
        lengths=data.lengths,
        target_counts=data.target_counts,
        chunk_size=config.chunk.size,
        k=config.chunk.k,
        fill_tails=config.chunk.fill_tails,
        equal_time=config.chunk.cuts is Cuts.time,
        # ZeRO-3 traces one forward for one backward, so the retained chunks of a sequence must share an engine call;
        # and it communicates within both, so all ranks must run the same ones.
        layout=Layout(join_retained=config.engine.zero_stage == 3, lockstep=config.engine.zero_stage == 3),
        pipeline=pipeline_layout(config, stages),
        ranks=topology.replicas,
        sequence=topology.sequence,
        spread_all=config.parallel.spread is Spread.all,
        costs=costs,
    )


def planned_topology(config: Config, *, pipeline: int | None = None) -> Topology:
    """How the processes of the run are divided. A run that says nothing of them has as many as one group needs.

    Args:
        pipeline: instead of `parallel.pipeline`.
    """
    sequence, pipeline = config.parallel.sequence, pipeline or config.parallel.pipeline
    return Topology.of(max(config.launch.processes, sequence * pipeline), sequence=sequence, pipeline=pipeline)


def pipeline_layout(config: Config, stages: int) -> PipelineLayout | None:
    """How `stages` stages would lie and take turns; None of one stage, which is no pipeline."""
    if stages == 1:
        return None
    parallel = config.parallel
    return PipelineLayout(stages, parallel.schedule.value, parallel.warmup_extra)


def check_stages(shape: ModelShape, stages: int) -> None:
    """Refuse a pipeline that the model's layers cannot fill.

    Raises:
        UsageError: some stage would hold no layer.
    """
    if stages > shape.layers:
        raise UsageError(
            f"a pipeline of {stages} stages cannot hold a model of {shape.layers} layers: each stage needs one\n"
            "  lower parallel.pipeline"
        )


def cost_model(config: Config, shape: ModelShape | None, device: DeviceProfile, hf_config: Any | None) -> CostModel:
    """As `plan.cost_model` says; without a model's shape, time is proportional to tokens.

    Args:
        device: whose profile is taken, or whose calibration.
        hf_config: the model's configuration; None where no model is named.

    Raises:
        UsageError: `plan.cost_model=measured`, and this model was not measured on this device yet.
    """
    if config.plan.cost_model is CostModelName.measured:
        return measured_costs(config, hf_config, device)
    if config.plan.cost_model is CostModelName.proportional or shape is None:
        return CostModel.proportional()
    device = with_links(config, device)
    checkpointed = config.model.activation_checkpointing is not ActivationCheckpointing.none
    return CostModel.profile(shape, device, checkpointed=checkpointed)


def with_links(config: Config, device: DeviceProfile) -> DeviceProfile:
    """The device in the cluster that the configuration describes."""
    cluster = config.cluster
    described = replace(device, devices_of_node=cluster.gpus_per_node)
    if cluster.node_gb_per_second is not None:
        described = replace(described, node_bytes_per_second=cluster.node_gb_per_second * 1e9)
    if cluster.network_gb_per_second is not None:
        described = replace(described, link_bytes_per_second=cluster.network_gb_per_second * 1e9)
    return described


def measured_costs(config: Config, hf_config: Any | None, device: DeviceProfile) -> CostModel:
    """What `tune-chunk-size` fitted to timed operations of this model on this machine's device, and kept.

    Raises:
        UsageError: there is no such calibration.
    """
    if hf_config is None:
        raise UsageError("plan.cost_model=measured needs a model that was measured: set model.path")
    calibration = Calibration.load(calibration_path(config, hf_config, device))
    if calibration is None:
        raise UsageError(
            f"plan.cost_model=measured: this model, as configured, has not been measured on {device.name}\n"
            "  chunkflow tune-chunk-size with the same recipe and keys measures it and keeps the result"
        )
    return calibration.costs


def calibration_path(config: Config, hf_config: Any, device: DeviceProfile) -> Path:
    """Where the calibration of this model, as configured, on this device lies."""
    facts = {
        "version": CALIBRATION_VERSION,
        "model": hf_config.to_json_string(),
        "settings": repr((config.model.dtype, config.model.attention, config.model.activation_checkpointing,
                          config.model.lora, config.engine, config.optim.name)),
        "device": device.name,
        "threads": threads_of_user(),
    }  # fmt: skip
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_root(config.data.cache_dir).parent / "calibrations" / f"{key}.json"


def target_weights(rank: RankPlan, step: StepPlan, weighting: LossWeighting) -> NDArray[np.float64]:
    """(sequences of the rank,) what each target of a sequence counts; over all ranks these sum to 1."""
    if weighting is LossWeighting.token:
        return np.full(len(rank.samples), 1.0 / step.target_tokens)
    return 1.0 / (len(step.samples) * rank.target_counts)


def planned_device(config: Config) -> DeviceProfile:
    """`tune.device`, with `tune.memory_gib` if that is set."""
    if config.tune.device is Device.measured:
        from chunkflow_cli.model.device import present_device

        device = present_device()
    else:
        device = DEVICES[config.tune.device.value]
    if config.tune.memory_gib is None:
        return device
    return replace(device, memory_bytes=int(config.tune.memory_gib * 2**30))


def memory_settings(config: Config, device: DeviceProfile, *, chunk_size: int, ranks: int) -> MemorySettings:
    """What decides the memory of a rank besides the model, under another chunk size and number of ranks."""
    states = {OptimizerName.adamw: 2, OptimizerName.sgd: 1 if config.optim.momentum else 0}
    return MemorySettings(
        element_bytes=ELEMENT_BYTES[config.model.dtype.value],
        optimizer_states=states[config.optim.name],
        zero_stage=config.engine.zero_stage,
        data_parallel=ranks,
        offload=config.engine.offload.value,
        checkpointing=config.model.activation_checkpointing.value,
        chunk_size=chunk_size,
        device_type="cpu" if "CPU" in device.name else "cuda",
    )
