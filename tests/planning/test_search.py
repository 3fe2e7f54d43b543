"""The search for (ChunkSize, K): its predictions equal those of the simulated schedules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost, chunk_targets
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.prediction import operation_seconds
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import SimulatedStep, best_first, grid, search
from chunkflow_cli.planning.simulate import simulate, simulate_ranks

COSTS = CostModel(
    "made up",
    forward=OperationCost(2.0, 1.0, 1e-3),
    backward=OperationCost(4.0, 2.0, 2e-3),
    recompute=OperationCost(2.0, 1.0, 1e-3),
    state_pass=OperationCost(1.0, 0.75, 1e-3),
    seconds_per_target=0.5,
    step_seconds=10.0,
)


def no_memory(run: RunPlan, timelines: object) -> int:
    return 0


def run_of(lengths: list[int], *, ranks: int = 1, batch: int = 4) -> RunPlan:
    sizes = np.array(lengths)
    batches = GlobalBatches(len(sizes), batch, seed=0, shuffle=True)
    return RunPlan(
        batches, batches.steps_per_epoch, sizes, np.maximum(sizes // 2, 1), chunk_size=1, k=1, ranks=ranks, costs=COSTS
    )


def test_the_grid_leaves_out_pairs_that_do_the_same() -> None:
    """For a sequence of three chunks, K = 4 and 8 keep the same chunks as K = 3."""
    assert grid([8, 4], [1, 2, 4, 8], longest=12) == [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2)]
    assert grid([16], [1, 2], longest=12) == [(16, 1)]
    with pytest.raises(ValueError, match="chunk_sizes is empty"):
        grid([], [1], 10)
    with pytest.raises(ValueError, match="ks is empty"):
        grid([4], [], 10)
    with pytest.raises(ValueError, match=r"ks=\[0\]"):
        grid([4], [0], 10)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    chunk_size=st.integers(3, 30),
    k=st.integers(1, 4),
    ranks=st.integers(1, 3),
)
def test_predicted_seconds_are_those_of_the_simulated_schedules(
    lengths: list[int], chunk_size: int, k: int, ranks: int
) -> None:
    """The closed form of the search equals the simulation of every operation, so the search ranks what runs."""
    run = run_of(lengths, ranks=ranks)
    chosen = replace(run, chunk_size=chunk_size, k=k)
    (found,) = search([chosen], range(run.steps), no_memory, 1)
    seconds = []
    for step in chosen:
        makespans = [
            simulate(rank.schedules, operation_seconds(run, rank)).makespan for rank in step.ranks if len(rank.chunks)
        ]
        seconds.append(max(makespans))
    assert found.step_seconds == pytest.approx(np.mean(seconds) + COSTS.step_seconds)
    assert 0 <= found.bubble_ratio < 1


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    k=st.integers(1, 4),
    groups=st.integers(1, 5),
    sequence=st.integers(1, 3),
    stages=st.integers(2, 4),
    schedule=st.sampled_from(["1f1b", "state_aware_1f1b", "zero_bubble"]),
    latency=st.sampled_from([0.0, 30.0]),
)
def test_predicted_seconds_of_pipelines_are_those_of_all_ranks_simulated(
    lengths: list[int], k: int, groups: int, sequence: int, stages: int, schedule: str, latency: float
) -> None:
    """The search simulates only the ranks that may finish last, and one rank of each group."""
    costs = replace(COSTS, transfer_latency_seconds=latency, transfer_seconds_per_token=0.1)
    run = replace(
        run_of(lengths, ranks=groups * sequence, batch=12),
        chunk_size=10,
        k=k,
        sequence=sequence,
        pipeline=PipelineLayout(stages, schedule),
        costs=costs,
    )
    (found,) = search([run], [0], no_memory, 1)
    whole = simulate_ranks([(rank.schedules, operation_seconds(run, rank)) for rank in run[0].ranks])
    assert found.step_seconds == pytest.approx(whole.makespan + COSTS.step_seconds)
    assert found.bubble_ratio == pytest.approx(whole.bubble_ratio)
    assert found.waiting_seconds == pytest.approx(whole.makespan - whole.busy_seconds.mean())
    assert found.bubble_seconds == pytest.approx(whole.makespan - whole.busy_seconds.max())


def test_a_rank_that_cannot_be_the_last_is_not_simulated() -> None:
    run = replace(run_of([500, *[1] * 7], ranks=4, batch=8), chunk_size=10, pipeline=PipelineLayout(2))
    asked: list[SimulatedStep] = []

    def keep(run: RunPlan, steps: Sequence[SimulatedStep]) -> int:
        asked.extend(steps)
        return 0

    list(search([run], [0], keep, 1))
    (step,) = asked
    assert len(step.plan.ranks) == 4
    assert sorted(step.timelines) == [next(i for i, rank in enumerate(step.plan.ranks) if 500 in rank.chunks.lengths)]


def test_the_parts_of_a_step_by_hand() -> None:
    """One sample of 10 tokens, 5 of them targets, in chunks of 4: S0 S1 F2 B2 R1 B1 R0 B0 of 4, 4 and 2 tokens."""
    (found,) = search([replace(run_of([10]), chunk_size=4)], [0], lambda run, timelines: 7, memory_limit_bytes=6)
    pairs = [8.0, 4 * (4 + 2), 2 * (8 + 1)]
    forward = [2 + tokens + 1e-3 * pair for tokens, pair in zip((4, 4, 2), pairs, strict=True)]
    state = [1 + 0.75 * 4 + 1e-3 * pair for pair in pairs[:2]]
    total = sum(forward) + sum(state) + sum(2 * each for each in forward) + 0.5 * 5
    assert found.step_seconds == pytest.approx(total + 10)
    assert found.recompute_share == pytest.approx(2 / 3)
    assert found.recompute_seconds == pytest.approx(sum(state))
    assert found.fixed_seconds == pytest.approx(3 * (2 + 4) + 2 * 1)
    assert found.waiting_seconds == 0
    assert found.fill == pytest.approx(10 / 12)
    assert not found.fits


def test_ranks_that_wait_are_counted() -> None:
    """Two ranks, one long and one short sample: the short one's rank waits for most of the step."""
    (found,) = search([replace(run_of([100, 1], ranks=2, batch=2), chunk_size=100)], [0], no_memory, 1)
    assert found.waiting_seconds == pytest.approx(found.bubble_ratio * (found.step_seconds - 10))
    assert 0.4 < found.bubble_ratio < 0.5


