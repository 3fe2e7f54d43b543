"""Assign sequences to ranks by predicted cost: whole ones to single ranks, or some of them spread over groups of ranks.

Longest-processing-time-first (Graham 1969): the costliest sequence that is left goes to the least loaded rank. No rank
then has more than 4/3 of the best possible maximum, if sequences stay whole. On long-tailed data that maximum is one
sequence, which takes longer than a rank's fair share of everything, and all other ranks wait for it. Spread over a
sequence-parallel group it takes a fraction of the time. Short sequences would only lose, because each exchange has its
cost (Skrull, arXiv 2505.19609; FlexSP, arXiv 2412.01523).

All functions here are pure, so every rank finds the same assignment.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Costs = Sequence[float] | NDArray[np.float64] | NDArray[np.int64]


def balance(costs: Costs, ranks: int) -> list[NDArray[np.int64]]:
    """Return the indices of each rank's sequences, ascending. With fewer sequences than ranks, some ranks get none.

    Args:
        costs: (sequences,) predicted cost of each, in any unit.
        ranks: number of data-parallel ranks.

    Raises:
        ValueError: `ranks` is not positive, or a cost is negative or not a number.
    """
    values = np.asarray(costs, dtype=np.float64)
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if values.ndim != 1 or not (values >= 0).all():
        raise ValueError("costs must be a flat list of non-negative numbers")
    if ranks == 1:
        return [np.arange(len(values), dtype=np.int64)]
    rank_of, _ = _longest_first(values, [0.0] * ranks)
    return [np.flatnonzero(rank_of == rank) for rank in range(ranks)]


def _longest_first(costs: NDArray[np.float64], loads: Sequence[float]) -> tuple[NDArray[np.int64], list[float]]:
    """Return the place of each sequence, (sequences,), and the loads of all places with them, given those before."""
    heap = [(load, place) for place, load in enumerate(loads)]  # of equal loads the lowest place comes first
    heapq.heapify(heap)
    place_of = np.empty(len(costs), dtype=np.int64)
    costliest_first = np.argsort(-costs, kind="stable")
    for sequence, cost in zip(costliest_first.tolist(), costs[costliest_first].tolist(), strict=True):
        load, place = heap[0]
        place_of[sequence] = place
        heapq.heapreplace(heap, (load + cost, place))
    return place_of, [load for load, _ in sorted(heap, key=lambda item: item[1])]


@dataclass(frozen=True)
class Shares:
    """The ranks that run each sequence. Ranks run the most widely spread sequences first, in one order (`spread`)."""

    degree: NDArray[np.int64]
    """(sequences,) number of ranks that each sequence is spread over; 1 if one rank runs it alone."""
    first_rank: NDArray[np.int64]
    """(sequences,) first of the `degree` neighboring ranks that run it; a multiple of its degree."""
    seconds: float
    """Predicted seconds until the last rank is done, in the unit of the costs."""

    def alone(self, rank: int) -> NDArray[np.int64]:
        """Return the sequences that only this rank runs, ascending."""
        return np.flatnonzero((self.degree == 1) & (self.first_rank == rank))

    def spread(self, rank: int) -> NDArray[np.int64]:
        """Return the sequences that this rank runs together with others: most widely spread first, else ascending."""
        mine = (self.degree > 1) & (self.first_rank <= rank) & (rank < self.first_rank + self.degree)
        own = np.flatnonzero(mine)
        return own[np.argsort(-self.degree[own], kind="stable")]


MOST_LIMITS = 64
"""Number of limits that `share_out` tries, spread evenly over the costs that may decide."""


def share_out(
    costs: NDArray[np.float64], degrees: Sequence[int], ranks: int, least_degree: NDArray[np.int64] | None = None
) -> Shares:
    """Return the assignment with the least predicted seconds found: which ranks run each sequence, alone or together.

    The search tries limits on the seconds of one sequence. Of the degrees that keep a sequence within the limit, it
    takes the one that costs all its ranks together the least: more ranks cost more exchanges, but larger chunks less
    recompute. The most widely spread sequences are placed first, each on the least loaded group of its size. Groups
    nest, so when a group begins a sequence its ranks are equally far and none waits. Sequences that stay alone fill up
    what is uneven. Limits range from a rank's fair share to the costliest sequence; whole sequences, as `balance`
    assigns them, are tried too. The result is never worse than that, where `least_degree` allows it.

    Args:
        costs: (degrees, sequences) predicted cost of each sequence on every rank that runs it, by degree, in any unit.
        degrees: sizes of groups, ascending from 1; each divides the next, and the last divides `ranks`.
        ranks: number of data-parallel ranks.
        least_degree: (sequences,) fewest ranks that each sequence must be spread over for its state to fit.

    Raises:
        ValueError: `costs` has the wrong shape or a value that is no cost, or groups do not nest.
    """
    values = np.asarray(costs, dtype=np.float64)
    count = values.shape[1]
    if values.shape[0] != len(degrees) or not (values >= 0).all():
        raise ValueError(f"costs of {len(degrees)} degrees must be {len(degrees)} rows of non-negative numbers")
    if degrees[0] != 1 or any(next_ % one for one, next_ in itertools.pairwise([*degrees, ranks])):
        raise ValueError(f"degrees={list(degrees)} of {ranks} ranks must start at 1 and each divide the next")
    least = np.searchsorted(np.asarray(degrees), np.ones(count) if least_degree is None else least_degree)
    assert count == 0 or least.max() < len(degrees), "no group is large enough"
    fair = values[0].sum() / ranks
    decisive = np.unique(values[(values >= fair / 4)])
    if len(decisive) > MOST_LIMITS:
        decisive = decisive[np.linspace(0, len(decisive) - 1, MOST_LIMITS).astype(np.int64)]
    best = _place(values, degrees, ranks, least)
    together = values * np.asarray(degrees)[:, None]
    allowed = np.arange(len(degrees))[:, None] >= least
    tried = {least.tobytes()}
    for limit in [np.inf, *decisive[::-1].tolist(), 0.0]:
        within = allowed & (values <= limit)
        cheapest = np.where(within, together, np.inf).argmin(axis=0)
        level = np.where(within.any(axis=0), cheapest, len(degrees) - 1)
        if level.tobytes() in tried:
            continue
        tried.add(level.tobytes())
        found = _place(values, degrees, ranks, level)
        if found.seconds < best.seconds:
            best = found
    return best


def _place(values: NDArray[np.float64], degrees: Sequence[int], ranks: int, level: NDArray[np.int64]) -> Shares:
    """Place sequences, given an index into `degrees` for each (`level`)."""
    first_rank = np.zeros(values.shape[1], dtype=np.int64)
    loads: list[float] = [0.0]
    for index, degree in reversed(list(enumerate(degrees))):
        loads = [load for load in loads for _ in range(ranks // degree // len(loads))]
        chosen = np.flatnonzero(level == index)
        places, loads = _longest_first(values[index, chosen], loads)
        first_rank[chosen] = places * degree
    return Shares(np.asarray(degrees, dtype=np.int64)[level], first_rank, max(loads))


def rank_loads(costs: Costs, shares: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the summed cost of each rank's sequences, (ranks,)."""
    values = np.asarray(costs, dtype=np.float64)
    return np.array([values[share].sum() for share in shares])
