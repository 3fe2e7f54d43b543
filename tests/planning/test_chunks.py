"""Chunk construction: by hand, by property, and against the optimum of a search."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.chunks import Chunk, Chunks, Segment, build_chunks, count_chunks, cut_points

LENGTHS = st.lists(st.integers(1, 60), max_size=25)
SIZES = st.integers(1, 24)


def listed(chunks: Chunks) -> list[list[tuple[int, int, int]]]:
    """Each chunk as its (sequence, start, stop)."""
    return [[(s.sequence, s.start, s.stop) for s in chunk.segments] for chunk in chunks]


def fewest_bins(sizes: list[int], capacity: int, open_rooms: tuple[int, ...]) -> int:
    """The fewest new bins that hold what the open ones cannot, by trying everything."""
    best = len(sizes)

    def place(index: int, rooms: list[int], opened: int) -> None:
        nonlocal best
        if opened >= best:
            return
        if index == len(sizes):
            best = opened
            return
        for room in sorted(set(rooms)):
            if room >= sizes[index]:
                rest = list(rooms)
                rest.remove(room)
                place(index + 1, [*rest, room - sizes[index]], opened)
        place(index + 1, [*rooms, capacity - sizes[index]], opened + 1)

    if sizes:
        place(0, list(open_rooms), 0)
    return best


def optimal_chunks(lengths: list[int], size: int, *, fill_tails: bool) -> int:
    long = [length for length in lengths if length > size]
    rooms = tuple(size - ((length - 1) % size + 1) for length in long) if fill_tails else ()
    short = sorted((length for length in lengths if length <= size), reverse=True)
    return sum(-(-length // size) for length in long) + fewest_bins(short, size, rooms)


@pytest.mark.parametrize("fill_tails", [True, False])
def test_worked_example_of_the_paper(fill_tails: bool) -> None:
    """Sequences of 1, 1, 2 and 4 units at ChunkSize 2 are four full chunks, the long sequence's last and in order."""
    chunks = build_chunks([1, 1, 2, 4], 2, fill_tails=fill_tails)
    assert sorted(listed(chunks)[:2]) == [[(0, 0, 1), (1, 0, 1)], [(2, 0, 2)]]
    assert listed(chunks)[2:] == [[(3, 0, 2)], [(3, 2, 4)]]
    assert chunks.dependent_groups() == [range(2, 4)]


def test_tail_is_filled_with_the_short_sequences_that_fit_best() -> None:
    """A tail of 2 in chunks of 10 takes 6 and then 2: the paper would open a chunk for each of the two lists."""
    chunks = build_chunks([22, 6, 2, 9], 10)
    assert listed(chunks) == [[(3, 0, 9)], [(0, 0, 10)], [(0, 10, 20)], [(0, 20, 22), (1, 0, 6), (2, 0, 2)]]
    assert chunks[3].tokens == 10
    assert chunks[3].is_dependent
    assert chunks.first_sequence(3) == 0
    assert not chunks[0].is_dependent


def test_tails_stay_alone_if_asked() -> None:
    """`chunk.fill_tails=false` is the paper's own construction, kept for comparison: no short sequence in a tail."""
    chunks = build_chunks([22, 6, 2, 9], 10, fill_tails=False)
    assert listed(chunks) == [[(3, 0, 9)], [(1, 0, 6), (2, 0, 2)], [(0, 0, 10)], [(0, 10, 20)], [(0, 20, 22)]]


def test_each_short_sequence_goes_to_the_tail_with_least_room() -> None:
    """Best fit, not first fit: 3 goes to the tail with 3 free although one with 8 comes first."""
    chunks = build_chunks([12, 17, 3], 10)
    assert listed(chunks) == [[(0, 0, 10)], [(0, 10, 12)], [(1, 0, 10)], [(1, 10, 17), (2, 0, 3)]]


def test_length_equal_to_the_size_is_one_standalone_chunk() -> None:
    """An off-by-one here makes a dependent chunk without successors, or a second empty one."""
    chunks = build_chunks([8], 8)
    assert listed(chunks) == [[(0, 0, 8)]]
    assert not chunks[0].is_dependent
    assert chunks.dependent_groups() == []


def test_length_that_the_size_divides_has_no_empty_tail() -> None:
    """The tail of a length of 2 x size is a full chunk, not an empty third one, and takes no short sequence."""
    chunks = build_chunks([16, 1], 8)
    assert listed(chunks) == [[(1, 0, 1)], [(0, 0, 8)], [(0, 8, 16)]]


def test_one_token_more_than_the_size_leaves_a_tail_of_one() -> None:
    """The smallest tail: its chunk is dependent although nearly empty."""
    chunks = build_chunks([9, 7], 8)
    assert listed(chunks) == [[(0, 0, 8)], [(0, 8, 9), (1, 0, 7)]]
    assert chunks.is_dependent.tolist() == [True, True]


