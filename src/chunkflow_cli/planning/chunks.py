"""Build chunks of at most `chunk_size` tokens: short sequences are packed, long ones are split.

Source: ChunkFlow (arXiv 2503.02356), Algorithm 1, with two differences. Packing is best-fit decreasing instead of a
trial of 1, 2, 3... bins: it needs one pass and nearly always reaches the fewest bins. And short sequences may fill the
last chunk of a long one (`fill_tails`), which the paper leaves partly empty. Attention treats each segment separately,
so only the waste changes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Unit = tuple[int, ...]
"""Indices of one standalone chunk, or of all chunks of a long sequence, ascending."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece `[start, stop)` of one sequence, placed in a chunk."""

    sequence: int
    """Index into the lengths that the chunks were built from."""
    start: int
    stop: int
    length: int
    """Number of tokens in the whole sequence."""

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.tokens == self.length

    @property
    def continues(self) -> bool:
        """True if later chunks hold more of this sequence, and so read the keys and values of this segment."""
        return self.stop < self.length


@dataclass(frozen=True, slots=True)
class Chunk:
    """One or more segments that go through the model together. A piece of a long sequence always comes first."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def is_dependent(self) -> bool:
        return not self.segments[0].is_whole


@dataclass(frozen=True)
class Chunks(Sequence[Chunk]):
    """The chunks of one rank in one optimizer step, stored as arrays because a million objects would be slow.

    Standalone chunks come first, then the dependent chunks of each long sequence, together and in order.
    """

    chunk_size: int
    first_segment: NDArray[np.int64]
    """(chunks + 1,) chunk i holds segments `first_segment[i]` to `first_segment[i + 1] - 1`."""
    sequence: NDArray[np.int64]
    """(segments,), like `start` and `stop`: the fields of each `Segment`."""
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """(sequences,) tokens of each sequence."""

    def __len__(self) -> int:
        return len(self.first_segment) - 1

    def __getitem__(self, index: int) -> Chunk:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        index %= len(self)
        segments = slice(self.first_segment[index], self.first_segment[index + 1])
        sequence = self.sequence[segments]
        columns = (sequence, self.start[segments], self.stop[segments], self.lengths[sequence])
        return Chunk(tuple(map(Segment, *(column.tolist() for column in columns))))

    def __iter__(self) -> Iterator[Chunk]:
        return (self[index] for index in range(len(self)))

    @property
    def tokens(self) -> int:
        return int((self.stop - self.start).sum())

    def begin(self, chunk: int) -> int:
        """Return the position at which the first segment of a chunk begins."""
        return int(self.start[self.first_segment[chunk]])

    def first_sequence(self, chunk: int) -> int:
        """Return the sequence of a chunk's first segment: of a dependent chunk, its long sequence."""
        return int(self.sequence[self.first_segment[chunk]])

    def branches(self) -> dict[int, int]:
        """Return the first positions of sequences that continue from the prompt of the other answer of their pair.

        That answer, `sequence ^ 1`, runs the positions before.
        """
        found = {}
        for group in self.dependent_groups():
            if (begin := self.begin(group.start)) > 0:
                found[self.first_sequence(group.start)] = begin
        return found

    @property
    def is_dependent(self) -> NDArray[np.bool_]:
        """(chunks,)"""
        first = self.first_segment[:-1]
        return (self.stop - self.start)[first] < self.lengths[self.sequence[first]]

    def stored_tokens(self, sequence: int) -> int:
        """Return how many tokens of a sequence later chunks read the keys and values of: all before its last piece."""
        return int(self.start[self.sequence == sequence].max())

    def dependent_groups(self) -> list[range]:
        """Return the indices of the chunks of each long sequence, in order."""
        dependent = np.flatnonzero(self.is_dependent)
        if not len(dependent):
            return []
        sequences = self.sequence[self.first_segment[dependent]]
        edges = np.flatnonzero(np.diff(sequences)) + 1
        return [range(int(group[0]), int(group[-1]) + 1) for group in np.split(dependent, edges)]

    def units(self) -> list[Unit]:
        """Return what stays together in any order of the chunks: standalone chunks first, then long sequences."""
        groups = self.dependent_groups()
        standalone = range(groups[0].start if groups else len(self))
        return [(chunk,) for chunk in standalone] + [tuple(group) for group in groups]