def test_best_first_takes_the_fastest_that_fits() -> None:
    run = run_of([30, 20, 3, 2])
    runs = [replace(run, chunk_size=size) for size in (4, 8, 16, 30)]
    candidates = list(search(runs, [0], lambda run, timelines: run.chunk_size, memory_limit_bytes=16))
    ranked = best_first(candidates)
    assert [candidate.chunk_size for candidate in ranked] == [16, 8, 4]
    assert [candidate.fits for candidate in candidates] == [True, True, True, False]


def test_host_memory_is_tried_where_a_choice_does_not_fit() -> None:
    """State on the device is faster, or as fast: a choice that fits is not tried otherwise."""
    run = run_of([30, 20, 3, 2])
    runs = [replace(run, chunk_size=size) for size in (4, 8, 16, 30)]

    def needed(run: RunPlan, _: object) -> int:
        return run.chunk_size // (2 if run.costs.moves_state else 1)

    def offloaded(run: RunPlan) -> RunPlan | None:
        return None if run.chunk_size == 16 else replace(run, costs=replace(run.costs, host_seconds_per_byte=1.0))

    found = search(runs, [0], needed, 15, offloaded=offloaded)
    assert [(each.chunk_size, each.offload_state, each.fits) for each in found] == [
        (4, "none", True), (8, "none", True), (16, "none", False), (30, "host", True),
    ]  # fmt: skip


@pytest.mark.processes
def test_the_search_needs_no_torch() -> None:
    """It runs on laptops without a GPU, and importing torch would take longer than the whole search."""
    code = "import chunkflow_cli.planning.search, sys; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_last_stage_pays_for_the_head() -> None:
    """Equal shares for all stages would hide that a large vocabulary makes the last one the slowest."""
    shape = ModelShape(
        layers=8, hidden_size=64, intermediate_size=128, attention=(AttentionLayers(8, 4, 4, 16, 16),), vocab_size=4000,
        matmul_parameters=8 * 40_000 + 256_000, parameters=900_000, trainable_parameters=900_000,
    )  # fmt: skip
    costs = replace(CostModel.profile(shape, DEVICES["h100"], checkpointed=False), transfer_latency_seconds=0.0)
    run = replace(run_of([40, 7, 13, 90], batch=4), chunk_size=16, pipeline=PipelineLayout(4), costs=costs)
    assert run.cut is not None
    assert [stage.layers for stage in run.cut] == [2, 2, 3, 1]  # half of the tokens are targets: a head of 3.2 layers
    rank = run[0].ranks[0]
    seconds = operation_seconds(run, rank)
    head = costs.seconds_per_target * chunk_targets(rank.chunks, rank.target_counts)
    layers = seconds.forward - np.vstack([np.zeros((3, len(head))), head])
    assert np.allclose(layers / layers.sum(axis=0), np.array([[stage.layers / 8] for stage in run.cut]))
    assert np.allclose(seconds.state_pass, layers)
