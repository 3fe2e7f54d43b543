"""What a run trains on and in which order: the samples of `data.*`, those held out, and the plan of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkflow_cli.batches import GlobalBatches, held_out
from chunkflow_cli.config import ActivationCheckpointing, Config, CostModelName, Cuts
from chunkflow_cli.costs import CostModel, DeviceProfile, ModelShape
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hf_config import position_limit
from chunkflow_cli.pipeline_schedules import PipelineLayout
from chunkflow_cli.run_plan import RunPlan
from chunkflow_cli.schedule import Layout
from chunkflow_cli.tokens import TokenizedData, tokenize
from chunkflow_cli.topology import Topology, key_value_copies


@dataclass(frozen=True)
class RunData:
    read: TokenizedData
    """All samples of `data.path`, with the account of what was rejected or dropped."""
    train: TokenizedData
    evaluation: TokenizedData
    """Held out of `data.path`, or those of `data.eval_path`; may be empty."""


def load_run_data(config: Config, hf_config: Any | None) -> RunData:
    """Tokenise (or find in the cache) what the run needs.

    Args:
        hf_config: the model's configuration; None only where rows are ids and no model is named.

    Raises:
        UsageError: as `tokens.tokenize`.
    """

    def read(path: str | None) -> TokenizedData:
        return tokenize(
            config.data,
            path=path,
            model_path=config.model.path,
            model_limit=None if hf_config is None else position_limit(hf_config),
            vocab_size=None if hf_config is None else int(hf_config.get_text_config().vocab_size),
            trust_remote_code=config.model.trust_remote_code,
        )

    data = read(None)
    if config.data.eval_path is not None:
        return RunData(data, data, read(config.data.eval_path))
    train, evaluation = held_out(len(data), config.data.eval_fraction, config.train.seed)
    return RunData(data, data.select(train), data.select(evaluation))


def topology_of(config: Config, *, stages: int | None = None) -> Topology:
    """Where the run's processes stand; left at launch.processes=1, those that one group of each kind takes.

    Args:
        stages: of the pipeline, where others than `parallel.pipeline` are tried.
    """
    sequence, pipeline = config.parallel.sequence, stages or config.parallel.pipeline
    processes = config.launch.processes if config.launch.processes > 1 else sequence * pipeline
    return Topology.of(processes, sequence=sequence, pipeline=pipeline)


def check_heads(config: Config, hf_config: Any) -> None:
    """Refuse a sequence-parallel group that the model's heads cannot be divided among.

    Args:
        hf_config: the model's configuration.

    Raises:
        UsageError: names the model, its heads, and the sizes that would do.
    """
    text = hf_config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    try:
        key_value_copies(heads, kv_heads, config.parallel.sequence)
    except ValueError as error:
        name = config.model.path or text.model_type
        raise UsageError(
            f"parallel.sequence={config.parallel.sequence} does not suit {name}:\n  its {error}"
        ) from error


def plan_run(config: Config, data: TokenizedData, costs: CostModel) -> RunPlan:
    """The plan of all steps over the training samples: what `plan` prints and `train` runs.

    Args:
        data: the samples to train on.
        costs: by which sequences are given to ranks.
    """
    topology = topology_of(config)
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
        # ZeRO-3 traces one forward for one backward: the retained chunks of a sequence must share an engine call.
        layout=Layout(join_retained=config.engine.zero_stage == 3),
        pipeline=None
        if topology.pipeline == 1
        else PipelineLayout(topology.pipeline, config.parallel.schedule.value, config.parallel.warmup_extra),
        ranks=topology.data,
        sequence=topology.sequence,
        costs=costs,
    )


def cost_model(config: Config, shape: ModelShape | None, device: DeviceProfile) -> CostModel:
    """As `plan.cost_model` says, of chunks spread over groups of `parallel.sequence` ranks; without a model's shape,
    time is proportional to tokens."""
    checkpointed = config.model.activation_checkpointing is not ActivationCheckpointing.none
    if config.plan.cost_model is CostModelName.proportional or shape is None:
        costs = CostModel.proportional()
    else:
        costs = CostModel.profile(shape, device, checkpointed=checkpointed)
    return costs.spread(config.parallel.sequence, device, checkpointed=checkpointed)
