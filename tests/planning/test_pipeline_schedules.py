"""Pipeline schedules: the paper's example to the digit, proofs for any lengths, and the distance from the optimum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.costs import chunk_tokens
from chunkflow_cli.planning.pipeline import (
    PIPELINE_SCHEDULES,
    PipelineLayout,
    activation_bound,
    plan_pipeline,
    sequences_as_chunks,
)
from chunkflow_cli.planning.pipeline_orders import live_activations, plain_1f1b, state_aware_1f1b
from chunkflow_cli.planning.pipeline_search import searched
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule, plan
from chunkflow_cli.planning.schedule_proof import validate_pipeline
from chunkflow_cli.planning.simulate import OperationSeconds, simulate
from chunkflow_cli.planning.timeline import Timeline
from chunkflow_cli.planning.zero_bubble import zero_bubble

GOLDEN = Path(__file__).parent / "golden"


def run(chunks: Chunks, k: int, layout: PipelineLayout) -> tuple[tuple[Schedule, ...], Timeline]:
    """Plan, prove and simulate with the assumptions of the paper."""
    schedules = plan_pipeline(chunks, k, layout)
    validate_pipeline(schedules, chunks, k, most_live=activation_bound(k, layout))
    return schedules, simulate(schedules, OperationSeconds.proportional(chunk_tokens(chunks), layout.stages))


# Sequences of 1, 1, 2 and 4 units on 4 stages. At ChunkSize 2: chunk 0 the one of 2, chunk 1 both of 1, then 2 and 3.
EXAMPLE = [1, 1, 2, 4]
WORKED_EXAMPLE = {
    "equal lengths": (sequences_as_chunks([2, 2, 2, 2]), 1, "1f1b", 0, 42, 42.86, 42.86, [4, 3, 2, 1]),
    "plain, in the order 4 2 1 1": (sequences_as_chunks([4, 2, 1, 1]), 1, "1f1b", 0, 56, 57.14, 57.14, [4, 3, 2, 1]),
    "ChunkSize 4": (build_chunks(EXAMPLE, 4), 1, "state_aware_1f1b", 0, 60, 60.00, 60.00, [2, 2, 2, 1]),
    "ChunkSize 2, K=2": (build_chunks(EXAMPLE, 2), 2, "state_aware_1f1b", 0, 46, 47.83, 47.83, [4, 3, 2, 2]),
    "ChunkSize 2, K=1": (build_chunks(EXAMPLE, 2), 1, "state_aware_1f1b", 0, 48, 45.83, 50.00, [3, 2, 2, 1]),
    "K=2, one more warm-up": (build_chunks(EXAMPLE, 2), 2, "state_aware_1f1b", 1, 42, 42.86, 42.86, [4, 4, 3, 2]),
    "K=1, one more warm-up": (build_chunks(EXAMPLE, 2), 1, "state_aware_1f1b", 1, 44, 40.91, 45.45, [3, 3, 2, 2]),
}


@pytest.mark.parametrize(
    ("chunks", "k", "name", "extra", "makespan", "bubble", "bubble_recompute_idle", "live"),
    WORKED_EXAMPLE.values(),
    ids=WORKED_EXAMPLE,
)
def test_worked_example(
    chunks: Chunks, k: int, name: str, extra: int, makespan: float, bubble: float, bubble_recompute_idle: float,
    live: list[int],
) -> None:  # fmt: skip
    """ChunkFlow's figures 2, 6 and 7 (57.14, 42.8, 47.8 and 60 %), and ours past them."""
    _, timeline = run(chunks, k, PipelineLayout(4, name, warmup_extra=extra))
    assert timeline.makespan == makespan
    assert round(100 * timeline.bubble_ratio, 2) == bubble
    assert round(100 * timeline.bubble_ratio_recompute_idle, 2) == bubble_recompute_idle
    assert timeline.live_activations.tolist() == live


