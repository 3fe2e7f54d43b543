"""Hold the samples of a batch of rows as flat arrays of tokens and targets.

**The shift** is made here and nowhere else: `targets[i]` is the id that position i has to predict, so it is the label
of i + 1, or -100 if that is not a target. The last position predicts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.data.notes import Note
from chunkflow_cli.data.preferences import NOT_PAIRED
from chunkflow_cli.data.sample import IGNORED, RejectedRow, TokenRow, digest_of
from chunkflow_cli.data.source import RowBatch


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The samples of a batch of rows, one after the other, and its bad rows."""

    input_ids: NDArray[np.int32]  # (tokens,)
    targets: NDArray[np.int32]  # (tokens,), shifted
    lengths: NDArray[np.int64]  # (samples,)
    target_counts: NDArray[np.int64]  # (samples,)
    digests: NDArray[np.uint64]  # (samples,), equal if tokens and targets are equal
    lines: NDArray[np.int64]  # (samples,), the same for all samples of a row
    marks: NDArray[np.int64]
    """(samples,) of a pair, the tokens of its chosen sequence, which comes first; of a labeled answer 1 if it is good,
    otherwise 0; -1 for all other samples."""
    file: int
    rejected: list[RejectedRow]
    notes: list[Note]
    ends: dict[int, int]
    """Ids of the special tokens that end the last answer of samples, and of how many."""
    position: int
    """How much of the source has been read, as in `RowBatch`."""


def concatenated(
    kept: list[tuple[int, TokenRow]],
    marks: list[int],
    rejected: list[tuple[int, str]],
    notes: list[Note],
    stops: dict[int, int],
    batch: RowBatch,
) -> EncodedBatch:
    """Join the samples of a batch, by line, in flat arrays of ids and targets."""
    rows = [row for _, row in kept]
    lengths = np.array([len(row.input_ids) for row in rows], np.int64)
    ends = np.cumsum(lengths)
    input_ids = _flat([row.input_ids for row in rows])
    labels = _flat([row.labels for row in rows])
    targets = np.full_like(labels, IGNORED)
    targets[:-1] = labels[1:]
    targets[ends - 1] = IGNORED
    counted = np.concatenate([[0], np.cumsum(targets != IGNORED)])
    starts = ends - lengths
    of_samples: Sequence[int | None] = marks or [None] * len(kept)
    digests = [
        digest_of(input_ids[start:end], targets[start:end], mark)
        for start, end, mark in zip(starts.tolist(), ends.tolist(), of_samples, strict=True)
    ]
    return EncodedBatch(
        input_ids=input_ids,
        targets=targets,
        lengths=lengths,
        digests=np.array(digests, np.uint64),
        target_counts=counted[ends] - counted[starts],
        lines=np.array([line for line, _ in kept], np.int64),
        marks=np.array(marks or [NOT_PAIRED] * len(kept), np.int64),
        file=batch.file,
        rejected=[RejectedRow(batch.file, line, reason) for line, reason in rejected],
        notes=notes,
        ends=dict(stops),
        position=batch.position,
    )


def _flat(arrays: list[NDArray[np.int64]]) -> NDArray[np.int32]:
    return np.concatenate(arrays).astype(np.int32) if arrays else np.empty(0, np.int32)
