"""The bytes that a rank holds: formulas against schedules, and by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.attention_memory import attention_workspace_bytes, efficient_backward_bytes
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.calibration import MeasuredMemory
from chunkflow_cli.planning.choices import Search, settings_of
from chunkflow_cli.planning.costs import CostModel, chunk_tokens
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.memory_parts import (
    HEAD_TILE_BYTES,
    TILES_ALIVE,
    MemoryParts,
    kept_bytes_per_token,
    live_tokens,
    memory_parts,
    state_bytes,
    step_seconds,
)
from chunkflow_cli.planning.memory_settings import Buffers, MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.peak_memory import activations_and_state, memory_of_fullest
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import SimulatedStep
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers
from chunkflow_cli.planning.state_memory import STATE_BLOCK_TOKENS, gradients_of_windows, state_bytes_per_token

SHAPE = ModelShape(
    layers=3, hidden_size=8, intermediate_size=20, attention=(AttentionLayers(3, 4, 2, 2, 2),), vocab_size=50,
    matmul_parameters=2000, parameters=2500, trainable_parameters=2500, largest_trained=400,
)  # fmt: skip


# Bytes of state


def test_the_256k_tokens_of_the_design() -> None:
    """A 7B model with 4 KV heads of 128 in 28 layers: 56 KiB per token in bfloat16, 14 GiB, and 28 GiB of gradients."""
    shape = dataclasses.replace(SHAPE, layers=28, attention=(AttentionLayers(28, 28, 4, 128, 128),))
    assert sum(part.kv_elements_per_token for part in shape.attention) * 2 == 56 * 1024
    assert state_bytes(shape, 2**18 + 1, 4096, 2) == 42 * 2**30


def test_an_edge_of_recurrent_layers_is_kept_behind_each_chunk_but_the_last() -> None:
    """It is as large behind 64 tokens as behind 4096, and keys and values are those of the attention layers alone."""
    shape = dataclasses.replace(
        SHAPE, layers=24, attention=(AttentionLayers(6, 8, 2, 256, 256),), recurrent=RecurrentLayers(edge_bytes=10**6)
    )
    keys_and_values = 6 * 2 * 2 * 256 * (2 + 4)
    assert state_bytes(shape, 4096, 64, 2) == (4096 - 64) * keys_and_values + 63 * 10**6
    assert state_bytes(shape, 4097, 4096, 2) == 4096 * keys_and_values + 10**6
    assert state_bytes(shape, 64, 64, 2) == 0


# Memory by part

BASE = MemorySettings(
    element_bytes=2, optimizer_states=2, zero_stage=1, data_parallel=4, offload="none", checkpointing="none",
    chunk_size=16, device_type="cpu", buffers=Buffers(reduce=10, gathered=1000, sub_group=300),
)  # fmt: skip
# A layer of SHAPE keeps two norms (4 x 8 + 2 x 2 x 8), attention 2 x (2 x 8 + 2 x 4) + 4 x 4 and 4 x 2 x 20.
LAYER = 2 * (32 + 32) + 64 + 160
ACTIVATIONS = 2 * 16 * 3 * LAYER
HEAD = TILES_ALIVE * 16 * 50 * 4 + 4 * 400
STATE = 32 * 2 * 3 * 2 * 2 * (2 + 4)


FLOAT32 = {"element_bytes": 4}
MOMENT = 400 * (2 + 4 + 4)  # a gradient of the largest weight, its float32 copy, and the copy that is scattered


def pinned(*sizes: int) -> int:
    """Return the sum of the sizes, each of them the next power of two."""
    return sum(next(2**power for power in range(30) if 2**power >= size) for size in sizes)


@pytest.mark.parametrize(
    ("settings", "weights", "gradients", "optimizer", "step", "host"),
    [
        # Without ZeRO no weights are kept twice; all gradients are flattened to be summed.
        ({"zero_stage": 0, **FLOAT32}, 10000, 10000, 20000, 10000, 0),
        # BF16_Optimizer: float32 sums of all gradients beside those of a chunk, both flattened to be summed.
        ({}, 5000, 10000 + 5000, 7500, 10000, 0),
        ({"optimizer_states": 0}, 5000, 15000, 2500, 10000, 0),
        ({"buffers": dataclasses.replace(BASE.buffers, whole=2000)}, 5000, 15000, 7500, 1600, 0),
        # In float32, a bucket of ten; at the step the rank's own gradients, and a bucket flattened.
        (FLOAT32, 10000, 10000 + 40, 7500, 2500 + 40, 0),
        ({"zero_stage": 2, "data_parallel": 1, **FLOAT32}, 10000, 10000 + 40, 30000, 10000, 0),
        # The largest weight has a buffer, the step a float32 partition and a float64 gradient.
        ({"offload": "optimizer"}, 5000 + 800, 10000 + 40 + 400 * (2 + 4), 0, 2500 + 3200 - 2400,
         pinned(2500, 2500, 1250, 800) + 5000),
        ({"zero_stage": 2, "offload": "optimizer", **FLOAT32}, 10000 + 1600, 10000 + 40, 0, 3200,
         pinned(2500, 2500, 2500, 1600) + 5000),
        # ZeRO-3 divides everything, and gathers 1400 weights; sub-groups of 300 are flattened at the step.
        ({"zero_stage": 3}, 1250 + 2800, 2500 + 40 + MOMENT, 7500, 1600 - 2800 - MOMENT, 0),
        ({"zero_stage": 3, "data_parallel": 1}, 5000, 10000 + 40 + 2400, 30000, 2800 - 2400, 0),
        ({"zero_stage": 3, "offload": "optimizer"}, 1250 + 2800, 40 + MOMENT + 400, 0, 0,
         7500 + pinned(1200, 1200, 100, 2500)),
        ({"zero_stage": 3, "offload": "parameters"}, 2800, 40 + MOMENT + 400, 0, 0,
         7500 + pinned(1200, 1200, 100, 2500, 1250)),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) or "zero 1" if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_deepspeed_keeps_by_hand(
    settings: dict[str, Any], weights: int, gradients: int, optimizer: int, step: int, host: int
) -> None:
    """2500 weights on four ranks, the largest of 400, without a loss, whose logits would be gone at the step."""
    middle = dataclasses.replace(SHAPE, parameters=3300, trainable_parameters=3300)
    found = memory_parts(middle, dataclasses.replace(BASE, **settings), StageLayers(1, 3, 0, 3))
    assert found == MemoryParts(weights, gradients, optimizer, 0, 0, 0, max(0, step), host)
    assert found.device_total == weights + gradients + optimizer + max(0, step)


@pytest.mark.parametrize(
    ("settings", "activations", "state"),
    [
        ({}, ACTIVATIONS, STATE),
        # In float32, state elements are as wide as their gradients.
        (FLOAT32, 2 * 16 * 3 * (2 * 96 + 112 + 320), STATE // 6 * 8),
        # All checkpointed layers keep their inputs, for 32 tokens; one runs again, for the 16 of a chunk.
        ({"checkpointing": "full"}, 32 * 3 * 16 + 16 * LAYER, STATE),
    ],
    ids=str,
)
def test_what_a_chunk_keeps_by_hand(settings: dict[str, Any], activations: int, state: int) -> None:
    found = memory_parts(SHAPE, dataclasses.replace(BASE, **settings), live=32, stored=32)
    assert (found.activations, found.head, found.state) == (activations, HEAD, state)


def test_the_fullest_moment_is_of_a_backward_or_of_the_step() -> None:
    """The step's buffers come when activations and state are gone, and a gradient is reduced when the logits are."""
    rest = memory_parts(SHAPE, dataclasses.replace(BASE, chunk_size=1))
    assert (rest.head, rest.step) == (600 + 1600, 10000 - 2200)
    assert rest.filled(7000, 700).step == 100
    assert rest.filled(7000, 900).device_total == rest.device_total + 100
    assert rest.filled(7000, 900).filled(7000, 900) == rest.filled(7000, 900)
    on_host = dataclasses.replace(BASE, chunk_size=1, zero_stage=3, offload="optimizer")
    assert memory_parts(SHAPE, on_host).gradients == 40 + MOMENT + 400 - 2200