def literal_rule(chunks: Chunks, k: int, stages: int, units: list[tuple[int, ...]]) -> list[Schedule]:
    """The paper's prose and no more: a forward before each backward, and more where a sibling is missing."""
    forwards = [
        Op(OpKind.state_pass if place < len(unit) - k else OpKind.forward, (chunk,))
        for unit in units
        for place, chunk in enumerate(unit)
    ]
    schedules = []
    for stage in range(stages):
        issued = min(stages - 1 - stage, len(forwards))
        ops, end_of_unit = forwards[:issued], 0
        for unit in units:
            end_of_unit += len(unit)
            for place, chunk in reversed(list(enumerate(unit))):
                until = min(len(forwards), max(issued + 1, end_of_unit))
                ops = ops + forwards[issued:until]
                issued = until
                ops += [Op(OpKind.recompute, (chunk,))] if place < len(unit) - k else []
                ops += [Op(OpKind.backward, (chunk,))]
        schedules.append(Schedule(tuple(ops)))
    validate_pipeline(schedules, chunks, k)
    return schedules


@pytest.mark.parametrize(("k", "literal", "ours"), [(2, 54, 42), (1, 56, 44)])
def test_worked_example_with_the_long_sequence_first(k: int, literal: float, ours: float) -> None:
    """The paper's rule wants standalone chunks first (46 and 48); with whole units ahead the order hardly matters."""
    chunks = build_chunks(EXAMPLE, 2)
    seconds = OperationSeconds.proportional(chunk_tokens(chunks), 4)
    first, last = [(2, 3), (0,), (1,)], [(0,), (1,), (2, 3)]
    assert simulate(literal_rule(chunks, k, 4, first), seconds).makespan == literal
    assert simulate(state_aware_1f1b(chunks, k, 4, units=first), seconds).makespan == ours
    assert tuple(literal_rule(chunks, k, 4, last)) == state_aware_1f1b(chunks, k, 4), "in the paper's order they agree"


def test_long_sequences_do_not_drain_the_pipeline() -> None:
    """Ten sequences of eight chunks: chunk by chunk the paper's rule idles 68 %, plain 1F1B 23 %, ours under 3 %."""
    chunks = build_chunks([40] * 10, 5)
    seconds = OperationSeconds.proportional(chunk_tokens(chunks), 4)
    literal = simulate(literal_rule(chunks, 1, 4, chunks.units()), seconds)
    plain = simulate(plain_1f1b(sequences_as_chunks([40] * 10), 1, 4), OperationSeconds.proportional([40] * 10, 4))
    _, ours = run(chunks, 1, PipelineLayout(4))
    ratios = [timeline.bubble_ratio for timeline in (literal, plain, ours)]
    assert [round(100 * ratio, 1) for ratio in ratios] == [67.9, 23.1, 2.8]
    assert ours.live_activations.tolist() == [4, 3, 2, 1]


def read_golden(name: str) -> str:
    return (GOLDEN / name).read_text()


# Two standalone chunks, a sequence of two chunks and one of four.
GOLDEN_LENGTHS, GOLDEN_SIZE, GOLDEN_K = [1, 1, 2, 4, 7], 2, 2
GOLDEN_LAYOUTS = {
    "1f1b": PipelineLayout(4, "1f1b"),
    "state_aware_1f1b": PipelineLayout(4),
    "state_aware_1f1b_warmup_extra": PipelineLayout(4, warmup_extra=1),
    "searched": PipelineLayout(4, "searched"),
    "zero_bubble": PipelineLayout(4, "zero_bubble"),
}


