"""Predict how long a planned run takes, from its plan and its cost model."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.balance import balance, rank_loads
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.costs import FIRST_PASS_OF_HEAD, CostModel, chunk_targets, chunk_tokens
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.simulate import OperationSeconds, simulate_lockstep, simulate_ranks
from chunkflow_cli.planning.timeline import Timeline


def operation_seconds(run: RunPlan, rank: RankPlan) -> OperationSeconds:
    """Predict the seconds of every operation of a rank; on spread chunks, those of its share of the tokens."""

    def seconds(costs: CostModel) -> OperationSeconds:
        return costs.of_chunks(rank.chunks, rank.target_counts, run.stages, run.cut)

    alone = seconds(run.costs)
    if not rank.spread:
        return alone
    spread, count = seconds(run.costs.spread_over(rank.group_size)), len(rank.spread)
    return OperationSeconds(
        **{
            kind.name: np.hstack([getattr(spread, kind.name)[:, :count], getattr(alone, kind.name)[:, count:]])
            for kind in fields(OperationSeconds)
        }
    )


def rank_seconds(rank: RankPlan, costs: CostModel) -> float:
    """Predict the seconds of all operations of a rank without a pipeline, one after the other."""
    if not len(rank.chunks):
        return 0.0
    tokens, pairs = chunk_tokens(rank.chunks), costs.chunk_pairs(rank.chunks)
    if costs.moves_state:
        return _seconds_with_moves(rank, costs)
    targets = chunk_targets(rank.chunks, rank.target_counts)
    is_passed = np.zeros(len(rank.chunks), dtype=bool)
    is_passed[rank.first_passed] = True

    def seconds(costs: CostModel, chunks: slice) -> float:
        again = rank.is_recomputed[chunks]
        once, twice = (tokens[chunks], pairs[chunks]), (tokens[chunks][again], pairs[chunks][again])
        second = costs.recompute(*twice) - costs.forward(*twice)
        head = costs.seconds_per_target * targets[chunks].sum()
        passed = is_passed[chunks]
        if rank.answers:
            head *= 1 + FIRST_PASS_OF_HEAD
        first = costs.forward(tokens[chunks][passed], pairs[chunks][passed]).sum()
        if not rank.answers or len(rank.schedules) > 1:  # otherwise, the first pass is the state pass
            first += costs.state_pass(*twice).sum()
        return float(costs.forward(*once).sum() + costs.backward(*once).sum() + second.sum() + first + head)

    spread = len(rank.spread)
    alone = seconds(costs, slice(spread, None)) + _mismatched_seconds(rank, costs)
    return alone + seconds(costs.spread_over(rank.group_size), slice(spread)) if spread else alone


def _seconds_with_moves(rank: RankPlan, costs: CostModel) -> float:
    """Predict the seconds of all operations of a rank, each as long as its computation or its copies of state."""
    total, spread = 0.0, len(rank.spread)
    for part, of_part in ((slice(spread), costs.spread_over(rank.group_size)), (slice(spread, None), costs)):
        each = of_part.of_chunks(rank.chunks, rank.target_counts)
        twice = rank.is_recomputed * (each.state_pass[0] + each.recompute[0] - each.forward[0])
        total += float((each.forward[0] + each.backward[0] + twice)[part].sum())
    return total


def _mismatched_seconds(rank: RankPlan, costs: CostModel) -> float:
    """Predict the seconds of the forwards of mismatched answers."""
    if rank.mismatched is None or not len(rank.mismatched):
        return 0.0
    costs = costs.spread_over(rank.group_size)
    return float(costs.forward(chunk_tokens(rank.mismatched), costs.chunk_pairs(rank.mismatched)).sum())


def seconds_before(run: RunPlan, rank: RankPlan) -> float:
    """Predict the seconds of the forwards of preferences that come before a rank's schedule, on one stage.

    They are the mismatched answers, and the first pass of a pipeline, whose first forward passes each stage in turn.
    """
    seconds = _mismatched_seconds(rank, run.costs)
    if rank.answers and run.stages > 1 and len(rank.chunks):
        forward = operation_seconds(run, rank).first_pass
        assert forward is not None
        return seconds / run.stages + float(forward.sum(axis=1).max() + forward.max(axis=1).sum())
    return seconds


def stage_seconds(run: RunPlan, rank: RankPlan) -> NDArray[np.float64]:
    """Predict the seconds for which each stage of a rank is busy, (stages,)."""
    head = 0.0
    if len(rank.chunks):
        targets, spread = chunk_targets(rank.chunks, rank.target_counts), len(rank.spread)
        head = run.costs.seconds_per_target * float(targets[spread:].sum())
        if spread:
            head += run.costs.spread_over(rank.group_size).seconds_per_target * float(targets[:spread].sum())
    seconds = run.costs.stage_shares(run.stages, run.cut) * (rank_seconds(rank, run.costs) - head)
    seconds[-1] += head
    return seconds


def timeline(run: RunPlan, step: StepPlan) -> Timeline:
    """Predict when each operation of a step runs on each rank and stage."""
    if not run.is_in_lockstep:
        return simulate_ranks([(rank.schedules, operation_seconds(run, rank)) for rank in step.ranks])
    one_token = run.costs.of_chunks(build_chunks([1], 1), np.ones(1, dtype=np.int64))
    return simulate_lockstep([(rank.schedule, operation_seconds(run, rank)) for rank in step.ranks], one_token)


def step_seconds(run: RunPlan, step: StepPlan) -> float:
    """Predict the seconds until the last rank is done with a step, without a pipeline and the optimizer step."""
    if run.is_in_lockstep:
        return timeline(run, step).makespan + max(seconds_before(run, rank) for rank in step.ranks)
    return max(rank_seconds(rank, run.costs) for rank in step.ranks)


def seconds_of_whole_samples(run: RunPlan, samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predict the seconds of each rank for a step of these samples if none were spread over a group, (ranks,)."""
    if run.answers is None:
        costs = run.costs.of_sequences(run.lengths[samples], run.chunk_size, run.k, run.target_counts[samples])
    else:
        costs = run.answers.seconds(run.costs, samples, run.chunk_size, run.k)
    return rank_loads(costs, balance(costs, run.ranks))
