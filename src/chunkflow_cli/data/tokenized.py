"""Samples in the cache: all of a data set, and the selection of them that a run uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.cache import CacheEntry
from chunkflow_cli.data.preferences import AnswerSizes
from chunkflow_cli.data.sample import IGNORED, RejectedRow, TokenizedSample
from chunkflow_cli.data.source import Location, Source
from chunkflow_cli.planning.batches import held_out


@dataclass(frozen=True)
class TokenizedSource:
    """A data set and its tokens before any policy: every sample at its full length, and every bad row."""

    source: Source
    format: DataFormat
    """Detected or configured, never `auto`."""
    entry: CacheEntry
    named: str
    """Key and path, for messages."""
    chat_template: str | None = None
    """Text of `data.chat_template`, which the tokenizer is saved with; None: it keeps its own."""

    @property
    def key(self) -> str:
        """Key of the cache's entry: a hash of the rows and of everything that decides which tokens they become."""
        return self.entry.folder.name

    def location(self, sample: int) -> Location:
        """Return where a sample of the cache is in the user's data."""
        return self.source.location(int(self.entry.files[sample]), int(self.entry.lines[sample]))

    def locate(self, rows: Sequence[RejectedRow]) -> list[tuple[Location, str]]:
        """Return where bad rows are in the user's data, and why they are bad."""
        return [(self.source.location(row.file, row.line), row.reason) for row in rows]


@dataclass(frozen=True, eq=False)
class TokenizedData:
    """A selection of the cache's samples, which stay on disk until they are read.

    `samples_read == len(self) + samples_rejected + samples_dropped` always holds. A part of the data (`select`) counts
    its own samples only: the whole reports what was rejected or dropped.
    """

    whole: TokenizedSource
    indices: NDArray[np.int64]  # (samples,) into the cache
    lengths: NDArray[np.int64]  # (samples,), after truncation
    target_counts: NDArray[np.int64]  # (samples,), after truncation
    rejected: list[tuple[Location, str]]
    """Bad rows and why, in the order of the data."""
    rows_read: int
    samples_read: int
    """Samples of the rows that were read; a rejected row counts as one."""
    samples_dropped: int
    answers: AnswerSizes | None = None
    """Sizes of the sequences of preferences; None if a sample is one sequence to imitate."""

    def __post_init__(self) -> None:
        assert self.samples_read == len(self) + self.samples_rejected + self.samples_dropped

    @property
    def format(self) -> DataFormat:
        return self.whole.format

    @property
    def key(self) -> str:
        """Key of the cache's entry, as in `TokenizedSource`. Policies and `select` do not change it."""
        return self.whole.key

    @property
    def samples_rejected(self) -> int:
        return len(self.rejected)

    @property
    def samples_truncated(self) -> int:
        return int(np.count_nonzero(self.lengths < self.whole.entry.lengths[self.indices]))

    @property
    def rows(self) -> NDArray[np.int64]:
        """(samples,) number of each sample's row, ascending from 0 without gaps."""
        return np.unique(self.whole.entry.rows[self.indices], return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> TokenizedSample:
        entry, sample = self.whole.entry, int(self.indices[index])
        start, stop = int(entry.offsets[sample]), int(entry.offsets[sample + 1])
        end = start + int(self.lengths[index])
        targets = entry.targets[start:end]
        if end < stop:
            targets = targets.copy()
            targets[-1] = IGNORED  # the token that it predicts is cut off
        return TokenizedSample(entry.input_ids[start:end], targets)

    def sequences(self, index: int) -> list[TokenizedSample]:
        """Return the sequences of a sample: those of both answers of a pair, otherwise one."""
        if self.answers is None:
            return [self[index]]
        entry, sample = self.whole.entry, int(self.indices[index])
        own = slice(int(entry.offsets[sample]), int(entry.offsets[sample + 1]))
        return self.answers.sequences(index, entry.input_ids[own], entry.targets[own])

    @property
    def is_good(self) -> NDArray[np.bool_]:
        """(samples,) labels of answers that have one."""
        good: NDArray[np.bool_] = self.whole.entry.marks[self.indices] == 1
        return good

    def location(self, index: int) -> Location:
        """Return where the sample is in the user's data."""
        return self.whole.location(int(self.indices[index]))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenizedData:
        """Return the samples with these indices, in this order."""
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            indices=self.indices[chosen],
            lengths=self.lengths[chosen],
            target_counts=self.target_counts[chosen],
            rejected=[],
            rows_read=len(np.unique(self.rows[chosen])),
            samples_read=len(chosen),
            samples_dropped=0,
            answers=None if self.answers is None else self.answers.select(chosen),
        )


def hold_out(data: TokenizedData, fraction: float, seed: int) -> tuple[TokenizedData, TokenizedData]:
    """Return the samples to train on and those to hold out.

    All samples of a row stay together: with `data.turns=split` they have most of their tokens in common.
    """
    rows = data.rows
    train, evaluation = held_out(int(rows.max(initial=-1)) + 1, fraction, seed)
    return data.select(np.flatnonzero(np.isin(rows, train))), data.select(np.flatnonzero(np.isin(rows, evaluation)))
