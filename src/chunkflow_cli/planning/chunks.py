"""Chunk construction: short sequences are packed, long ones are split, into chunks of at most `chunk_size` tokens.

Source: ChunkFlow (arXiv 2503.02356), Algorithm 1. Two things differ. Packing is best-fit decreasing instead of a
trial of 1, 2, 3... bins: it reaches the fewest bins nearly always and needs one pass. And the last chunk of a long
sequence may be filled with short sequences (`fill_tails`), where the paper leaves it partly empty; attention treats
each segment alone, so nothing but the waste changes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece `[start, stop)` of one sequence, placed in a chunk."""

    sequence: int
    """Index into the lengths that the chunks were built from."""
    start: int
    stop: int
    length: int
    """Tokens of the whole sequence."""

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.tokens == self.length

    @property
    def continues(self) -> bool:
        """Whether later chunks hold more of this sequence, and so will read its keys and values."""
        return self.stop < self.length


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of a forward or backward: one or more segments. A piece of a long sequence always comes first."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def is_dependent(self) -> bool:
        return not self.segments[0].is_whole

    @property
    def long_sequence(self) -> int | None:
        """The sequence that this chunk holds a piece of; None for a standalone chunk."""
        return self.segments[0].sequence if self.is_dependent else None


@dataclass(frozen=True)
class Chunks(Sequence[Chunk]):
    """The chunks of one optimizer step of one rank, as arrays: a million small objects would cost more than the plan.

    Standalone chunks come first, then the dependent chunks of each long sequence, together and in order.
    """

    chunk_size: int
    first_segment: NDArray[np.int64]
    """(chunks + 1,): segments of chunk i are `first_segment[i]` up to `first_segment[i + 1]`."""
    sequence: NDArray[np.int64]
    """(segments,)"""
    start: NDArray[np.int64]
    """(segments,)"""
    stop: NDArray[np.int64]
    """(segments,)"""
    lengths: NDArray[np.int64]
    """(sequences,): tokens of each sequence."""

    def __len__(self) -> int:
        return len(self.first_segment) - 1

    def __getitem__(self, index: int) -> Chunk:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        first, last = self.first_segment[index % len(self)], self.first_segment[index % len(self) + 1]
        return Chunk(
            tuple(
                Segment(
                    int(self.sequence[i]), int(self.start[i]), int(self.stop[i]), int(self.lengths[self.sequence[i]])
                )
                for i in range(first, last)
            )
        )

    def __iter__(self) -> Iterator[Chunk]:
        return (self[index] for index in range(len(self)))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def is_dependent(self) -> NDArray[np.bool_]:
        """(chunks,)"""
        first = self.first_segment[:-1]
        return (self.stop - self.start)[first] < self.lengths[self.sequence[first]]

    @property
    def lower_bound(self) -> int:
        """No plan has fewer chunks: ceil(tokens / chunk_size)."""
        return -(-self.tokens // self.chunk_size)

    @property
    def fill(self) -> float:
        """Share of the chunks' room that holds tokens."""
        return self.tokens / (len(self) * self.chunk_size) if len(self) else 1.0

    def stored_tokens(self, sequence: int) -> int:
        """Tokens of a sequence whose keys and values a later chunk reads: all before its last piece."""
        return int(self.start[self.sequence == sequence].max())

    def dependent_groups(self) -> list[range]:
        """For each long sequence, the indices of its chunks, in order."""
        dependent = np.flatnonzero(self.is_dependent)
        if not len(dependent):
            return []
        sequences = self.sequence[self.first_segment[dependent]]
        edges = np.flatnonzero(np.diff(sequences)) + 1
        return [range(int(group[0]), int(group[-1]) + 1) for group in np.split(dependent, edges)]


def build_chunks(
    lengths: Sequence[int] | NDArray[np.int64],
    chunk_size: int,
    *,
    fill_tails: bool = True,
    pair_weight: float = 0.0,
) -> Chunks:
    """Chunks that together hold every token of every sequence exactly once.

    A sequence longer than `chunk_size` is cut every `chunk_size` tokens, or into pieces that take equally long (see
    `cut_points`); a chunk holds at most one such piece. The others go, longest first, where they leave the least room
    (best-fit decreasing).

    Args:
        lengths: (sequences,) tokens of each sequence.
        chunk_size: most tokens in a chunk.
        fill_tails: let the last chunk of a long sequence take short sequences.
        pair_weight: seconds of a query-key pair, in seconds of a token; above 0, pieces are cut to take equally long.

    Raises:
        ValueError: a length or the chunk size is not positive.
    """
    sizes = _checked(lengths, chunk_size)
    long = np.flatnonzero(sizes > chunk_size)
    long_start, long_stop, pieces = _cut(sizes[long], chunk_size, pair_weight)
    tails = (long_stop - long_start)[np.cumsum(pieces) - 1]
    bins, bin_of = _best_fit_decreasing(sizes, chunk_size, tails if fill_tails else tails[:0])

    standalone = bins - (len(long) if fill_tails else 0)
    chunk_count = standalone + int(pieces.sum())
    # Bin b < len(long) is the tail of long[b] (if tails are filled); the others are standalone chunks, which go first.
    last_chunk_of_long = standalone + np.cumsum(pieces) - 1
    first_chunks = np.concatenate([last_chunk_of_long if fill_tails else last_chunk_of_long[:0], np.arange(standalone)])

    short = np.flatnonzero(sizes <= chunk_size)
    sequence = np.concatenate([np.repeat(long, pieces), short])
    start = np.concatenate([long_start, np.zeros_like(short)])
    stop = np.concatenate([long_stop, sizes[short]])
    chunk = np.concatenate([standalone + np.arange(int(pieces.sum())), first_chunks[bin_of[short]]])
    order = np.argsort(chunk, kind="stable")  # stable: the piece of a long sequence stays before the short ones
    first_segment = np.searchsorted(chunk[order], np.arange(chunk_count + 1))
    return Chunks(chunk_size, first_segment.astype(np.int64), sequence[order], start[order], stop[order], sizes)


def join_chunks(first: Chunks, second: Chunks) -> Chunks:
    """The chunks of `first`, then those of `second`, over the sequences of both in that order.

    Standalone chunks are then first only within each of the two. `chunk_size` is that of `second`: they may differ.
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
    """(pieces + 1,) where a long sequence is cut, from 0 to its length.

    Without weight, every `chunk_size` tokens. With it, into the fewest pieces of at most `chunk_size` tokens that take
    equally long (InfiniPipe, arXiv 2509.21275, balances its splits so): the time of the first t positions is
    t + w t^2 / 2, in seconds of a token, so the i-th of N cuts lies where that is i / N of the whole. The first piece
    is the longest.
    """
    if pair_weight <= 0:
        return np.append(np.arange(0, length, chunk_size), length)
    weight = float(pair_weight)
    whole, most = (size + weight * size**2 / 2 for size in (float(length), float(chunk_size)))
    pieces = int(np.ceil(whole / most))
    share = np.arange(1, pieces) * (whole / pieces)
    cuts = np.floor((np.sqrt(1 + 2 * weight * share) - 1) / weight).astype(np.int64)
    return np.unique(np.concatenate([[0], cuts, [length]]))  # where pieces would be of less than a token: fewer of them


def _cut(
    sizes: NDArray[np.int64], chunk_size: int, pair_weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(pieces,) starts and stops of the pieces of all long sequences, and (sequences,) how many each has."""
    if pair_weight <= 0:
        pieces = -(-sizes // chunk_size)
        index = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return index * chunk_size, np.minimum((index + 1) * chunk_size, np.repeat(sizes, pieces)), pieces
    cuts = [cut_points(size, chunk_size, pair_weight) for size in sizes.tolist()]
    empty = np.empty(0, dtype=np.int64)
    return (
        np.concatenate([each[:-1] for each in cuts] or [empty]),
        np.concatenate([each[1:] for each in cuts] or [empty]),
        np.array([len(each) - 1 for each in cuts], dtype=np.int64),
    )


def count_chunks(lengths: Sequence[int] | NDArray[np.int64], chunk_size: int) -> int:
    """`len(build_chunks(lengths, chunk_size))`, in less time.

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
    """Number of bins, and the bin of each size that fits in one (-1 for the others); bins 0.. already hold `tails`.

    Open bins are kept by the room that they have left, in a sorted list of the distinct values: at most `capacity`
    of them, however many bins there are.
    """
    bin_of = np.full(len(sizes), -1, dtype=np.int64)
    short = np.flatnonzero(sizes <= capacity)
    if not len(tails) and 0 < int(sizes[short].sum()) <= capacity:
        bin_of[short] = 0
        return 1, bin_of
    bins_with_room: dict[int, list[int]] = {}
    for index, tail in enumerate(tails.tolist()):
        bins_with_room.setdefault(capacity - tail, []).append(index)
    bins_with_room.pop(0, None)
    rooms = sorted(bins_with_room)
    bins = len(tails)
    order = short[np.argsort(-sizes[short], kind="stable")]
    chosen = []
    for size in sizes[order].tolist():  # a million times: function calls would take half of the time
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
