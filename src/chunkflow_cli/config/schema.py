"""Every configuration key: its type, its default, what it means, and the one gate through which it enters.

`load()` composes `conf/`, a recipe and the user's overrides with Hydra, checks them and returns plain dataclasses.
Nothing past that gate reads a dictionary or asks whether a key exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


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
        "zero_bubble": "zero_bubble",
    },
    type=str,
)


class Cuts(str, Enum):
    tokens = "tokens"
    time = "time"


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
    chunk_sizes: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
    """Values of chunk.size that are tried."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Values of chunk.k that are tried."""
    cuts: list[Cuts] = field(default_factory=lambda: [Cuts.tokens, Cuts.time])
    """Values of chunk.cuts that are tried in pipelines (one stage is as fast with any); empty: chunk.cuts."""
    samples: int = 1024
    """So many samples are planned for each pair, in whole global batches of the run."""
    measure: int = 3
    """How many of the best pairs run a real step, where the device is here; 0 trusts the prediction."""
    budget_seconds: float = 300.0
    """Time for all that runs on the device: timing of chunks, and the best pairs."""


@dataclass
class ClusterConfig:
    gpus_per_node: int = 8
    """GPUs of a node: a sequence-parallel group within a node exchanges over the node's own links."""
    node_gb_per_second: float | None = None
    """Between two GPUs of a node, in one direction, in 10^9 bytes; null: by the device's data sheet."""
    network_gb_per_second: float | None = None
    """Between nodes, each GPU's share, in one direction; stages and gradients too. null: 50, of an A100 25."""
    pipelines: list[int] = field(default_factory=list)
    """Numbers of pipeline stages that tune-chunk-size tries for launch.processes devices; empty: parallel.pipeline."""
    sequences: list[int] = field(default_factory=list)
    """Sizes of sequence-parallel groups that tune-chunk-size tries for launch.processes devices; empty:
    parallel.sequence."""


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
