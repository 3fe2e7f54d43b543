"""The simulation of a pipeline: timelines worked out by hand, an independent simulator, and every way to hang."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.pipeline_orders import state_aware_1f1b
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule, plan
from chunkflow_cli.planning.simulate import OperationSeconds, simulate, simulate_ranks
from chunkflow_cli.planning.timeline import Timeline


def lines(*text: str) -> list[Schedule]:
    return [Schedule.parse(line) for line in text]


def stage_rows(timeline: Timeline, stage: int) -> list[tuple[str, float, float]]:
    """What a stage did: operation, start, stop."""
    return [
        (f"{timeline.kind[row]}{timeline.chunk[row]}", timeline.start_seconds[row], timeline.stop_seconds[row])
        for row in np.flatnonzero(timeline.stage == stage)
    ]


def test_one_stage_never_waits() -> None:
    """One stage runs one operation after the other: chunks of 2 and 3 tokens, backward twice the forward."""
    timeline = simulate(lines("F0 B0 F1 B1"), OperationSeconds.proportional([2, 3], 1))
    assert stage_rows(timeline, 0) == [("F0", 0, 2), ("B0", 2, 6), ("F1", 6, 9), ("B1", 9, 15)]
    assert timeline.makespan == 15
    assert timeline.busy_seconds.tolist() == [[15]]
    assert timeline.bubble_ratio == timeline.bubble_ratio_recompute_idle == 0


def test_two_stages_by_hand() -> None:
    """1F1B of two micro-batches of 1 and 2 units on two stages:

    stage 0   F0 F1 F1 .  B0 B0 .  .  .  .  B1 B1 B1 B1
    stage 1   .  F0 B0 B0 F1 F1 B1 B1 B1 B1 .  .  .  .
    """
    timeline = simulate(lines("F0 F1 B0 B1", "F0 B0 F1 B1"), OperationSeconds.proportional([1, 2], 2))
    assert stage_rows(timeline, 0) == [("F0", 0, 1), ("F1", 1, 3), ("B0", 4, 6), ("B1", 10, 14)]
    assert stage_rows(timeline, 1) == [("F0", 1, 2), ("B0", 2, 4), ("F1", 4, 6), ("B1", 6, 10)]
    assert timeline.makespan == 14
    assert timeline.busy_seconds.tolist() == [[9, 9]]
    assert timeline.bubble_ratio == 1 - 18 / 28
    assert timeline.live_activations.tolist() == [2, 1]


def test_messages_take_their_time_and_hold_up_nobody() -> None:
    """Half a second for chunk 0, a whole one for chunk 1, each way: the sender goes on meanwhile."""
    plain = OperationSeconds.proportional([1, 2], 2)
    seconds = OperationSeconds(
        plain.forward, plain.backward, plain.recompute, plain.state_pass, transfer=np.array([[0.5, 1.0]])
    )
    timeline = simulate(lines("F0 F1 B0 B1", "F0 B0 F1 B1"), seconds)
    assert stage_rows(timeline, 0) == [("F0", 0, 1), ("F1", 1, 3), ("B0", 5, 7), ("B1", 11.5, 15.5)]
    assert stage_rows(timeline, 1) == [("F0", 1.5, 2.5), ("B0", 2.5, 4.5), ("F1", 4.5, 6.5), ("B1", 6.5, 10.5)]


def test_recompute_is_local_and_does_not_wait_for_the_gradient() -> None:
    """Stage 0 recomputes chunk 0 at 7, from its own input, while stage 1 is still busy with its gradient (until 8):

    stage 0   S0 F1 .  .  .  B1 B1 R0 B0 B0
    stage 1   .  S0 F1 B1 B1 R0 B0 B0 .  .
    """
    timeline = simulate(lines("S0 F1 B1 R0 B0", "S0 F1 B1 R0 B0"), OperationSeconds.proportional([1, 1], 2))
    assert stage_rows(timeline, 1) == [("S0", 1, 2), ("F1", 2, 3), ("B1", 3, 5), ("R0", 5, 6), ("B0", 6, 8)]
    assert stage_rows(timeline, 0) == [("S0", 0, 1), ("F1", 1, 2), ("B1", 5, 7), ("R0", 7, 8), ("B0", 8, 10)]
    assert timeline.busy_seconds.tolist() == [[7, 7]]
    assert timeline.recompute_seconds.tolist() == [[1, 1]]
    assert timeline.bubble_ratio == pytest.approx(1 - 14 / 20)
    assert timeline.bubble_ratio_recompute_idle == pytest.approx(1 - 12 / 20)
    assert timeline.live_activations.tolist() == [1, 1]


def test_split_backward_sends_its_gradient_before_its_weight_gradient() -> None:
    """Stage 0 waits for I, not for W: it starts at 3, when a whole backward would have let it start at 4."""
    timeline = simulate(lines("F0 I0 W0", "F0 I0 W0"), OperationSeconds.proportional([1], 2))
    assert stage_rows(timeline, 1) == [("F0", 1, 2), ("I0", 2, 3), ("W0", 3, 4)]
    assert stage_rows(timeline, 0) == [("F0", 0, 1), ("I0", 3, 4), ("W0", 4, 5)]
    assert timeline.live_activations.tolist() == [1, 1]
    seconds, live = timeline.live_bytes(0, 1, [1])
    assert (seconds.tolist(), live.tolist()) == ([1, 2, 2, 3, 3, 4], [1, 1, 1, 1, 1, 0]), "W frees, I does not"
    # Whole and split backwards understand each other: what is awaited is the gradient.
    mixed = simulate(lines("F0 B0", "F0 I0 W0"), OperationSeconds.proportional([1], 2))
    assert stage_rows(mixed, 0) == [("F0", 0, 1), ("B0", 3, 5)]


def test_stages_may_differ() -> None:
    """Durations are a stage's own: the last one has the head to run as well."""
    forward = np.array([[1.0], [4.0]])
    timeline = simulate(lines("F0 B0", "F0 B0"), OperationSeconds(forward, 3 * forward, forward, forward))
    assert timeline.busy_seconds.tolist() == [[4, 16]]
    assert timeline.makespan == 20