def test_chunks_of_one_token() -> None:
    """Size 1 cuts everything to single tokens."""
    chunks = build_chunks([1, 3], 1)
    assert listed(chunks) == [[(0, 0, 1)], [(1, 0, 1)], [(1, 1, 2)], [(1, 2, 3)]]
    assert chunks.dependent_groups() == [range(1, 4)]


def test_single_short_sequence() -> None:
    chunks = build_chunks([3], 8)
    assert listed(chunks) == [[(0, 0, 3)]]


def test_no_sequences_no_chunks() -> None:
    """A rank without work gets a plan without chunks, not an error or a division by zero."""
    chunks = build_chunks([], 8)
    assert len(chunks) == 0
    assert list(chunks) == []
    assert chunks.tokens == 0
    assert chunks.dependent_groups() == []


def test_neighbouring_long_sequences_are_two_groups() -> None:
    """Chunks of two long sequences lie side by side: joined into one group, one would read the other's state."""
    chunks = build_chunks([5, 6], 3)
    assert chunks.dependent_groups() == [range(2), range(2, 4)]
    assert [chunks.first_sequence(chunk) for chunk in range(4)] == [0, 0, 1, 1]


def test_segment_tells_whether_its_sequence_goes_on() -> None:
    """`continues` decides whether keys and values are kept; true for a last piece it would leak them."""
    pieces = [Segment(0, 0, 4, 10), Segment(0, 4, 8, 10), Segment(0, 8, 10, 10)]
    assert [piece.continues for piece in pieces] == [True, True, False]
    assert [piece.tokens for piece in pieces] == [4, 4, 2]
    assert not any(piece.is_whole for piece in pieces)
    whole = Segment(1, 0, 3, 3)
    assert whole.is_whole
    assert not whole.continues
    assert Chunk((pieces[2], whole)).tokens == 5


def test_indexing_like_a_list() -> None:
    """Chunks are held as arrays; negative indices and the end must behave as in a list of chunks."""
    chunks = build_chunks([5, 2], 3)
    assert chunks[-1] == chunks[len(chunks) - 1]
    assert chunks[-len(chunks)] == chunks[0]
    for index in (len(chunks), -len(chunks) - 1):
        with pytest.raises(IndexError, match=f"chunk {index} of {len(chunks)}"):
            chunks[index]


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [
        ([3], 0, "chunk_size=0 must be at least 1"),
        ([3], -2, "chunk_size=-2 must be at least 1"),
        ([3, 0], 8, "lengths must be a flat list of positive numbers"),
        ([-1], 8, "lengths must be a flat list of positive numbers"),
        ([[3, 4]], 8, "lengths must be a flat list of positive numbers"),
    ],
)
def test_nonsense_is_refused(lengths: list[int], size: int, message: str) -> None:
    """An empty sample would make an empty segment, on which kernels fail far from the cause."""
    with pytest.raises(ValueError, match=message):
        build_chunks(lengths, size)


@given(LENGTHS, SIZES, st.booleans())
def test_every_token_is_in_exactly_one_chunk(lengths: list[int], size: int, fill_tails: bool) -> None:
    """A lost or doubled token changes the gradient without any error."""
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for chunk in build_chunks(lengths, size, fill_tails=fill_tails):
        for segment in chunk.segments:
            assert segment.length == lengths[segment.sequence]
            assert segment.start < segment.stop
            seen[segment.sequence][segment.start : segment.stop] += 1
    assert all((count == 1).all() for count in seen)


@given(LENGTHS, SIZES)
def test_counting_chunks_is_building_them(lengths: list[int], size: int) -> None:
    assert count_chunks(lengths, size) == len(build_chunks(lengths, size))


@given(LENGTHS, SIZES, st.booleans())
def test_shape_of_every_plan(lengths: list[int], size: int, fill_tails: bool) -> None:
    """What the schedule and the state store rely on: capacity, one long piece a chunk and first, order of chunks."""
    chunks = build_chunks(lengths, size, fill_tails=fill_tails)
    listed_chunks = list(chunks)
    for chunk in listed_chunks:
        assert 0 < chunk.tokens <= size
        assert all(segment.is_whole for segment in chunk.segments[1:])
        if not fill_tails and chunk.is_dependent:
            assert len(chunk.segments) == 1
    assert chunks.is_dependent.tolist() == [chunk.is_dependent for chunk in listed_chunks]
    dependent = [index for index, chunk in enumerate(listed_chunks) if chunk.is_dependent]
    assert dependent == list(range(len(listed_chunks) - len(dependent), len(listed_chunks)))
    groups = chunks.dependent_groups()
    assert list(itertools.chain.from_iterable(groups)) == dependent
    assert [chunks.first_sequence(group.start) for group in groups] == [
        index for index, length in enumerate(lengths) if length > size
    ]
    for group in groups:
        pieces = [listed_chunks[index].segments[0] for index in group]
        assert len({piece.sequence for piece in pieces}) == 1
        assert [piece.start for piece in pieces] == [size * position for position in range(len(pieces))]
        assert [piece.continues for piece in pieces] == [True] * (len(pieces) - 1) + [False]


