"""Every configuration key: its type, its default and its documentation.

The string below a field is the documentation of its key: `--help` and docs/configuration.md show it. The metadata of a
field holds the bounds of its value (`bounded`), which `checks.py` reads, and whether its value is a path (`a_path`).
Every number has bounds, and every text is either a path or listed in tests/config/test_words.py as none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, TypeVar

Value = TypeVar("Value")

FULL_LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 2e-4
"""Default of `optim.lr`. Adapters begin at zero and are few: at the rate of a full fine-tune they hardly move."""
MOST = 2**31 - 1
"""The largest count of anything: tokens, samples, steps."""
LARGEST_SEED = 2**63 - 1
MOST_RANKS = 65536
MOST_SECONDS = 1e7


def bounded(default: Value, **bounds: float) -> Value:
    """Declare a field whose value has bounds: `at_least`, `at_most`, `above`, `below`. A null value has none."""
    return field(default=default, metadata=bounds)  # type: ignore[no-any-return]


def a_path(default: Value, *, null_is_a_name: bool = False) -> Value:
    """Declare a field whose text is a path: a leading `~` is the home folder.

    Args:
        null_is_a_name: `key=null` on the command line means a folder called null. In YAML, null stays no value.
    """
    return field(default=default, metadata={"path": True, "null_is_a_name": null_is_a_name})  # type: ignore[no-any-return]


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


class Quantization(str, Enum):
    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class ActivationCheckpointing(str, Enum):
    none = "none"
    full = "full"
    selective = "selective"


class Kernels(str, Enum):
    none = "none"
    liger = "liger"


class DataFormat(str, Enum):
    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"
    tokens = "tokens"
    preference = "preference"
    feedback = "feedback"


class TrainOn(str, Enum):
    assistant = "assistant"
    last = "last"
    all = "all"


class Turns(str, Enum):
    whole = "whole"
    split = "split"  # type: ignore[assignment]  # a method of str


class Overlong(str, Enum):
    error = "error"
    drop = "drop"
    truncate = "truncate"


class BadRows(str, Enum):
    error = "error"
    skip = "skip"


class OptimizerName(str, Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    muon = "muon"
    sgd = "sgd"


class LearningRateSchedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class LossWeighting(str, Enum):
    token = "token"
    sequence = "sequence"


class Task(str, Enum):
    sft = "sft"
    dpo = "dpo"
    orpo = "orpo"
    kto = "kto"


class PreferenceLoss(str, Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    simpo = "simpo"


class LogBackend(str, Enum):
    jsonl = "jsonl"
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"
    trackio = "trackio"


class Offload(str, Enum):
    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


# A class cannot have a member named `1f1b`.
PipelineSchedule = Enum(
    "PipelineSchedule",
    {"1f1b": "1f1b", "state_aware_1f1b": "state_aware_1f1b", "searched": "searched", "zero_bubble": "zero_bubble"},
    type=str,
)


class Cuts(str, Enum):
    tokens = "tokens"
    time = "time"


class OffloadState(str, Enum):
    none = "none"
    host = "host"


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
    """Low-rank adapters (LoRA): train a small share of the weights."""

    enabled: bool = False
    """Train low-rank adapters with peft, and freeze the model."""
    r: int = bounded(16, at_least=1, at_most=65536)
    """Rank of the adapters. A higher rank trains more weights."""
    alpha: float = bounded(32.0, above=0)
    """Scale of the adapters, which are multiplied by alpha / r."""
    dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout on the input of the adapters. A recomputed chunk drops the same elements again."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter, by name, or by a regular expression for the whole name. `all-linear` means every
    linear layer except the head."""
    target_parameters: list[str] = field(default_factory=list)
    """Parameters that get an adapter, by name, for experts that a model stores as one tensor:
    `[experts.gate_up_proj,experts.down_proj]`. Each forward makes a merged copy of such a tensor."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules to train in full and to save with the adapters, by name, or by a regular expression for the whole name:
    `[embed_tokens,lm_head,.*norm]`. Each has a trained copy next to the frozen original."""
    use_rslora: bool = False
    """Multiply the adapters by alpha / sqrt(r) instead of alpha / r, so that a high rank keeps its effect (rsLoRA)."""
    use_dora: bool = False
    """Also train the magnitude of each row of an adapted weight (DoRA). It takes more memory and time than plain
    LoRA."""
    path: str | None = a_path(None)
    """Folder of an adapter to continue training. Its rank, alpha, dropout and targets are used."""