def golden_text(name: str) -> str:
    layout = GOLDEN_LAYOUTS[name]
    schedules, timeline = run(build_chunks(GOLDEN_LENGTHS, GOLDEN_SIZE), GOLDEN_K, layout)
    lines = [
        f"# {layout.schedule}, {layout.stages} stages, warmup_extra={layout.warmup_extra}",
        f"# sequences of {GOLDEN_LENGTHS} units, ChunkSize {GOLDEN_SIZE}, K={GOLDEN_K}",
        f"# makespan {timeline.makespan:g}, bubble {100 * timeline.bubble_ratio:.2f} %,"
        f" {100 * timeline.bubble_ratio_recompute_idle:.2f} % with recompute as idle",
        f"# live activations {timeline.live_activations}",
        *(f"stage {stage}   {schedule}" for stage, schedule in enumerate(schedules)),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", GOLDEN_LAYOUTS)
def test_golden_schedules(name: str) -> None:
    """What each schedule is, for a person to read: a line a stage. A change of any rule shows here."""
    expected = read_golden(f"{name}.txt")
    assert golden_text(name) == expected
    stages = [Schedule.parse(line.split("   ", 1)[1]) for line in expected.splitlines() if not line.startswith("#")]
    validate_pipeline(stages, build_chunks(GOLDEN_LENGTHS, GOLDEN_SIZE), GOLDEN_K)


LENGTHS = st.lists(st.integers(1, 30), max_size=10)
SIZES = st.integers(1, 10)
KS = st.integers(1, 5)


@st.composite
def layouts(draw: st.DrawFn, names: Sequence[str] = PIPELINE_SCHEDULES) -> PipelineLayout:
    name = draw(st.sampled_from(names))
    return PipelineLayout(draw(st.integers(1, 6)), name, draw(st.integers(0, 3)))


def random_seconds(seed: int, stages: int, chunks: int) -> OperationSeconds:
    """Whole sixteenths, so that sums are exact; a split backward takes as long as a whole one."""
    random = np.random.default_rng(seed)

    def draw(rows: int) -> np.ndarray:
        return random.integers(0, 64, (rows, chunks)) / 16

    first, second = draw(stages), draw(stages)
    return OperationSeconds(
        draw(stages), first + second, draw(stages), draw(stages), first, second, draw(stages - 1),
    )  # fmt: skip


def critical_path(chunks: Chunks, k: int, stages: int, seconds: OperationSeconds) -> float:
    """The longest chain of operations that wait for each other, were every stage as wide as one likes.

    Forwards follow those of earlier siblings and of the stage before; backwards follow their forward, those of later
    siblings and of the stage after. State passes count as forwards, the first half of a split backward as backward.
    """
    forward: dict[tuple[int, int], float] = {}
    backward: dict[tuple[int, int], float] = {}
    input_gradient = seconds.input_gradient
    assert input_gradient is not None
    for unit in chunks.units():
        for stage in range(stages):
            for place, chunk in enumerate(unit):
                table = seconds.state_pass if place < len(unit) - k else seconds.forward
                start = max(
                    forward.get((stage - 1, chunk), 0.0), forward.get((stage, chunk - 1), 0.0) if place else 0.0
                )
                forward[stage, chunk] = start + table[stage, chunk]
        for stage in reversed(range(stages)):
            for place, chunk in reversed(list(enumerate(unit))):
                own = forward[stage, chunk] + (seconds.recompute[stage, chunk] if place < len(unit) - k else 0.0)
                later = backward[stage, chunk + 1] if place < len(unit) - 1 else 0.0
                start = max(own, later, backward.get((stage + 1, chunk), 0.0))
                backward[stage, chunk] = start + input_gradient[stage, chunk]
    return max(backward.values(), default=0.0)


@given(LENGTHS, SIZES, KS, layouts(), st.integers(0, 2**32 - 1))
def test_every_plan_is_valid_and_ends(lengths: list[int], size: int, k: int, layout: PipelineLayout, seed: int) -> None:
    """For any lengths, K, stages, warm-up and durations: proved, no deadlock, all work done, no faster than possible."""
    chunks = build_chunks(lengths, size)
    seconds = random_seconds(seed, layout.stages, len(chunks))
    schedules = plan_pipeline(chunks, k, layout, seconds)
    bound = activation_bound(k, layout)
    validate_pipeline(schedules, chunks, k, most_live=bound)
    timeline = simulate(schedules, seconds)

    recomputed = [chunk for unit in chunks.units() for chunk in unit[: max(0, len(unit) - k)]]
    kept = np.setdiff1d(np.arange(len(chunks)), recomputed)
    of_stage = seconds.backward.sum(axis=1) + seconds.forward[:, kept].sum(axis=1)
    of_stage += seconds.state_pass[:, recomputed].sum(axis=1) + seconds.recompute[:, recomputed].sum(axis=1)
    assert timeline.busy_seconds.tolist() == [of_stage.tolist()]
    assert timeline.recompute_seconds.sum() == seconds.recompute[:, recomputed].sum()
    assert timeline.makespan >= max(of_stage.max(), critical_path(chunks, k, layout.stages, seconds))
    assert timeline.live_activations.tolist() == [live_activations(schedule) for schedule in schedules]
    assert (timeline.live_activations <= bound).all()
    for stage in range(layout.stages):
        assert timeline.live_bytes(0, stage, np.ones(len(chunks)))[1][-1:].sum() == 0, "every activation is freed"
    for schedule in schedules:
        assert Schedule.parse(str(schedule)) == schedule


@given(LENGTHS, SIZES, KS)
def test_one_stage_is_the_plan_without_a_pipeline(lengths: list[int], size: int, k: int) -> None:
    """A pipeline of one stage is no other trainer: state-aware 1F1B becomes `plan()`."""
    chunks = build_chunks(lengths, size)
    assert state_aware_1f1b(chunks, k, 1) == (plan(chunks, k),)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 5))
