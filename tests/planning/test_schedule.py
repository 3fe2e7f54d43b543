"""Schedules: golden lines, the round trip of their text, and a proof that refuses each way to be wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule, plan
from chunkflow_cli.planning.schedule_proof import validate

LENGTHS = st.lists(st.integers(1, 50), max_size=12)
SIZES = st.integers(1, 20)
KS = st.integers(1, 8)
OPS = st.builds(
    Op,
    st.sampled_from(OpKind),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4).map(tuple),
)


def line(lengths: list[int], size: int, k: int, *, join_retained: bool = False) -> str:
    return str(plan(build_chunks(lengths, size), k, join_retained=join_retained))


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, "S0 S1 F2 B2 R1 B1 R0 B0"),
        (2, "S0 F1 F2 B2 B1 R0 B0"),
        (3, "F0 F1 F2 B2 B1 B0"),
        (9, "F0 F1 F2 B2 B1 B0"),
    ],
)
def test_one_long_sequence(k: int, expected: str) -> None:
    """The *last* K chunks keep their activations, backwards descend: the paper's Algorithm 2 does neither."""
    assert line([5], 2, k) == expected


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, "S0 S1 F2 B2 R1 B1 R0 B0"),
        (2, "S0 F1+2 B2+1 R0 B0"),
        (3, "F0+1+2 B2+1+0"),
    ],
)
def test_retained_chunks_in_one_engine_call(k: int, expected: str) -> None:
    """ZeRO-3 traces one forward for one backward: the retained chunks must share both."""
    assert line([5], 2, k, join_retained=True) == expected


def test_standalone_chunks_go_first_and_back_at_once() -> None:
    """A standalone chunk holds no activation while a long sequence runs, or memory would exceed K chunks."""
    assert line([2, 2, 5], 2, 1) == "F0 B0 F1 B1 S2 S3 F4 B4 R3 B3 R2 B2"
    assert line([2, 5], 2, 2, join_retained=True) == "F0 B0 S1 F2+3 B3+2 R1 B1"


def test_long_sequences_run_one_after_the_other() -> None:
    """The state of one sequence is freed before the next begins: only one is ever held."""
    assert line([5, 3], 2, 1) == "S0 S1 F2 B2 R1 B1 R0 B0 S3 F4 B4 R3 B3"


def test_worked_example_of_the_paper() -> None:
    """Sequences of 1, 1, 2 and 4 units at ChunkSize 2: the chunks 0 and 1 are standalone, 2 and 3 dependent."""
    assert line([1, 1, 2, 4], 2, 1) == "F0 B0 F1 B1 S2 F3 B3 R2 B2"
    assert line([1, 1, 2, 4], 2, 2) == "F0 B0 F1 B1 F2 F3 B3 B2"


def test_nothing_to_do() -> None:
    """A rank without samples runs an empty schedule, which is valid and prints as nothing."""
    chunks = build_chunks([], 4)
    schedule = plan(chunks, 1)
    assert str(schedule) == ""
    assert Schedule.parse("") == schedule
    validate(schedule, chunks, 1)


def test_k_of_zero_is_refused() -> None:
    """K = 0 would keep no chunk, and so run no backward at all."""
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        plan(build_chunks([5], 2), 0)


@given(st.lists(OPS, max_size=30).map(lambda ops: Schedule(tuple(ops))))
def test_text_round_trip(schedule: Schedule) -> None:
    """Schedules are written to logs and read back: nothing may be lost on the way."""
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("word", ["X1", "F", "F1+", "F+1", "F-1", "f1", "F1++2", "1F", "F1,2", "F1.0", "F1@", "F1@1"])
def test_words_that_are_no_operation(word: str) -> None:
    """A typo in a schedule is named, not skipped."""
    with pytest.raises(ValueError, match=re.escape(f"{word!r} is not an operation")):
        Schedule.parse(f"S0 {word} B0")