def test_memory_over_time() -> None:
    """Activations of 10 and 20 bytes, state of 1 and 2: S takes state alone, R activations, B frees both."""
    timeline = simulate(lines("S0 F1 B1 R0 B0"), OperationSeconds.proportional([1, 1], 1))
    seconds, live = timeline.live_bytes(0, 0, [1, 1])
    assert seconds.tolist() == [0, 1, 1, 2, 2, 4, 4, 5, 5, 7]
    assert live.tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    at, held = timeline.live_bytes(0, 0, [10, 20], [1, 2])
    assert dict(zip(at.tolist(), held.tolist(), strict=True)) == {0: 1, 1: 23, 2: 23, 4: 11, 5: 11, 7: 0}
    assert timeline.live_bytes(0, 0, [10, 20])[1].max() == 20


def test_split_backward_frees_state_before_activations() -> None:
    timeline = simulate(lines("F0 I0 W0"), OperationSeconds.proportional([1], 1))
    _, held = timeline.live_bytes(0, 0, [10], [1])
    assert held.tolist() == [11, 11, 11, 10, 10, 0]


def test_ranks_wait_for_the_slowest() -> None:
    """Two ranks of one stage, of 3 and 6 units: the first waits for half of the step at the optimizer."""
    timeline = simulate_ranks(
        [
            (lines("F0 B0"), OperationSeconds.proportional([1], 1)),
            (lines("F0 B0"), OperationSeconds.proportional([2], 1)),
        ]
    )
    assert timeline.rank.tolist() == [0, 0, 1, 1]
    assert timeline.makespan == 6
    assert timeline.busy_seconds.tolist() == [[3], [6]]
    assert timeline.bubble_ratio == 0.25
    assert timeline.live_activations.tolist() == [1]