@dataclass
class ModelConfig:
    """The model: its weights, data type, attention and activation checkpointing."""

    path: str = a_path("")
    """Hugging Face model id, local folder or GGUF file. Required."""
    init: Init = Init.pretrained
    """Where the weights come from. `random` draws them at random, for tests and benchmarks."""
    dtype: Dtype = Dtype.bfloat16
    """Data type of weights and activations. With bfloat16, master weights and accumulated gradients stay in float32."""
    quantization: Quantization = Quantization.none
    """Store the frozen linear layers under adapters in 4 bits (`nf4`) or 8 bits (`int8`) with bitsandbytes (QLoRA). The
    head, the embedding and stacked experts stay in `model.dtype`."""
    attention: Attention = Attention.auto
    """Attention backend. `auto` takes the fastest backend that supports the model on this device."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """What each layer keeps for its backward pass: everything (`none`), only the layer's input (`full`), or the input
    and the results of matrix products and attention (`selective`). Keeping less saves memory and costs computation."""
    kernels: Kernels = Kernels.none
    """Fused kernels for norms, rotary embeddings and gated feed-forward layers. `liger` uses those of the package
    liger-kernel, on GPUs."""
    compile: bool = False
    """Compile the layers with torch.compile. The first steps take longer; later ones can be faster."""
    vocab_size: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of rows of the embedding and the head. Set it if the tokenizer has more tokens than the checkpoint. New
    rows are drawn around the mean of the existing ones."""
    new_weights: list[str] = field(default_factory=list)
    """Weights that the checkpoint is meant to lack, by name, such as [lm_head]. They are drawn with `train.seed`."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Scaling of the rotary embedding for longer samples, as Hugging Face configurations write it: {rope_type: yarn,
    factor: 4}. It replaces the model's own setting, multiplies the model's length limit, and is saved with the
    model."""
    trust_remote_code: bool = False
    """Allow Python code from the model's folder to run. Set it only for a source that you trust."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class SourceConfig:
    """One of several data sets. A key that is null or empty takes the value of the same key of `data`."""

    path: Annotated[Any, str | list[str]] = a_path("")
    """Where the data is, as in `data.path`. Required."""
    name: str = ""
    """Name in losses, reports and messages. The default is the name of the file, folder or data set."""
    weight: float | None = bounded(None, above=0)
    """Share of the samples to draw from this source, relative to the weights of the others. Set it for all sources or
    for none."""
    samples: int | None = bounded(None, at_least=1, at_most=MOST)
    """Largest number of samples to use, drawn with `train.seed`. By default, all of them."""
    format: DataFormat | None = None
    """Format of the rows."""
    split: str | None = None
    """Split to train on."""
    subset: str | None = None
    """Subset of the data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the rows to rename."""
    train_on: TrainOn | None = None
    """Tokens that the loss counts."""


@dataclass
class DataConfig:
    """The data set: where it is, how its rows are read, and which tokens the loss counts."""

    path: Annotated[Any, str | list[str]] = a_path("")  # OmegaConf has no such type: checks.py checks the value
    """A file, folder, glob or Hugging Face data set id, or a list of files, folders and globs. Required, unless
    `data.sources` is set. Files are .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt."""
    sources: Annotated[Any, list[SourceConfig]] = field(default_factory=list)  # load.py gives its elements their types
    """Several data sets instead of `data.path`, as a list of {path: ..., name: ..., weight: ..., samples: ...}. Each
    may also set format, split, subset, columns and train_on."""
    deduplicate: bool = False
    """Leave out each sample whose tokens and targets equal those of an earlier sample, in any source."""
    split: str = "train"
    """Split to train on, for a Hugging Face data set or a folder with files named after splits. Join several with `+`;
    `all` takes all of them."""
    subset: str | None = None
    """Subset of a Hugging Face data set, or of a folder with subsets. By default, the only subset or the data set's
    default one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the rows to rename, as in {question: instruction, answer: output}."""
    format: DataFormat = DataFormat.auto
    """Format of the rows. `auto` detects it from the first rows."""
    train_on: TrainOn = TrainOn.assistant
    """Tokens that the loss counts: those of the assistant's answers, of the `last` answer only, or `all` tokens."""
    train_on_reasoning: bool = True
    """Count the reasoning in an answer, too. With false, the model sees the reasoning but does not learn to write
    it."""
    turns: Turns = Turns.whole
    """How many samples a conversation becomes. `whole` makes one sample, as the chat template writes the whole
    conversation. `split` makes one sample per answer, as the model sees it at inference."""
    chat_template: str | None = a_path(None)
    """Chat template for conversations: a Jinja file, or the name of one of the tokenizer's templates. It is saved with
    the model. By default, the tokenizer's template."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as in {enable_thinking: false}. Pass the same ones when you use the model."""
    max_length: int | None = bounded(None, at_least=2, at_most=MOST)
    """Largest number of tokens in a sample. By default, the model's own limit."""
    overlong: Overlong = Overlong.error
    """What to do with a sample of more than `data.max_length` tokens: stop and name it (`error`), leave it out
    (`drop`), or cut off its end (`truncate`)."""
    bad_rows: BadRows = BadRows.error
    """What to do with a row that cannot be used: stop and name it (`error`), or leave it out and list it in
    rejected.jsonl (`skip`)."""
    eval_path: Annotated[Any, str | list[str] | None] = a_path(None)
    """Held-out data, as in `data.path`. If it has splits, `validation` or else `test` is read. Cannot be combined with
    `data.eval_fraction`."""
    eval_split: str | None = None
    """Split to evaluate on: of `data.eval_path` or, if that is null, of `data.path`."""
    eval_fraction: float = bounded(0.0, at_least=0, below=1)
    """Fraction of the rows of each source to hold out, drawn with `train.seed`."""
    cache_dir: str | None = a_path(None)
    """Folder for tokenized data. By default ~/.cache/chunkflow, or $XDG_CACHE_HOME/chunkflow if that is set."""
    num_workers: int | None = bounded(None, at_least=1, at_most=1024)
    """Number of processes that tokenize the data. By default, one per core."""


