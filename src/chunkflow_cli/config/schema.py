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
    """Low-rank adapters: train a small part of the parameters."""

    enabled: bool = False
    """Train low-rank adapters (peft) and freeze the model."""
    r: int = bounded(16, at_least=1, at_most=65536)
    """Rank of the adapters. A higher rank has more parameters to train."""
    alpha: float = bounded(32.0, above=0)
    """Scale of the adapters, which are multiplied by alpha / r."""
    dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout in front of the adapters. When a chunk is recomputed, it draws the same random numbers again."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the modules that get an adapter, or regular expressions for whole names. `all-linear` names every linear
    layer except the head."""
    target_parameters: list[str] = field(default_factory=list)
    """Names of parameters that get an adapter, for experts that a model stores as one tensor:
    `[experts.gate_up_proj,experts.down_proj]`. Each forward makes a merged copy of such a tensor."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that are trained whole and saved with the adapters, or regular expressions for whole names:
    `[embed_tokens,lm_head,.*norm]`. Each has a trained copy beside the frozen original."""
    use_rslora: bool = False
    """Multiply the adapters by alpha / sqrt(r) instead of alpha / r, so that a high rank keeps its effect (rsLoRA)."""
    use_dora: bool = False
    """Also train the length of each row of an adapted weight (DoRA). It takes more memory and time than plain LoRA."""
    path: str | None = a_path(None)
    """Folder of an adapter to go on training. Its rank, alpha, dropout and targets are taken from there."""


@dataclass
class ModelConfig:
    """The model: its weights, data type, attention and activation checkpointing."""

    path: str = a_path("")
    """Hugging Face model id, local folder or GGUF file. Required."""
    init: Init = Init.pretrained
    """Where the weights come from. `random` reads only the model's configuration: for tests and benchmarks."""
    dtype: Dtype = Dtype.bfloat16
    """Data type of weights and activations. With bfloat16, master weights and accumulated gradients stay in float32."""
    quantization: Quantization = Quantization.none
    """Store the frozen linear layers under adapters in 4 (`nf4`) or 8 bits (`int8`), by bitsandbytes (QLoRA). The head,
    the embedding and stacked experts stay as they are."""
    attention: Attention = Attention.auto
    """Attention backend. `auto` takes the fastest one that supports the model on this device."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """What each layer keeps for its backward pass. `none` keeps everything, `full` only the layer's input, `selective`
    also the results of matrix products and attention. Less kept means less memory and more computation."""
    kernels: Kernels = Kernels.none
    """Kernels of norms, rotary embeddings and gated feed-forwards. `liger` takes those of Liger, on GPUs."""
    compile: bool = False
    """Compile the layers with torch.compile. The first steps take longer; later ones can be faster."""
    vocab_size: int | None = bounded(None, at_least=1, at_most=MOST)
    """Rows of the embedding and the head, for a tokenizer with more tokens than the checkpoint. New rows are drawn
    around the mean of the others."""
    new_weights: list[str] = field(default_factory=list)
    """Names of weights that the checkpoint lacks on purpose, such as [lm_head]. They are drawn with `train.seed`."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Stretch the rotary embedding for longer samples, as Hugging Face configurations write it: {rope_type: yarn,
    factor: 4}. It replaces the model's own setting, is saved with the model, and multiplies the model's limit of
    tokens."""
    trust_remote_code: bool = False
    """Allow the model folder to run its own Python code. Set it only for a source that you trust."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class SourceConfig:
    """One of several data sets. What is null or empty here is as in the key of `data` with the same name."""

    path: Annotated[Any, str | list[str]] = a_path("")
    """Data, given as in `data.path`. Required."""
    name: str = ""
    """Name in losses, reports and messages. By default, the name of the file, folder or data set."""
    weight: float | None = bounded(None, above=0)
    """Share of the samples drawn, relative to the weights of the other sources. All sources have one, or none has."""
    samples: int | None = bounded(None, at_least=1, at_most=MOST)
    """Most samples to use, drawn with `train.seed`. Null uses all of them."""
    format: DataFormat | None = None
    """Format of the rows."""
    split: str | None = None
    """Split to train on."""
    subset: str | None = None
    """Subset of the data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """New names for columns of the rows."""
    train_on: TrainOn | None = None
    """Tokens that the loss counts."""


@dataclass
class DataConfig:
    """The data set: where it is, how its rows are read, and which tokens the loss counts."""

    path: Annotated[Any, str | list[str]] = a_path("")  # OmegaConf has no such type: checks.py checks the value
    """File, folder, glob or Hugging Face data set id, or a list of files, folders and globs. Required, unless
    `data.sources` is set. Files are .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt."""
    sources: Annotated[Any, list[SourceConfig]] = field(default_factory=list)  # load.py gives its elements their types
    """Several data sets instead of `data.path`: a list of {path: ..., name: ..., weight: ..., samples: ...}. A source
    may set its own format, split, subset, columns and train_on."""
    deduplicate: bool = False
    """Leave out samples whose tokens and targets equal those of an earlier one, of any source."""
    split: str = "train"
    """Split to train on, of a folder whose files are named after splits or of a Hugging Face data set. Several are
    joined by `+`; `all` is all of them."""
    subset: str | None = None
    """Subset of a Hugging Face data set, or of a folder with subsets. Null takes the only or the default one."""
    columns: dict[str, str] = field(default_factory=dict)
    """New names for columns of the rows, as in {question: instruction, answer: output}."""
    format: DataFormat = DataFormat.auto
    """Format of the rows. `auto` finds it from the first rows."""
    train_on: TrainOn = TrainOn.assistant
    """Tokens that the loss counts: those of the assistant's answers, of the `last` answer only, or all of them."""
    train_on_reasoning: bool = True
    """Count the words of an answer's reasoning as well. False trains on the rest of the answer, with the reasoning in
    view."""
    turns: Turns = Turns.whole
    """What a conversation becomes. `whole` makes one sample of it, as the chat template writes the whole conversation.
    `split` makes a sample of each answer, as the model sees it at inference."""
    chat_template: str | None = a_path(None)
    """Chat template of conversations: a Jinja file, or the name of one of the tokenizer's own templates. It is saved
    with the model. Null takes the tokenizer's."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template gets, as in {enable_thinking: false}. Pass the same when you use the model."""
    max_length: int | None = bounded(None, at_least=2, at_most=MOST)
    """Most tokens in a sample. Null takes the model's own limit."""
    overlong: Overlong = Overlong.error
    """What to do with a sample of more than `data.max_length` tokens. `error` stops the run and names the sample."""
    bad_rows: BadRows = BadRows.error
    """What to do with a row that cannot be used. `error` stops the run and names it, `skip` lists it in
    rejected.jsonl."""
    eval_path: Annotated[Any, str | list[str] | None] = a_path(None)
    """Held-out data, given as in `data.path`. Of data with splits, validation or else test is read. Use either this or
    `data.eval_fraction`."""
    eval_split: str | None = None
    """Split to evaluate on, of `data.eval_path`, or of `data.path` if that is null."""
    eval_fraction: float = bounded(0.0, at_least=0, below=1)
    """Fraction of the rows to hold out, of each source, drawn with `train.seed`."""
    cache_dir: str | None = a_path(None)
    """Folder for tokenised data. Null is ~/.cache/chunkflow, or $XDG_CACHE_HOME/chunkflow."""
    num_workers: int | None = bounded(None, at_least=1, at_most=1024)
    """Number of processes that tokenise. Null starts one per core."""