def build_chunks(
    lengths: Sequence[int] | NDArray[np.int64],
    chunk_size: int,
    *,
    fill_tails: bool = True,
    pair_weight: float = 0.0,
    is_base: NDArray[np.bool_] | None = None,
) -> Chunks:
    """Return the chunks that together hold every token of every sequence exactly once.

    A sequence longer than `chunk_size` is cut at its `cut_points`; a chunk holds at most one such piece. The other
    sequences go, longest first, where they leave the least room (best-fit decreasing).

    Args:
        lengths: (sequences,) tokens of each sequence.
        chunk_size: most tokens in a chunk.
        fill_tails: let the last chunk of a long sequence take short sequences.
        pair_weight: seconds of a query-key pair divided by seconds of a token. Above 0, the pieces of a long sequence
            take equally long.
        is_base: (sequences,) short sequences that begin a chunk each, and are treated as long ones of one piece; by
            default none.

    Raises:
        ValueError: a length or the chunk size is not positive.
    """
    sizes = _checked(lengths, chunk_size)
    is_long = sizes > chunk_size
    alone = np.zeros_like(is_long) if is_base is None else is_base & ~is_long
    long, short = np.concatenate([np.flatnonzero(alone), np.flatnonzero(is_long)]), np.flatnonzero(~is_long & ~alone)
    long_start, long_stop, pieces = _cut(sizes[long], chunk_size, pair_weight)
    tails = np.cumsum(pieces)[: len(long) if fill_tails else 0] - 1
    packed = np.where(alone, chunk_size + 1, sizes)  # what stands alone goes into no bin
    bins, bin_of = _best_fit_decreasing(packed, chunk_size, (long_stop - long_start)[tails])
    # The first bins are the tails that may be filled. The others are the standalone chunks, which go first.
    standalone = bins - len(tails)
    chunk_of_bin = np.concatenate([standalone + tails, np.arange(standalone)])

    sequence = np.concatenate([np.repeat(long, pieces), short])
    start = np.concatenate([long_start, np.zeros_like(short)])
    stop = np.concatenate([long_stop, sizes[short]])
    chunk = np.concatenate([standalone + np.arange(len(long_start)), chunk_of_bin[bin_of[short]]])
    order = np.argsort(chunk, kind="stable")  # stable: the piece of a long sequence stays before the short ones
    first_segment = np.searchsorted(chunk[order], np.arange(standalone + len(long_start) + 1))
    return Chunks(chunk_size, first_segment.astype(np.int64), sequence[order], start[order], stop[order], sizes)


def join_chunks(first: Chunks, second: Chunks) -> Chunks:
    """Return the chunks of `first`, then those of `second`, over the sequences of both in that order.

    Standalone chunks come first only within each of the two. `chunk_size` is that of `second`; the two may differ.
    """
    return Chunks(
        second.chunk_size,
        np.concatenate([first.first_segment, second.first_segment[1:] + first.first_segment[-1]]),
        np.concatenate([first.sequence, second.sequence + len(first.lengths)]),
        np.concatenate([first.start, second.start]),
        np.concatenate([first.stop, second.stop]),
        np.concatenate([first.lengths, second.lengths]),
    )


