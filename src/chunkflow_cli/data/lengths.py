"""Statistics of sample lengths, and the costs of ordinary batching."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K = 1024
THRESHOLDS = (1 * K, 4 * K, 8 * K, 32 * K, 128 * K)
"""Lengths in the cumulative table, as in the paper (arXiv 2503.02356, table 1)."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}

Lengths = NDArray[np.int64]  # (samples,) tokens of each sample


def short_count(tokens: int) -> str:
    """Format a length in powers of two: 512, 4K, 256K, 1M."""
    for size, unit in ((K * K, "M"), (K, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def bucket_names() -> list[str]:
    """Return the names of the ranges between `THRESHOLDS`: `<1K`, `1K-4K`, ..., `>=128K`."""
    names = [short_count(limit) for limit in THRESHOLDS]
    between = [f"{low}-{high}" for low, high in itertools.pairwise(names)]
    return [f"<{names[0]}", *between, f">={names[-1]}"]


def bucket_of(lengths: Lengths) -> NDArray[np.int64]:
    """Return the range that each length is in, (samples,), as an index into `bucket_names`."""
    return np.searchsorted(THRESHOLDS, lengths, side="right")


@dataclass(frozen=True)
class LengthStatistics:
    """Length statistics of one data set. Shares are between 0 and 1."""

    samples: int
    tokens: int
    mean: float
    quantiles: dict[str, int]
    """For each quantile, the smallest length that at least this share of the samples does not exceed."""
    max: int
    shorter: dict[str, float]
    """Share of the samples that are strictly shorter than each of `THRESHOLDS`, named `<4K` for 4096."""
    tokens_in_shorter: dict[str, float]
    """Share of all tokens that those samples hold."""


def describe(lengths: Lengths) -> LengthStatistics:
    """Return the statistics of a data set's lengths.

    Raises:
        ValueError: there are no samples.
    """
    if len(lengths) == 0:
        raise ValueError("there are no samples to describe")
    ascending = np.sort(lengths)
    tokens_up_to = np.concatenate([[0], np.cumsum(ascending)])
    total = int(tokens_up_to[-1])
    shorter = {f"<{short_count(limit)}": int(np.searchsorted(ascending, limit, side="left")) for limit in THRESHOLDS}
    ranks = {name: max(0, int(np.ceil(share * len(ascending))) - 1) for name, share in QUANTILES.items()}
    return LengthStatistics(
        samples=len(ascending),
        tokens=total,
        mean=total / len(ascending),
        quantiles={name: int(ascending[rank]) for name, rank in ranks.items()},
        max=int(ascending[-1]),
        shorter={name: count / len(ascending) for name, count in shorter.items()},
        tokens_in_shorter={name: int(tokens_up_to[count]) / max(1, total) for name, count in shorter.items()},
    )


@dataclass(frozen=True)
class Histogram:
    """Samples and tokens by length, in bins whose width doubles."""

    edges: NDArray[np.int64]  # (bins + 1,): bin i holds lengths in [edges[i], edges[i + 1])
    samples: NDArray[np.int64]  # (bins,)
    tokens: NDArray[np.int64]  # (bins,)


def histogram(lengths: Lengths) -> Histogram:
    """Return the bins from the shortest sample to the longest. Bins begin at powers of two."""
    first = int(lengths.min()).bit_length() - 1
    last = int(lengths.max()).bit_length()
    edges = 1 << np.arange(first, last + 1, dtype=np.int64)
    bins = np.searchsorted(edges, lengths, side="right") - 1
    count = len(edges) - 1
    return Histogram(
        edges,
        np.bincount(bins, minlength=count),
        np.bincount(bins, weights=lengths, minlength=count).astype(np.int64),
    )


@dataclass(frozen=True)
class Truncation:
    """Samples and tokens that a length limit would remove."""

    limit: int
    samples_cut: int
    tokens_lost: int


def truncation(lengths: Lengths, limit: int) -> Truncation:
    """Count what truncation to `limit` tokens would remove."""
    beyond = np.maximum(lengths - limit, 0)
    return Truncation(limit, int(np.count_nonzero(beyond)), int(beyond.sum()))


def padding_share(lengths: Lengths, batch_size: int) -> float:
    """Return the share of padding if batches of consecutive samples are padded to their longest one."""
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths, starts)
    in_batch = np.diff(np.append(starts, len(lengths)))
    return 1.0 - float(lengths.sum()) / float((longest * in_batch).sum())


def idle_share(loads: Sequence[NDArray[np.float64]]) -> float:
    """Return the share of the ranks' time that they wait for the slowest one.

    Args:
        loads: for each step, (ranks,) the cost of each rank.
    """
    longest = sum(float(load.max()) for load in loads)
    busy = sum(float(load.mean()) for load in loads)
    return 1.0 - busy / longest if longest else 0.0