@dataclass
class ChunkConfig:
    """Chunks: how samples are packed and split. This sets memory and speed, but never the result."""

    size: int = bounded(8192, at_least=1, at_most=MOST)
    """Most tokens in a chunk. Every forward and backward pass runs one chunk, so this sets peak memory. Lower it if you
    run out of memory; `chunkflow tune-chunk-size` finds the best value."""
    k: int = bounded(1, at_least=1, at_most=MOST)
    """K, the number of chunks of a long sample that keep their activations. The other chunks run forward twice. A
    larger K takes more memory and less computation."""
    fill_tails: bool = True
    """Fill the last chunk of a long sample with short samples."""
    cuts: Cuts = Cuts.tokens
    """How long samples are cut: into chunks of equally many `tokens`, or of equal predicted `time`. Later chunks take
    longer per token, so `time` makes them shorter. That can balance pipeline stages better."""
    offload_state: OffloadState = OffloadState.none
    """Where the state of long samples is kept: on the device, or in `host` memory, from where it passes through the
    device in blocks. Length is then limited by the host's memory."""


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: OptimizerName = OptimizerName.adamw
    """Optimizer. Choose it by `optim=NAME`, which also sets the defaults that suit it. `adamw_8bit` and
    `paged_adamw_8bit` are those of bitsandbytes. `muon` trains the matrices of the layers with Muon and everything else
    with AdamW."""
    lr: float = bounded(FULL_LEARNING_RATE, at_least=0)
    """Peak learning rate. Unless set: 1e-5, with model.lora.enabled=true 2e-4, with `optim=sgd` 1e-2. Adafactor takes
    it relative to the size of each weight: 1e-3 with `optim=adafactor`."""
    lr_factors: dict[str, float] = field(default_factory=dict, metadata={"at_least": 0})
    """Factors of the learning rate for weights by name, as in {embed_tokens: 0.1} or {lora_B: 16} (LoRA+). Names are
    given as in `optim.freeze`; of several that match, the last one counts."""
    freeze: list[str] = field(default_factory=list)
    """Names of weights that are not trained: whole parts of their names, such as [embed_tokens,layers.0], or regular
    expressions for whole names."""
    weight_decay: float = bounded(0.0, at_least=0)
    """Decay of weight matrices. Biases and norms do not decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"at_least": 0, "below": 1})
    """Decay rates of AdamW's running averages of gradients and of their squares."""
    eps: float = bounded(1e-8, above=0)
    """Term that AdamW adds to its denominator for numerical stability."""
    momentum: float = bounded(0.0, at_least=0, below=1)
    """Momentum of SGD and Muon. `optim=muon` sets 0.95."""
    schedule: LearningRateSchedule = LearningRateSchedule.cosine
    """Learning rate after the warm-up. `wsd` (warm-up, stable, decay) decays only over the last tenth of the steps."""
    warmup_ratio: float = bounded(0.03, at_least=0, below=1)
    """Fraction of the steps in which the learning rate rises from zero."""
    min_lr_ratio: float = bounded(0.0, at_least=0, at_most=1)
    """Fraction of `optim.lr` at which the decay ends, instead of at zero."""
    grad_clip: float = bounded(1.0, at_least=0)
    """Largest norm of a step's gradient. Larger gradients are scaled down to it; 0 disables clipping."""


