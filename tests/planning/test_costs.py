"""Costs by hand, and against the operations of schedules."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.costs import CostModel, OperationCost, chunk_targets, chunk_tokens
from chunkflow_cli.planning.devices import DEVICES, DeviceProfile
from chunkflow_cli.planning.memory_parts import MemorySettings, offload_seconds
from chunkflow_cli.planning.model_shape import ModelShape, training_flops
from chunkflow_cli.planning.prediction import rank_seconds
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers
from chunkflow_cli.planning.run_plan import RankPlan
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.simulate import simulate

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=12)
SIZES = st.integers(1, 40)


# Floating-point operations


SHAPE = ModelShape(
    layers=3, hidden_size=8, intermediate_size=20, attention=(AttentionLayers(3, 4, 2, 2, 2),), vocab_size=50,
    matmul_parameters=2000, parameters=2500, trainable_parameters=2500,
)  # fmt: skip
DEVICE = DeviceProfile(
    "made up",
    1e6,
    10**9,
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    layer_launch_seconds=0.1,
    scan_efficiency=0.1,
)


def test_operations_of_several_sequences_add_up() -> None:
    """Sequences do not attend to each other: each length is squared, not their sum."""
    assert training_flops([5, 7], SHAPE) == 6 * 2000 * 12 + 6 * 3 * 4 * 2 * (25 + 49)
    assert training_flops([], SHAPE) == 0


def test_operations_of_a_hybrid_model_by_hand() -> None:
    """Pairs cost in its one attention layer, where keys have 6 channels and values 2; scans cost per token."""
    hybrid = replace(SHAPE, attention=(AttentionLayers(1, 4, 4, 6, 2),), recurrent=RecurrentLayers(flops_per_token=90))
    assert training_flops([5, 7], hybrid) == (6 * 2000 + 3 * 90) * 12 + 6 * 4 * (6 + 2) * (12.5 + 24.5)
    costs = CostModel.profile(hybrid, DEVICE, checkpointed=False)
    assert costs.forward.seconds_per_token == pytest.approx(2 * (2000 - 400) / 0.5e6 + 90 / 0.1e6)
    assert costs.forward.seconds_per_pair == pytest.approx(2 * 4 * (6 + 2) / 0.25e6)
    without_attention = replace(hybrid, attention=())
    assert training_flops([5, 7], without_attention) == (6 * 2000 + 3 * 90) * 12
    chunks = build_chunks([5, 7], 4)
    assert not CostModel.profile(without_attention, DEVICE, checkpointed=False).chunk_pairs(chunks).any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_seconds_of_a_profile_by_hand(checkpointed: bool) -> None:
    """Products run at half of 1e6, attention at a quarter. The head costs per target. Checkpointing adds a forward."""
    costs = CostModel.profile(SHAPE, DEVICE, checkpointed=checkpointed)
    forward = OperationCost(0.3, 2 * (2000 - 400) / 0.5e6, 4 * 3 * 4 * 2 / 0.25e6)
    assert dataclasses.astuple(costs.forward) == pytest.approx(dataclasses.astuple(forward))
    assert costs.recompute == costs.state_pass == costs.forward
    times = 3 if checkpointed else 2
    assert dataclasses.astuple(costs.backward) == pytest.approx(tuple(times * x for x in dataclasses.astuple(forward)))
    assert costs.seconds_per_target == pytest.approx(6 * 400 / 0.5e6)
    frozen = CostModel.profile(dataclasses.replace(SHAPE, trainable_parameters=10), DEVICE, checkpointed=checkpointed)
    assert frozen.seconds_per_target == pytest.approx(4 * 400 / 0.5e6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_seconds_of_state_in_host_memory_by_hand(checkpointed: bool) -> None:
    """An operation takes as long as its computation, or as its copies if these take longer.

    A token has 24 numbers of keys and values in three layers. A forward fetches 2 bytes of each that the chunk sees,
    and sends its own. A backward fetches 2 + 4, and 4 of its own; under checkpointing it fetches 2 more. It sends less.
    """
    plain = CostModel.profile(SHAPE, DEVICE, checkpointed=checkpointed)
    costs = plain.with_state_on_host(dataclasses.replace(DEVICE, host_bytes_per_second=240.0))
    chunks = build_chunks([10], 4)  # of 4, 4 and 2 tokens; the last one's are never kept
    forward, backward = costs.state_seconds(chunks)
    fetched = 8 if checkpointed else 6
    assert forward == pytest.approx(np.array([2 * 4, 2 * 4, 2 * 8]) / 10)
    assert backward == pytest.approx(np.array([4 * 4, fetched * 4 + 4 * 4, fetched * 8]) / 10)
    assert costs.spread_over(2).state_seconds(chunks)[0] == pytest.approx(forward / 2)
    targets = np.array([0])
    rank = RankPlan(np.arange(1), chunks, targets, (plan(chunks, 1),))
    computed, both = plain.of_chunks(chunks, targets), costs.of_chunks(chunks, targets)
    assert both.backward[0] == pytest.approx(np.maximum(computed.backward[0], backward))
    assert both.backward[0].max() > computed.backward[0].max()
    assert rank_seconds(rank, costs) == pytest.approx(seconds_by_operation(chunks, targets, 1, costs))
    assert not plain.state_seconds(chunks)[0].any()


def test_a_window_hides_state_that_need_not_move() -> None:
    """A window of 3 shows two earlier tokens, and only the last two of a chunk are kept."""
    shape = replace(SHAPE, attention=(AttentionLayers(3, 4, 2, 2, 2, window=3),))
    costs = CostModel.profile(shape, DEVICE, checkpointed=False).with_state_on_host(DEVICE)
    forward, _ = costs.state_seconds(build_chunks([10], 4))
    assert forward * DEVICE.host_bytes_per_second == pytest.approx(24 * 2 * np.array([2.0, 2.0, 2.0]))


def test_seconds_of_weights_and_gradients_in_host_memory_by_hand() -> None:
    """ZeRO-3 on two ranks: 8 bytes of each gradient cross the link in a backward, and 2 of each weight in each pass."""
    device = replace(DEVICE, host_bytes_per_second=10.0)
    settings = MemorySettings(2, 2, 3, 2, "none", "full", 4, "cuda")
    weights, gradients = 2 * SHAPE.parameters / 20, 8 * SHAPE.trainable_parameters / 20
    assert offload_seconds(SHAPE, settings, device) == (0, 0)
    assert offload_seconds(SHAPE, replace(settings, offload="optimizer"), device) == (0, gradients)
    on_host = replace(settings, offload="parameters")
    assert offload_seconds(SHAPE, on_host, device) == (weights, 2 * weights + gradients)
    assert offload_seconds(SHAPE, replace(on_host, zero_stage=1), device) == (0, 0)
    plain, tokens, pairs = CostModel.profile(SHAPE, DEVICE, checkpointed=True), np.ones(1), np.ones(1)
    longer = plain.with_seconds_of_passes(3.0, 5.0)
    for name, more in (("forward", 3), ("backward", 5), ("recompute", 3), ("state_pass", 3)):
        assert getattr(longer, name)(tokens, pairs) - getattr(plain, name)(tokens, pairs) == pytest.approx(more)


def test_a_profile_is_the_count_of_operations_divided_by_the_rate() -> None:
    """Without launches and with one efficiency, a step of standalone chunks takes `training_flops` / rate."""
    device = dataclasses.replace(DEVICE, attention_efficiency=0.5, layer_launch_seconds=0)
    costs = CostModel.profile(SHAPE, device, checkpointed=False)
    lengths = np.array([5, 7, 11])
    assert costs.of_sequences(lengths, 16, 1).sum() == pytest.approx(training_flops(lengths, SHAPE) / 0.5e6)


# Seconds of sequences, chunks and ranks

COST = st.builds(OperationCost, st.floats(0, 5), st.floats(0, 2), st.floats(0, 0.1))
COSTS = st.builds(CostModel, st.just("drawn"), COST, COST, COST, COST, st.floats(0, 3))


def seconds_by_operation(chunks: Chunks, targets: np.ndarray, k: int, costs: CostModel) -> float:
    """Walk through the schedule and look up every operation's seconds."""
    seconds = costs.of_chunks(chunks, targets)
    by_kind = {"F": seconds.forward, "B": seconds.backward, "R": seconds.recompute, "S": seconds.state_pass}
    return sum(float(by_kind[op.kind.value][0, chunk]) for op in plan(chunks, k).ops for chunk in op.chunks)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=6), st.integers(1, 20),
    st.integers(1, 6), COSTS,
)  # fmt: skip
def test_cost_of_a_sequence_is_that_of_its_operations(
    samples: list[tuple[int, float]], size: int, k: int, costs: CostModel
) -> None:
    """This cost balances ranks: leaving out a second forward, or charging a head twice, would unbalance them.

    Sequences are long, or short ones that fill a chunk, so that no chunk is shared.
    """
    lengths = np.array([max(length, size) for length, _ in samples])
    targets = np.array([int(share * length) for length, (_, share) in zip(lengths, samples, strict=True)])
    predicted = costs.of_sequences(lengths, size, k, targets)
    assert predicted.shape == lengths.shape
    for length, target, seconds in zip(lengths, targets, predicted, strict=True):
        chunks = build_chunks([length], size, fill_tails=False)
        assert seconds == pytest.approx(seconds_by_operation(chunks, np.array([target]), k, costs))
    assert costs.of_sequences(lengths, size, k) == pytest.approx(costs.of_sequences(lengths, size, k, lengths))