def test_plain_baseline_is_textbook_1f1b(lengths: list[int], stages: int) -> None:
    """A micro-batch a sequence, in the data's order: P-1-s forwards, then one forward and one backward in turn."""
    chunks = sequences_as_chunks(lengths)
    assert [chunk.tokens for chunk in chunks] == lengths
    assert [chunk.segments[0].sequence for chunk in chunks] == list(range(len(lengths)))
    for stage, schedule in enumerate(plain_1f1b(chunks, 1, stages)):
        warmup = min(stages - 1 - stage, len(lengths))
        words = [f"F{i}" for i in range(warmup)]
        for i in range(len(lengths)):
            words += [f"F{i + warmup}"] if i + warmup < len(lengths) else []
            words += [f"B{i}"]
        assert str(schedule) == " ".join(words)
    assert plain_1f1b(chunks, 1, stages) == state_aware_1f1b(chunks, 1, stages), "without long sequences they agree"


@given(LENGTHS, SIZES, KS, st.integers(1, 5), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_zero_bubble_is_never_slower(lengths: list[int], size: int, k: int, stages: int, extra: int, seed: int) -> None:
    """What fits into a wait delays nothing: splitting can only gain, and takes no more room than the fullest stage."""
    chunks = build_chunks(lengths, size)
    seconds = random_seconds(seed, stages, len(chunks))
    whole, split = state_aware_1f1b(chunks, k, stages, extra), zero_bubble(chunks, k, seconds, extra)
    assert simulate(split, seconds).makespan <= simulate(whole, seconds).makespan
    assert max(map(live_activations, split)) <= max(map(live_activations, whole))
    kinds = {op.kind for schedule in split for op in schedule.ops}
    assert OpKind.backward not in kinds


@given(LENGTHS, SIZES, KS, st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_searched_is_never_slower(lengths: list[int], size: int, k: int, stages: int, extra: int, seed: int) -> None:
    """The search begins with state-aware 1F1B and only leaves it for something faster; it repeats itself exactly."""
    chunks = build_chunks(lengths, size)
    seconds = random_seconds(seed, stages, len(chunks))
    found = searched(chunks, k, seconds, 2, simulated_operations=5_000)
    assert simulate(found, seconds).makespan <= simulate(state_aware_1f1b(chunks, k, stages, 0), seconds).makespan
    assert found == searched(chunks, k, seconds, 2, simulated_operations=5_000)


def test_searched_beats_every_warmup() -> None:
    """A step on which standalone chunks first is not the best order: the search must find something faster."""
    chunks = build_chunks([13, 4, 2, 5, 7, 13, 7, 2], 4)
    seconds = OperationSeconds.proportional(chunk_tokens(chunks), 4)
    in_order = [simulate(state_aware_1f1b(chunks, 1, 4, extra), seconds).makespan for extra in range(3)]
    assert simulate(searched(chunks, 1, seconds), seconds).makespan < min(in_order)
    unsearched = searched(chunks, 1, seconds, simulated_operations=1)
    assert unsearched == state_aware_1f1b(chunks, 1, 4), "without a budget it is what it began with"


def test_zero_bubble_needs_both_halves() -> None:
    chunks = sequences_as_chunks([1] * 8)
    seconds = OperationSeconds.proportional(chunk_tokens(chunks), 4)
    whole_only = OperationSeconds(seconds.forward, seconds.backward, seconds.recompute, seconds.state_pass)
    with pytest.raises(ValueError, match="needs the seconds of input_gradient and weight_gradient"):
        zero_bubble(chunks, 1, whole_only)


def test_zero_bubble_of_equal_micro_batches() -> None:
    """ZB-H1 (arXiv 2401.10241): the bubble (P-1)(F + B + W) of 1F1B becomes (P-1)(F + B - W): 9 to 3 units."""
    chunks = sequences_as_chunks([1] * 12)
    seconds = OperationSeconds.proportional(chunk_tokens(chunks), 4)
    assert simulate(plain_1f1b(chunks, 1, 4), seconds).makespan == 36 + 9
    assert simulate(zero_bubble(chunks, 1, seconds), seconds).makespan == 36 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 2, "schedule": "gpipe"}, "schedule='gpipe' is none of 1f1b, state_aware_1f1b, searched,"),
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"stages": 2, "warmup_extra": -1}, "warmup_extra=-1 must be at least 0"),
    ],
)
def test_layouts_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        PipelineLayout(**arguments)  # type: ignore[arg-type]