@dataclass
class TrainConfig:
    """The run: its task, length, batches, order, loss and output folder."""

    task: Task = Task.sft
    """What is learnt: the answers (`sft`), or which answer of two is preferred (`dpo`, `orpo`), or which answers are
    good and which are not (`kto`)."""
    steps: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of optimizer steps. Null trains for `train.epochs`."""
    epochs: int = bounded(1, at_least=1, at_most=MOST)
    """Number of passes over the data. Ignored if `train.steps` is set."""
    global_batch_size: int | None = bounded(256, at_least=1, at_most=MOST)
    """Number of samples in an optimizer step, over all ranks. Null if `train.global_batch_tokens` is set."""
    global_batch_tokens: int | None = bounded(None, at_least=1, at_most=MOST)
    """Number of tokens in an optimizer step, over all ranks, instead of `train.global_batch_size`: a step takes as many
    whole samples as fit. A longer sample has a step of its own."""
    shuffle: bool = True
    """Shuffle each epoch. The order depends only on `train.seed` and the number of the epoch."""
    seed: int = bounded(0, at_least=0, at_most=LARGEST_SEED)
    """Seed of sample order, dropout, held-out samples and random weights."""
    deterministic: bool = False
    """On GPUs, take only kernels and sums whose order is fixed, so that the same run gives the same numbers to the bit.
    Slower. An operation without such a kernel ends the run with its name."""
    loss_weighting: LossWeighting = LossWeighting.token
    """What counts equally in the loss: every target `token` of the global batch, or every sample (`sequence`)."""
    output_dir: str | None = a_path(None, null_is_a_name=True)
    """Folder of the run. The default is outputs/<recipe>/<date-time>."""
    trace: bool = False
    """Record when each rank ran each operation since the last start, and write trace.json at the end, for Perfetto and
    `plan --trace`. The run waits for the GPU after each operation, which costs time."""
    guard: bool = True
    """Before training, check on a small float32 copy that this architecture trains exactly in chunks."""


@dataclass
class PreferenceConfig:
    """The loss of `train.task=dpo`, `orpo` and `kto`."""

    loss: PreferenceLoss = PreferenceLoss.sigmoid
    """Loss of a pair under `train.task=dpo`. `simpo` compares mean log-probabilities and needs no reference model."""
    beta: float = bounded(0.1, above=0)
    """How closely the model stays to the reference model; the higher, the closer. Under `orpo` and `simpo`, the weight
    of the comparison."""
    label_smoothing: float = bounded(0.0, at_least=0, below=0.5)
    """Probability that the answers of a pair are labelled the wrong way round (`sigmoid` and `simpo`)."""
    gamma: float = bounded(0.5, at_least=0)
    """Margin by which `simpo` wants the chosen answer to win."""
    nll_weight: float = bounded(0.0, at_least=0)
    """Weight of an additional loss that imitates the chosen answers of `train.task=dpo`, per token."""
    share_prompts: bool = True
    """Run a long prompt once for both answers of a pair. The result is the same. Pipelines, and models with recurrent
    layers, run it for each answer."""
    desirable_weight: float = bounded(1.0, at_least=0)
    """Weight of the good answers under `train.task=kto`."""
    undesirable_weight: float = bounded(1.0, at_least=0)
    """Weight of the bad answers under `train.task=kto`."""


@dataclass
class EvalConfig:
    """Evaluation on held-out data."""

    every: int | None = bounded(None, at_least=1, at_most=MOST)
    """Steps between evaluations. Null evaluates only at the start and at the end."""
    early_stopping_patience: int | None = bounded(None, at_least=1, at_most=MOST)
    """Stop when this many evaluations in a row have not lowered the held-out loss. Null trains all steps."""
    keep_best: bool = False
    """Keep the model of the lowest held-out loss after a step, and save it as the final one."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers at each evaluation, for you to read: on the screen, and in answers.jsonl."""


