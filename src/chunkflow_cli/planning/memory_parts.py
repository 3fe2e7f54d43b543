"""Predict what takes memory on a rank: weights, gradients, optimizer states, activations and sequence state.

The formulas take the model's shape, the layers that the rank holds and the way ZeRO divides them; each states its
source. `peak_memory` combines them with what a plan keeps at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.attention_memory import attention_workspace_bytes
from chunkflow_cli.planning.devices import DeviceProfile
from chunkflow_cli.planning.engine_memory import HeldWeights, engine_bytes
from chunkflow_cli.planning.memory_settings import MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers
from chunkflow_cli.planning.state_memory import gradients_of_windows, state_bytes_per_token

HEAD_TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Most bytes of float32 logits that exist at once (`execution.loss`)."""
TILES_ALIVE = 3
"""Tensors as large as a tile of logits: the logits, their gradient, and a copy in the model's dtype."""
HOST_MEMORY_BYTES_PER_SECOND = 150e9
"""Memory bandwidth that an optimizer step reaches on a server's CPUs."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on a rank's device at its peak, and bytes that are kept in host memory instead."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    state: int
    step: int
    """What the optimizer step needs beyond all of these: its own buffers, when activations and state are gone."""
    host: int
    host_state: int = 0
    """Bytes of the state store in host memory; `state` is then what of it is on the device at once."""

    @property
    def device_total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, part.name) for part in fields(self) if not part.name.startswith("host"))

    @property
    def before_step(self) -> int:
        """Bytes on the device at the fullest moment of forwards and backwards."""
        return self.device_total - self.step

    def filled(self, activations: int, state: int) -> MemoryParts:
        """Return the parts with other activations and another state. The step's buffers come after them."""
        more = activations + state - self.activations - self.state
        return replace(self, activations=activations, state=state, step=max(0, self.step - more))


def kept_bytes_per_token(shape: ModelShape, element_bytes: int, checkpointing: str, layers: int | None = None) -> float:
    """Return the bytes that `layers` layers keep for backward, for each token that holds activations.

    They are counted on the model's own modules (`model.shape_probe`). For the few models whose forward cannot show
    them, a formula follows transformers' Llama tensor by tensor (h = hidden, f = feed-forward, b =
    element bytes). A norm keeps its input in float32 and its normalized value, and its output is the next product's
    input: 4h + 2bh. Attention keeps queries, keys, values, its output and a float32 log-sum-exp per head. The gated
    feed-forward keeps gate, activation, up and their product: 4bf. Full checkpointing keeps the layer's input;
    selective keeps the results of products and of attention.

    Compared with the tensors that autograd keeps (tests/planning/test_memory.py), the formula is 1 to 5 % too low for
    llama, qwen2 and mistral, because it leaves out the final norm and the rotary angles, and 14 % for mixtral.

    Args:
        layers: by default, all layers of the model.
    """
    b, h, f = element_bytes, shape.hidden_size, shape.intermediate_size
    layers = shape.layers if layers is None else layers
    if checkpointing == "full":
        return layers * b * h
    if checkpointing == "selective" and shape.layer_product_bytes is not None:
        return layers * (b * h + shape.layer_product_bytes)
    if checkpointing == "none" and shape.layer_activation_bytes is not None:
        return layers * shape.layer_activation_bytes
    of_attention = sum(
        b * (part.query_elements_per_token + part.kv_elements_per_token) + 4 * part.layers * part.heads
        for part in shape.attention
    )
    attention = of_attention / shape.layers
    if checkpointing == "selective":
        return layers * (b * (3 * h + 2 * f) + attention)
    return layers * (2 * (4 * h + 2 * b * h) + attention + 4 * b * f)


def rerun_bytes_per_token(shape: ModelShape, element_bytes: int, checkpointing: str) -> float:
    """Return the extra bytes per token of the chunk that goes backward: the largest layer, which runs again."""
    if checkpointing == "none":
        return 0.0
    return max(kept_bytes_per_token(shape, element_bytes, "none", layers=1), shape.largest_layer_activation_bytes or 0)


