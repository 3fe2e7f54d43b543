"""Plans of preferences: where answers lie, and that the proof finds weights that would be used before they are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.preferences import build_pair_chunks, preference_tasks
from chunkflow_cli.planning.schedule import OpKind, Schedule, plan_in_lockstep, plan_tasks
from chunkflow_cli.planning.schedule_proof import validate, validate_lockstep

SIZE = 32


def pairs(*lengths: int) -> Chunks:
    return build_pair_chunks(np.array(lengths, np.int64), SIZE)


def segments(chunks: Chunks) -> list[list[tuple[int, int, int]]]:
    return [[(part.sequence, part.start, part.stop) for part in chunk.segments] for chunk in chunks]


def test_answers_share_a_chunk_where_they_fit() -> None:
    assert segments(pairs(5, 6, 40, 20, 9, 7)) == [
        [(3, 0, 20), (0, 0, 5), (1, 0, 6)],
        [(2, 0, 32)],
        [(2, 32, 40), (4, 0, 9), (5, 0, 7)],
    ]


def test_only_the_last_chunks_of_one_answer_are_forwarded_once_more() -> None:
    chunks = pairs(90, 70)
    expected = {
        1: "P3 P4 P5 P0 P1 F2 B2 R1 B1 R0 B0 F5 B5 R4 B4 R3 B3",
        2: "P3 P4 P5 P0 F1+2 B2+1 R0 B0 F4+5 B5+4 R3 B3",
        9: "P3 P4 P5 F0+1+2 B2+1+0 F3+4+5 B5+4+3",
    }
    for k, line in expected.items():
        assert str(plan_tasks(preference_tasks(chunks, k, 2), join_retained=True)) == line


def test_a_long_prompt_is_run_by_one_answer() -> None:
    lengths, prompts = np.array([90, 70, 40, 36, 70, 95]), np.array([60, 5, 64])
    chunks = build_pair_chunks(lengths, SIZE, prompts=prompts)
    # The second pair's prompt is too short; the longer answer of the third is the rejected one. What is not in the
    # state of the other answer is run for both: its last chunk.
    assert chunks.branches() == {1: 59, 4: 63}
    assert segments(chunks) == [
        [(1, 59, 70)], [(4, 63, 70)],
        [(0, 0, 32)], [(0, 32, 64)], [(0, 64, 90)],
        [(2, 0, 32)], [(2, 32, 40)],
        [(3, 0, 32)], [(3, 32, 36)],
        [(5, 0, 32)], [(5, 32, 64)], [(5, 64, 95)],
    ]  # fmt: skip
    line = str(plan_tasks(preference_tasks(chunks, 2, 2), join_retained=True))
    assert "P2 P3 P4 F0 B0 F3+4 B4+3 R2 B2" in line
    validate(Schedule.parse(line), chunks, 2, answers=2)
    wrong = {
        line.replace("F0 B0 F3+4 B4+3", "F0 F3+4 B4+3 B0"): "chunk 0 has yet to give gradient to the prompt in chunk 3",
        f"P0 {line}": "the prompt in chunk 2 is not in the state that chunk 0 reads",
    }
    for schedule, reason in wrong.items():
        with pytest.raises(ValueError, match=reason):
            validate(Schedule.parse(schedule), chunks, 9, answers=2)


LENGTHS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=8)


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_plan_is_proved(ranks: list[list[tuple[int, int]]], k: int, fill_tails: bool, shares: bool) -> None:
    built = []
    for rank in ranks:
        lengths = np.array(rank, np.int64)
        prompts = np.maximum(1, lengths.min(axis=1) * 2 // 3) if shares else None
        built.append(build_pair_chunks(lengths.ravel(), SIZE, fill_tails=fill_tails, prompts=prompts))
    tasks = [preference_tasks(chunks, k, 2) for chunks in built]
    together = plan_in_lockstep(tasks)
    validate_lockstep(together)
    for chunks, own, schedule in zip(built, tasks, together, strict=True):
        validate(plan_tasks(own, join_retained=True), chunks, k, answers=2)
        validate(schedule, chunks, k, answers=2)
        held = np.bincount(chunks.sequence, chunks.stop - chunks.start)
        for branch, begin in chunks.branches().items():
            held[branch] += begin
        assert held.tolist() == chunks.lengths.tolist()
        again = sum(op.kind is OpKind.first_pass for op in schedule.ops if op.real_chunks)
        assert again < len(chunks)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("F0 B0 F1 B1", "the log-probabilities of chunk 1 weigh the targets of chunk 0"),
        ("P1 F1 B1 F0 B0", "the log-probabilities of chunk 0 weigh the targets of chunk 1"),
        ("P1 F0 B0", "chunk 1 never goes backward"),
        ("P1 P1 F0 B0 F1 B1", "chunk 1 needs no first pass after another forward"),
    ],
)
def test_weights_that_are_not_known_yet_are_found(line: str, reason: str) -> None:
    chunks = pairs(20, 25)
    validate(Schedule.parse("P1 F0 B0 F1 B1"), chunks, 1, answers=2)
    with pytest.raises(ValueError, match=reason):
        validate(Schedule.parse(line), chunks, 1, answers=2)
    with pytest.raises(ValueError, match="only preferences have a first pass"):
        validate(Schedule.parse("P1 F0 B0 F1 B1"), chunks, 1)