@dataclass
class CheckpointConfig:
    """Checkpoints, from which an interrupted run continues."""

    every: int | None = bounded(None, at_least=1, at_most=MOST)
    """Steps between checkpoints. Null saves one only on interruption; set it to survive kill -9 and power cuts."""
    keep: int = bounded(2, at_least=1, at_most=MOST)
    """Number of checkpoints to keep. Older ones are deleted."""
    resume: str = a_path("auto")
    """Checkpoint to continue from. `auto` continues an unfinished run of the same configuration, `never` starts a new
    run, and a path names a checkpoint."""


@dataclass
class LogConfig:
    """Metrics and where they go."""

    every: int = bounded(1, at_least=1, at_most=MOST)
    """Steps between rows of metrics."""
    backends: list[LogBackend] = field(default_factory=lambda: [LogBackend.jsonl])
    """Where metrics go. `jsonl` writes metrics.jsonl in the folder of the run. The others are trackers: each needs its
    package, gets the configuration and the plan as well, and never ends a run when it fails."""
    project: str | None = None
    """Project of wandb and trackio, and experiment of mlflow. Null takes the tracker's own environment variable, such
    as WANDB_PROJECT, or else `chunkflow`."""
    run_name: str | None = None
    """Name of the run in trackers. Null takes the name of its folder."""


@dataclass
class EngineConfig:
    """DeepSpeed, which holds the optimizer and divides the model state among the ranks."""

    zero_stage: int = bounded(1, at_least=0, at_most=3)
    """DeepSpeed ZeRO stage. 1 divides the optimizer state among the ranks, 2 also gradients, 3 also weights."""
    offload: Offload = Offload.none
    """What to keep in host memory: the optimizer state, or the parameters as well. Needs a GPU."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, for buffers and overlap. Those that chunkflow sets itself are refused."""


@dataclass
class LaunchConfig:
    """Processes: how many ranks run, where, and when they are stopped."""

    processes: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Number of ranks. `train` starts them on this machine; `plan` divides each global batch among them."""
    hostfile: str | None = a_path(None)
    """File with lines of `HOST slots=N`. `train` starts N ranks on each of these nodes with DeepSpeed's launcher."""
    grace_seconds: float = bounded(300.0, at_least=0, at_most=MOST_SECONDS)
    """Seconds that ranks get to save a checkpoint after Ctrl-C or SIGTERM."""
    hang_seconds: float = bounded(1800.0, at_least=0, at_most=MOST_SECONDS)
    """Seconds without an operation begun or bytes moved on any rank, after which a run is killed as hung. 0 disables
    this."""