def activation_bytes(
    shape: ModelShape, settings: MemorySettings, layers: int, live: Any, sharers: Any, chunks: Any, past: Any = 0.0
) -> Any:
    """Return the bytes that `layers` layers keep for backward, and those of the layer that checkpointing runs again.

    A rank of a sequence-parallel group is taken to run convolutions and scans for the tokens of all ranks, so it keeps
    `sharers` times what they keep of its own (see `RecurrentLayers`). Of a checkpointed layer, all counts as theirs.

    Where a model computes attention itself, all its layers keep the keys of the past, and scores of each token and all
    keys of its chunk; under checkpointing, the layer that runs. The gradients of one layer take as much again.

    Args:
        live: tokens that hold activations on the rank; a number, or an array.
        sharers: ranks of the group, likewise.
        chunks: chunks that hold activations, likewise.
        past: tokens of the sequence before them, likewise.
    """
    kept = kept_bytes_per_token(shape, settings.element_bytes, settings.checkpointing, layers)
    again = rerun_bytes_per_token(shape, settings.element_bytes, settings.checkpointing)
    running = np.minimum(live, settings.chunk_size)
    scans = shape.recurrent.activation_bytes_per_token
    if settings.checkpointing == "none":
        of_others = live * (scans / shape.layers * layers)
    else:
        of_others = running * (again if scans else 0.0)
    copies = chunks * merged_bytes_per_chunk(shape, settings, layers) + merged_bytes_of_running(shape, settings)
    of_token = (past * shape.past_score_bytes + running * shape.score_bytes) / shape.layers
    of_past = past * shape.past_key_bytes / shape.layers
    if settings.checkpointing == "none":
        own = of_token * (live * layers + running) + of_past * (chunks * layers + 1)
    else:
        own = 2 * (of_token * running + of_past)
    return live * kept + running * again + (sharers - 1) * of_others + copies * (live > 0) + own


def merged_bytes_per_chunk(shape: ModelShape, settings: MemorySettings, layers: int) -> float:
    """Return the bytes of merged copies that each chunk with activations keeps on `layers` layers."""
    return shape.merged_bytes / shape.layers * layers if settings.checkpointing == "none" else 0.0


def merged_bytes_of_running(shape: ModelShape, settings: MemorySettings) -> float:
    """Return the bytes of the gradient of a layer's merged copies, and of the copies if the layer runs again.

    What an adapter needs for a moment is added.
    """
    of_layer = shape.merged_bytes / shape.layers * (1 if settings.checkpointing == "none" else 2)
    return of_layer + shape.workspace_bytes


def state_bytes(shape: ModelShape, length: int, chunk_size: int, element_bytes: int) -> int:
    """Return the bytes of the state before a sequence's last chunk.

    These are keys and values with their gradients, and an edge of recurrent layers behind each chunk. The gradient of
    an edge takes its place.
    """
    chunks = (length - 1) // chunk_size
    of_tokens = round(chunk_size * state_bytes_per_token(shape, element_bytes, chunk_size))
    of_windows = gradients_of_windows(shape, element_bytes, chunk_size) if chunks else 0
    return chunks * (of_tokens + shape.recurrent.bytes_between(chunk_size)) + of_windows