def test_ranks_are_named_and_have_as_many_stages() -> None:
    one = (lines("F0 B0"), OperationSeconds.proportional([1], 1))
    two = (lines("F0 B0", "F0 B0"), OperationSeconds.proportional([1], 2))
    with pytest.raises(ValueError, match=r"same number of stages, not \[1, 2\]"):
        simulate_ranks([one, two])
    with pytest.raises(ValueError, match=r"^rank 1: stage 0, operation 0 \(B0\) waits forever"):
        simulate_ranks([one, (lines("B0"), one[1])])


def test_joined_operations_have_a_row_for_each_chunk() -> None:
    """What one engine call takes is the sum over its chunks: ZeRO-3's schedules can be simulated too."""
    chunks = build_chunks([5], 2)
    seconds = OperationSeconds.proportional([2, 2, 1], 1)
    joined = simulate([plan(chunks, 2, join_retained=True)], seconds)
    assert stage_rows(joined, 0)[:5] == [("S0", 0, 2), ("F1", 2, 4), ("F2", 4, 5), ("B2", 5, 7), ("B1", 7, 11)]
    assert joined.makespan == simulate([plan(chunks, 2)], seconds).makespan


def test_nothing_to_do() -> None:
    """A rank without samples takes no time and divides nothing by zero."""
    timeline = simulate(lines("", ""), OperationSeconds.proportional([], 2))
    assert timeline.makespan == timeline.bubble_ratio == 0
    assert timeline.live_activations.tolist() == [0, 0]


HANGS = {
    "backward before forward": (["B0 F0"], "stage 0, operation 0 (B0) waits forever: it needs a forward with activations of chunk 0 before it"),
    "backward after a state pass only": (["S0 B0"], "stage 0, operation 1 (B0) waits forever: it needs a forward with activations of chunk 0"),
    "recompute without state pass": (["R0 B0"], "stage 0, operation 0 (R0) waits forever: it needs a state pass of chunk 0"),
    "weight gradient first": (["F0 W0 I0"], "stage 0, operation 1 (W0) waits forever: it needs an input gradient of chunk 0"),
    "no forward before": (["", "F0 B0"], "stage 1, operation 0 (F0) waits forever: it needs a forward of chunk 0 on stage 0"),
    "no backward after": (["F0 B0", "F0"], "stage 0, operation 1 (B0) waits forever: it needs a backward of chunk 0 on stage 1"),
    "each waits for the other": (
        ["F0 B0 F1 B1", "F0 F1 B0 B1"],
        "stage 0, operation 1 (B0) waits forever: it needs stage 1, operation 2 (B0), which never runs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), HANGS.values(), ids=HANGS)
def test_deadlocks_are_named(text: list[str], message: str) -> None:
    """A schedule that would hang for ever on a cluster fails in milliseconds here, with the place."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        simulate(lines(*text), OperationSeconds.proportional([1, 1], len(text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["F0 F0 B0", "F0 B0"], "stage 0, operation 1 (F0): runs a second time"),
        (["F0 B0 B0", "F0 B0"], "stage 0, operation 2 (B0): runs a second time"),
        (["F0 I0 B0 W0", "F0 B0"], "stage 0, operation 2 (B0): runs a second time"),
        (["F0 I0 W0 W0", "F0 B0"], "stage 0, operation 3 (W0): runs a second time"),
        (["F0 B0", "F0 B0 F7"], "stage 1, operation 2 (F7): there are only 2 chunks"),
        (["F0 B0", "F0 B0", "F0 B0"], "there are schedules of 3 stages, and seconds of 2"),
        (["F0 B0"], "there are schedules of 1 stages, and seconds of 2"),
        ([], "there are schedules of 0 stages, and seconds of 2"),
    ],
)
def test_schedules_that_do_not_fit(text: list[str], message: str) -> None:
    """What cannot be simulated is refused, and the operation named."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        simulate(lines(*text), OperationSeconds.proportional([1, 1], 2))


def test_durations_that_do_not_fit() -> None:
    one = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"backward has shape \(2, 2\), not \(2, 3\)"):
        OperationSeconds(one, np.ones((2, 2)), one, one)
    with pytest.raises(ValueError, match=r"transfer has shape \(2, 3\), not \(1, 3\)"):
        OperationSeconds(one, one, one, one, transfer=one)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="state_pass holds a duration that is not a number of seconds"):
            OperationSeconds(one, one, one, np.full((2, 3), wrong))
    with pytest.raises(ValueError, match="a split backward has two halves"):
        OperationSeconds(one, one, one, one, input_gradient=one)
    with pytest.raises(ValueError, match=r"forwards have shape \(3,\)"):
        OperationSeconds(one[0], one[0], one[0], one[0])
    with pytest.raises(ValueError, match=r"operation 1 \(I0\): no seconds are given for a split backward"):
        simulate(lines("F0 I0 W0"), OperationSeconds(one[:1], one[:1], one[:1], one[:1]))