@dataclass
class ParallelConfig:
    """Sequence and pipeline parallelism. With neither, all ranks are data parallel."""

    sequence: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Ranks per sequence-parallel group. They split each chunk; every rank holds `chunk.size` tokens of it."""
    spread: Spread = Spread.auto
    """Which samples are split over a sequence-parallel group. `auto` splits those that other ranks would wait for, and
    those whose state exceeds a rank's part of the longest sample's state; single ranks run the others. `all` splits
    every chunk, which ZeRO-3 and pipelines always do."""
    pipeline: int = bounded(1, at_least=1, at_most=MOST_RANKS)
    """Number of pipeline stages to divide the model's layers into. `plan` shows their schedules."""
    schedule: PipelineSchedule = PipelineSchedule.state_aware_1f1b
    """Order of forward and backward passes in the stages of a pipeline."""
    warmup_extra: int = bounded(0, at_least=0, at_most=MOST)
    """Warm-up forward passes per stage beyond those of 1F1B. Each one shortens the idle time of the stages, and keeps
    the activations of about one more chunk."""


@dataclass
class PlanConfig:
    """How `chunkflow plan` and `train` predict the time of a step."""

    cost_model: CostModelName = CostModelName.profile
    """Where predicted times come from. `profile` is the device's data sheet, `measured` is what tune-chunk-size timed
    on this machine, and `proportional` is the paper's model, with time proportional to tokens."""


@dataclass
class TuneConfig:
    """The search of `chunkflow tune-chunk-size`, and the device that plans are made for."""

    device: Device = Device.measured
    """Device to plan for. `measured` is the one of this machine."""
    memory_gib: float | None = bounded(None, above=0)
    """Memory of a rank's device, in GiB. Null is all of it, less the twentieth that allocators waste."""
    chunk_sizes: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
        metadata={"at_least": 1, "at_most": MOST},
    )
    """Values of `chunk.size` to try."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"at_least": 1, "at_most": MOST})
    """Values of `chunk.k` to try."""
    cuts: list[Cuts] = field(default_factory=lambda: [Cuts.tokens, Cuts.time])
    """Values of `chunk.cuts` to try in pipelines, where they matter. An empty list takes `chunk.cuts`."""
    samples: int = bounded(1024, at_least=1, at_most=MOST)
    """Number of samples planned for each (size, K) pair, rounded to whole global batches."""
    measure: int = bounded(3, at_least=0, at_most=MOST)
    """Number of the best pairs that run a real step, if this machine has the device. 0 trusts the prediction."""
    budget_seconds: float = bounded(300.0, at_least=0, at_most=MOST_SECONDS)
    """Seconds for everything that runs on the device: timing chunks, and the steps of the best pairs."""


@dataclass
class ClusterConfig:
    """The cluster that `plan` and `tune-chunk-size` assume."""

    gpus_per_node: int = bounded(8, at_least=1, at_most=MOST_RANKS)
    """GPUs per node. Sequence-parallel groups within a node use its own links."""
    node_gb_per_second: float | None = bounded(None, above=0)
    """One-way bandwidth between two GPUs of a node, in 10^9 bytes per second. Null takes the device's data sheet."""
    network_gb_per_second: float | None = bounded(None, above=0)
    """One-way bandwidth between nodes for each GPU, in 10^9 bytes per second. Pipeline stages and gradients use it too.
    Null is 50, or 25 for an A100."""
    pipelines: list[int] = field(default_factory=list, metadata={"at_least": 1, "at_most": MOST_RANKS})
    """Numbers of stages that tune-chunk-size tries on `launch.processes` devices. Empty takes `parallel.pipeline`."""
    sequences: list[int] = field(default_factory=list, metadata={"at_least": 1, "at_most": MOST_RANKS})
    """Group sizes that tune-chunk-size tries on `launch.processes` devices. Empty takes `parallel.sequence`."""


@dataclass
class VerifyConfig:
    """The comparison that `chunkflow verify` makes."""

    length: int | None = bounded(None, at_least=8, at_most=MOST)
    """Number of tokens in the long test sequence. Null is three and a half chunks, at most 2048."""
    dtype: Dtype | None = None
    """Data type of the comparison. Null is float32, or float64 if `model.dtype` is: the rounding of bfloat16 would hide
    the differences that `verify` looks for."""


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
