"""What work costs: floating-point operations, and seconds of the operations of a schedule.

All of it is formulas over the shape of the model; each states its source. Seconds come from a device's profile (data
sheet and assumed efficiency) or are proportional to tokens, as in the paper's worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.stage_cut import StageLayers

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
    is_head_tied: bool = False
    """The embedding is the head's weight too; the first and the last stage of a pipeline then hold a copy each."""

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

    def parameters_of(self, held: StageLayers) -> int:
        """Weights of a stage. The first one holds the embedding, the last one the head; what is left (final norm,
        biases, position embeddings) is little, and counted with the layers."""
        tables = (1 if self.is_head_tied else 2) * self.head_parameters
        of_layers = (self.parameters - tables) * held.layers // self.layers
        ends = held.is_first + held.is_last
        return of_layers + min(ends * self.head_parameters, tables)

    def trainable_parameters_of(self, held: StageLayers) -> int:
        """Those of them that get a gradient. Adapters lie in the layers."""
        if self.is_head_trained:
            return self.parameters_of(held)
        return self.trainable_parameters * held.layers // self.layers


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
    devices_of_node: int = 8
    """Those that `node_bytes_per_second` connects."""


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
    """Seconds of the operations of a schedule on one stage that holds the whole model.

    Against measured steps of `train` (SmolLM2-135M on a CPU, chunks of 256 to 4096, K of 1 to 4; benchmarks/LOG.md): a
    model fitted to timed chunks is at most 15 % off, and predicts too little where all chunks keep their activations.
    Profiles of GPUs have not been held against any.
    """

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
    devices_of_node: int = 8
    """Ranks of a group that the links of one node connect."""
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
            devices_of_node=device.devices_of_node,
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
            if ranks <= self.devices_of_node:
                exchanged = token * (ranks - 1) / ranks * self.node_seconds_per_byte
            else:
                exchanged = token * (ranks - self.devices_of_node) / ranks * self.network_seconds_per_byte
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
        self,
        lengths: NDArray[np.int64],
        chunk_size: int,
        k: int,
        targets: NDArray[np.int64] | None = None,
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