@dataclass
class ChunkConfig:
    """Chunks: how samples are packed and split. This sets memory and speed, but never the result."""

    size: int = bounded(8192, at_least=1, at_most=MOST)
    """Largest number of tokens in a chunk. Every forward and backward pass runs one chunk, so this sets peak memory.
    Lower it if you run out of memory. `chunkflow tune-chunk-size` finds the best value."""
    k: int = bounded(1, at_least=1, at_most=MOST)
    """How many chunks of a long sample keep their activations (K). The other chunks run forward twice. A larger K takes
    more memory and less computation."""
    fill_tails: bool = True
    """Fill the last chunk of a long sample with short samples."""
    cuts: Cuts = Cuts.tokens
    """How to cut long samples: into chunks with equally many `tokens`, or with equal predicted `time`. Later chunks
    take longer per token, so `time` makes them shorter. This can balance pipeline stages better."""
    offload_state: OffloadState = OffloadState.none
    """Where to keep the state of long samples: on the device (`none`), or in `host` memory, from where it is copied to
    the device in blocks. Host memory then limits the length of a sample."""


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: OptimizerName = OptimizerName.adamw
    """Optimizer. Set it with `optim=NAME`, which also sets the defaults that suit it. `adamw_8bit` and
    `paged_adamw_8bit` are those of bitsandbytes. `muon` trains the weight matrices of the layers with Muon and
    everything else with AdamW."""
    lr: float = bounded(FULL_LEARNING_RATE, at_least=0)
    """Peak learning rate. The default is 1e-5, or 2e-4 with model.lora.enabled=true, 1e-2 with `optim=sgd`, and 1e-3
    with `optim=adafactor`, which takes it relative to the size of each weight."""
    lr_factors: dict[str, float] = field(default_factory=dict, metadata={"at_least": 0})
    """Factors on the learning rate of weights by name, as in {embed_tokens: 0.1} or {lora_B: 16} (LoRA+). Names work as
    in `optim.freeze`. If several match, the last one counts."""
    freeze: list[str] = field(default_factory=list)
    """Weights not to train, by whole parts of their names, such as [embed_tokens,layers.0], or by regular expressions
    for whole names."""
    weight_decay: float = bounded(0.0, at_least=0)
    """Weight decay of weight matrices. Biases and norms do not decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"at_least": 0, "below": 1})
    """Decay rates of AdamW's running averages of gradients and of their squares."""
    eps: float = bounded(1e-8, above=0)
    """Term that AdamW adds to its denominator for numerical stability."""
    momentum: float = bounded(0.0, at_least=0, below=1)
    """Momentum of SGD and Muon. `optim=muon` sets 0.95."""
    schedule: LearningRateSchedule = LearningRateSchedule.cosine
    """Course of the learning rate after the warm-up. `wsd` (warm-up, stable, decay) decays only over the last tenth of
    the steps."""
    warmup_ratio: float = bounded(0.03, at_least=0, below=1)
    """Fraction of the steps during which the learning rate rises from zero."""
    min_lr_ratio: float = bounded(0.0, at_least=0, at_most=1)
    """Learning rate at the end of the decay, as a fraction of `optim.lr`."""
    grad_clip: float = bounded(1.0, at_least=0)
    """Largest gradient norm of a step. Larger gradients are scaled down to it. 0 disables clipping."""


