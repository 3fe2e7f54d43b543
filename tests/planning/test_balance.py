"""Assignment of sequences to ranks: none is lost, no rank is far above the optimum, and all ranks agree."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.balance import balance, rank_loads, share_out

COSTS = st.lists(st.floats(0, 1e6), max_size=40)


def listed(costs: list[float], ranks: int) -> list[list[int]]:
    return [share.tolist() for share in balance(costs, ranks)]


def best_maximum(costs: list[int], ranks: int) -> int:
    """Return the least possible load of the fullest rank, by trying every assignment."""
    return min(
        max(sum(cost for cost, rank in zip(costs, assigned, strict=True) if rank == chosen) for chosen in range(ranks))
        for assigned in itertools.product(range(ranks), repeat=len(costs))
    )


@given(COSTS, st.integers(1, 9))
def test_every_sequence_is_on_exactly_one_rank(costs: list[float], ranks: int) -> None:
    """A sequence on two ranks would count twice, one on none would be lost. Indices ascend, as chunks expect."""
    shares = listed(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_no_rank_exceeds_four_thirds_of_the_best(costs: list[int], ranks: int) -> None:
    """Graham's bound, (4/3 - 1/(3 ranks)), holds for the optimum of an exhaustive search."""
    most = max(rank_loads(costs, balance(costs, ranks)))
    assert most <= (4 / 3 - 1 / (3 * ranks)) * best_maximum(costs, ranks) + 1e-9


def test_the_bound_is_reached() -> None:
    """The worst case for two ranks is 7/6 of the best, so the exhaustive search does find the optimum."""
    assert max(rank_loads([3, 3, 2, 2, 2], balance([3, 3, 2, 2, 2], 2))) == 7
    assert best_maximum([3, 3, 2, 2, 2], 2) == 6


def test_by_hand() -> None:
    """8 alone, then 5, 4, 3 and 2, each to the least loaded rank."""
    assert listed([2, 8, 3, 5, 4], 3) == [[1], [0, 3], [2, 4]]


def test_one_costly_sequence_has_a_rank_to_itself() -> None:
    """The case that matters: a long sample takes longer than a rank's fair share."""
    assert listed([1, 1, 1, 100, 1], 2) == [[3], [0, 1, 2, 4]]


def test_sequences_that_cost_nothing_are_assigned_too() -> None:
    """A sample whose predicted cost is zero still needs a rank."""
    assert sorted(itertools.chain(*listed([0.0] * 5, 3))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("costs", "used"), [([], 0), ([4.0], 1), ([1.0, 2.0, 3.0], 3)])
def test_fewer_sequences_than_ranks_leave_ranks_empty(costs: list[float], used: int) -> None:
    """An empty rank gets an empty share that can index an array, not an error or no share."""
    shares = balance(costs, 5)
    assert [len(share) for share in shares] == [1] * used + [0] * (5 - used)
    assert all(np.arange(7)[share].tolist() == share.tolist() for share in shares)


def test_one_rank_has_all() -> None:
    """Without data parallelism the data keeps its order."""
    assert listed([3.0, 1.0, 2.0], 1) == [[0, 1, 2]]


@given(COSTS, st.integers(1, 5))
def test_same_costs_same_shares(costs: list[float], ranks: int) -> None:
    """Each rank plans on its own, and all plans must agree."""
    assert listed(costs, ranks) == listed(costs, ranks) == listed(list(np.array(costs)), ranks)


@pytest.mark.processes
def test_equal_costs_go_to_the_same_ranks_in_every_process() -> None:
    """Ties broken by a hash or by the order of a set would differ from process to process."""
    code = (
        "from chunkflow_cli.planning.balance import balance\n"
        "print([share.tolist() for share in balance([5, 1, 5, 1, 5, 1, 5, 2, 2], 4)])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True,
                       check=True).stdout.strip()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs == [str(listed([5, 1, 5, 1, 5, 1, 5, 2, 2], 4))] * 2


def test_loads_are_summed_by_rank() -> None:
    """The report divides by these sums."""
    assert rank_loads([1, 2, 4], [np.array([0, 2]), np.array([], int), np.array([1])]).tolist() == [5, 0, 2]


@pytest.mark.parametrize(
    ("costs", "ranks", "message"),
    [
        ([1.0], 0, "ranks=0 must be at least 1"),
        ([1.0, -1.0], 2, "non-negative"),
        ([1.0, float("nan")], 2, "non-negative"),
        ([[1.0, 2.0]], 2, "flat list"),
    ],
)
def test_invalid_arguments_are_refused(costs: list[float], ranks: int, message: str) -> None:
    """nan has no place in an order, so ranks could disagree."""
    with pytest.raises(ValueError, match=message):
        balance(costs, ranks)


# Spread over groups


def best_sharing(costs: np.ndarray, degrees: list[int], ranks: int) -> float:
    """Return the least possible time of the slowest rank, by trying every group for every sequence."""
    places = [(level, first) for level, degree in enumerate(degrees) for first in range(0, ranks, degree)]
    best = np.inf
    for assigned in itertools.product(places, repeat=costs.shape[1]):
        loads = np.zeros(ranks)
        for sequence, (level, first) in enumerate(assigned):
            loads[first : first + degrees[level]] += costs[level, sequence]
        best = min(best, loads.max())
    return float(best)