def cut_points(length: int, chunk_size: int, pair_weight: float) -> NDArray[np.int64]:
    """Return where a long sequence is cut, (pieces + 1,), from 0 to its length.

    With `pair_weight` 0, the cuts are `chunk_size` tokens apart. Above 0, there are as few pieces of at most
    `chunk_size` tokens as possible, and they take equally long (InfiniPipe, arXiv 2509.21275, balances its splits this
    way). The first t tokens take t + w t^2 / 2, in seconds of a token, so the i-th of N cuts is where that is i / N of
    the whole. The first piece is the longest.
    """
    if pair_weight <= 0:
        return np.append(np.arange(0, length, chunk_size), length)
    weight = float(pair_weight)
    whole, most = (size + weight * size**2 / 2 for size in (float(length), float(chunk_size)))
    pieces = int(np.ceil(whole / most))
    share = np.arange(1, pieces) * (whole / pieces)
    cuts = np.floor((np.sqrt(1 + 2 * weight * share) - 1) / weight).astype(np.int64)
    return np.unique(np.concatenate([[0], cuts, [length]]))  # pieces of less than a token are merged


def _cut(
    sizes: NDArray[np.int64], chunk_size: int, pair_weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return starts and stops of the pieces of all long sequences, (pieces,), and how many each has, (sequences,)."""
    if pair_weight <= 0:  # what `cut_points` returns, in half of the time
        pieces = -(-sizes // chunk_size)
        index = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return index * chunk_size, np.minimum((index + 1) * chunk_size, np.repeat(sizes, pieces)), pieces
    cuts = [cut_points(size, chunk_size, pair_weight) for size in sizes.tolist()]
    none = np.empty(0, dtype=np.int64)
    return (
        np.concatenate([none, *(each[:-1] for each in cuts)]),
        np.concatenate([none, *(each[1:] for each in cuts)]),
        np.array([len(each) - 1 for each in cuts], dtype=np.int64),
    )


def count_chunks(lengths: Sequence[int] | NDArray[np.int64], chunk_size: int) -> int:
    """Return `len(build_chunks(lengths, chunk_size))` in less time.

    Raises:
        ValueError: a length or the chunk size is not positive.
    """
    sizes = _checked(lengths, chunk_size)
    long = sizes[sizes > chunk_size]
    bins, _ = _best_fit_decreasing(sizes, chunk_size, (long - 1) % chunk_size + 1)
    return bins + int(((long - 1) // chunk_size).sum())


def _checked(lengths: Sequence[int] | NDArray[np.int64], chunk_size: int) -> NDArray[np.int64]:
    sizes = np.asarray(lengths, dtype=np.int64)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if sizes.ndim != 1 or (sizes < 1).any():
        raise ValueError("lengths must be a flat list of positive numbers")
    return sizes


def _best_fit_decreasing(
    sizes: NDArray[np.int64], capacity: int, tails: NDArray[np.int64]
) -> tuple[int, NDArray[np.int64]]:
    """Return the number of bins and the bin of each size, -1 for a size that fits in none.

    The first bins already hold `tails`. Open bins are kept by the room that is left in them, with a sorted list of the
    distinct values: at most `capacity` of them, however many bins there are.
    """
    bin_of = np.full(len(sizes), -1, dtype=np.int64)
    short = np.flatnonzero(sizes <= capacity)
    bins_with_room: dict[int, list[int]] = {}
    for index, tail in enumerate(tails.tolist()):
        bins_with_room.setdefault(capacity - tail, []).append(index)
    bins_with_room.pop(0, None)
    rooms = sorted(bins_with_room)
    bins = len(tails)
    order = short[np.argsort(-sizes[short], kind="stable")]
    chosen = []
    for size in sizes[order].tolist():  # up to a million times: function calls would double the time
        place = bisect_left(rooms, size)
        if place == len(rooms):
            index, room = bins, capacity - size
            bins += 1
        else:
            fitting = rooms[place]
            indices = bins_with_room[fitting]
            index, room = indices.pop(), fitting - size
            if not indices:
                del bins_with_room[fitting], rooms[place]
        chosen.append(index)
        if room in bins_with_room:
            bins_with_room[room].append(index)
        elif room:
            bins_with_room[room] = [index]
            insort(rooms, room)
    bin_of[order] = chosen
    return bins, bin_of