def test_memory_with_adapters_by_hand() -> None:
    """Only trained weights have gradients and optimizer states; a frozen head has no gradient to sum."""
    adapters = dataclasses.replace(SHAPE, parameters=2600, trainable_parameters=100)
    found = memory_parts(adapters, dataclasses.replace(BASE, zero_stage=1))
    assert (found.weights, found.gradients, found.optimizer) == (5200, 400 + 200, 300)
    assert found.head == TILES_ALIVE * 16 * 50 * 4


def test_the_tile_of_the_head_is_the_one_that_the_loss_makes() -> None:
    """With a large vocabulary the tile is full."""
    assert HEAD_TILE_BYTES["cpu"] == 64 * 2**20
    large = dataclasses.replace(SHAPE, vocab_size=150_000)
    found = memory_parts(large, dataclasses.replace(BASE, chunk_size=8192))
    assert found.head == TILES_ALIVE * 64 * 2**20 + large.head_parameters * 4


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    chunk_size=st.integers(3, 20),
    k=st.integers(1, 4),
    fill_tails=st.booleans(),
)
def test_tokens_of_a_whole_run_are_those_of_its_schedules(
    lengths: list[int], chunk_size: int, k: int, fill_tails: bool
) -> None:
    """Compared with a replay of every operation. For a run that is not planned whole, the prediction is never lower."""
    sizes = np.array(lengths)
    run = RunPlan(GlobalBatches(len(sizes), 4, 0, True), -(-len(sizes) // 4), sizes, sizes, chunk_size, k, fill_tails)
    most = 0
    for step in run:
        (rank,) = step.ranks
        tokens, live = chunk_tokens(rank.chunks), 0
        for op in rank.schedule.ops:
            live += {"S": 0, "F": 1, "R": 1, "B": -1}[op.kind.value] * int(tokens[op.chunks[0]])
            most = max(most, live)
    live_most, stored, edges, _, _ = activations_and_state(run, is_planned_whole=True)
    assert live_most.max() == most
    assert stored.max() == (max(lengths) - 1) // chunk_size * chunk_size
    assert edges.max() == (max(lengths) - 1) // chunk_size
    assert activations_and_state(run, is_planned_whole=False).live.max() >= most


def test_live_tokens_by_hand() -> None:
    """Chunks of 10: with K = 2, a sequence of 23 keeps 3 + 10 and what fills its tail; one early chunk is 10."""
    lengths = np.array([23, 10, 4])
    assert live_tokens(lengths, 10, 2, 0, fill_tails=True).tolist() == [13, 10, 4]
    assert live_tokens(lengths, 10, 2, 5, fill_tails=True).tolist() == [18, 10, 9]
    assert live_tokens(lengths, 10, 2, 5, fill_tails=False).tolist() == [13, 10, 9]
    assert live_tokens(lengths, 10, 1, 0, fill_tails=True).tolist() == [10, 10, 4]
    assert live_tokens(lengths, 10, 8, 99, fill_tails=True).tolist() == [30, 10, 10]


HYBRID = dataclasses.replace(SHAPE, recurrent=RecurrentLayers(edge_bytes=700, activation_bytes_per_token=30))


def fullest(lengths: list[int], **options: Any) -> MemoryParts:
    """Return the memory of a run without a pipeline that plans these samples in one step, in chunks of 16."""
    sizes = np.array(lengths)
    costs = dataclasses.replace(CostModel.proportional(), shape=HYBRID)
    settings = {"chunk_size": 16, "k": 1, "costs": costs, **options}
    run = RunPlan(GlobalBatches(len(sizes), len(sizes), 0, False), 1, sizes, sizes, **settings)
    return memory_of_fullest(HYBRID, BASE, run, [])


EQUAL_TIME = {"costs": dataclasses.replace(CostModel.profile(SHAPE, DEVICES["h100"], checkpointed=False), shape=HYBRID)}


@pytest.mark.parametrize(
    ("lengths", "options", "live", "stored", "edges"),
    [
        ([40], {"k": 2}, 16 + 8, 32, 2),
        ([40, 9], {"k": 2}, 16 + 16, 32, 2),  # the tail of the long one has room for the short one
        ([40, 9], {"k": 2, "fill_tails": False}, 16 + 8, 32, 2),
        ([9], {"k": 50}, 9, 0, 0),
        ([9, 5, 2], {"k": 2}, 16, 0, 0),  # short ones share a chunk, so the longest is not the most
        ([40], {"k": 50}, 40, 32, 2),
        # The last piece is the smallest: nearly all tokens are stored.
        ([40], {"equal_time": True}, 16, 40, 2),
        # A pair costs 0.04 tokens here: 160 + 0.04 x 160^2 / 2 is 31.8 times 16 + 0.04 x 16^2 / 2, so 32 pieces.
        ([160], {"equal_time": True, **EQUAL_TIME}, 16, 160, 31),
        # Two ranks hold 16 tokens each of a chunk of 32, so 40 tokens are two chunks. Each rank has one head of state,
        # and all edges.
        ([40], {"k": 2, "ranks": 2, "sequence": 2}, 20, 16, 1),
        ([40], {"k": 2, "ranks": 4, "sequence": 4}, 10, 0, 0),
        ([40, 20], {"ranks": 2, "sequence": 2}, 16, 16, 1),  # a rank alone runs 20 tokens in two chunks
    ],
)  # fmt: skip
def test_memory_of_the_fullest_rank_by_hand(
    lengths: list[int], options: dict[str, Any], live: int, stored: int, edges: int
) -> None:
    """Each rank of a group runs the recurrent layers for the tokens of all ranks."""
    found, sharers = fullest(lengths, **options), options.get("sequence", 1)
    assert found == memory_parts(HYBRID, BASE, live=live, stored=stored, edges=edges, sharers=sharers)
    dense = memory_parts(SHAPE, BASE, live=live, stored=stored)
    assert found.state == dense.state + 700 * edges
    assert found.activations == dense.activations + (sharers - 1) * live * 30


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    k=st.integers(1, 4),
    options=st.fixed_dictionaries({"fill_tails": st.booleans(), "equal_time": st.booleans()}),
    groups=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 4)]),
    batch=st.integers(1, 6),
)  # fmt: skip
def test_no_planned_step_exceeds_the_predicted_memory(
    lengths: list[int], k: int, options: dict[str, Any], groups: tuple[int, int], batch: int
) -> None:
    """A run that is predicted to fit must fit in each of its steps, on each rank: replayed operation by operation."""
    sizes = np.array(lengths)
    costs = CostModel.profile(HYBRID, DEVICES["h100"], checkpointed=False)
    ranks, sequence = groups
    run = RunPlan(
        GlobalBatches(len(sizes), batch, 0, True), -(-len(sizes) // batch), sizes, sizes, chunk_size=16, k=k,
        costs=costs, ranks=ranks, sequence=sequence, **options,
    )  # fmt: skip
    limit = memory_of_fullest(HYBRID, BASE, run, [])
    for step in run:
        for rank in step.ranks:
            edges = {chunk: chunk - group.start for group in rank.chunks.dependent_groups() for chunk in group}
            live: dict[int, float] = {}
            for op in rank.schedule.ops:
                for chunk in op.real_chunks:
                    spread = chunk in rank.spread
                    if op.kind.value in "FR":
                        live[chunk] = rank.chunks[chunk].tokens / (sequence if spread else 1)
                    elif op.kind.value == "B":
                        del live[chunk]
                    stored = rank.chunks[chunk].segments[0].start / (min(sequence, SHAPE.kv_heads) if spread else 1)
                    held = memory_parts(HYBRID, BASE, live=sum(live.values()), stored=stored, edges=edges.get(chunk, 0))
                    assert held.device_total <= limit.device_total


def test_peak_of_a_pipeline_by_hand() -> None:
    """One sample of 10 tokens in chunks of 4 on two stages, K = 1.

    Each stage runs S0 S1 F2 B2 R1 B1 R0 B0. It is fullest at R1: activations of chunk 1, keys and values of chunks 0
    and 1 with their float32 gradients, and on the second stage the hidden states that came in for both.
    """
    shape = ModelShape(
        layers=2, hidden_size=8, intermediate_size=16, attention=(AttentionLayers(2, 2, 1, 4, 4),), vocab_size=32,
        matmul_parameters=1000, parameters=2000, trainable_parameters=2000, recurrent=RecurrentLayers(edge_bytes=60),
    )  # fmt: skip
    lengths = np.array([10])
    run = RunPlan(GlobalBatches(1, 1, 0, False), 1, lengths, lengths, chunk_size=4, k=1, pipeline=PipelineLayout(2))
    settings = MemorySettings(
        element_bytes=2, optimizer_states=2, zero_stage=1, data_parallel=1, offload="none", checkpointing="none",
        chunk_size=4, device_type="cuda",
    )  # fmt: skip
    parts = memory_of_fullest(shape, settings, run, [SimulatedStep(run, run[0])])
    a_token = kept_bytes_per_token(shape, 2, "none")
    # Attention's backward: sums, expanded keys and gradients of a block of 8 tokens, beside the own gradients.
    workspace = 4 * 2 * (4 + 128) * (32 + 1) + 2 * 2 * 8 * 2 * 4 + 2 * 4 * (4 * 2 + 2 * 8) + 4 * 4 * (4 * 2 + 2 * 2)
    assert parts.activations == 4 * a_token / 2 + workspace - TILES_ALIVE * 4 * 32 * 4
    assert parts.state == 8 * (2 * 1 * 4) * (2 + 4) + 8 * 8 * 2 + 2 * 60 / 2, "half of two edges"
    assert parts.weights == 1000 * 2, "half of the layers, and the embedding or the head"
    assert parts.optimizer == 1000 * 4 * 3
    moved = memory_of_fullest(
        shape, dataclasses.replace(settings, offload_state="host"), run, [SimulatedStep(run, run[0])]
    )
    assert moved.state == 8 * 8 * 2 + 8 * (1 * 1 * 8) * (2 + 4), "what came in, and at most three blocks of one layer"
    block = STATE_BLOCK_TOKENS["cuda"]
    assert moved.host_state == (8 + block) * 8 * (2 + 4) + 2 * 60 / 2, "one of two layers, with a block begun"


LLAMA_8B = (AttentionLayers(32, 32, 8, 128, 128),)
SUM, EXPANDED, GRADIENTS = 4 * 32 * 8320 * 128, 2 * 2 * 8192 * 32 * 128, 2 * 128 * 8192 * (32 + 2 * 8)


@pytest.mark.parametrize(
    ("settings", "past", "sharers", "expected"),
    [
        # The backward of 8192 queries: their float32 sums, a float32 number each, and 32 heads of keys for 8.
        ({}, 0, 1, SUM + 4 * 32 * 8320 + EXPANDED + GRADIENTS),
        # A block of 16384 keys, with the float32 sum of the queries' gradients, and the own keys' gradients.
        ({}, 10**6, 1, SUM + 4 * 32 * 8320 + 2 * EXPANDED + 2 * 128 * (8192 * 32 + 2 * 16384 * 8)
         + 8192 * 128 * (4 * 32 + 2 * 2 * 8)),
        # In one order, on 132 multiprocessors: each of 32 heads has ceil(132 / 32) sums.
        ({"multiprocessors": 132}, 0, 1, 5 * SUM + 4 * 32 * 8320 + EXPANDED + GRADIENTS),
        # Four ranks have 2048 tokens each, and 8 of 32 heads for 8192, with 128 rows more for each head.
        ({}, 0, 4, (SUM + 4 * 32 * 8320 + EXPANDED + GRADIENTS) // 4),
        # float32: keys and values for each of 32 heads, their gradients, and these summed for 8 heads.
        ({"element_bytes": 4}, 0, 1, 4 * 128 * 8192 * (32 + 4 * 32 + 2 * 8) + 4 * 32 * 8192),
        # ... of the past: three copies of queries, their gradients twice, and gradients of 16384 keys.
        ({"element_bytes": 4}, 10**6, 1, 4 * 128 * (8192 * 32 * 5 + 16384 * 2 * 8) + 4 * 32 * 8192
         + 8192 * 128 * (4 * 32 + 2 * 4 * 8)),
        ({"device_type": "cpu"}, 10**6, 1, 0),
    ],
    ids=str,
)  # fmt: skip
def test_what_attention_takes_for_a_moment_by_hand(
    settings: dict[str, Any], past: int, sharers: int, expected: int
) -> None:
    """Llama-3.1-8B's attention in chunks of 8192 tokens."""
    shape = dataclasses.replace(SHAPE, attention=LLAMA_8B)
    given = dataclasses.replace(BASE, **{"device_type": "cuda", **settings})
    assert attention_workspace_bytes(shape, given, 8192 / sharers, past, sharers) == expected


def test_heads_too_wide_for_flash_kernels_by_hand() -> None:
    """32 heads of 512 channels that share 16 of keys, in bfloat16: the sum of the queries' gradients is in float32."""
    found = efficient_backward_bytes(8192, 8192, 32, 16, 512, 2, is_causal=True)
    assert found == 512 * 8192 * (2 * (32 + 4 * 32 + 2 * 16) + 4 * 32) + 4 * 32 * 8192


def test_attention_takes_the_room_of_the_loss() -> None:
    """The tiles of logits are gone when attention goes backward; a stage without a head has none."""
    shape = dataclasses.replace(SHAPE, layers=32, attention=LLAMA_8B, vocab_size=128256)
    settings = dataclasses.replace(BASE, device_type="cuda", chunk_size=32768)
    arguments = {"live": 32768, "stored": 10**6}
    workspace = attention_workspace_bytes(shape, settings, 32768, 10**6)
    first, last = cut_layers(32, 2)
    without = [
        memory_parts(shape, dataclasses.replace(settings, device_type="cpu"), layers, **arguments)
        for layers in (first, last)
    ]
    more = [memory_parts(shape, settings, layers, **arguments).activations for layers in (first, last)]
    assert [m - w.activations for m, w in zip(more, without, strict=True)] == [workspace, workspace - 3 * 2**29]


def test_state_of_llama_8b_in_host_memory() -> None:
    """By arithmetic: 384 KiB a token, so 256K tokens are 96 GiB on the host, and three blocks of a layer 576 MiB."""
    shape = dataclasses.replace(SHAPE, layers=32, attention=LLAMA_8B)
    settings = dataclasses.replace(BASE, chunk_size=8192, device_type="cuda", offload_state="host")
    lengths = np.array([2**18 + 1, 100])
    run = RunPlan(GlobalBatches(2, 2, 0, False), 1, lengths, lengths, chunk_size=8192, k=1)
    parts = memory_of_fullest(shape, settings, run, ())
    assert parts.host_state == 96 * 2**30
    assert parts.state == 3 * 16384 * 384 * 1024 / 32 == 576 * 2**20
    on_device = memory_of_fullest(shape, dataclasses.replace(settings, offload_state="none"), run, ())
    assert (on_device.state, on_device.host_state) == (96 * 2**30, 0)
    assert parts.device_total == on_device.device_total - on_device.state + parts.state


def test_a_checkpointed_layer_runs_again_for_the_tokens_of_all_ranks() -> None:
    """By hand: the largest layer keeps 500 bytes a token, and is taken to be recurrent."""
    shape = dataclasses.replace(HYBRID, layer_activation_bytes=300, largest_layer_activation_bytes=500)
    settings = dataclasses.replace(BASE, checkpointing="full")
    assert memory_parts(shape, settings, live=32).activations == 32 * 3 * 16 + 16 * 500
    assert memory_parts(shape, settings, live=32, sharers=4).activations == 32 * 3 * 16 + 4 * 16 * 500


def test_scores_of_a_model_that_computes_attention_itself() -> None:
    """A layer of three keeps 2 bytes per pair of a token and one of 64 + 16 keys; the gradient of one's comes on top."""
    shape = dataclasses.replace(SHAPE, score_bytes=6.0, past_score_bytes=6.0)
    for checkpointing, rows in (("none", 3 * 32 + 16), ("full", 2 * 16)):
        settings = dataclasses.replace(BASE, checkpointing=checkpointing)
        more = [memory_parts(each, settings, live=32, stored=64).activations for each in (SHAPE, shape)]
        assert more[1] - more[0] == 80 * 2 * rows


def test_measured_memory_is_for_models_that_keep_no_scores() -> None:
    """It is a line through the peaks of a few chunk sizes. Scores grow with the square, so they follow the formulas."""
    run = RunPlan(GlobalBatches(1, 1, 0, False), 1, np.array([64]), np.array([64]), chunk_size=16, k=1)
    measured, scoring = MeasuredMemory(1, 2, 3.0, 0.0), dataclasses.replace(SHAPE, score_bytes=6.0)
    plain, own = (
        Search((run,), range(1), shape, BASE, measured, DEVICES["h100"]).memory_bytes(run, ())
        for shape in (SHAPE, scoring)
    )
    settings = settings_of(run, BASE)
    assert plain != memory_of_fullest(SHAPE, settings, run, ()).device_total
    assert own == memory_of_fullest(scoring, settings, run, ()).device_total


def test_past_keys_of_a_model_that_computes_attention_itself() -> None:
    """In each of two chunks, a layer of three keeps 4 bytes per token of the past; one's gradient comes on top."""
    shape = dataclasses.replace(SHAPE, past_key_bytes=12.0)
    for checkpointing, copies in (("none", 2 * 3 + 1), ("full", 2)):
        settings = dataclasses.replace(BASE, checkpointing=checkpointing)
        more = [memory_parts(each, settings, live=32, chunks=2, stored=64).activations for each in (SHAPE, shape)]
        assert more[1] - more[0] == 64 * 4 * copies


def test_merged_copies_of_experts_by_hand() -> None:
    """Each of the two chunks with activations has those of all layers; the gradient of one layer's comes on top.

    With checkpointing there are only those of the layer that runs again.
    """
    shape = dataclasses.replace(SHAPE, merged_bytes=3000)
    without = memory_parts(SHAPE, BASE, live=32)
    assert memory_parts(shape, BASE, live=32, chunks=2).activations == without.activations + 2 * 3000 + 1000
    assert memory_parts(shape, BASE).activations == 0
    full = dataclasses.replace(BASE, checkpointing="full")
    without = memory_parts(SHAPE, full, live=32)
    assert memory_parts(shape, full, live=32, chunks=2).activations == without.activations + 2 * 1000
    sizes = np.array([100, 5])
    run = RunPlan(GlobalBatches(2, 2, 0, False), 1, sizes, sizes, chunk_size=16, k=3)
    assert activations_and_state(run, is_planned_whole=True).chunks.max() == 3
    assert activations_and_state(run, is_planned_whole=False).chunks.tolist() == [1, 3]


# Stages of a pipeline

WIDE = ModelShape(
    layers=5, hidden_size=8, intermediate_size=20, attention=(AttentionLayers(5, 4, 2, 2, 2),), vocab_size=500,
    matmul_parameters=5000 + 4000, parameters=5000 + 2 * 4000, trainable_parameters=5000 + 2 * 4000,
)  # fmt: skip
FIRST, MIDDLE, LAST = StageLayers(0, 3, 0, 2), StageLayers(1, 3, 2, 4), StageLayers(2, 3, 4, 5)


def test_weights_of_stages_by_hand() -> None:
    """1000 weights per layer, and tables of 4000: the first stage holds the embedding, the last one the head."""
    assert [WIDE.parameters_of(part) for part in (FIRST, MIDDLE, LAST)] == [6000, 2000, 5000]
    tied = dataclasses.replace(WIDE, parameters=9000, trainable_parameters=9000, is_head_tied=True)
    assert [tied.parameters_of(part) for part in (FIRST, MIDDLE, LAST)] == [6000, 2000, 5000], "a copy on each"
    assert tied.parameters_of(cut_layers(5, 1)[0]) == 9000, "one table where one rank holds both"
    adapters = dataclasses.replace(WIDE, parameters=13050, trainable_parameters=50)
    assert [adapters.trainable_parameters_of(part) for part in (FIRST, MIDDLE, LAST)] == [20, 20, 10]
    first, middle, last = (memory_parts(WIDE, BASE, part, live=32, stored=32) for part in (FIRST, MIDDLE, LAST))
    assert (first.weights, middle.optimizer, last.gradients) == (6000 * 2, 2000 * 12 / 4, 5000 * (4 + 2))
    assert (first.head, middle.head, last.head) == (0, 0, TILES_ALIVE * 16 * 500 * 4 + 4 * 4000)
    assert [part.activations for part in (first, middle, last)] == [2 * 16 * layers * LAYER for layers in (2, 2, 1)]
    assert [part.state for part in (first, middle, last)] == [32 * 2 * layers * 2 * 2 * (2 + 4) for layers in (2, 2, 1)]
    seconds = [step_seconds(WIDE, BASE, DEVICES["h100"], part) for part in (FIRST, MIDDLE, LAST)]
    assert seconds[0] == pytest.approx(3 * seconds[1])
    assert seconds[2] == pytest.approx(2.5 * seconds[1])


def test_the_fullest_stage_is_found_where_layers_do_not_divide() -> None:
    """A head that costs as much as four layers leaves one layer to the last stage; equal shares would predict too little.

    By hand, for a sample of one chunk: the first of two stages holds four layers of 11000 weights and the embedding.
    """
    shape = dataclasses.replace(WIDE, parameters=63000, trainable_parameters=63000)
    lengths = np.array([10])
    costs = CostModel.profile(shape, dataclasses.replace(DEVICES["h100"], layer_launch_seconds=0), checkpointed=False)
    run = RunPlan(
        GlobalBatches(1, 1, 0, False), 1, lengths, lengths, chunk_size=16, k=1, pipeline=PipelineLayout(2), costs=costs
    )
    assert [part.layers for part in run.stage_layers(5)] == [4, 1]
    settings = dataclasses.replace(BASE, data_parallel=1)
    parts = memory_of_fullest(shape, settings, run, [SimulatedStep(run, run[0])])
    assert (parts.weights, parts.optimizer, parts.head) == (2 * 48000, 12 * 48000, 0)
    assert parts.activations == 10 * 4 * LAYER
    heavy = dataclasses.replace(settings, chunk_size=1000)  # a tile of logits makes the last stage the fullest
    assert memory_of_fullest(shape, heavy, run, [SimulatedStep(run, run[0])]).weights == 2 * 15000


def test_a_pipeline_whose_steps_leave_out_the_longest_sample_holds_what_its_first_step_holds() -> None:
    run = RunPlan(
        GlobalBatches(2, 1, 0, False), 1, np.array([10, 20]), np.array([10, 20]), chunk_size=16, k=1,
        pipeline=PipelineLayout(2),
    )  # fmt: skip
    settings = dataclasses.replace(BASE, data_parallel=1)
    parts = memory_of_fullest(WIDE, settings, run, ())
    assert parts == memory_of_fullest(WIDE, settings, run, [SimulatedStep(run, run[0])])
    assert parts.activations >= 10 * 2 * LAYER, "10 tokens in at least two of five layers"


@pytest.mark.parametrize("chunk_size", [4, 8, 32])
def test_blocks_hide_state_as_windows_do(chunk_size: int) -> None:
    """A chunk of llama4 sees at most the rest of its block: of longer chunks, no more than that is kept."""
    windowed, blocked = (
        dataclasses.replace(SHAPE, attention=(AttentionLayers(3, 4, 2, 2, 2, **sight),))
        for sight in ({"window": 9}, {"block": 9})
    )
    kept = state_bytes_per_token(blocked, 2, chunk_size)
    assert kept == state_bytes_per_token(windowed, 2, chunk_size)
    assert kept == 24 * (6 if chunk_size <= 8 else 2 * 8 / 32)
    assert gradients_of_windows(blocked, 2, chunk_size) == (0 if chunk_size <= 8 else 24 * 8 * 4)