def naive_stops(schedules: list[Schedule], seconds: OperationSeconds) -> dict[tuple[int, int], float]:
    """When each operation (stage, position) stops, straight from the rules and by recursion: slow, and independent."""

    def find(stage: int, chunk: int, kinds: tuple[OpKind, ...]) -> tuple[int, int]:
        for position, op in enumerate(schedules[stage].ops):
            if op.kind in kinds and op.chunks == (chunk,):
                return stage, position
        raise AssertionError(f"no {kinds} of chunk {chunk} on stage {stage}")

    @cache
    def stop(stage: int, position: int) -> float:
        op: Op = schedules[stage].ops[position]
        (chunk,) = op.chunks
        start = stop(stage, position - 1) if position else 0.0
        message: tuple[int, int] | None = None
        edge = stage
        if op.kind in (OpKind.state_pass, OpKind.forward) and stage > 0:
            edge = stage - 1
            message = find(edge, chunk, (OpKind.state_pass, OpKind.forward))
        elif op.kind in (OpKind.backward, OpKind.input_gradient) and stage < len(schedules) - 1:
            message = find(stage + 1, chunk, (OpKind.backward, OpKind.input_gradient))
        if message is not None:
            on_its_way = 0.0 if seconds.transfer is None else float(seconds.transfer[edge, chunk])
            start = max(start, stop(*message) + on_its_way)
        values = seconds.of_kind(op.kind)
        assert values is not None
        return start + float(values[stage, chunk])

    return {(s, p): stop(s, p) for s, schedule in enumerate(schedules) for p in range(len(schedule.ops))}


def random_seconds(seed: int, stages: int, chunks: int) -> OperationSeconds:
    """Nothing in proportion to anything, whole sixteenths so that sums are exact; backwards split without loss."""
    random = np.random.default_rng(seed)

    def draw(rows: int) -> np.ndarray:
        return random.integers(0, 64, (rows, chunks)) / 16

    first, second = draw(stages), draw(stages)
    return OperationSeconds(
        draw(stages), first + second, draw(stages), draw(stages), first, second, draw(stages - 1),
    )  # fmt: skip


@given(
    st.lists(st.integers(1, 30), max_size=6), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_against_the_naive_simulator(lengths: list[int], size: int, k: int, stages: int, extra: int, seed: int) -> None:
    """Every stop time to the digit, for any durations and transfers."""
    chunks = build_chunks(lengths, size)
    schedules = list(state_aware_1f1b(chunks, k, stages, extra))
    seconds = random_seconds(seed, stages, len(chunks))
    timeline = simulate(schedules, seconds)
    expected = naive_stops(schedules, seconds)
    assert timeline.stop_seconds.tolist() == list(expected.values())
    assert timeline.makespan == max(expected.values(), default=0.0)