def test_k_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        plan_pipeline(build_chunks([5], 2), 0, PipelineLayout(2))


@given(LENGTHS, SIZES, st.integers(1, 3), layouts(), st.data())
def test_a_plan_without_one_operation_is_refused(
    lengths: list[int], size: int, k: int, layout: PipelineLayout, data: st.DataObject
) -> None:
    """No operation of any stage is there for nothing: whichever is lost, the proof notices."""
    chunks = build_chunks(lengths, size)
    schedules = list(plan_pipeline(chunks, k, layout))
    assume(len(chunks))
    stage = data.draw(st.integers(0, layout.stages - 1))
    lost = data.draw(st.integers(0, len(schedules[stage].ops) - 1))
    schedules[stage] = Schedule(schedules[stage].ops[:lost] + schedules[stage].ops[lost + 1 :])
    with pytest.raises(ValueError, match=f"^stage {stage}"):
        validate_pipeline(schedules, chunks, k)


# One sequence of three chunks (0, 1, 2 of [6]), or two standalone chunks before it (2, 3, 4 of [2, 2, 6]); K = 1.
LONG, MIXED = [6], [2, 2, 6]
RIGHT = "S0 S1 F2 B2 R1 B1 R0 B0"
BROKEN = {
    "double backward": (LONG, "S0 S1 F2 B2 B2", "operation 4 (B2): chunk 2 already went backward, its state is freed"),
    "forward after backward": (LONG, "S0 S1 F2 B2 F2", "operation 4 (F2): chunk 2 already went backward"),
    "ascending backwards": (MIXED, "S2 S3 S4 R2 B2", "operation 4 (B2): a later chunk of the sequence of chunk 2"),
    "state before it is written": (LONG, "S1 S0 F2", "operation 0 (S1): an earlier chunk of the sequence of chunk 1"),
    "more than K of a sequence": (LONG, "S0 F1 F2 B2", "operation 2 (F2): 2 chunks of a sequence hold activations, K is 1"),
    "no room": (MIXED, "F0 F1 S2 S3 F4", "operation 4 (F4): 3 chunks hold activations, the stage has room for 2"),
    "no room while weights wait": (MIXED, "F0 I0 F1 I1 S2 S3 F4", "operation 6 (F4): 3 chunks hold activations"),
    "recompute too early": (LONG, "S0 S1 F2 B2 R1 R0", "operation 5 (R0): its backward must directly follow the recompute of chunk 1"),
    "recompute, then another backward": (MIXED, "F0 S2 S3 F4 B4 R3 B0", "operation 6 (B0): its backward must directly follow the recompute of chunk 3"),
    "recompute without state pass": (LONG, "R0 B0", "operation 0 (R0): chunk 0 is recomputed if and only if"),
    "forward after state pass": (LONG, "S0 S1 F2 B2 F1", "operation 4 (F1): chunk 1 is recomputed if and only if"),
    "state pass of a standalone chunk": (MIXED, "S0", "operation 0 (S0): chunk 0 needs no state pass"),
    "two state passes": (LONG, "S0 S0", "operation 1 (S0): chunk 0 needs no state pass"),
    "forward twice": (MIXED, "F0 F0", "operation 1 (F0): chunk 0 already holds activations"),
    "backward without activations": (LONG, "S0 S1 F2 B2 B1", "operation 4 (B1): chunk 1 holds no activations"),
    "weight gradient first": (MIXED, "F0 W0", "operation 1 (W0): chunk 0 has no input gradient without its weight gradient"),
    "weight gradient of a whole backward": (MIXED, "F0 B0 W0", "operation 2 (W0): chunk 0 has no input gradient"),
    "two weight gradients": (MIXED, "F0 I0 W0 W0", "operation 3 (W0): chunk 0 has no input gradient without"),
    "both backwards": (MIXED, "F0 I0 B0", "operation 2 (B0): chunk 0 already went backward"),
    "joined chunks": (LONG, "S0+1", "operation 0 (S0+1): operations of a pipeline take one chunk"),
    "chunk that is not there": (LONG, "F3", "operation 0 (F3): there are only 3 chunks"),
    "missing backward": (LONG, "S0 S1 F2 B2 R1 B1", "chunk 0 never goes backward"),
    "missing weight gradient": (LONG, "S0 S1 F2 B2 R1 B1 R0 I0", "chunk 0 has no weight gradient"),
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("lengths", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_schedules_are_refused(lengths: list[int], text: str, message: str, stage: int) -> None:
    """Each rule broken once, on the first or the second stage: refused, for that reason, and the stage named."""
    chunks = build_chunks(lengths, 2)
    schedules = list(state_aware_1f1b(chunks, 1, 2))
    schedules[stage] = Schedule.parse(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'stage {stage}: {message}')}"):
        validate_pipeline(schedules, chunks, 1, most_live=[2, 2])


def test_stages_that_wait_for_each_other_are_refused() -> None:
    """Each stage alone is right; together they hang."""
    chunks = sequences_as_chunks([1, 1])
    schedules = [Schedule.parse("F0 B0 F1 B1"), Schedule.parse("F0 F1 B0 B1")]
    with pytest.raises(ValueError, match=r"^stage 0, operation 1 \(B0\) waits forever"):
        validate_pipeline(schedules, chunks, 1)
    validate_pipeline(schedules[::-1], chunks, 1)


def test_unusual_but_right_schedules_pass() -> None:
    """The proof is the rules, not a comparison with the planner."""
    chunks = build_chunks(MIXED, 2)
    for text in (
        "S2 S3 F4 B4 R3 B3 R2 B2 F1 B1 F0 B0",
        "F0 F1 S2 S3 B1 F4 I4 R3 I3 W4 B0 R2 I2 W2 W3",
    ):
        validate_pipeline([Schedule.parse(text)] * 2, chunks, 1, most_live=[4, 4])


class Optimum:
    """The least makespan of any order of operations on every stage, by exhaustive search with pruning.

    Orders are built operation by operation in the order of their starts, so that each schedule is built once; a
    recompute goes with its backward. A branch ends where the work that a stage still has would not fit.
    """

    def __init__(
        self, chunks: Chunks, k: int, stages: int, seconds: OperationSeconds, room: Sequence[int] | None
    ) -> None:
        self.stages, self.room = stages, room
        units = chunks.units()
        self.unit_of = {chunk: unit for unit in units for chunk in unit}
        self.early = {chunk for unit in units for chunk in unit[: max(0, len(unit) - k)]}
        self.seconds = seconds
        self.least = float("inf")

    def search(self, at_most: float) -> float:
        self.least = at_most
        work = [
            sum(self.first(s, c) + self.again(s, c) + self.seconds.backward[s, c] for c in self.unit_of)
            for s in range(self.stages)
        ]
        self.extend([{} for _ in work], [{} for _ in work], [0.0] * self.stages, work, [0] * self.stages, 0.0)
        return self.least

    def first(self, stage: int, chunk: int) -> float:
        table = self.seconds.state_pass if chunk in self.early else self.seconds.forward
        return float(table[stage, chunk])

    def again(self, stage: int, chunk: int) -> float:
        return float(self.seconds.recompute[stage, chunk]) if chunk in self.early else 0.0

    def extend(
        self, forward: list[dict[int, float]], backward: list[dict[int, float]], free: list[float], left: list[float],
        live: list[int], last_start: float,
    ) -> None:  # fmt: skip
        if not any(left):
            self.least = min(self.least, max(free))
            return
        for s in range(self.stages):
            # After its last own work, the last gradient still goes through the stages before.
            missing = [c for c in self.unit_of if c not in backward[s]]
            tail = min((sum(self.seconds.backward[t, c] for t in range(s)) for c in missing), default=0.0)
            if left[s] and free[s] + left[s] + tail >= self.least:
                return
        for s in range(self.stages):
            for chunk, unit in self.unit_of.items():
                early = chunk in self.early
                if chunk not in forward[s]:
                    if any(c not in forward[s] for c in unit if c < chunk) or (s and chunk not in forward[s - 1]):
                        continue
                    held = live[s] + (not early)
                    start = max(free[s], forward[s - 1][chunk] if s else 0.0)
                    if start < last_start or (self.room is not None and held > self.room[s]):
                        continue
                    took = self.first(s, chunk)
                    done, delta = forward, 0 if early else 1
                elif chunk not in backward[s]:
                    if any(c not in backward[s] for c in unit if c > chunk):
                        continue
                    if s < self.stages - 1 and chunk not in backward[s + 1]:
                        continue
                    if early and self.room is not None and live[s] + 1 > self.room[s]:
                        continue
                    arrives = backward[s + 1][chunk] if s < self.stages - 1 else 0.0
                    start = max(free[s] + self.again(s, chunk), arrives)
                    if start < last_start:
                        continue
                    took = float(self.seconds.backward[s, chunk])
                    done, delta = backward, 0 if early else -1
                else:
                    continue
                spent = took + (self.again(s, chunk) if done is backward else 0.0)
                old_free, old_left = free[s], left[s]
                done[s][chunk] = free[s] = start + took
                left[s] -= spent
                live[s] += delta
                self.extend(forward, backward, free, left, live, start)
                live[s] -= delta
                free[s], left[s] = old_free, old_left
                del done[s][chunk]


SMALL_STEPS = {  # lengths at ChunkSize 2, stages, K
    "3 standalone": ([2, 1, 2], 2, 1),
    "1 and a sequence of 2": ([1, 4], 2, 1),
    "a sequence of 3": ([5], 2, 1),
    "2 and a sequence of 2": ([1, 2, 4], 2, 1),
    "2 and a sequence of 2, K=2": ([1, 2, 4], 2, 2),
    "2 sequences of 2": ([3, 4], 2, 1),
    "1 and a sequence of 3": ([2, 5], 2, 1),
    "1 and a sequence of 3, K=2": ([2, 5], 2, 2),
    "paper's example, 2 stages": (EXAMPLE, 2, 2),
    "3 stages, 1 and a sequence of 2": ([2, 4], 3, 1),
}


def distance_text() -> str:
    names = ["1f1b", "state_aware_1f1b", "warmup_extra=1", "searched"]
    lines = [
        "# Least makespan of any order of operations (exhaustive search), in any room and in that of state_aware_1f1b,",
        "# beside the makespans of the schedules; ChunkSize 2, proportional durations.",
        f"{'step':34}{'best':>6}{'in room':>9}" + "".join(f"{name:>18}" for name in names),
    ]
    for step, (lengths, stages, k) in SMALL_STEPS.items():
        chunks = build_chunks(lengths, 2)
        seconds = OperationSeconds.proportional(chunk_tokens(chunks), stages)
        plans = [
            plain_1f1b(chunks, k, stages),
            state_aware_1f1b(chunks, k, stages),
            state_aware_1f1b(chunks, k, stages, 1),
            searched(chunks, k, seconds),
        ]
        makespans = [simulate(schedules, seconds).makespan for schedules in plans]
        room = [live_activations(schedule) for schedule in plans[1]]
        # Begun one above what is known: were the search wrong, it would find nothing or too little.
        best = Optimum(chunks, k, stages, seconds, None).search(min(makespans) + 1)
        best_in_room = Optimum(chunks, k, stages, seconds, room).search(makespans[1] + 1)
        assert best <= min(makespans)
        assert best <= best_in_room <= makespans[1]
        lines.append(f"{step:34}{best:>6g}{best_in_room:>9g}" + "".join(f"{value:>18g}" for value in makespans))
    return "\n".join(lines) + "\n"


def test_distance_from_the_optimum() -> None:
    """How far each schedule is from the best order that exists: `searched` reaches it in every small step."""
    assert distance_text() == read_golden("distance_from_optimum.txt")


def test_the_exhaustive_search_finds_what_is_known() -> None:
    """Two stages, two micro-batches of one unit: F F B B over both, 1 + 2 * 3 + 2; and by brute force over all orders."""
    chunks = sequences_as_chunks([1, 1])
    seconds = OperationSeconds.proportional([1, 1], 2)
    assert Optimum(chunks, 1, 2, seconds, None).search(100.0) == 9
    orders = ["F0 F1 B0 B1", "F0 F1 B1 B0", "F0 B0 F1 B1", "F1 F0 B0 B1", "F1 F0 B1 B0", "F1 B1 F0 B0"]
    makespans = []
    for first in orders:
        for second in orders:
            try:
                makespans.append(simulate([Schedule.parse(first), Schedule.parse(second)], seconds).makespan)
            except ValueError:  # that pair deadlocks
                continue
    assert min(makespans) == 9