@dataclass
class TrainConfig:
    """The run: its task, length, batches, order, loss and output folder."""

    task: Task = Task.sft
    """What to learn: to write the given answers (`sft`), to prefer one of two answers (`dpo`, `orpo`), or to prefer
    answers labeled good over answers labeled bad (`kto`)."""
    steps: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of optimizer steps. By default, `train.epochs` decides."""
    epochs: int = bounded(1, at_least=1, at_most=MOST)
    """Number of passes over the data. Ignored if `train.steps` is set."""
    global_batch_size: int | None = bounded(256, at_least=1, at_most=MOST)
    """Number of samples in an optimizer step, over all ranks. Null if `train.global_batch_tokens` is set."""
    global_batch_tokens: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of tokens in an optimizer step, over all ranks, instead of `train.global_batch_size`. A step takes as many
    whole samples as fit. A longer sample gets a step of its own."""
    shuffle: bool = True
    """Shuffle the samples of each epoch. The order depends only on `train.seed` and the number of the epoch."""
    seed: int = bounded(0, at_least=0, at_most=LARGEST_SEED)
    """Seed of sample order, dropout, noise, held-out samples and random weights."""
    deterministic: bool = False
    """On GPUs, use only kernels that add in a fixed order, so that the same run gives the same numbers bit for bit.
    This is slower. An operation without such a kernel ends the run with an error that names it."""
    loss_weighting: LossWeighting = LossWeighting.token
    """What has equal weight in the loss: every target `token` of the global batch, or every sample (`sequence`)."""
    neftune_noise_alpha: float = bounded(0.0, at_least=0, at_most=1000)
    """Strength of the noise that is added to the embeddings in training (NEFTune); the paper tries 5, 10 and 15."""
    output_dir: str | None = a_path(None, null_is_a_name=True)
    """Folder of the run. The default is outputs/<recipe>/<date-time>."""
    trace: bool = False
    """Record when each rank ran each operation, and write trace.json at the end, for Perfetto and `plan --trace`. The
    run waits for the GPU after each operation, which costs time."""
    guard: bool = True
    """Before training, check on a small float32 copy of the architecture that it trains exactly in chunks."""


