"""What a rank holds: bytes of weights, gradients, optimizer states, activations and sequence state, by formula.

All of it follows from the shape of the model, from which layers the rank holds and from how ZeRO divides them; each
formula states its source. `peak_memory` puts them together with what a plan keeps at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.costs import DeviceProfile, ModelShape
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Of weights and activations, by `model.dtype`."""
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
    """Most tokens of a chunk on one rank."""
    device_type: str
    """cpu | cuda"""


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


def kept_bytes_per_token(shape: ModelShape, element_bytes: int, checkpointing: str, layers: int | None = None) -> float:
    """Bytes that `layers` layers (all, if not given) keep for backward, for each token that holds activations.

    Counted on the model's own modules (`shape.layer_activation_bytes`), or where that was not possible, for a model
    with experts, by formula: read off transformers' Llama, tensor by tensor (h = hidden, f = feed-forward, b = element
    bytes). A norm keeps its input in float32 and its normalised value, and its output is the next product's input:
    4h + 2bh. Attention keeps queries, keys, values, its output and a float32 log-sum-exp a head. The gated feed-forward
    keeps gate, activation, up and their product: 4bf. Full checkpointing keeps the layer's input; selective keeps the
    results of products and of attention.

    The formula against the tensors that autograd keeps (tests/test_memory.py): 1 to 5 % too few for llama, qwen2 and
    mistral, as the final norm and the rotary angles are left out; mixtral 14 %.
    """
    b, h, f = element_bytes, shape.hidden_size, shape.intermediate_size
    queries, keys = shape.attention_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = shape.layers if layers is None else layers
    if checkpointing == "full":
        return layers * b * h
    if checkpointing == "selective":
        return layers * (b * (3 * h + 2 * queries + 2 * keys + 2 * f) + 4 * shape.attention_heads)
    if shape.layer_activation_bytes is not None:
        return layers * shape.layer_activation_bytes
    attention = b * (2 * queries + 2 * keys) + 4 * shape.attention_heads
    return layers * (2 * (4 * h + 2 * b * h) + attention + 4 * b * f)


def rerun_bytes_per_token(shape: ModelShape, element_bytes: int, checkpointing: str) -> float:
    """Bytes more for each token of the one chunk that goes backward: of the layer that is being run again."""
    return 0.0 if checkpointing == "none" else kept_bytes_per_token(shape, element_bytes, "none", layers=1)


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


def memory_parts(
    shape: ModelShape,
    settings: MemorySettings,
    held: StageLayers | None = None,
    *,
    live: float = 0.0,
    stored: float = 0.0,
) -> MemoryParts:
    """Bytes of one rank by part.

    ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054, section 5. Weights in the model's dtype; float32 master weights and
    optimizer states of the trainable ones; their gradients in the model's dtype while a chunk goes backward, and their
    sum over the step in float32. Nothing else is counted: what allocators waste, and what kernels use beside their
    results, comes on top (of the CPU's measured form see benchmarks/LOG.md; GPUs have not been measured).

    Args:
        shape: of the whole model.
        settings: of the run.
        held: the layers of the rank's pipeline stage; the whole model if not given.
        live: tokens that hold activations on this rank at its peak.
        stored: tokens in its state store meanwhile; of a sequence-parallel group, this rank's share of them.
    """
    held = cut_layers(shape.layers, 1)[0] if held is None else held
    layers = held.layers
    shared = settings.data_parallel
    trainable = shape.trainable_parameters_of(held)
    parameters = shape.parameters_of(held)
    weights = parameters * settings.element_bytes // (shared if settings.zero_stage == 3 else 1)
    optimizer = trainable * 4 * (1 + settings.optimizer_states) // (shared if settings.zero_stage >= 1 else 1)
    summed = trainable * 4 // (shared if settings.zero_stage >= 2 else 1)
    of_a_chunk = trainable * settings.element_bytes if settings.element_bytes != 4 else 0
    host = 0
    if settings.offload in ("optimizer", "parameters"):  # DeepSpeed then sums the gradients on the host, too
        host, optimizer, summed = optimizer + summed, 0, 0
    if settings.offload == "parameters":
        host, weights = host + weights, weights // max(1, layers)
    kept = live * kept_bytes_per_token(shape, settings.element_bytes, settings.checkpointing, layers)
    again = min(live, settings.chunk_size) * rerun_bytes_per_token(
        shape, settings.element_bytes, settings.checkpointing
    )
    state = stored * state_bytes_per_token(shape, settings.element_bytes) * layers / shape.layers
    tile = min(HEAD_TILE_BYTES[settings.device_type], settings.chunk_size * shape.vocab_size * 4)
    # The head's gradient, summed until its chunks have gone backward.
    head = TILES_ALIVE * tile + (shape.head_parameters * 4 if shape.is_head_trained else 0)
    return MemoryParts(
        weights=weights,
        gradients=summed + of_a_chunk,
        optimizer=optimizer,
        activations=int(kept + again),
        head=head if held.is_last else 0,
        state=int(state),
        host=host,
    )


def step_seconds(
    shape: ModelShape, settings: MemorySettings, device: DeviceProfile, held: StageLayers | None = None
) -> float:
    """Of the optimizer step on one rank: gradients are summed over the data-parallel ranks, weights are updated.

    A ring moves 2 (n - 1) / n of the float32 gradients over each rank's link (Patarasuk & Yuan 2009); the update reads
    and writes weights, gradients and states once. With offload the rank's share of them crosses the host link twice.

    Args:
        shape: of the whole model.
        settings: of the run.
        device: whose links and memory.
        held: the layers of its pipeline stage, as for `memory_parts`.
    """
    trainable = shape.trainable_parameters_of(cut_layers(shape.layers, 1)[0] if held is None else held)
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