@given(LENGTHS, SIZES)
def test_counts(lengths: list[int], size: int) -> None:
    """Filling tails can only save chunks, and no plan has fewer than the tokens need."""
    filled, apart = build_chunks(lengths, size), build_chunks(lengths, size, fill_tails=False)
    assert -(-sum(lengths) // size) <= len(filled) <= len(apart)
    assert filled.tokens == apart.tokens == sum(lengths)


@given(LENGTHS, SIZES, st.booleans())
def test_no_two_standalone_chunks_could_be_one(lengths: list[int], size: int, fill_tails: bool) -> None:
    """Best fit opens a chunk only for what fits nowhere, so at most one standalone chunk is half empty."""
    standalone = [c.tokens for c in build_chunks(lengths, size, fill_tails=fill_tails) if not c.is_dependent]
    assert all(a + b > size for a, b in itertools.combinations(standalone, 2))


@pytest.mark.parametrize("fill_tails", [True, False])
def test_close_to_the_optimum(fill_tails: bool) -> None:
    """A packing that decays (ascending instead of descending, say) wastes time silently: never more than one chunk over
    the fewest possible, and nearly always equal to it."""
    rng = np.random.default_rng(0)
    extra = []
    for _ in range(300):
        size = int(rng.integers(4, 20))
        lengths = rng.integers(1, size + size // 3 + 1, int(rng.integers(1, 10))).tolist()
        found = len(build_chunks(lengths, size, fill_tails=fill_tails))
        extra.append(found - optimal_chunks(lengths, size, fill_tails=fill_tails))
    assert min(extra) == 0, "the search is not optimal"
    assert max(extra) <= 1
    assert np.mean(extra) < 0.02


def test_the_plan_does_not_depend_on_the_container() -> None:
    """Lengths come as lists and as arrays of any integer type."""
    lengths = [7, 30, 2, 12, 12, 1]
    wanted = listed(build_chunks(lengths, 12))
    assert listed(build_chunks(tuple(lengths), 12)) == wanted
    assert listed(build_chunks(np.array(lengths, dtype=np.int32), 12)) == wanted


def test_many_lengths_plan_quickly() -> None:
    """A plan that scans the open bins is quadratic: minutes for 200,000 samples instead of a fraction of a second."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int64) + 1, 300_000)
    start = time.process_time()
    chunks = build_chunks(lengths, 8192)
    assert time.process_time() - start < 5
    assert chunks.tokens / (len(chunks) * chunks.chunk_size) > 0.999


@given(st.integers(2, 5000), st.integers(2, 300), st.floats(1e-5, 0.1))
def test_pieces_take_equally_long(length: int, size: int, pair_weight: float) -> None:
    """No piece is longer than a chunk, every token is in one, and times differ by what whole tokens cost."""
    cuts = cut_points(length, size, pair_weight)
    pieces = np.diff(cuts)
    assert cuts[0] == 0
    assert cuts[-1] == length
    assert (pieces > 0).all()
    assert pieces.max() <= size
    seconds = np.diff(cuts + pair_weight * cuts.astype(np.float64) ** 2 / 2)
    a_token = 1 + pair_weight * length  # the last token is the costliest
    assert seconds.max() - seconds.min() <= 2 * a_token + 1e-6
    whole = length + pair_weight * length**2 / 2
    fewest = whole / (size + pair_weight * size**2 / 2)
    assert len(pieces) <= np.ceil(fewest) + 1e-9


def test_without_weight_pieces_are_cut_by_tokens() -> None:
    assert cut_points(10, 4, 0.0).tolist() == [0, 4, 8, 10]


@given(LENGTHS, SIZES, st.booleans(), st.floats(1e-3, 1.0))
def test_equal_time_loses_no_token(lengths: list[int], size: int, fill_tails: bool, pair_weight: float) -> None:
    """And state is kept of all tokens before the last piece, wherever that begins."""
    chunks = build_chunks(lengths, size, fill_tails=fill_tails, pair_weight=pair_weight)
    seen = sorted(
        (s.sequence, position) for chunk in chunks for s in chunk.segments for position in range(s.start, s.stop)
    )
    assert seen == [(index, position) for index, length in enumerate(lengths) for position in range(length)]
    assert all(chunk.tokens <= size for chunk in chunks)
    for index, length in enumerate(lengths):
        last = max(s.start for chunk in chunks for s in chunk.segments if s.sequence == index)
        assert chunks.stored_tokens(index) == last < length