@given(LENGTHS, SIZES, KS, st.booleans())
def test_every_plan_is_valid(lengths: list[int], size: int, k: int, join: bool) -> None:
    """What the runner runs is what `validate` proves, for any lengths."""
    chunks = build_chunks(lengths, size)
    schedule = plan(chunks, k, join_retained=join)
    validate(schedule, chunks, k)
    validate(Schedule.parse(str(schedule)), chunks, k)


@given(LENGTHS, SIZES, KS, st.booleans())
def test_recomputed_chunks(lengths: list[int], size: int, k: int, join: bool) -> None:
    """The price of K: each sequence of N chunks recomputes max(0, N - K), standalone chunks never."""
    chunks = build_chunks(lengths, size)
    pieces = [-(-length // size) for length in lengths if length > size]
    ops = plan(chunks, k, join_retained=join).ops
    assert sum(op.kind is OpKind.recompute for op in ops) == sum(max(0, n - k) for n in pieces)


@given(LENGTHS, SIZES, st.integers(1, 4), st.booleans(), st.data())
def test_a_plan_without_one_operation_is_refused(
    lengths: list[int], size: int, k: int, join: bool, data: st.DataObject
) -> None:
    """No operation of a plan is there for nothing: whichever is lost, the proof notices."""
    chunks = build_chunks(lengths, size)
    ops = plan(chunks, k, join_retained=join).ops
    assume(ops)
    lost = data.draw(st.integers(0, len(ops) - 1))
    with pytest.raises(ValueError, match=r"^operation \d+|never goes backward$"):
        validate(Schedule(ops[:lost] + ops[lost + 1 :]), chunks, k)


@given(LENGTHS, SIZES, st.integers(1, 4), st.data())
def test_a_plan_with_one_operation_twice_is_refused(lengths: list[int], size: int, k: int, data: st.DataObject) -> None:
    """A chunk that goes backward twice counts double in the gradient."""
    chunks = build_chunks(lengths, size)
    ops = plan(chunks, k).ops
    assume(ops)
    twice = data.draw(st.integers(0, len(ops) - 1))
    with pytest.raises(ValueError, match=rf"operation {twice + 1} "):
        validate(Schedule(ops[: twice + 1] + ops[twice:]), chunks, k)


# One sequence of three chunks (0, 1, 2 of [6]), or two standalone chunks before it (2, 3, 4 of [2, 2, 6]).
LONG, MIXED = [6], [2, 2, 6]

BROKEN = {
    "double backward": (LONG, 3, "F0 F1 F2 B2 B2 B1 B0", "operation 4 (B2): chunk 2 already went backward"),
    "forward after backward": (LONG, 3, "F0 F1 F2 B2 F2 B1 B0", "operation 4 (F2): chunk 2 already went backward"),
    "ascending backwards": (LONG, 3, "F0 F1 F2 B0 B1 B2", "operation 3 (B0): a later chunk of the sequence of chunk 0"),
    "ascending in one call": (LONG, 3, "F0+1+2 B0+1+2", "operation 1 (B0+1+2): a later chunk of the sequence"),
    "first kept, last not": (LONG, 1, "F0 S1 S2 B0 R1 B1 R2 B2", "operation 3 (B0): a later chunk"),
    "state before it is written": (LONG, 3, "F1 F0 F2 B2 B1 B0", "operation 0 (F1): an earlier chunk of the sequence"),
    "state pass out of order": (LONG, 1, "S1 S0 F2 B2 R1 B1 R0 B0", "operation 0 (S1): an earlier chunk"),
    "state read after it was freed": (
        LONG, 2, "S0 F1 F2 B2 B1 R0 B0 F1 B1", "operation 7 (F1): chunk 1 already went backward, its state is freed",
    ),
    "too many live": (LONG, 2, "F0 F1 F2 B2 B1 B0", "operation 2 (F2): 3 chunks hold activations, K is 2"),
    "too many live in one call": (LONG, 2, "F0+1+2 B2+1+0", "operation 0 (F0+1+2): 3 chunks hold activations, K is 2"),
    "standalone chunks held at once": (MIXED, 1, "F0 F1 B1 B0", "operation 1 (F1): 2 chunks hold activations, K is 1"),
    "standalone held beside a long one": (
        MIXED, 1, "F0 S2 S3 F4 B4 R3 B3 R2 B2 B0 F1 B1", "operation 3 (F4): 2 chunks hold activations",
    ),
    "missing standalone chunk": (MIXED, 3, "F0 B0 F2 F3 F4 B4 B3 B2", "chunk 1 never goes backward"),
    "missing last backward": (LONG, 1, "S0 S1 F2 B2 R1 B1", "chunk 0 never goes backward"),
    "nothing at all": (LONG, 1, "", "chunk 0 never goes backward"),
    "backward without forward": (LONG, 1, "S0 S1 B2", "operation 2 (B2): chunk 2 holds no activations"),
    "backward after a state pass only": (LONG, 1, "S0 S1 F2 B2 B1", "operation 4 (B1): chunk 1 holds no activations"),
    "recompute without state pass": (LONG, 3, "F0 F1 R2 B2", "operation 2 (R2): chunk 2 is recomputed if and only if"),
    "forward after state pass": (LONG, 1, "S0 S1 F2 B2 F1 B1", "operation 4 (F1): chunk 1 is recomputed if and only"),
    "two state passes": (LONG, 1, "S0 S0 S1 F2", "operation 1 (S0): chunk 0 needs no state pass"),
    "state pass of a standalone chunk": (MIXED, 1, "S0 R0 B0", "operation 0 (S0): chunk 0 needs no state pass"),
    "forward twice": (LONG, 3, "F0 F0 F1 F2", "operation 1 (F0): chunk 0 already holds activations"),
    "recompute twice": (LONG, 1, "S0 S1 F2 B2 R1 R1", "operation 5 (R1): chunk 1 already holds activations"),
    "chunk that is not there": (LONG, 1, "S0 S1 S2 F3", "operation 3 (F3): there are only 3 chunks"),
    "joined state passes": (LONG, 1, "S0+1 F2 B2 R1 B1 R0 B0", "operation 0 (S0+1): only forwards and backwards"),
    "joined recomputes": (LONG, 2, "S0 S1 F2 B2 R0+1 B1+0", "operation 4 (R0+1): only forwards and backwards"),
    "split backward": (LONG, 3, "F0 F1 F2 I2 W2", "operation 3 (I2): only pipeline stages split backwards"),
    "second half alone": (LONG, 3, "F0 F1 F2 W2", "operation 3 (W2): only pipeline stages split backwards"),
    "backward of half an engine call": (LONG, 3, "F0+1+2 B2 B1 B0", "operation 1 (B2): the chunks were not forwarded"),
    "backward of two engine calls": (LONG, 3, "F0 F1 F2 B2+1 B0", "operation 3 (B2+1): the chunks were not forwarded"),
}  # fmt: skip


@pytest.mark.parametrize(("lengths", "k", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_schedules_are_refused(lengths: list[int], k: int, text: str, message: str) -> None:
    """Each rule that the gradient or the memory bound rests on, broken once: refused, and for that reason."""
    chunks = build_chunks(lengths, 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(Schedule.parse(text), chunks, k)


def test_unusual_but_right_schedules_pass() -> None:
    """`validate` is the rules, not a comparison with `plan`: another right order must pass."""
    chunks: Chunks = build_chunks(MIXED, 2)
    for text in (
        "S2 S3 F4 B4 R3 B3 R2 B2 F1 B1 F0 B0",
        "F0 F1 B0 B1 F2 F3 F4 B4 B3 B2",
        "F2 F3 F4 B4 B3 F0 B0 B2 F1 B1",
        "F0+1 B1+0 S2 F3+4 B4+3 R2 B2",
    ):
        validate(Schedule.parse(text), chunks, 3)
