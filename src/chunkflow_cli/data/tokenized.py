"""Samples in the cache: all of a data set, and the selection of them that a run uses, of one data set or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.cache import CacheEntry
from chunkflow_cli.data.preferences import AnswerSizes
from chunkflow_cli.data.sample import IGNORED, RejectedRow, TokenizedSample, digest_of
from chunkflow_cli.data.source import Location, Source


@dataclass(frozen=True)
class TokenizedSource:
    """A data set and its tokens before any policy: every sample at its full length, and every bad row."""

    source: Source
    format: DataFormat
    """Detected or configured, never `auto`."""
    entry: CacheEntry
    named: str
    """Key and path, for messages."""
    name: str | None = None
    """Name of the source in `data.sources`; None without."""
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


@dataclass(frozen=True)
class SourceCounts:
    """Counts of what happened to the rows of one source, before any are held out."""

    rows_read: int = 0
    samples_read: int = 0
    """Samples of the rows that were read; a rejected row counts as one."""
    samples_rejected: int = 0
    samples_dropped: int = 0
    """Samples that are too long (`data.overlong=drop`)."""
    samples_duplicate: int = 0
    """Samples that equal an earlier one (`data.deduplicate`)."""
    samples_beyond_limit: int = 0
    """Samples beyond the source's `samples`."""

    @property
    def samples_left(self) -> int:
        """Samples that are used."""
        out = self.samples_rejected + self.samples_dropped + self.samples_duplicate + self.samples_beyond_limit
        return self.samples_read - out


@dataclass(frozen=True, eq=False)
class TokenizedData:
    """A selection of samples from the cache, where they stay until they are read.

    `len(self) == total.samples_left` always holds. A part of the data (`select`) counts its own
    samples only: the whole reports what was rejected or left out.
    """

    wholes: tuple[TokenizedSource, ...]
    """The sources; one without `data.sources`."""
    sources: NDArray[np.int32]  # (samples,) index into `wholes`, ascending
    indices: NDArray[np.int64]  # (samples,) into the cache of their source
    lengths: NDArray[np.int64]  # (samples,), after truncation
    target_counts: NDArray[np.int64]  # (samples,), after truncation
    rejected: list[tuple[Location, str]]
    """Bad rows and why, in the order of the data."""
    counts: tuple[SourceCounts, ...]
    """What became of the rows of each source."""
    duplicates: list[tuple[Location, str]] = field(default_factory=list)
    """Samples left out as duplicates, and of what."""
    answers: AnswerSizes | None = None
    """Sizes of the sequences of preferences; None if a sample is one sequence to imitate."""

    def __post_init__(self) -> None:
        assert self.total.samples_left == len(self)

    @property
    def whole(self) -> TokenizedSource:
        """The source of data that has one."""
        (whole,) = self.wholes
        return whole

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources; empty without `data.sources`."""
        return tuple(whole.name for whole in self.wholes if whole.name is not None)

    @property
    def longest_sequences(self) -> NDArray[np.int64]:
        """Tokens of the longest sequence of each sample, (samples,): of preferences, of the longest answer."""
        return self.lengths if self.answers is None else self.answers.lengths.max(axis=1)

    @property
    def total(self) -> SourceCounts:
        """What became of the rows of all sources together."""
        return SourceCounts(*(sum(each) for each in zip(*map(astuple, self.counts), strict=True)))

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """(samples,) whether the end of a sample is cut off."""
        whole_lengths = [whole.entry.lengths[self._of(number)] for number, whole in enumerate(self.wholes)]
        return self.lengths < np.concatenate(whole_lengths)

    @property
    def samples_truncated(self) -> int:
        return int(np.count_nonzero(self.is_truncated))

    @property
    def rows(self) -> NDArray[np.int64]:
        """(samples,) number of each sample's row, ascending from 0 without gaps."""
        rows = [whole.entry.rows[self._of(number)] for number, whole in enumerate(self.wholes)]
        starts = np.cumsum([0, *(int(part.max(initial=-1)) + 1 for part in rows[:-1])])
        return np.unique(
            np.concatenate([start + part for start, part in zip(starts, rows, strict=True)]), return_inverse=True
        )[1]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> TokenizedSample:
        entry, sample = self.wholes[int(self.sources[index])].entry, int(self.indices[index])
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
        return self.wholes[int(self.sources[index])].location(int(self.indices[index]))

    def samples_of(self, source: int) -> NDArray[np.int64]:
        """Return the indices of the samples of a source, (samples,)."""
        first, last = np.searchsorted(self.sources, [source, source + 1])
        return np.arange(first, last)

    def _of(self, source: int) -> NDArray[np.int64]:
        """Return the samples of a source as indices into its cache."""
        return self.indices[self.samples_of(source)]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenizedData:
        """Return the samples with these indices; sources stay in order."""
        chosen = np.asarray(indices, np.int64)
        sources, rows = self.sources[chosen], self.rows[chosen]
        counts = tuple(
            SourceCounts(len(np.unique(rows[sources == number])), int((sources == number).sum()))
            for number in range(len(self.wholes))
        )
        return self._chosen(chosen, rejected=[], duplicates=[], counts=counts)

    def without(self, left_out: NDArray[np.bool_], reason: str) -> TokenizedData:
        """Return the data without some samples, which are counted.

        Args:
            left_out: (samples,) whether a sample is left out.
            reason: the field of `SourceCounts` that counts them.
        """
        lost = np.bincount(self.sources[left_out], minlength=len(self.wholes)).tolist()
        counts = tuple(
            replace(count, **{reason: getattr(count, reason) + more})
            for count, more in zip(self.counts, lost, strict=True)
        )
        return self._chosen(np.flatnonzero(~left_out), counts=counts)

    def _chosen(self, chosen: NDArray[np.int64], **changes: Any) -> TokenizedData:
        arrays = {name: getattr(self, name)[chosen] for name in ("sources", "indices", "lengths", "target_counts")}
        answers = None if self.answers is None else self.answers.select(chosen)
        return replace(self, **arrays, answers=answers, **changes)


