"""What work costs: floating-point operations, seconds of the operations of a schedule, bytes of a training run.

All of it is formulas over the shape of the model; each states its source. Seconds come from a device's profile (data
sheet and assumed efficiency) or are proportional to tokens, as in the paper's worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.chunks import Chunks

GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward layer that a token goes through; of experts, the active ones together."""
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    matmul_parameters: int
    """Weights that every token is multiplied with: all linear layers and the head; of experts, the active ones."""
    parameters: int
    """All weights, each counted once."""
    trainable_parameters: int
    """Those that get a gradient: all of them, or the adapters."""
    layer_activation_bytes: float | None = None
    """Bytes that a layer keeps for backward, for each token, in the model's dtype: counted, where it could be."""
    window: int | None = None
    """Most keys that a query of a windowed layer attends to."""
    windowed_layers: int = 0
    """How many of the layers have that window; the others attend to all of the past."""

    @property
    def state_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def attended_pairs(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Query-key pairs of the first `tokens` positions of a sequence, as a mean over the layers.

        Causal: tokens^2 / 2. With a window w, a query past position w has w keys: w^2 / 2 + w (tokens - w).
        """
        full = tokens**2 / 2
        if self.window is None or self.windowed_layers == 0:
            return full
        window = float(self.window)
        windowed = np.where(tokens <= window, full, window**2 / 2 + window * (tokens - window))
        share = self.windowed_layers / self.layers
        return np.asarray((1 - share) * full + share * windowed)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def is_head_trained(self) -> bool:
        """Adapters leave the head frozen."""
        return self.trainable_parameters == self.parameters


def training_flops(lengths: Sequence[int] | NDArray[np.int64], shape: ModelShape) -> float:
    """Floating-point operations of forward and backward over whole sequences, recompute not counted.

    6 per weight and token (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), and for attention
    12 x layers x heads x head_dim per query-key pair: scores and their weighted sum are 4 forward, and backward is
    twice the forward. Norms, softmax and activation functions are left out, about 1 % at ordinary sizes.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    per_token = 6.0 * shape.matmul_parameters
    per_pair = 12.0 * shape.layers * shape.attention_heads * shape.head_dim
    return float((per_token * sizes + per_pair * shape.attended_pairs(sizes)).sum())


@dataclass(frozen=True)
class DeviceProfile:
    """A device by its data sheet."""

    name: str
    matmul_flops: float
    """Dense bfloat16 products, operations a second."""
    memory_bytes: int
    matmul_efficiency: float = 0.6
    """Share of `matmul_flops` that linear layers reach at a few thousand tokens; assumed, not measured."""
    attention_efficiency: float = 0.45
    """The same for fused attention."""
    layer_launch_seconds: float = 60e-6
    """A layer's forward takes at least that long, however few its tokens: some fifteen kernel launches."""
    memory_bytes_per_second: float = 2e12
    link_bytes_per_second: float = 25e9
    """To another device, in one direction: the network's share of each device, for pipelines may span nodes."""
    link_latency_seconds: float = 20e-6
    node_bytes_per_second: float = 50e9
    """To another device of the same node, in one direction: half of what the data sheet says of NVLink, which counts
    both. Exchanges within a sequence-parallel group are costed with it."""
    host_bytes_per_second: float = 25e9
    """To the host's memory, in one direction: PCIe 4, or half of PCIe 5."""


DEVICES = {
    # The makers' data sheets; memory as the driver reports it.
    "a100": DeviceProfile(
        "A100 80GB", 312e12, int(79.1 * GIB), memory_bytes_per_second=2.0e12, node_bytes_per_second=300e9
    ),
    "h100": DeviceProfile(
        "H100 SXM", 989e12, int(79.2 * GIB), memory_bytes_per_second=3.35e12, link_bytes_per_second=50e9,
        node_bytes_per_second=450e9,
    ),
    "h200": DeviceProfile(
        "H200", 989e12, int(139.8 * GIB), memory_bytes_per_second=4.8e12, link_bytes_per_second=50e9,
        node_bytes_per_second=450e9,
    ),
    "b200": DeviceProfile(
        "B200", 2250e12, int(179.0 * GIB), memory_bytes_per_second=8e12, link_bytes_per_second=50e9,
        node_bytes_per_second=900e9,
    ),
    # Two cores with AVX-512, measured with float32 products (benchmarks/LOG.md), which bfloat16 models use there too.
    "cpu": DeviceProfile(
        "CPU, two cores", 300e9, 16 * GIB, 0.7, 0.35, 200e-6, memory_bytes_per_second=10e9, node_bytes_per_second=2e9
    ),
}  # fmt: skip
DEVICES_OF_A_NODE = 8
EXCHANGE_EFFICIENCY = 0.6
"""Share of a link's rate that an all-to-all reaches; assumed, not measured."""


ACTIVATION_BYTES = 2
"""Of an element of a hidden state that is sent to another stage, or exchanged within a sequence-parallel group:
bfloat16."""


@dataclass(frozen=True)
class OperationCost:
    """Seconds of one kind of operation: linear in the tokens of a chunk and in the pairs that its attention makes."""

    fixed_seconds: float
    seconds_per_token: float
    seconds_per_pair: float
    """A pair is a query and a key that it attends to."""

    def __call__(self, tokens: NDArray[np.float64], pairs: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.fixed_seconds + self.seconds_per_token * tokens + self.seconds_per_pair * pairs


@dataclass(frozen=True)
class CostModel:
    """Seconds of the operations of a schedule on one stage that holds the whole model."""

    source: str
    """In words: where the numbers come from."""
    forward: OperationCost
    backward: OperationCost
    recompute: OperationCost
    state_pass: OperationCost
    seconds_per_target: float = 0.0
    """Of head and loss: they run once for each target, in the forward that keeps activations, with their gradient."""
    step_seconds: float = 0.0
    """Of the optimizer step, which no choice of chunks changes."""
    transfer_seconds_per_token: float = 0.0
    """Of a chunk's activations to the next stage of a pipeline, or of their gradient back."""
    transfer_latency_seconds: float = 0.0
    node_seconds_per_byte: float = 0.0
    """Of an exchange between the devices of a node."""
    network_seconds_per_byte: float = 0.0
    """The same between nodes."""
    shape: ModelShape | None = None
    """Whose attention is counted; without it every query attends to all of its past."""
    is_of_one_stage: bool = False
    """Whether these are the seconds of each stage of a pipeline, however many there are, or those of the whole model,
    which its stages share."""

    @classmethod
    def proportional(cls) -> CostModel:
        """The paper's worked example: on each stage a forward takes a unit for each token, a backward two."""
        once, twice = OperationCost(0.0, 1.0, 0.0), OperationCost(0.0, 2.0, 0.0)
        return cls("proportional to tokens", once, twice, once, once, is_of_one_stage=True)

    @classmethod
    def profile(cls, shape: ModelShape, device: DeviceProfile, *, checkpointed: bool) -> CostModel:
        """From the operations that a chunk takes and the rate at which the device does them.

        Forward: 2 per weight and token, and 4 x layers x heads x head_dim per query-key pair. Backward: twice that,
        and the forward once more where activations are checkpointed. Head and loss: 6 per weight of the head and
        target (4 if the head is frozen), for their gradient is formed with their value. A state pass leaves them out.
        """
        rate = device.matmul_flops * device.matmul_efficiency
        token = 2.0 * (shape.matmul_parameters - shape.head_parameters) / rate
        target = (6.0 if shape.is_head_trained else 4.0) * shape.head_parameters / rate
        pair = (
            4.0 * shape.layers * shape.attention_heads * shape.head_dim
            / (device.matmul_flops * device.attention_efficiency)
        )  # fmt: skip
        launch = shape.layers * device.layer_launch_seconds
        forward = OperationCost(launch, token, pair)
        factor = 3.0 if checkpointed else 2.0
        return cls(
            source=f"profile of {device.name}",
            forward=forward,
            backward=OperationCost(factor * launch, factor * token, factor * pair),
            recompute=forward,
            state_pass=forward,
            seconds_per_target=target,
            transfer_seconds_per_token=shape.hidden_size * ACTIVATION_BYTES / device.link_bytes_per_second,
            transfer_latency_seconds=device.link_latency_seconds,
            node_seconds_per_byte=1 / (EXCHANGE_EFFICIENCY * device.node_bytes_per_second),
            network_seconds_per_byte=1 / (EXCHANGE_EFFICIENCY * device.link_bytes_per_second),
            shape=shape,
        )

    def spread_over(self, ranks: int) -> CostModel:
        """Of a chunk whose tokens are divided among the ranks of a sequence-parallel group (Ulysses, arXiv 2309.14509).

        Each rank does `1 / ranks` of the arithmetic and launches as many kernels as for a whole chunk. Around the
        attention of each layer an all-to-all turns tokens into heads and another turns them back. Of the bytes of its
        own tokens (queries and outputs, keys and values; K/V heads are repeated where they are fewer than ranks) a rank
        sends what lies on others, `(ranks - 1) / ranks`; over several nodes the network limits what leaves the node.
        Gradients take the same way back. Nothing overlaps the exchange.
        """
        if ranks == 1:
            return self
        exchanged = latency = 0.0
        if self.shape is not None:
            heads = self.shape.attention_heads + max(self.shape.kv_heads, min(ranks, self.shape.attention_heads))
            token = 2 * self.shape.layers * heads * self.shape.head_dim * ACTIVATION_BYTES / ranks
            if ranks <= DEVICES_OF_A_NODE:
                exchanged = token * (ranks - 1) / ranks * self.node_seconds_per_byte
            else:
                exchanged = token * (ranks - DEVICES_OF_A_NODE) / ranks * self.network_seconds_per_byte
            latency = 2 * self.shape.layers * self.transfer_latency_seconds

        def divided(cost: OperationCost, exchanges: int = 1) -> OperationCost:
            return OperationCost(
                cost.fixed_seconds + exchanges * latency,
                cost.seconds_per_token / ranks + exchanges * exchanged,
                cost.seconds_per_pair / ranks,
            )

        # A backward that runs its layers' forwards again, which takes three forwards, exchanges again.
        again = 2 if self.backward.seconds_per_token > 2.5 * self.forward.seconds_per_token else 1
        return replace(
            self,
            source=f"{self.source}, spread over {ranks} ranks",
            forward=divided(self.forward),
            backward=divided(self.backward, again),
            recompute=divided(self.recompute),
            state_pass=divided(self.state_pass),
            seconds_per_target=self.seconds_per_target / ranks,
            transfer_seconds_per_token=self.transfer_seconds_per_token / ranks,
        )

    def pairs_up_to(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Query-key pairs of the first `tokens` positions of a sequence."""
        return tokens**2 / 2 if self.shape is None else self.shape.attended_pairs(tokens)

    def chunk_pairs(self, chunks: Chunks) -> NDArray[np.float64]:
        """(chunks,) query-key pairs of each chunk: of a segment, those up to its end without those before it."""
        ends, starts = chunks.stop.astype(np.float64), chunks.start.astype(np.float64)
        return np.add.reduceat(self.pairs_up_to(ends) - self.pairs_up_to(starts), chunks.first_segment[:-1])

    def of_sequences(
        self, lengths: NDArray[np.int64], chunk_size: int, k: int, targets: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """(sequences,) seconds of all operations of each sequence, the second forwards of long ones included.

        A short sequence is charged its share of a full chunk's fixed seconds.

        Args:
            lengths: (sequences,) tokens.
            chunk_size: most tokens in a chunk.
            k: chunks of a long sequence that keep their activations.
            targets: (sequences,) tokens that the loss counts; all of them if not given.
        """
        size = np.asarray(lengths, dtype=np.float64)
        pairs = self.pairs_up_to(size)
        pieces = np.where(size > chunk_size, np.ceil(size / chunk_size), size / chunk_size)
        early = np.where(size > chunk_size, np.maximum(pieces - k, 0), 0)  # chunks that are forwarded twice
        early_tokens = early * chunk_size

        def twice(cost: OperationCost) -> NDArray[np.float64]:
            return early * cost.fixed_seconds + cost(early_tokens, self.pairs_up_to(early_tokens)) - cost.fixed_seconds

        forward = (
            pieces * self.forward.fixed_seconds + self.forward(size, pairs) - self.forward.fixed_seconds
            - twice(self.forward) + twice(self.state_pass) + twice(self.recompute)
        )  # fmt: skip
        backward = pieces * self.backward.fixed_seconds + self.backward(size, pairs) - self.backward.fixed_seconds
        return forward + backward + self.seconds_per_target * (size if targets is None else targets)


def chunk_tokens(chunks: Chunks) -> NDArray[np.float64]:
    """(chunks,)"""
    return np.add.reduceat((chunks.stop - chunks.start).astype(np.float64), chunks.first_segment[:-1])


def chunk_targets(chunks: Chunks, targets: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """(chunks,) tokens that the loss counts; those of a sequence are taken to be spread evenly over it.

    Args:
        targets: (sequences,) of each sequence; all of its tokens if not given.
    """
    if targets is None:
        return chunk_tokens(chunks)
    share = np.asarray(targets, dtype=np.float64) / chunks.lengths
    tokens = (chunks.stop - chunks.start) * share[chunks.sequence]
    return np.add.reduceat(tokens, chunks.first_segment[:-1])


# Memory

HEAD_TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Most bytes of float32 logits that exist at once (`execution.loss`)."""
TILES_ALIVE = 3
"""Tensors of that size within a tile: logits, their gradient, and a copy in the model's dtype."""


@dataclass(frozen=True)
class MemorySettings:
    """What the memory of a rank depends on besides the model's shape."""

    element_bytes: int
    """Of weights and activations: 2 or 4 (8 in float64)."""
    optimizer_states: int
    """Float32 numbers that the optimizer keeps for a weight: AdamW 2, SGD with momentum 1."""
    zero_stage: int
    data_parallel: int
    """Ranks that optimizer states, gradients and weights are divided among, as the ZeRO stage says."""
    offload: str
    """none | optimizer | parameters"""
    checkpointing: str
    """none | full | selective"""
    chunk_size: int
    k: int
    longest: int
    """Tokens of the longest sequence."""
    device_type: str
    """cpu | cuda"""
    stages: int = 1
    """Of a pipeline; each holds an equal share of the model."""
    sequence: int = 1
    """Ranks of a sequence-parallel group: each holds `chunk_size` tokens of a chunk and a share of the heads' state."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on the device of a rank at its peak, and what is kept in host memory instead."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    state: int
    host: int

    @property
    def device_total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "host")


def activation_bytes_per_token(shape: ModelShape, element_bytes: int, checkpointing: str) -> float:
    """Bytes that all layers keep for backward, for each token of a chunk.

    Counted on the model's own modules (`shape.layer_activation_bytes`), or where that was not possible, for a model
    with experts, by formula: read off transformers' Llama, tensor by tensor (h = hidden, f = feed-forward, b = element
    bytes). A norm keeps its input in float32 and its normalised value, and its output is the next product's input:
    4h + 2bh. Attention keeps queries, keys, values, its output and a float32 log-sum-exp a head. The gated feed-forward
    keeps gate, activation, up and their product: 4bf. Full checkpointing keeps the layer's input, and all of one layer
    while it goes backward; selective keeps the results of products and of attention.

    The formula against the tensors that autograd keeps (tests/test_costs.py): 1 to 5 % too few for llama, qwen2 and
    mistral, as the final norm and the rotary angles are left out; mixtral 14 %.
    """
    b, h, f = element_bytes, shape.hidden_size, shape.intermediate_size
    queries, keys = shape.attention_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = b * (2 * queries + 2 * keys) + 4 * shape.attention_heads
    layer = 2 * (4 * h + 2 * b * h) + attention + 4 * b * f
    if shape.layer_activation_bytes is not None:
        layer = int(shape.layer_activation_bytes)
    if checkpointing == "full":
        return shape.layers * b * h + layer
    if checkpointing == "selective":
        kept = b * (3 * h + 2 * queries + 2 * keys + 2 * f) + 4 * shape.attention_heads
        return shape.layers * kept + layer
    return shape.layers * layer


def state_bytes_per_token(shape: ModelShape, element_bytes: int) -> int:
    """A key and a value in every layer, and their gradients, which are float32 (float64 in float64)."""
    return shape.state_elements_per_token * (element_bytes + max(4, element_bytes))


def state_bytes(shape: ModelShape, length: int, chunk_size: int, element_bytes: int) -> int:
    """Keys and values of all tokens before the last chunk of a sequence, and their gradients."""
    return (length - 1) // chunk_size * chunk_size * state_bytes_per_token(shape, element_bytes)


def live_tokens(
    lengths: NDArray[np.int64], chunk_size: int, k: int, others: int, *, fill_tails: bool
) -> NDArray[np.int64]:
    """(sequences,) most tokens that hold activations at once, on one stage, while each sequence goes backward.

    Of a long sequence that is its last K chunks, or an early one in its recompute. Its last chunk is seldom full of it:
    what short sequences may add is what makes K x chunk_size of it, and on few samples it stays far below.

    Args:
        lengths: (sequences,) tokens.
        chunk_size: most tokens in a chunk.
        k: chunks of a long sequence that keep their activations.
        others: tokens of short sequences that may share a chunk with this one, at most.
        fill_tails: whether the last chunk of a long sequence takes them in, as other chunks do.
    """
    pieces = -(-lengths // chunk_size)
    tail = lengths - (pieces - 1) * chunk_size
    kept = np.minimum(pieces, k)
    fill = np.where((pieces == 1) | fill_tails, others, 0)
    retained = (kept - 1) * chunk_size + np.minimum(chunk_size, tail + fill)
    return np.asarray(np.where(pieces > kept, np.maximum(retained, chunk_size), retained))


def memory_parts(shape: ModelShape, settings: MemorySettings) -> MemoryParts:
    """Bytes of one rank by part. ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.

    Weights in the model's dtype; float32 master weights and optimizer states of the trainable ones; their gradients in
    the model's dtype while a chunk goes backward, and their sum over the step in float32.
    """
    shared = settings.data_parallel
    trainable = shape.trainable_parameters // settings.stages
    parameters = shape.parameters // settings.stages
    weights = parameters * settings.element_bytes // (shared if settings.zero_stage == 3 else 1)
    optimizer = trainable * 4 * (1 + settings.optimizer_states) // (shared if settings.zero_stage >= 1 else 1)
    summed = trainable * 4 // (shared if settings.zero_stage >= 2 else 1)
    of_a_chunk = trainable * settings.element_bytes if settings.element_bytes != 4 else 0
    host = 0
    if settings.offload in ("optimizer", "parameters"):  # DeepSpeed then sums the gradients on the host, too
        host, optimizer, summed = optimizer + summed, 0, 0
    if settings.offload == "parameters":
        host, weights = host + weights, weights // max(1, shape.layers)
    of_group = settings.chunk_size * settings.sequence
    tokens = min(settings.chunk_size, settings.longest) * min(settings.k, -(-settings.longest // of_group))
    state_of_longest = state_bytes(shape, settings.longest, of_group, settings.element_bytes)
    per_token = activation_bytes_per_token(shape, settings.element_bytes, settings.checkpointing)
    tile = min(HEAD_TILE_BYTES[settings.device_type], settings.chunk_size * shape.vocab_size * 4)
    # The head's gradient, summed until its chunks have gone backward.
    head_sum = shape.head_parameters * 4 if shape.is_head_trained else 0
    return MemoryParts(
        weights=weights,
        gradients=summed + of_a_chunk,
        optimizer=optimizer,
        activations=int(tokens * per_token),
        head=TILES_ALIVE * tile + head_sum,
        # Of key and value heads that are fewer than the ranks, each rank holds one.
        state=state_of_longest // min(settings.sequence, shape.kv_heads),
        host=host,
    )


def step_seconds(shape: ModelShape, settings: MemorySettings, device: DeviceProfile) -> float:
    """Of the optimizer step on one rank: gradients are summed over the data-parallel ranks, weights are updated.

    A ring moves 2 (n - 1) / n of the float32 gradients over each rank's link (Patarasuk & Yuan 2009); the update reads
    and writes weights, gradients and states once. With offload the rank's share of them crosses the host link twice.
    """
    trainable = shape.trainable_parameters // settings.stages
    ranks = settings.data_parallel
    reduce = 2 * (ranks - 1) / ranks * 4 * trainable / device.link_bytes_per_second
    share = trainable / (ranks if settings.zero_stage >= 1 else 1)
    touched = share * (4 * (2 + 2 * settings.optimizer_states) + 2 * settings.element_bytes)
    if settings.offload == "none":
        return reduce + touched / device.memory_bytes_per_second
    crossed = share * (4 + settings.element_bytes) / device.host_bytes_per_second
    return reduce + crossed + touched / HOST_MEMORY_BYTES_PER_SECOND


HOST_MEMORY_BYTES_PER_SECOND = 150e9
"""What the optimizer reaches on a server's CPUs."""
