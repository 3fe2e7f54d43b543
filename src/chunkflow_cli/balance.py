"""Whole sequences to data-parallel ranks, by predicted cost.

Longest-processing-time-first (Graham 1969): the costliest sequence that is left goes to the rank with the least so far.
No rank then has more than 4/3 of the best possible maximum; on long-tailed data, where one sequence is often more than
a rank's fair share, it usually is the best possible.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Costs = Sequence[float] | NDArray[np.float64] | NDArray[np.int64]


def balance(costs: Costs, ranks: int) -> list[NDArray[np.int64]]:
    """Indices of the sequences of each rank, ascending. A pure function of its arguments: equal on every rank.

    Args:
        costs: (sequences,) predicted cost of each; any unit.
        ranks: how many data-parallel ranks there are. With fewer sequences than ranks, some get none.

    Raises:
        ValueError: `ranks` is not positive, or a cost is negative or not a number.
    """
    values = np.asarray(costs, dtype=np.float64)
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if values.ndim != 1 or not (values >= 0).all():
        raise ValueError("costs must be a flat list of numbers that are not negative")
    if ranks == 1:
        return [np.arange(len(values), dtype=np.int64)]
    loads = [(0.0, rank) for rank in range(ranks)]  # a heap; of equal loads the lowest rank comes first
    rank_of = np.empty(len(values), dtype=np.int64)
    costliest_first = np.argsort(-values, kind="stable")
    for sequence, cost in zip(costliest_first.tolist(), values[costliest_first].tolist(), strict=True):
        load, rank = loads[0]
        rank_of[sequence] = rank
        heapq.heapreplace(loads, (load + cost, rank))
    return [np.flatnonzero(rank_of == rank) for rank in range(ranks)]


def rank_loads(costs: Costs, shares: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """(ranks,) the summed cost of each rank's sequences."""
    values = np.asarray(costs, dtype=np.float64)
    return np.array([values[share].sum() for share in shares])
