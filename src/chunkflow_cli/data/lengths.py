"""What a set of sample lengths looks like, and what ordinary batching would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K = 1024
THRESHOLDS = (1 * K, 4 * K, 8 * K, 32 * K, 128 * K)
"""Of the cumulative table; the paper's (arXiv 2503.02356, table 1)."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}

Lengths = NDArray[np.int64]  # (samples,) tokens of each sample


def threshold_name(tokens: int) -> str:
    """`<4K` for 4096."""
    return f"<{short_count(tokens)}"


def short_count(tokens: int) -> str:
    """Tokens as people write lengths: 512, 4K, 256K, 1M; in powers of two."""
    for size, unit in ((K * K, "M"), (K, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


@dataclass(frozen=True)
class LengthStatistics:
    """Of one data set. Shares are between 0 and 1."""

    samples: int
    tokens: int
    mean: float
    quantiles: dict[str, int]
    """The smallest length that at least this share of the samples does not exceed."""
    max: int
    shorter: dict[str, float]
    """Share of the samples that are strictly shorter than each of `THRESHOLDS`."""
    tokens_in_shorter: dict[str, float]
    """Share of all tokens that those samples hold."""


def describe(lengths: Lengths) -> LengthStatistics:
    """
    Raises:
        ValueError: there are no samples.
    """
    if len(lengths) == 0:
        raise ValueError("there are no samples to describe")
    ascending = np.sort(lengths)
    tokens_up_to = np.concatenate([[0], np.cumsum(ascending)])
    total = int(tokens_up_to[-1])
    shorter = {threshold: int(np.searchsorted(ascending, threshold, side="left")) for threshold in THRESHOLDS}
    ranks = {name: max(0, int(np.ceil(share * len(ascending))) - 1) for name, share in QUANTILES.items()}
    return LengthStatistics(
        samples=len(ascending),
        tokens=total,
        mean=total / len(ascending),
        quantiles={name: int(ascending[rank]) for name, rank in ranks.items()},
        max=int(ascending[-1]),
        shorter={threshold_name(threshold): count / len(ascending) for threshold, count in shorter.items()},
        tokens_in_shorter={
            threshold_name(threshold): int(tokens_up_to[count]) / max(1, total) for threshold, count in shorter.items()
        },
    )


@dataclass(frozen=True)
class Histogram:
    """Samples and tokens by length, in bins that double."""

    edges: NDArray[np.int64]  # (bins + 1,): bin i holds the lengths of [edges[i], edges[i + 1])
    samples: NDArray[np.int64]  # (bins,)
    tokens: NDArray[np.int64]  # (bins,)


def histogram(lengths: Lengths) -> Histogram:
    """From the bin of the shortest sample to that of the longest; bins begin at powers of two."""
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
    """What a limit would take from the data."""

    limit: int
    samples_cut: int
    tokens_lost: int


def truncation(lengths: Lengths, limit: int) -> Truncation:
    beyond = np.maximum(lengths - limit, 0)
    return Truncation(limit, int(np.count_nonzero(beyond)), int(beyond.sum()))


def padding_share(lengths: Lengths, batch_size: int) -> float:
    """Share of the positions that is padding, if batches of consecutive samples are padded to their longest one."""
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths, starts)
    in_batch = np.diff(np.append(starts, len(lengths)))
    return 1.0 - float(lengths.sum()) / float((longest * in_batch).sum())


def idle_share(loads: Sequence[NDArray[np.float64]]) -> float:
    """Share of the ranks' time that is waiting for the slowest one.

    Args:
        loads: of each step, (ranks,) the cost of each rank.
    """
    longest = sum(float(load.max()) for load in loads)
    busy = sum(float(load.mean()) for load in loads)
    return 1.0 - busy / longest if longest else 0.0
