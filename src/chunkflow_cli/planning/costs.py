"""Predict floating-point operations, and the seconds of a schedule's operations, from the shape of the model.

Seconds come from a device's profile (data sheet and assumed efficiency), from timed chunks (`calibration`), or are
proportional to tokens, as in the paper's worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers
from chunkflow_cli.planning.simulate import OperationSeconds
from chunkflow_cli.planning.stage_cut import StageLayers, layer_shares

GIB = 2**30
FIRST_PASS_OF_HEAD = 1 / 3
"""Share of head and loss that a first pass runs: the product that gives log-probabilities, without its gradients."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model."""

    layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward layer that a token goes through; with experts, the sum over the active ones."""
    attention: tuple[AttentionLayers, ...]
    """The attention layers, by their sizes; in a hybrid model, fewer than `layers`."""
    vocab_size: int
    matmul_parameters: int
    """Weights that every token is multiplied with: all linear layers and the head; only the active experts."""
    parameters: int
    """All weights, each counted once."""
    trainable_parameters: int
    """Weights that get a gradient: all of them, or those of the adapters."""
    layer_activation_bytes: float | None = None
    """Bytes per token that a layer keeps for backward, as a mean; None if they could not be counted."""
    largest_layer_activation_bytes: float | None = None
    """Bytes per token that the layer that keeps the most keeps for backward."""
    layer_product_bytes: float | None = None
    """Bytes per token of the results of a layer's matrix products and attention, as a mean."""
    recurrent: RecurrentLayers = field(default_factory=RecurrentLayers)
    """The recurrent layers, together; by default, there are none."""
    merged_bytes: int = 0
    """Bytes of the copies of adapted expert tensors, over all layers: each chunk that keeps activations has its own."""
    embedding_copy: int = 0
    """Weights of the trained copy of the embedding that adapters come with (`model.lora.modules_to_save`)."""
    head_copy: int = 0
    """Likewise of the head. Where embedding and head share a weight, they share the copy, and both fields count it."""
    workspace_bytes: int = 0
    """Most bytes that a layer needs for a moment: DoRA computes whole weights for their lengths, and a quantised layer
    is multiplied with its dequantised weight."""
    spared_bytes: int = 0
    """Bytes that quantised layers take less than in the model's data type, all together."""
    largest_trained: int = 0
    """Numbers in the largest weight that gets a gradient."""
    is_head_tied: bool = False
    """True if embedding and head share a weight; the first and last stage of a pipeline then hold a copy each."""

    @property
    def state_elements_per_token(self) -> int:
        """Numbers in the stored keys and values of one token, over all layers."""
        return sum(part.kv_elements_per_token for part in self.attention if part.owns_keys)

    @property
    def attention_flops_per_pair(self) -> int:
        """Floating-point operations of a forward for one query-key pair, over all layers."""
        return sum(part.flops_per_pair for part in self.attention)

    @property
    def kv_heads(self) -> int:
        """Fewest heads of keys and values of an attention layer; 1 if there is none."""
        return min((part.kv_heads for part in self.attention), default=1)

    def attended_pairs(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of the first `tokens` positions of a sequence.

        It is the mean over the attention layers, weighted by their operations per pair; 0 without such layers.
        """
        pairs = np.zeros_like(tokens)
        for part in self.attention:
            pairs += part.flops_per_pair / self.attention_flops_per_pair * part.attended_pairs(tokens)
        return pairs

    @property
    def head_parameters(self) -> int:
        """Weights of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def is_head_trained(self) -> bool:
        """True without adapters, or if they come with a trained copy of the head."""
        return self._is_all_trained or self.head_copy > 0

    @property
    def _is_all_trained(self) -> bool:
        return self.trainable_parameters == self.parameters

    def _copies_of(self, is_first: bool, is_last: bool) -> int:
        """Return the weights of the trained copies of embedding and head on a stage."""
        copies = self.embedding_copy * is_first + self.head_copy * is_last
        return min(copies, self.head_copy) if self.is_head_tied and self.head_copy else copies

    def parameters_of(self, held: StageLayers) -> int:
        """Return the number of weights on a stage.

        The first stage holds the embedding, the last one the head. The few other weights (final norm, biases, position
        embeddings) are counted with the layers.
        """
        tables = (1 if self.is_head_tied else 2) * self.head_parameters
        layers = (self.parameters - tables - self._copies_of(True, True)) * held.layers // self.layers
        copies = self._copies_of(held.is_first, held.is_last)
        return layers + min((held.is_first + held.is_last) * self.head_parameters, tables) + copies

    def trainable_parameters_of(self, held: StageLayers) -> int:
        """Return the number of weights on a stage that get a gradient; adapters are part of the layers."""
        if self._is_all_trained:
            return self.parameters_of(held)
        layers = (self.trainable_parameters - self._copies_of(True, True)) * held.layers // self.layers
        return layers + self._copies_of(held.is_first, held.is_last)


def training_flops(lengths: Sequence[int] | NDArray[np.int64], shape: ModelShape) -> float:
    """Return the floating-point operations of forward and backward over whole sequences, without recompute.

    6 per weight and token (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), and for attention
    6 x heads x (key_dim + value_dim) per layer and query-key pair: scores and their weighted sum are 2 each forward,
    and backward is twice the forward. Scans of recurrent layers are counted per token. Norms, softmax and activation
    functions are left out, about 1 % at ordinary sizes.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    per_token = 6.0 * shape.matmul_parameters + 3.0 * shape.recurrent.flops_per_token
    per_pair = 3.0 * shape.attention_flops_per_pair
    return float((per_token * sizes + per_pair * shape.attended_pairs(sizes)).sum())


@dataclass(frozen=True)
class DeviceProfile:
    """A device as its data sheet describes it. Bandwidths count one direction."""

    name: str
    matmul_flops: float
    """Dense bfloat16 operations per second."""
    memory_bytes: int
    matmul_efficiency: float = 0.6
    """Share of `matmul_flops` that linear layers reach at a few thousand tokens; assumed, not measured."""
    attention_efficiency: float = 0.45
    """Share of `matmul_flops` that fused attention reaches; assumed, not measured."""
    layer_launch_seconds: float = 60e-6
    """Least seconds of a layer's forward, even with few tokens: about fifteen kernel launches."""
    scan_efficiency: float = 0.2
    """Share of `matmul_flops` that scans of recurrent layers reach with their kernels; assumed, not measured."""
    memory_bytes_per_second: float = 2e12
    link_bytes_per_second: float = 25e9
    """Bandwidth to a device of another node: this device's share of the network, because pipelines may span nodes."""
    link_latency_seconds: float = 20e-6
    node_bytes_per_second: float = 50e9
    """Bandwidth to a device of the same node: half of NVLink's rate in the data sheet, which counts both directions.
    It sets the cost of exchanges within a sequence-parallel group."""
    host_bytes_per_second: float = 25e9
    """Bandwidth to the host's memory: PCIe 4, or half of PCIe 5."""
    devices_of_node: int = 8
    """Devices that `node_bytes_per_second` connects."""
    host_memory_bytes: int | None = None
    """Memory of the node that the device is in, where it is known."""


DEVICES = {
    # From the makers' data sheets; memory as the driver reports it.
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
    # Two cores with AVX-512, measured with float32 products (benchmarks/LOG.md): bfloat16 models use them there too.
    # Scans run in torch: 5 to 6 GFLOP/s per core, measured on layers of Qwen3.5 and Granite 4.
    "cpu": DeviceProfile(
        "CPU, two cores", 300e9, 16 * GIB, 0.7, 0.35, 200e-6, scan_efficiency=0.04, memory_bytes_per_second=10e9,
        node_bytes_per_second=2e9,
    ),
}  # fmt: skip
EXCHANGE_EFFICIENCY = 0.6
"""Share of a link's rate that an all-to-all reaches; assumed, not measured."""
ACTIVATION_BYTES = 2
"""Bytes of an activation element sent between stages or within a sequence-parallel group (bfloat16)."""


@dataclass(frozen=True)
class OperationCost:
    """Seconds of one kind of operation, linear in a chunk's tokens and in its query-key pairs."""

    fixed_seconds: float
    seconds_per_token: float
    seconds_per_pair: float

    def __call__(self, tokens: NDArray[np.float64], pairs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Predict the seconds of operations on this many tokens and query-key pairs."""
        return self.fixed_seconds + self.seconds_per_token * tokens + self.seconds_per_pair * pairs


@dataclass(frozen=True)
class CostModel:
    """Seconds of a schedule's operations on one stage that holds the whole model.

    Accuracy: models fitted to timed chunks are within 15 % of measured steps of `train` (SmolLM2-135M on a CPU, chunks
    of 256 to 4096, K of 1 to 4; benchmarks/LOG.md), and too low where all chunks keep their activations. GPU profiles
    have not been compared with measurements.
    """

    source: str
    """Where the numbers come from, in words."""
    forward: OperationCost
    backward: OperationCost
    recompute: OperationCost
    state_pass: OperationCost
    seconds_per_target: float = 0.0
    """Seconds of head and loss. They run once per target, with their gradient, in the forward that keeps
    activations."""
    step_seconds: float = 0.0
    """Seconds of the optimizer step, which no choice of chunks changes."""
    transfer_seconds_per_token: float = 0.0
    """Seconds to send a chunk's activations to the next stage of a pipeline, or their gradient back."""
    transfer_latency_seconds: float = 0.0
    node_seconds_per_byte: float = 0.0
    """Seconds of an exchange between the devices of a node."""
    network_seconds_per_byte: float = 0.0
    """Seconds of an exchange between nodes."""
    devices_of_node: int = 8
    """Ranks of a group that the links of one node connect."""
    shape: ModelShape | None = None
    """The model whose attention is counted; if None, every query attends to all of its past."""
    scan_share: float = 0.0
    """Share of the seconds per token that convolutions and scans of recurrent layers take, where it is known."""
    host_seconds_per_byte: float = 0.0
    """Seconds to copy a byte of state between device and host memory; 0 if state stays on the device."""
    is_of_one_stage: bool = False
    """True if each stage of a pipeline takes these seconds; False if the stages share them."""

    @classmethod
    def proportional(cls) -> CostModel:
        """Return the costs of the paper's worked example: on each stage 1 s per token forward, 2 s backward."""
        once, twice = OperationCost(0.0, 1.0, 0.0), OperationCost(0.0, 2.0, 0.0)
        return cls("proportional to tokens", once, twice, once, once, is_of_one_stage=True)

    @classmethod
    def profile(cls, shape: ModelShape, device: DeviceProfile, *, checkpointed: bool) -> CostModel:
        """Return the costs that follow from a chunk's floating-point operations and the device's rates.

        Forward: 2 per weight and token, those of attention per query-key pair, and those of scans per token. Backward:
        twice that, and the forward once more with checkpointing. Head and loss: 6 per weight of the head and target (4
        if the head is frozen), because their gradient is computed with their value. A state pass leaves them out.
        """
        rate = device.matmul_flops * device.matmul_efficiency
        attention_rate = device.matmul_flops * device.attention_efficiency
        token = 2.0 * (shape.matmul_parameters - shape.head_parameters) / rate
        scans = shape.recurrent.flops_per_token / (device.matmul_flops * device.scan_efficiency)
        target = (6.0 if shape.is_head_trained else 4.0) * shape.head_parameters / rate
        pair = shape.attention_flops_per_pair / attention_rate
        launch = shape.layers * device.layer_launch_seconds
        forward = OperationCost(launch, token + scans, pair)
        factor = 3.0 if checkpointed else 2.0
        return cls(
            source=f"profile of {device.name}",
            forward=forward,
            backward=OperationCost(factor * launch, factor * (token + scans), factor * pair),
            recompute=forward,
            state_pass=forward,
            seconds_per_target=target,
            transfer_seconds_per_token=shape.hidden_size * ACTIVATION_BYTES / device.link_bytes_per_second,
            transfer_latency_seconds=device.link_latency_seconds,
            node_seconds_per_byte=1 / (EXCHANGE_EFFICIENCY * device.node_bytes_per_second),
            network_seconds_per_byte=1 / (EXCHANGE_EFFICIENCY * device.link_bytes_per_second),
            devices_of_node=device.devices_of_node,
            shape=shape,
            scan_share=scans / (token + scans),
        )

    def with_state_on_host(self, device: DeviceProfile) -> CostModel:
        """Return the costs with state in host memory, to which the device's data sheet gives the rate."""
        return replace(self, host_seconds_per_byte=1 / device.host_bytes_per_second)

    def with_seconds_of_passes(self, forward: float, backward: float) -> CostModel:
        """Return the costs with so many seconds more for each forward of a chunk, and for each backward."""

        def longer(cost: OperationCost, seconds: float) -> OperationCost:
            return replace(cost, fixed_seconds=cost.fixed_seconds + seconds)

        return replace(
            self, forward=longer(self.forward, forward), backward=longer(self.backward, backward),
            recompute=longer(self.recompute, forward), state_pass=longer(self.state_pass, forward),
        )  # fmt: skip

    @property
    def moves_state(self) -> bool:
        """True if state is kept in host memory."""
        return self.host_seconds_per_byte > 0

    def state_seconds(self, chunks: Chunks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the seconds in which each chunk's forward and backward copy state, (chunks,) each.

        A forward fetches the keys and values that the chunk sees, and sends its own. A backward fetches them with their
        float32 gradients and sends these back, and fetches the chunk's own gradients; the recompute of checkpointing
        fetches keys and values once more. Copies of both directions run next to each other and to what is computed, so
        an operation takes the largest time.
        """
        first = chunks.first_segment[:-1]
        past = chunks.start[first].astype(np.float64)
        own = (chunks.stop[first] - chunks.start[first]).astype(np.float64)
        own[chunks.stop[first] == chunks.lengths[chunks.sequence[first]]] = 0.0  # the last chunk's are never kept
        fetched, sent, fetched_back, sent_back = (np.zeros(len(past)) for _ in range(4))
        if self.moves_state and self.shape is not None:
            again = ACTIVATION_BYTES if self._is_checkpointed else 0
            for part in self.shape.attention:
                seen = past if part.window is None else np.minimum(past, part.window - 1.0)
                seen = seen if part.block is None else np.minimum(seen, past % part.block)
                kept = own if part.owns_keys else np.zeros(len(past))
                kept = kept if part.window is None else np.minimum(kept, part.window - 1.0)
                fetched += part.kv_elements_per_token * ACTIVATION_BYTES * seen
                sent += part.kv_elements_per_token * ACTIVATION_BYTES * kept
                fetched_back += part.kv_elements_per_token * ((ACTIVATION_BYTES + 4 + again) * seen + 4 * kept)
                sent_back += part.kv_elements_per_token * 4 * seen
            edges = self.shape.recurrent.edge_bytes
            fetched, sent_back = fetched + edges * (past > 0), sent_back + edges * (past > 0)
            sent, fetched_back = sent + edges * (own > 0), fetched_back + edges * (own > 0)
        rate = self.host_seconds_per_byte
        return np.maximum(fetched, sent) * rate, np.maximum(fetched_back, sent_back) * rate

    @property
    def _is_checkpointed(self) -> bool:
        """True if backward runs the layers again: with checkpointing it takes three forwards."""
        return self.backward.seconds_per_token > 2.5 * self.forward.seconds_per_token

    def spread_over(self, ranks: int) -> CostModel:
        """Return the costs of chunks that a sequence-parallel group splits (Ulysses, arXiv 2309.14509).

        Each rank does `1 / ranks` of the arithmetic and launches as many kernels as for a whole chunk. In each layer,
        one all-to-all before attention turns tokens into heads, and another turns them back. A rank sends
        `(ranks - 1) / ranks` of its own tokens' bytes: queries and outputs, keys and values (repeated if there are
        fewer K/V heads than ranks). Across nodes, the network limits what leaves the node. Gradients are exchanged
        likewise. No exchange overlaps with computation. Convolutions and scans of recurrent layers are taken as
        not divided (see `RecurrentLayers`): their inputs are gathered, and each rank runs them for all tokens.
        """
        if ranks == 1:
            return self
        exchanged = latency = 0.0
        if self.shape is not None:
            sent = sum(
                part.query_elements_per_token
                + part.kv_elements_per_token * max(part.kv_heads, min(ranks, part.heads)) / part.kv_heads
                for part in self.shape.attention
            )
            token = (sent / ranks + self.shape.recurrent.input_elements_per_token) * ACTIVATION_BYTES
            if ranks <= self.devices_of_node:
                exchanged = token * (ranks - 1) / ranks * self.node_seconds_per_byte
            else:
                exchanged = token * (ranks - self.devices_of_node) / ranks * self.network_seconds_per_byte
            latency = 2 * sum(part.layers for part in self.shape.attention) * self.transfer_latency_seconds

        def divided(cost: OperationCost, exchanges: int = 1) -> OperationCost:
            return OperationCost(
                cost.fixed_seconds + exchanges * latency,
                cost.seconds_per_token * (self.scan_share + (1 - self.scan_share) / ranks) + exchanges * exchanged,
                cost.seconds_per_pair / ranks,
            )

        again = 2 if self._is_checkpointed else 1  # it runs the exchanges of its layers again, too
        return replace(
            self,
            source=f"{self.source}, spread over {ranks} ranks",
            forward=divided(self.forward),
            backward=divided(self.backward, again),
            recompute=divided(self.recompute),
            state_pass=divided(self.state_pass),
            seconds_per_target=self.seconds_per_target / ranks,
            transfer_seconds_per_token=self.transfer_seconds_per_token / ranks,
            host_seconds_per_byte=self.host_seconds_per_byte
            / min(ranks, 1 if self.shape is None else self.shape.kv_heads),
        )

    def pairs_up_to(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of the first `tokens` positions of a sequence."""
        return tokens**2 / 2 if self.shape is None else self.shape.attended_pairs(tokens)

    def chunk_pairs(self, chunks: Chunks) -> NDArray[np.float64]:
        """Return the query-key pairs of each chunk, (chunks,)."""
        ends, starts = chunks.stop.astype(np.float64), chunks.start.astype(np.float64)
        return np.add.reduceat(self.pairs_up_to(ends) - self.pairs_up_to(starts), chunks.first_segment[:-1])

    def of_sequences(
        self, lengths: NDArray[np.int64], chunk_size: int, k: int, targets: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """Predict the seconds of all operations of each sequence, (sequences,), including second forwards.

        A short sequence is charged its share of a full chunk's fixed seconds.

        Args:
            lengths: (sequences,) tokens.
            chunk_size: most tokens in a chunk.
            k: chunks of a long sequence that keep their activations.
            targets: (sequences,) tokens that the loss counts; by default, all of them.
        """
        size = np.asarray(lengths, dtype=np.float64)
        pieces = np.where(size > chunk_size, np.ceil(size / chunk_size), size / chunk_size)
        early = np.where(size > chunk_size, np.maximum(pieces - k, 0), 0)  # chunks that are forwarded twice
        early_tokens = early * chunk_size

        def seconds(
            cost: OperationCost, chunks: NDArray[np.float64], tokens: NDArray[np.float64]
        ) -> NDArray[np.float64]:
            return chunks * cost.fixed_seconds + cost(tokens, self.pairs_up_to(tokens)) - cost.fixed_seconds

        forward = (
            seconds(self.forward, pieces, size) - seconds(self.forward, early, early_tokens)
            + seconds(self.state_pass, early, early_tokens) + seconds(self.recompute, early, early_tokens)
        )  # fmt: skip
        backward = seconds(self.backward, pieces, size)
        return forward + backward + self.seconds_per_target * (size if targets is None else targets)

    def of_chunks(
        self, chunks: Chunks, targets: NDArray[np.int64], stages: int = 1, cut: tuple[StageLayers, ...] | None = None
    ) -> OperationSeconds:
        """Predict the seconds of every operation on each chunk, by stage of a pipeline.

        Each stage takes its layers' share of the model's seconds. The last one also takes head and loss.

        Args:
            targets: (sequences,) tokens that the loss counts.
            cut: the layers of each stage; by default, equal shares.
        """
        shares = self.stage_shares(stages, cut)[:, None]
        tokens, pairs = chunk_tokens(chunks), self.chunk_pairs(chunks)
        head = np.zeros((stages, len(chunks)))
        head[-1] = self.seconds_per_target * chunk_targets(chunks, targets)
        moved_forward, moved_backward = self.state_seconds(chunks)
        backward = shares * np.maximum(self.backward(tokens, pairs), moved_backward)
        sent = self.transfer_latency_seconds + self.transfer_seconds_per_token * tokens
        return OperationSeconds(
            forward=shares * np.maximum(self.forward(tokens, pairs), moved_forward) + head,
            backward=backward,
            recompute=shares * np.maximum(self.recompute(tokens, pairs), moved_forward) + head,
            state_pass=shares * np.maximum(self.state_pass(tokens, pairs), moved_forward),
            first_pass=shares * np.maximum(self.forward(tokens, pairs), moved_forward) + FIRST_PASS_OF_HEAD * head,
            # The two products of a backward have the same size.
            input_gradient=backward / 2,
            weight_gradient=backward / 2,
            transfer=np.tile(sent, (stages - 1, 1)),
        )

    def stage_shares(self, stages: int, cut: tuple[StageLayers, ...] | None) -> NDArray[np.float64]:
        """Return the share of the layers' seconds that each stage takes, (stages,)."""
        if self.is_of_one_stage:
            return np.ones(stages)
        return np.full(stages, 1.0 / stages) if cut is None else layer_shares(cut)


def chunk_tokens(chunks: Chunks) -> NDArray[np.float64]:
    """Return the tokens of each chunk, (chunks,)."""
    return np.add.reduceat((chunks.stop - chunks.start).astype(np.float64), chunks.first_segment[:-1])


def chunk_targets(chunks: Chunks, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the targets of each chunk, (chunks,), as if those of a sequence were spread evenly over it.

    Args:
        targets: (sequences,) tokens that the loss counts.
    """
    share = np.asarray(targets, dtype=np.float64) / chunks.lengths
    tokens = (chunks.stop - chunks.start) * share[chunks.sequence]
    return np.add.reduceat(tokens, chunks.first_segment[:-1])