def spread_costs(alone: list[int], degrees: list[int], price: float) -> np.ndarray:
    """Return costs, (degrees, sequences), of equal shares plus a price for every exchange."""
    return np.stack([np.array(alone) / degree + (price if degree > 1 else 0.0) for degree in degrees])


LAYOUTS = st.sampled_from(
    [([1, 2], 2), ([1, 2], 4), ([1, 2, 4], 4), ([1, 3], 6), ([1, 2, 4], 8), ([1], 3), ([1, 4], 8)]
)


@given(st.lists(st.integers(0, 30), max_size=40), LAYOUTS, st.floats(0, 5), st.integers(0, 2**31))
def test_every_sequence_is_shared_out_exactly_once(
    alone: list[int], layout: tuple[list[int], int], price: float, seed: int
) -> None:
    """Each is on one rank or on all ranks of one aligned group, which its state fits; the predicted time is right.

    If one rank of a group lacked a sequence, the others would wait in an exchange forever.
    """
    degrees, ranks = layout
    least = np.random.default_rng(seed).choice(degrees, size=len(alone))
    costs = spread_costs(alone, degrees, price)
    shares = share_out(costs, degrees, ranks, least)
    runs_on: dict[int, list[int]] = {sequence: [] for sequence in range(len(alone))}
    loads = np.zeros(ranks)
    for rank in range(ranks):
        mine = [*shares.spread(rank).tolist(), *shares.alone(rank).tolist()]
        assert len(set(mine)) == len(mine)
        for sequence in mine:
            runs_on[sequence].append(rank)
            loads[rank] += costs[degrees.index(shares.degree[sequence]), sequence]
    for sequence, on in runs_on.items():
        degree = int(shares.degree[sequence])
        assert degree >= least[sequence]
        assert on == list(range(on[0], on[0] + degree))
        assert on[0] % degree == 0
    assert shares.seconds == pytest.approx(loads.max())


@given(st.lists(st.integers(0, 30), max_size=40), LAYOUTS, st.floats(0, 5))
def test_sharing_is_never_worse_than_whole_sequences(
    alone: list[int], layout: tuple[list[int], int], price: float
) -> None:
    """Where spreading does not pay, nothing is spread."""
    degrees, ranks = layout
    whole = max(rank_loads(alone, balance(alone, ranks)), default=0)
    assert share_out(spread_costs(alone, degrees, price), degrees, ranks).seconds <= whole + 1e-9


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.sampled_from([([1, 2], 2), ([1, 2], 4), ([1, 2, 4], 4)]),
    st.floats(0, 3),
)
def test_sharing_is_near_the_best_of_all(alone: list[int], layout: tuple[list[int], int], price: float) -> None:
    """The result is within 4/3 of the best of all assignments, Graham's bound for whole sequences."""
    degrees, ranks = layout
    costs = spread_costs(alone, degrees, price)
    assert share_out(costs, degrees, ranks).seconds <= 4 / 3 * best_sharing(costs, degrees, ranks) + 1e-9


def test_a_long_sequence_is_spread_and_short_ones_are_not() -> None:
    """By hand: 40 over four ranks takes 11; the eight sequences of 4, two on each rank, take another 8."""
    costs = spread_costs([40, *[4] * 8], [1, 4], 1.0)
    shares = share_out(costs, [1, 4], 4)
    assert shares.degree.tolist() == [4, *[1] * 8]
    assert shares.seconds == 11 + 8
    assert all(shares.spread(rank).tolist() == [0] for rank in range(4))
    assert sorted(len(shares.alone(rank)) for rank in range(4)) == [2, 2, 2, 2]


def test_groups_nest_and_the_widest_go_first() -> None:
    """16 on four ranks, 6 on two, 2 on each. In another order, a group of four would wait for its first two ranks."""
    costs = np.array([[16.0, 6.0, 6.0, 2, 2, 2, 2], [9, 3, 3, 2, 2, 2, 2], [4, 3, 3, 2, 2, 2, 2]])
    shares = share_out(costs, [1, 2, 4], 4)
    assert shares.seconds == 9
    assert shares.degree.tolist() == [4, 2, 2, 1, 1, 1, 1]
    assert shares.spread(0).tolist() == [0, 1]
    assert shares.spread(3).tolist() == [0, 2]


def test_sequences_whose_state_needs_a_group_get_one() -> None:
    """Two equally long sequences would each go to one of two ranks, and neither would fit."""
    costs = spread_costs([10, 10], [1, 2], 1.0)
    assert share_out(costs, [1, 2], 2).seconds == 10
    forced = share_out(costs, [1, 2], 2, np.array([2, 2]))
    assert (forced.degree.tolist(), forced.seconds) == ([2, 2], 12)


@pytest.mark.parametrize(
    ("costs", "degrees", "ranks", "message"),
    [
        ([[1.0]], [1, 2], 2, "costs of 2 degrees"),
        ([[1.0], [-1.0]], [1, 2], 2, "non-negative"),
        ([[1.0], [1.0]], [2, 4], 4, "must start at 1"),
        ([[1.0], [1.0]], [1, 2], 3, "each divide the next"),
        ([[1.0]] * 3, [1, 2, 3], 6, "each divide the next"),
    ],
)
def test_groups_that_do_not_nest_are_refused(
    costs: list[list[float]], degrees: list[int], ranks: int, message: str
) -> None:
    """Overlapping groups would wait for each other."""
    with pytest.raises(ValueError, match=message):
        share_out(np.array(costs), degrees, ranks)
