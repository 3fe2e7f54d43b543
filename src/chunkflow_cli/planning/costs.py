"""Predict floating-point operations, and the seconds of a schedule's operations, from the shape of the model.

Seconds come from a device's profile (data sheet and assumed efficiency), from timed chunks (`calibration`), or are
proportional to tokens, as in the paper's worked example.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.devices import DeviceProfile
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.simulate import OperationSeconds
from chunkflow_cli.planning.stage_cut import StageLayers, layer_shares

FIRST_PASS_OF_HEAD = 1 / 3
"""Share of head and loss that a first pass runs: the product that gives log-probabilities, without its gradients."""


EXCHANGE_EFFICIENCY = 0.6
"""Share of a link's rate that an all-to-all reaches; assumed, not measured."""
LAUNCHES_OF_LAYER = 15
"""Kernel launches in `DeviceProfile.layer_launch_seconds`."""
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
    """Share of the seconds per token that a sequence-parallel group does not divide, where it is known: convolutions
    and scans of recurrent layers, and modules that run for all tokens."""
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

        Forward: 2 per weight and token, those of attention per query-key pair, and those of scans per token. Modules
        that go through tokens in Python also take the time of their launches. Backward: twice that, and the forward
        once more with checkpointing. Head and loss: 6 per weight of the head and target (4 if the head is frozen),
        because their gradient is computed with their value. A state pass leaves them out.
        """
        rate = device.matmul_flops * device.matmul_efficiency
        attention_rate = device.matmul_flops * device.attention_efficiency
        token = 2.0 * (shape.matmul_parameters - shape.head_parameters) / rate
        scans = shape.recurrent.flops_per_token / (device.matmul_flops * device.scan_efficiency)
        scans += shape.recurrent.launches_per_token * device.layer_launch_seconds / LAUNCHES_OF_LAYER
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
            scan_share=(scans + 2.0 * shape.recurrent.weights / rate) / (token + scans),
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
        """Return the query-key pairs of each chunk, (chunks,).

        A model that computes attention itself scores every token with every key of its chunk, or segment, seen or not.
        """
        if self.shape is not None and self.shape.is_by_segment:
            past, tokens = chunks.start.astype(np.float64), (chunks.stop - chunks.start).astype(np.float64)
            return np.add.reduceat(self.shape.scored_pairs(past, tokens), chunks.first_segment[:-1])
        if self.shape is not None and self.shape.score_bytes:
            tokens = chunk_tokens(chunks)
            return tokens * (chunks.start[chunks.first_segment[:-1]] + tokens)
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