def joined(parts: Sequence[TokenizedData]) -> TokenizedData:
    """Return the samples of several sources, one source after the other. Only one can hold preferences."""
    assert len(parts) == 1 or all(part.answers is None for part in parts)
    sizes = [len(part) for part in parts]
    return TokenizedData(
        wholes=tuple(part.whole for part in parts),
        sources=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        indices=np.concatenate([part.indices for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        target_counts=np.concatenate([part.target_counts for part in parts]),
        rejected=[row for part in parts for row in part.rejected],
        counts=tuple(part.counts[0] for part in parts),
        answers=parts[0].answers,
    )


def without_duplicates(data: TokenizedData) -> TokenizedData:
    """Return the data without samples whose tokens and targets equal those of an earlier one, of any source."""
    digests = [whole.entry.digests[data.indices[data.samples_of(n)]] for n, whole in enumerate(data.wholes)]
    known = np.concatenate(digests)
    for sample in np.flatnonzero(data.is_truncated).tolist():
        known[sample] = digest_of(*_content(data, sample))
    _, inverse, counts = np.unique(known, return_inverse=True, return_counts=True)
    is_duplicate = np.zeros(len(data), bool)
    firsts: dict[int, list[int]] = {}
    """Digest, by its number -> samples that differ from each other: digests of different samples may be equal."""
    found: list[tuple[Location, str]] = []
    for sample in np.flatnonzero(counts[inverse] > 1).tolist():
        alike = firsts.setdefault(int(inverse[sample]), [])
        first = next((other for other in alike if _are_equal(data, sample, other)), None)
        if first is None:
            alike.append(sample)
        else:
            is_duplicate[sample] = True
            found.append((data.location(sample), f"a duplicate of {data.location(first)}"))
    return replace(data.without(is_duplicate, "samples_duplicate"), duplicates=found)


def _are_equal(data: TokenizedData, one: int, other: int) -> bool:
    (ids, targets, mark), (other_ids, other_targets, other_mark) = _content(data, one), _content(data, other)
    return mark == other_mark and np.array_equal(ids, other_ids) and np.array_equal(targets, other_targets)


def _content(data: TokenizedData, sample: int) -> tuple[NDArray[np.int32], NDArray[np.int32], int | None]:
    """Return the tokens and the targets of a sample, of all of its sequences, and its mark if it is a preference."""
    if data.answers is None:
        return data[sample].input_ids, data[sample].targets, None
    sequences = data.sequences(sample)
    ids, targets = (np.concatenate([getattr(each, name) for each in sequences]) for name in ("input_ids", "targets"))
    mark = int(data.is_good[sample]) if len(sequences) == 1 else len(sequences[0].input_ids)
    return ids, targets, mark


def limited(data: TokenizedData, limits: Sequence[int | None], seed: int) -> TokenizedData:
    """Return at most as many samples of each source as its limit says, drawn by seed."""
    is_beyond = np.zeros(len(data), bool)
    for number, limit in enumerate(limits):
        samples = data.samples_of(number)
        if limit is not None:
            is_beyond[samples] = True
            is_beyond[samples[drawn(len(samples), limit, seed)]] = False
    return data.without(is_beyond, "samples_beyond_limit")


def hold_out(data: TokenizedData, fraction: float, seed: int) -> tuple[TokenizedData, TokenizedData]:
    """Return the samples to train on and those to hold out, of each source this fraction of its rows.

    All samples of a row stay together: with `data.turns=split` they have most of their tokens in common.
    """
    rows, is_held_out = data.rows, np.zeros(len(data), bool)
    for number in range(len(data.wholes)):
        samples = data.samples_of(number)
        own = np.unique(rows[samples])
        _, evaluation = held_out(len(own), fraction, seed)
        is_held_out[samples] = np.isin(rows[samples], own[evaluation])
    return data.select(np.flatnonzero(~is_held_out)), data.select(np.flatnonzero(is_held_out))


def held_out(samples: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the samples to train on and of those to hold out, each ascending.

    With more than one sample, a fraction above zero holds out at least one and leaves at least one.
    """
    if fraction == 0 or samples < 2:
        return np.arange(samples), np.arange(0)
    count = min(max(1, round(samples * fraction)), samples - 1)
    # A key of its own; otherwise the first epoch would be shuffled by the same numbers.
    order = np.random.default_rng((seed, 0x4E1D)).permutation(samples)
    return np.sort(order[count:]), np.sort(order[:count])


def drawn(samples: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of `count` of the samples, drawn by seed, ascending; all of them if there are not more."""
    if count >= samples:
        return np.arange(samples)
    return np.sort(np.random.default_rng((seed, 0xD4A3)).permutation(samples)[:count])