@dataclass
class PreferenceConfig:
    """The loss of `train.task=dpo`, `orpo` and `kto`."""

    loss: PreferenceLoss = PreferenceLoss.sigmoid
    """Loss on a pair under `train.task=dpo`: that of DPO (`sigmoid`), IPO (`ipo`) or SimPO (`simpo`, which needs no
    reference model)."""
    beta: float = bounded(0.1, above=0)
    """How close the model stays to the reference model; higher is closer. Under `orpo` and `simpo`, the weight of the
    comparison of the two answers."""
    label_smoothing: float = bounded(0.0, at_least=0, below=0.5)
    """Assumed probability that the answers of a pair are swapped (`sigmoid` and `simpo`)."""
    gamma: float = bounded(0.5, at_least=0)
    """Target margin of `simpo` between the chosen and the rejected answer."""
    nll_weight: float = bounded(0.0, at_least=0)
    """Weight of an additional cross entropy of the chosen answers under `train.task=dpo`, per token."""
    share_prompts: bool = True
    """Run a long prompt once for both answers of a pair. The result is the same. Pipelines and models with recurrent
    layers run it once per answer."""
    desirable_weight: float = bounded(1.0, at_least=0)
    """Weight of the good answers under `train.task=kto`."""
    undesirable_weight: float = bounded(1.0, at_least=0)
    """Weight of the bad answers under `train.task=kto`."""


@dataclass
class EvalConfig:
    """Evaluation on held-out data."""

    every: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of steps between evaluations. By default, the model is evaluated only at the start and at the end."""
    early_stopping_patience: int | None = bounded(None, at_least=1, at_most=MOST)
    """Stop after this many evaluations in a row that did not lower the held-out loss. By default, train all steps."""
    keep_best: bool = False
    """Keep the model with the lowest held-out loss after a step, and save it as the final one."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers at each evaluation. The answers are printed, and written to answers.jsonl."""


@dataclass
class CheckpointConfig:
    """Checkpoints, from which an interrupted run resumes."""

    every: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of steps between checkpoints. By default, one is saved only on interruption. Set it to survive kill -9 and
    power cuts."""
    keep: int = bounded(2, at_least=1, at_most=MOST)
    """Number of checkpoints to keep. Older ones are deleted."""
    resume: str = a_path("auto")
    """Checkpoint to resume from. `auto` resumes an unfinished run of the same configuration, `never` starts a new run,
    and a path names a checkpoint."""


@dataclass
class LogConfig:
    """Metrics: how often they are written, and where."""

    every: int = bounded(1, at_least=1, at_most=MOST)
    """Number of steps between rows of metrics."""
    backends: list[LogBackend] = field(default_factory=lambda: [LogBackend.jsonl])
    """Where metrics are written. `jsonl` writes metrics.jsonl in the run's folder. The others are trackers: each needs
    its package, also gets the configuration and the plan, and never ends the run if it fails."""
    project: str | None = None
    """Project in wandb and trackio, experiment in mlflow. By default, the value of the tracker's own environment
    variable, such as WANDB_PROJECT, or else `chunkflow`."""
    run_name: str | None = None
    """Name of the run in trackers. By default, the name of the run's folder."""


@dataclass
class EngineConfig:
    """DeepSpeed, which holds the optimizer and divides the model state among the ranks."""

    zero_stage: int = bounded(1, at_least=0, at_most=3)
    """DeepSpeed ZeRO stage. Stage 1 divides the optimizer states among the ranks, 2 also the gradients, 3 also the
    weights."""
    offload: Offload = Offload.none
    """What to keep in host memory: the optimizer states (`optimizer`), or the weights as well (`parameters`). Needs a
    GPU."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's configuration, for buffers and overlap. Keys that chunkflow sets itself are
    refused."""


@dataclass
class LaunchConfig:
    """Processes: how many ranks run, where, and when they are stopped."""

    processes: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Number of ranks. `train` starts them on this machine; `plan` divides each global batch among them."""
    hostfile: str | None = a_path(None)
    """File with a line `HOST slots=N` for each node. `train` starts N ranks on each of them with DeepSpeed's
    launcher."""
    grace_seconds: float = bounded(300.0, at_least=0, at_most=MOST_SECONDS)
    """Seconds that ranks get to save a checkpoint after Ctrl-C or SIGTERM."""
    hang_seconds: float = bounded(1800.0, at_least=0, at_most=MOST_SECONDS)
    """Seconds after which a run counts as hung and is killed, if no rank begins an operation or moves bytes. 0 disables
    the check."""


@dataclass
class ParallelConfig:
    """Sequence and pipeline parallelism. With neither, all ranks are data parallel."""

    sequence: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Number of ranks in a sequence-parallel group. They share each chunk: every rank holds `chunk.size` tokens of
    it."""
    spread: Spread = Spread.auto
    """Which samples a sequence-parallel group shares. `auto` takes those that other ranks would wait for, and those
    whose state is larger than a rank's part of the longest sample's state; single ranks run the others. `all` shares
    every chunk, as ZeRO-3 and pipelines always do."""
    pipeline: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Number of pipeline stages that the model's layers are divided into. `plan` shows their schedules."""
    schedule: PipelineSchedule = PipelineSchedule.state_aware_1f1b
    """Order of forward and backward passes in the stages of a pipeline."""
    warmup_extra: int = bounded(0, at_least=0, at_most=MOST)
    """Warm-up forward passes per stage beyond those of 1F1B. Each one can shorten the stages' idle time, and keeps the
    activations of about one more chunk."""


