"""Plans of sequence-parallel groups: no token is lost or run twice, no rank waits, state stays within its bound."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.chunks import build_chunks, join_chunks
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.prediction import operation_seconds, rank_seconds, timeline
from chunkflow_cli.planning.proof import validate_groups
from chunkflow_cli.planning.run_plan import (
    RankPlan,
    RunPlan,
    StepPlan,
)
from chunkflow_cli.planning.schedule import OpKind, Schedule
from chunkflow_cli.planning.schedule_proof import validate

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=30)
# Fixed seconds are high, so that spreading short sequences costs something; and pairs cost time.
COSTS = CostModel(
    "by hand",
    OperationCost(40.0, 1.0, 0.01), OperationCost(80.0, 2.0, 0.02), OperationCost(40.0, 1.0, 0.01),
    OperationCost(40.0, 1.0, 0.01), seconds_per_target=0.5,
)  # fmt: skip


SHAPE = ModelShape(
    layers=2, hidden_size=8, intermediate_size=16, attention=(AttentionLayers(2, 4, 1, 2, 2),), vocab_size=32,
    matmul_parameters=1000, parameters=2000, trainable_parameters=2000,
)  # fmt: skip


def run_of(lengths: list[int], *, ranks: int, sequence: int, **options: Any) -> RunPlan:
    sizes = np.array(lengths)
    batches = GlobalBatches(len(sizes), len(sizes), seed=0, shuffle=False)
    settings = {"chunk_size": 32, "k": 1, "costs": COSTS, **options}
    return RunPlan(batches, 1, sizes, sizes, ranks=ranks, sequence=sequence, **settings)


def tokens_of(step: StepPlan) -> Counter[tuple[int, int]]:
    """Count how often each token of each sample is run; a group runs those of spread chunks once."""
    found: Counter[tuple[int, int]] = Counter()
    for rank in step.ranks:
        for chunk in rank.counted:
            for part in rank.chunks[chunk].segments:
                sample = int(rank.samples[part.sequence])
                found.update((sample, token) for token in range(part.start, part.stop))
    return found


GROUPS = st.sampled_from([(2, 2), (4, 2), (4, 4), (6, 3), (8, 2)])
OPTIONS = st.sampled_from(
    [
        {},
        {"k": 2},
        {"spread_all": True},
        {"fill_tails": False},
        {"is_zero_3": True, "k": 2},
        {"pipeline": PipelineLayout(2)},
    ]
)


@given(LENGTHS, GROUPS, OPTIONS)
def test_each_token_is_run_once_and_groups_agree(
    lengths: list[int], groups: tuple[int, int], options: dict[str, Any]
) -> None:
    """The invariants, for any lengths.

    A token that two ranks count is trained on twice. Operations that differ within a group hang. An early chunk that
    goes backward before a late one loses gradient.
    """
    ranks, sequence = groups
    run = run_of(lengths, ranks=ranks, sequence=sequence, **options)
    step = run[0]
    assert len(step.ranks) == ranks
    assert tokens_of(step) == {(sample, token): 1 for sample, length in enumerate(lengths) for token in range(length)}
    validate_groups(step.ranks)
    for rank in step.ranks:
        assert (rank.target_counts == run.target_counts[rank.samples]).all()
        assert (rank.chunks.lengths == run.lengths[rank.samples]).all()
        room = 32 * np.where(np.arange(len(rank.chunks)) < len(rank.spread), sequence, 1)
        assert (rank.room == room).all()
        assert all(chunk.tokens <= most for chunk, most in zip(rank.chunks, room, strict=True))
        if run.pipeline is None:
            assert rank.schedule.ops  # a rank without samples, too
            validate(rank.schedule, rank.chunks, run.k)
    assert step.chunks == sum(len(rank.counted) for rank in step.ranks) <= sum(len(rank.chunks) for rank in step.ranks)
    assert sum(rank.lower_bound for rank in step.ranks) <= step.chunks


@given(LENGTHS, GROUPS)
def test_no_rank_holds_more_state_than_its_part_of_the_longest(lengths: list[int], groups: tuple[int, int]) -> None:
    """Two long samples that balance each other are spread too, because whether a run fits must not depend on luck."""
    ranks, sequence = groups
    most = max(32, -(-max(lengths) // sequence))
    for rank in run_of(lengths, ranks=ranks, sequence=sequence)[0].ranks:
        alone = rank.chunks.sequence[rank.chunks.first_segment[len(rank.spread)] :]
        assert (rank.chunks.lengths[alone] <= most).all()


@given(LENGTHS, st.sampled_from([(2, 2), (4, 2), (4, 4)]))
def test_seconds_of_a_group_are_those_of_its_operations(lengths: list[int], groups: tuple[int, int]) -> None:
    """By hand: seconds of a group's operations are divided, those of a rank's own operations are not."""
    ranks, sequence = groups
    run = run_of(lengths, ranks=ranks, sequence=sequence)
    step = run[0]
    predicted = timeline(run, step)
    for index, rank in enumerate(step.ranks):
        assert rank_seconds(rank, COSTS) == pytest.approx(predicted.busy_seconds[index, 0] if len(rank.chunks) else 0)
        if not len(rank.chunks):
            continue
        whole = COSTS.of_chunks(rank.chunks, rank.target_counts)
        own = operation_seconds(run, rank)
        count = len(rank.spread)
        fixed = COSTS.backward.fixed_seconds
        assert own.backward[0, count:] == pytest.approx(whole.backward[0, count:])
        assert own.backward[0, :count] - fixed == pytest.approx((whole.backward[0, :count] - fixed) / sequence)


def test_spread_chunks_come_first_and_short_samples_run_alone() -> None:
    """By hand: one sample of 400 tokens among short ones, on two ranks.

    Its seven chunks of 2 x 32 tokens are spread; each short sample is on one rank. No rank waits in the middle, because
    all of them begin the spread chunks at once.
    """
    step = run_of([400, *[30] * 8], ranks=2, sequence=2)[0]
    first, second = step.ranks
    assert first.spread == second.spread == range(7)
    assert str(first.schedule).startswith("S0 S1 S2 S3 S4 S5 F6 B6 R5 B5 R4 B4 R3 B3 R2 B2 R1 B1 R0 B0 F7 B7")
    assert [len(rank.chunks) for rank in step.ranks] == [11, 11]
    assert set(first.samples.tolist()) & set(second.samples.tolist()) == {0}
    assert (step.chunks, step.recomputed_chunks, step.spread_samples) == (7 + 8, 6, 1)
    assert step.room == 7 * 64 + 8 * 32


def test_all_is_spread_where_ranks_must_run_alike() -> None:
    """With ZeRO-3 or a pipeline, a rank that ran a chunk alone would leave the others waiting in a collective."""
    lengths = [400, *[30] * 8]
    for options in ({"spread_all": True}, {"is_zero_3": True}, {"pipeline": PipelineLayout(2)}):
        for rank in run_of(lengths, ranks=4, sequence=2, **options)[0].ranks:
            assert len(rank.spread) == len(rank.chunks)
    assert any(len(rank.spread) < len(rank.chunks) for rank in run_of(lengths, ranks=4, sequence=2)[0].ranks)


def test_ranks_without_samples_still_have_something_to_do() -> None:
    """A rank without operations has no gradients: DeepSpeed crashes, or is silently wrong."""
    step = run_of([5], ranks=4, sequence=2)[0]
    assert all(rank.schedule.ops for rank in step.ranks)


@given(LENGTHS)
def test_groups_of_one_are_data_parallelism(lengths: list[int]) -> None:
    """Without sequence parallelism, no chunk is spread."""
    run = run_of(lengths, ranks=3, sequence=1)
    for rank in run[0].ranks:
        assert (rank.group_size, rank.spread, rank.counted.start) == (1, range(0), 0)


def test_joined_chunks_are_those_of_both() -> None:
    """Segments, sequences and lengths of the second are shifted by those of the first."""
    first, second = build_chunks([70, 9], 20), build_chunks([3, 4, 50], 10)
    joined = join_chunks(first, second)
    assert len(joined) == len(first) + len(second)
    for chunk, (origin, shift) in zip(
        joined, [*((c, 0) for c in first), *((c, len(first.lengths)) for c in second)], strict=True
    ):
        assert [(s.sequence - shift, s.start, s.stop, s.length) for s in chunk.segments] == [
            (s.sequence, s.start, s.stop, s.length) for s in origin.segments
        ]
    assert joined.dependent_groups() == [
        *first.dependent_groups(),
        *(range(g.start + len(first), g.stop + len(first)) for g in second.dependent_groups()),
    ]


# The validator refuses


def swapped(rank: RankPlan, one: int, other: int) -> RankPlan:
    ops = list(rank.schedule.ops)
    ops[one], ops[other] = ops[other], ops[one]
    return replace(rank, schedules=(Schedule(tuple(ops)),))


def test_a_group_that_would_hang_is_refused() -> None:
    """Every way in which a rank can differ from its group is refused; a difference among chunks run alone is not."""
    step = run_of([400, 400, *[30] * 8], ranks=2, sequence=2)[0]
    first, second = step.ranks
    validate_groups([first, second])
    own = len(second.schedule.ops) - 1
    validate_groups([first, replace(second, schedules=(Schedule(second.schedule.ops[: own - 1]),))])
    with pytest.raises(ValueError, match="rank 1, stage 0: spread operation 0 is not that of its group's first rank"):
        validate_groups([first, swapped(second, 0, 1)])
    with pytest.raises(ValueError, match=r"rank 1, stage 0: spread operation \d+"):
        validate_groups([first, replace(second, schedules=(Schedule(second.schedule.ops[1:]),))])
    with pytest.raises(ValueError, match="as many as on its group's first"):
        validate_groups([first, replace(second, spread=range(len(second.spread) - 1))])
    with pytest.raises(ValueError, match="not those of its group's first rank"):
        validate_groups([first, replace(second, samples=second.samples + 1)])
    with pytest.raises(ValueError, match="place 0"):
        validate_groups([first, first])
    joined = replace(second.schedule.ops[0], kind=OpKind.forward, chunks=(0, len(second.spread)))
    with pytest.raises(ValueError, match="joins chunks that are spread and chunks that are not"):
        validate_groups([first, replace(second, schedules=(Schedule((joined,)),))])


def test_operations_in_another_order_among_alone_ones_are_fine() -> None:
    """A rank may run its own chunks at any time, even between spread ones; only the spread ones must agree."""
    step = run_of([400, *[30] * 8], ranks=2, sequence=2)[0]
    first, second = step.ranks
    ops = list(second.schedule.ops)
    moved = [*ops[-2:], *ops[:-2]]
    validate_groups([first, replace(second, schedules=(Schedule(tuple(moved)),))])


def test_steps_are_pure() -> None:
    """Each rank plans on its own, and all plans must agree."""
    run = run_of([400, 7, 90, 33, *range(1, 60)], ranks=8, sequence=4)
    for one, other in zip(run[0].ranks, run[0].ranks, strict=True):
        assert one.schedules == other.schedules
        assert (one.samples == other.samples).all()
    assert list(itertools.chain(*(rank.samples for rank in run[0].ranks)))