def test_a_short_sequence_pays_its_share_of_the_fixed_seconds() -> None:
    """Four sequences that fill a chunk pay for one chunk together, not for four."""
    costs = CostModel("drawn", *(OperationCost(fixed, 0.0, 0.0) for fixed in (1.0, 10.0, 100.0, 1000.0)))
    assert costs.of_sequences(np.array([2, 2, 2, 2]), 8, 1) == pytest.approx([2.75] * 4)
    # Three chunks, one of them retained: three forwards with activations, three backwards, two state passes.
    assert costs.of_sequences(np.array([20]), 8, 1) == pytest.approx([1 + 2 * 100 + 3 * 10 + 2 * 1000])


@given(LENGTHS, SIZES, st.integers(1, 4), st.booleans(), st.booleans(), COSTS)
def test_seconds_of_a_rank_are_those_of_its_operations(
    lengths: list[int], size: int, k: int, fill_tails: bool, joined: bool, costs: CostModel
) -> None:
    """`plan` adds up ranks by formula and draws them by simulation; both must give the same time."""
    chunks = build_chunks(lengths, size, fill_tails=fill_tails)
    targets = np.array([length // 2 for length in lengths])
    schedule = plan(chunks, k, join_retained=joined)
    rank = RankPlan(np.arange(len(lengths)), chunks, targets, (schedule,))
    expected = seconds_by_operation(chunks, targets, k, costs)
    assert rank_seconds(rank, costs) == pytest.approx(expected)
    assert simulate([schedule], costs.of_chunks(chunks, targets)).makespan == pytest.approx(expected)


def test_a_rank_without_samples_takes_no_time() -> None:
    """With fewer samples than ranks, some ranks have none."""
    empty = build_chunks([], 8)
    rank = RankPlan(np.arange(0), empty, np.arange(0), (plan(empty, 1),))
    assert rank_seconds(rank, CostModel.proportional()) == 0


@given(LENGTHS, SIZES, st.booleans())
def test_tokens_and_pairs_of_chunks_by_counting(lengths: list[int], size: int, fill_tails: bool) -> None:
    """A query sees every earlier token of its sequence, and half of its own, because it is on the diagonal."""
    chunks = build_chunks(lengths, size, fill_tails=fill_tails)
    pairs = [sum(query + 0.5 for part in chunk.segments for query in range(part.start, part.stop)) for chunk in chunks]
    found = CostModel.proportional().chunk_pairs(chunks)
    assert found == pytest.approx(pairs)
    assert chunk_tokens(chunks).tolist() == [chunk.tokens for chunk in chunks]
    assert found.sum() == pytest.approx(sum(length**2 / 2 for length in lengths))


@given(LENGTHS, SIZES, st.integers(1, 40), st.integers(1, 40))
def test_a_query_sees_no_more_than_its_window_or_its_block(
    lengths: list[int], size: int, window: int, block: int
) -> None:
    """By counting: two layers of four have neither; layers weigh as many heads as they have."""
    full, windowed = AttentionLayers(2, 4, 2, 2, 2), AttentionLayers(1, 4, 2, 2, 2, window=window)
    shape = replace(SHAPE, layers=4, attention=(full, windowed, AttentionLayers(1, 12, 2, 2, 2, block=block)))
    chunks = build_chunks(lengths, size)

    def seen(query: int) -> float:
        return (2 * (query + 0.5) + min(query + 0.5, window) + 3 * (query % block + 0.5)) / 6

    expected = [
        sum(seen(query) for part in chunk.segments for query in range(part.start, part.stop)) for chunk in chunks
    ]
    found = replace(CostModel.proportional(), shape=shape).chunk_pairs(chunks)
    assert found == pytest.approx(expected, abs=0.2 * sum(len(chunk.segments) for chunk in chunks))


@given(LENGTHS, SIZES)
def test_own_attention_scores_every_token_with_every_key_of_its_chunk(lengths: list[int], size: int) -> None:
    chunks = build_chunks(lengths, size)
    tokens = [sum(part.tokens for part in chunk.segments) for chunk in chunks]
    expected = [count * (chunk.segments[0].start + count) for count, chunk in zip(tokens, chunks, strict=True)]
    costs = replace(CostModel.proportional(), shape=replace(SHAPE, score_bytes=1.0))
    assert costs.chunk_pairs(chunks).tolist() == expected


@given(LENGTHS, SIZES)
def test_targets_of_chunks_by_counting(lengths: list[int], size: int) -> None:
    """Each piece of a sequence has its share of the targets."""
    chunks = build_chunks(lengths, size)
    targets = np.array([length // 3 for length in lengths])
    expected = [sum(p.tokens * targets[p.sequence] / p.length for p in chunk.segments) for chunk in chunks]
    assert chunk_targets(chunks, targets) == pytest.approx(expected)


def test_memory_of_devices_matches_their_data_sheets() -> None:
    """Memory in GB mistaken for GiB would accept plans that do not fit."""
    assert {name: round(device.memory_bytes / 1e9) for name, device in DEVICES.items() if name != "cpu"} == {
        "a100": 85, "h100": 85, "h200": 150, "b200": 192,
    }  # fmt: skip


# Spread over a sequence-parallel group


def test_costs_of_a_spread_chunk_by_hand() -> None:
    """Each of three ranks does a third of the arithmetic, all launches, and two exchanges per layer.

    Queries and outputs have three heads each; the one head of keys and of values is repeated to three. A rank has a
    third of the tokens, and sends two thirds of their bytes.
    """
    device = dataclasses.replace(DEVICE, node_bytes_per_second=1e4, link_latency_seconds=0.01)
    shape = dataclasses.replace(SHAPE, attention=(AttentionLayers(3, 3, 1, 2, 2),))
    alone = CostModel.profile(shape, device, checkpointed=False)
    spread = alone.spread_over(3)
    sent = 3 * (2 * 3 + 2 * 3) * 2 * 2 / 3 * (2 / 3)
    assert spread.forward.fixed_seconds == pytest.approx(alone.forward.fixed_seconds + 2 * 3 * 0.01)
    assert spread.forward.seconds_per_token == pytest.approx(alone.forward.seconds_per_token / 3 + sent / 0.6e4)
    assert spread.backward.seconds_per_token == pytest.approx(alone.backward.seconds_per_token / 3 + sent / 0.6e4)
    assert spread.forward.seconds_per_pair == pytest.approx(alone.forward.seconds_per_pair / 3)
    assert spread.seconds_per_target == pytest.approx(alone.seconds_per_target / 3)
    assert alone.spread_over(1) is alone


@pytest.mark.parametrize(("weights", "share"), [(0, 0.2), (400, 0.4)])
def test_recurrent_layers_are_not_divided(weights: int, share: float) -> None:
    """By hand: each of two ranks gathers the ten inputs of every token and runs the scans, a fifth of the time.

    Modules of their own with 400 of the layers' 1600 weights take another fifth.
    """
    device = dataclasses.replace(DEVICE, node_bytes_per_second=1e4)
    recurrent = RecurrentLayers(flops_per_token=160, input_elements_per_token=10, weights=weights)
    alone = CostModel.profile(replace(SHAPE, attention=(), recurrent=recurrent), device, checkpointed=False)
    spread = alone.spread_over(2)
    gathered = 10 * 2 / 2 / 0.6e4
    assert spread.forward.seconds_per_token == pytest.approx(
        alone.forward.seconds_per_token * (share + (1 - share) / 2) + gathered
    )


def test_checkpointed_layers_exchange_again() -> None:
    """Their backward runs the forward once more, with its exchanges."""
    device = dataclasses.replace(DEVICE, node_bytes_per_second=1e4, link_latency_seconds=0.01)
    once, twice = (
        CostModel.profile(SHAPE, device, checkpointed=checkpointed).spread_over(2) for checkpointed in (False, True)
    )
    assert twice.backward.seconds_per_token - once.backward.seconds_per_token == pytest.approx(
        once.forward.seconds_per_token
    )
    assert twice.backward.fixed_seconds - once.backward.fixed_seconds == pytest.approx(once.forward.fixed_seconds)


def test_the_network_limits_what_leaves_the_node() -> None:
    """Eight of sixteen ranks are on the same node: half of a token's bytes go over the network, which is slower."""
    device = dataclasses.replace(DEVICE, node_bytes_per_second=1e6, link_bytes_per_second=1e4)
    shape = dataclasses.replace(SHAPE, attention=(AttentionLayers(3, 16, 16, 2, 2),))
    alone = CostModel.profile(shape, device, checkpointed=False)
    sent = 3 * (2 * 16 + 2 * 16) * 2 * 2 / 16
    over_network = alone.spread_over(16).forward.seconds_per_token - alone.forward.seconds_per_token / 16
    within_node = alone.spread_over(8).forward.seconds_per_token - alone.forward.seconds_per_token / 8
    assert over_network == pytest.approx(sent / 2 / 0.6e4)
    assert within_node == pytest.approx(2 * sent * 7 / 8 / 0.6e6)


def test_proportional_costs_are_divided() -> None:
    """The paper's example has no communication."""
    spread = CostModel.proportional().spread_over(4)
    assert (spread.forward.seconds_per_token, spread.backward.seconds_per_token) == (0.25, 0.5)