@dataclass
class PlanConfig:
    """How `chunkflow plan` and `train` predict the time of a step."""

    cost_model: CostModelName = CostModelName.profile
    """Where predicted times come from: the device's data sheet (`profile`), what tune-chunk-size timed on this machine
    (`measured`), or the paper's model, where time is proportional to tokens (`proportional`)."""


@dataclass
class TuneConfig:
    """The search of `chunkflow tune-chunk-size`, and the device that plans are made for."""

    device: Device = Device.measured
    """Device to plan for. `measured` means the device of this machine."""
    memory_gib: float | None = bounded(None, above=0)
    """Memory of a rank's device in GiB. By default, 95 % of what it has: allocators waste the rest."""
    chunk_sizes: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
        metadata={"at_least": 1, "at_most": MOST},
    )
    """Values of `chunk.size` to try."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"at_least": 1, "at_most": MOST})
    """Values of `chunk.k` to try."""
    cuts: list[Cuts] = field(default_factory=lambda: [Cuts.tokens, Cuts.time])
    """Values of `chunk.cuts` to try in pipelines. An empty list keeps `chunk.cuts`."""
    samples: int = bounded(1024, at_least=1, at_most=MOST)
    """Number of samples to plan for each pair of chunk size and K, rounded to whole global batches."""
    measure: int = bounded(3, at_least=0, at_most=MOST)
    """Number of best pairs to run a real step with, if this machine has the device. 0 trusts the prediction."""
    budget_seconds: float = bounded(300.0, at_least=0, at_most=MOST_SECONDS)
    """Time limit in seconds for everything that runs on the device: timing chunks, and the steps of the best pairs."""


@dataclass
class ClusterConfig:
    """The cluster that `plan` and `tune-chunk-size` assume."""

    gpus_per_node: int = bounded(8, at_least=1, at_most=MOST_RANKS)
    """Number of GPUs per node. Sequence-parallel groups within a node use its own links."""
    node_gb_per_second: float | None = bounded(None, above=0)
    """One-way bandwidth between two GPUs of a node, in 10^9 bytes per second. By default, that of the device's data
    sheet."""
    network_gb_per_second: float | None = bounded(None, above=0)
    """One-way bandwidth between nodes for each GPU, in 10^9 bytes per second. Pipeline stages and gradients use it,
    too. By default 50, or 25 for an A100."""
    pipelines: list[int] = field(default_factory=list, metadata={"at_least": 1, "at_most": MOST_RANKS})
    """Numbers of stages that tune-chunk-size tries on `launch.processes` devices. An empty list keeps
    `parallel.pipeline`."""
    sequences: list[int] = field(default_factory=list, metadata={"at_least": 1, "at_most": MOST_RANKS})
    """Group sizes that tune-chunk-size tries on `launch.processes` devices. An empty list keeps `parallel.sequence`."""


@dataclass
class VerifyConfig:
    """The comparison that `chunkflow verify` makes."""

    length: int | None = bounded(None, at_least=8, at_most=MOST)
    """Number of tokens in the long test sequence. By default three and a half chunks, at most 2048."""
    dtype: Dtype | None = None
    """Data type of the comparison. By default float32, or float64 if `model.dtype` is float64: bfloat16 would hide
    small errors in its own rounding."""


@dataclass
class Config:
    """The whole configuration: every key of a run."""

    hardware: str = ""
    """Hardware that a recipe is made for, in words. Shown when the machine lacks something."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
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