def live_tokens(
    lengths: NDArray[np.int64], chunk_size: int, k: int, others: int | NDArray[np.int64], *, fill_tails: bool
) -> NDArray[np.int64]:
    """Return the most tokens that hold activations at once on one stage while each sequence goes backward.

    For a long sequence these are its last K chunks, or one early chunk in its recompute. The sequence itself seldom
    fills its last chunk; only short sequences can bring the total to K x chunk_size, so few samples stay far below.

    Args:
        lengths: (sequences,) tokens.
        chunk_size: most tokens in a chunk.
        k: chunks of a long sequence that keep their activations.
        others: most tokens of short sequences that may share a chunk with this one; a number, or (sequences,).
        fill_tails: True if the last chunk of a long sequence takes short sequences, as other chunks do.
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
    live: float = 0,
    stored: float = 0,
    edges: float = 0,
    sharers: float = 1,
    chunks: float = 1,
) -> MemoryParts:
    """Predict the bytes of one rank by part.

    `engine_memory` says what DeepSpeed keeps, `attention_memory` what attention takes for a moment. What allocators
    waste and the workspace of other kernels come on top (measured on a CPU in benchmarks/LOG.md, not on GPUs).

    Args:
        shape: the shape of the whole model.
        held: the layers of the rank's pipeline stage; by default, the whole model.
        live: tokens that hold activations on this rank at its peak.
        stored: tokens in its state store at that time; in a sequence-parallel group, this rank's share of them.
        edges: chunk edges in its state store at that time. In a sequence-parallel group, each rank is taken to
            store them whole.
        sharers: ranks of the sequence-parallel group that shares the chunks; 1 without one.
        chunks: chunks that hold activations at that time.
    """
    held = held or cut_layers(shape.layers, 1)[0]
    kept = engine_bytes(_held_weights(shape, held), settings)
    activations = activation_bytes(shape, settings, held.layers, live, sharers, chunks, stored)
    activations += workspace_beyond_loss(shape, settings, held, tokens=live, past=stored, sharers=sharers)
    a_token = state_bytes_per_token(shape, settings.element_bytes, settings.chunk_size)
    if settings.offload_state == "host":  # counted by `peak_memory`
        stored = edges = 0
    of_windows = gradients_of_windows(shape, settings.element_bytes, settings.chunk_size) if stored else 0
    of_edges = edges * shape.recurrent.bytes_between(settings.chunk_size)
    head = head_bytes(shape, settings) if held.is_last else 0
    parts = MemoryParts(
        weights=kept.weights,
        gradients=kept.gradients + max(0, kept.reduced - head),  # what the loss took for a moment is free again
        optimizer=kept.optimizer,
        activations=int(activations),
        head=head,
        state=int((stored * a_token + of_windows + of_edges) * held.layers / shape.layers),
        step=0,
        host=kept.host,
    )
    return replace(parts, step=max(0, kept.at_step - parts.device_total))


def _held_weights(shape: ModelShape, held: StageLayers) -> HeldWeights:
    return HeldWeights(
        shape.parameters_of(held),
        shape.trainable_parameters_of(held),
        shape.head_parameters,
        shape.largest_trained,
        shape.spared_bytes * held.layers // shape.layers,
        shape.gathered_together,
    )


def head_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    """Return the bytes of the loss: tiles of logits, and the float32 gradient of the head.

    The gradient is summed until its chunks have gone backward. `execution.loss` makes it piece by piece.
    """
    return tile_bytes(shape, settings) + (shape.head_parameters * 4 if shape.is_head_trained else 0)


def tile_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    """Return the bytes of the tiles of logits that exist at once."""
    return TILES_ALIVE * min(HEAD_TILE_BYTES[settings.device_type], settings.chunk_size * shape.vocab_size * 4)


def workspace_beyond_loss(
    shape: ModelShape, settings: MemorySettings, held: StageLayers, *, tokens: float, past: float, sharers: float
) -> int:
    """Return the bytes of attention's backward for which the tiles of the loss, gone by then, leave no room.

    What the feed-forward of the same layer has given back by then is not subtracted.

    Args:
        tokens: tokens that hold activations on this rank.
        past: tokens in its state store.
        sharers: ranks that share a chunk.
    """
    workspace = attention_workspace_bytes(shape, settings, min(tokens, settings.chunk_size), past, sharers)
    return max(0, workspace - (tile_bytes(shape, settings) if held.is_last else 0))


def step_seconds(
    shape: ModelShape, settings: MemorySettings, device: DeviceProfile, held: StageLayers | None = None
) -> float:
    """Predict the seconds of the optimizer step on one rank: summing gradients over ranks, and updating weights.

    A ring moves 2 (n - 1) / n of the float32 gradients over each rank's link (Patarasuk & Yuan 2009). The update reads
    and writes weights, gradients and states once. With offload, the rank's share of them crosses the host link twice.

    Args:
        shape: the shape of the whole model.
        held: the layers of the rank's pipeline stage; by default, the whole model.
    """
    trainable = shape.trainable_parameters_of(held or cut_layers(shape.layers, 1)[0])
    ranks = settings.data_parallel
    reduce = 2 * (ranks - 1) / ranks * 4 * trainable / device.link_bytes_per_second
    share = trainable / (ranks if settings.zero_stage >= 1 else 1)
    touched = share * (4 * (2 + 2 * settings.optimizer_states) + 2 * settings.element_bytes)
    if settings.offload == "none":
        return reduce + touched / device.memory_bytes_per_second
    crossed = share * (4 + settings.element_bytes) / device.host_bytes_per_second
    return reduce + crossed + touched / HOST_MEMORY_BYTES_PER_SECOND


def offload_seconds(shape: ModelShape, settings: MemorySettings, device: DeviceProfile) -> tuple[float, float]:
    """Predict the seconds in which ZeRO-3 copies over the host link in each forward of a chunk, and in each backward.

    With offload, a backward fetches the rank's float32 sums of gradients, adds to them and sends them back
    (`partition_grads` in DeepSpeed's stage3.py). With parameters on the host, every pass fetches the weights, and under
    checkpointing a backward is two passes. All of it runs on the computing stream, so it adds to what is computed.
    """
    if settings.zero_stage < 3 or settings.offload == "none":
        return 0.0, 0.0
    sums = 2 * 4 * shape.trainable_parameters
    weights = settings.element_bytes * shape.parameters if settings.offload == "parameters" else 0
    passes = 1 if settings.checkpointing == "none" else 2
    rate = settings.data_parallel * device.host_bytes_per_second
    return weights / rate, (passes * weights + sums) / rate
