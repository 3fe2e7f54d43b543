"""Schedules of a pipeline: what each stage does in one optimizer step, and the proof that it is right.

    stage 0   F0 F1 S2 F3 B0 B1 B3 R2 B2         two standalone chunks, then a sequence of two chunks, K = 1
    stage 1   F0 F1 S2 B0 F3 B1 B3 R2 B2

1F1B (PipeDream-Flush: Narayanan et al. 2021, arXiv 2006.09503): stage `s` of `P` runs `P - 1 - s` warm-up forwards,
then one forward and one backward in turn. State-aware 1F1B (ChunkFlow, arXiv 2503.02356, section 4.3): forwards in the
order of the chunks, the backwards of a sequence descending, and where 1F1B would run a backward whose later sibling has
not run, another forward instead.

What is ours:
- A stage recomputes *locally*, from its input of the state pass, which it keeps. Sent through the stages again, a
  recompute costs more than it saves: worse than plain 1F1B in the paper's own example.
- `warmup_extra`: more warm-up forwards a stage. One reaches the bubble of equally long sequences in that example.
- *Whole units ahead*: while a long sequence goes backward, P - 1 - s whole units (standalone chunks, long sequences)
  after it have been forwarded, not P - 1 - s chunks, or the pipeline drains and fills again at every long sequence. On
  data with many, chunk by chunk is worse than no chunks at all; the price is the state of as many sequences.
- *Room*: stage `s` holds at most K + P - 1 - s + warmup_extra live activations, however long the sequences are. What
  would exceed that is forwarded later; state passes leave no activations.

Why plain and state-aware 1F1B never deadlock: all stages run the same forwards and the same backwards in one order, and
a stage runs at least as many forwards before its j-th backward as the stage after it. So a forward waits only for
earlier forwards of the stage before, and for backwards that themselves wait only for earlier forwards. Interleaved, the
last stage also sends to the first: there no stage may run ahead by more than a round each way, 2 P forwards in all.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chunkflow_cli.chunks import Chunks
from chunkflow_cli.schedule import Op, OpKind, Schedule
from chunkflow_cli.simulate import OperationSeconds, simulate

PIPELINE_SCHEDULES = ("1f1b", "state_aware_1f1b", "searched", "interleaved", "zero_bubble")
CHOSEN_BY_SECONDS = ("searched", "zero_bubble")
"""Those that depend on how long operations take."""

Unit = tuple[int, ...]
"""The chunks of a long sequence, ascending, or one standalone chunk: what stays together in any order of chunks."""


@dataclass(frozen=True)
class PipelineLayout:
    """How the model lies on the stages of a pipeline, and how they take turns."""

    stages: int
    schedule: str = "state_aware_1f1b"
    """One of PIPELINE_SCHEDULES."""
    warmup_extra: int = 0
    """More warm-up forwards a stage than 1F1B has; each takes about one more live activation. `searched` tries all
    from 0 up to this, or up to 2."""
    parts: int = 1
    """Parts of the model on each stage. Only interleaved schedules have more than one."""
    most_live: int | None = None
    """Live activations that a stage has room for; what `searched` and `zero_bubble` take must stay within it."""

    def __post_init__(self) -> None:
        if self.schedule not in PIPELINE_SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is none of {', '.join(PIPELINE_SCHEDULES)}")
        for name, least in (("stages", 1), ("warmup_extra", 0), ("parts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.parts > 1 and self.schedule != "interleaved":
            raise ValueError(f"parts={self.parts}: a stage of {self.schedule} holds one part of the model")


def plan_pipeline(
    chunks: Chunks, k: int, layout: PipelineLayout, seconds: OperationSeconds | None = None
) -> tuple[Schedule, ...]:
    """The operations of one step, a schedule for each stage.

    Args:
        chunks: the chunks of the step of one data-parallel rank.
        k: how many chunks of a long sequence keep their activations, on each part of the model.
        layout: the stages.
        seconds: what `searched` and `zero_bubble` choose by; proportional to tokens if not given.
    """
    if seconds is None and layout.schedule in CHOSEN_BY_SECONDS:
        seconds = OperationSeconds.proportional(chunk_tokens(chunks), layout.stages * layout.parts)
    match layout.schedule:
        case "1f1b":
            return plain_1f1b(chunks, k, layout.stages, layout.warmup_extra)
        case "interleaved":
            return interleaved(chunks, k, layout.stages, layout.parts, layout.warmup_extra)
        case "zero_bubble":
            assert seconds is not None
            return zero_bubble(chunks, k, layout.stages, seconds, layout.warmup_extra, most_live=layout.most_live)
        case "searched":
            assert seconds is not None
            return searched(chunks, k, layout.stages, seconds, max(2, layout.warmup_extra), most_live=layout.most_live)
        case _:
            return state_aware_1f1b(chunks, k, layout.stages, layout.warmup_extra)


def sequences_as_chunks(lengths: ArrayLike) -> Chunks:
    """The micro-batches of plain training, to compare with: each sequence whole, in the data's order.

    Args:
        lengths: (sequences,) tokens of each sequence.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    index = np.arange(len(sizes))
    return Chunks(int(sizes.max(initial=1)), np.arange(len(sizes) + 1), index, np.zeros_like(sizes), sizes, sizes)


def chunk_tokens(chunks: Chunks) -> NDArray[np.int64]:
    """(chunks,): tokens of each chunk."""
    ends = np.concatenate([[0], np.cumsum(chunks.stop - chunks.start)])
    return np.diff(ends[chunks.first_segment])


def units_of(chunks: Chunks) -> list[Unit]:
    """Standalone chunks and long sequences in the order of the chunks: standalone chunks first."""
    groups = chunks.dependent_groups()
    first_dependent = groups[0].start if groups else len(chunks)
    return [(chunk,) for chunk in range(first_dependent)] + [tuple(group) for group in groups]


def plain_1f1b(chunks: Chunks, k: int, stages: int, warmup_extra: int = 0) -> tuple[Schedule, ...]:
    """1F1B over whole sequences: the chunks of a long sequence together are one micro-batch.

    Stage `s` keeps up to `P - s + warmup_extra` micro-batches in flight, of up to K live activations each.
    """
    units = units_of(chunks)
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    end_of_unit = np.cumsum([len(unit) for unit in units])
    unit_of_backward = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    return tuple(
        _weave(
            forwards,
            backwards,
            end_of_unit[np.minimum(unit_of_backward + stages - 1 - stage + warmup_extra, len(units) - 1)].tolist(),
        )
        for stage in range(stages)
    )


def state_aware_1f1b(
    chunks: Chunks, k: int, stages: int, warmup_extra: int = 0, units: Sequence[Unit] | None = None
) -> tuple[Schedule, ...]:
    """1F1B over chunks, with the dependencies of long sequences; each stage recomputes from its own kept input.

    Stage `s` holds at most K + P - 1 - s + warmup_extra live activations.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        warmup_extra: warm-up forwards more than P - 1 - s.
        units: another order of standalone chunks and long sequences than that of the chunks.
    """
    units = units_of(chunks) if units is None else units
    forwards, backwards = _first_forwards(units, k), _backwards(units, k)
    sizes = np.array([len(unit) for unit in units], dtype=np.int64)
    unit, end_of_unit = np.repeat(np.arange(len(units)), sizes), np.cumsum(sizes)
    # The first backward of a sequence is that of its last chunk: all of its forwards must have run.
    needed = end_of_unit[unit]
    turn = np.arange(len(backwards)) + 1
    recomputes = np.array([len(ops) == 2 for ops in backwards], dtype=np.int64)
    kept_by_forwards = np.cumsum([0] + [op.kind is OpKind.forward for op in forwards])
    freed_before = np.cumsum(1 - recomputes) - (1 - recomputes)
    schedules = []
    for stage in range(stages):
        warmup = stages - 1 - stage + warmup_extra
        units_ahead = np.where(sizes[unit] > 1, end_of_unit[np.minimum(unit + warmup, len(units) - 1)], 0)
        # A recompute takes room too, beside what is in flight, until its own backward.
        room = k + warmup + freed_before - recomputes
        has_room = np.searchsorted(kept_by_forwards, room, side="right") - 1
        wanted = np.minimum(np.maximum(turn + warmup, units_ahead), has_room)
        before = np.minimum(np.maximum.accumulate(np.maximum(wanted, needed)), len(forwards))
        schedules.append(_weave(forwards, backwards, before.tolist()))
    return tuple(schedules)


def interleaved(chunks: Chunks, k: int, stages: int, parts: int, warmup_extra: int = 0) -> tuple[Schedule, ...]:
    """State-aware 1F1B with several parts of the model on each stage: bubbles shrink by their number.

    Rounds of at least P chunks go through part 0 of all stages, then through part 1, and so on; rounds of backwards the
    other way (Megatron-LM: Narayanan et al. 2021, arXiv 2104.04473, section 2.2; it asks for rounds of exactly P, here
    the chunks left over make rounds longer). Part `v` of stage `s` is virtual stage `v * P + s`.
    """
    units = units_of(chunks)
    count = len(chunks)
    rounds = np.array_split(np.arange(count), max(1, count // stages))
    forwards = _first_forwards(units, k)
    backwards = _backwards(units, k)
    forward_items = [(int(turn), part) for turns in rounds for part in range(parts) for turn in turns]
    backward_items = [(int(turn), part) for turns in rounds for part in reversed(range(parts)) for turn in turns]
    forward_ops = [_on_part(forwards[turn], part) for turn, part in forward_items]
    backward_ops = [[_on_part(op, part) for op in backwards[turn]] for turn, part in backward_items]

    place = {(op.chunks[0], op.part): place for place, op in enumerate(forward_ops)}
    own_forward = np.array([place[(ops[-1].chunks[0], ops[-1].part)] for ops in backward_ops], dtype=np.int64)
    needed = np.maximum.accumulate(own_forward) + 1
    turn = np.arange(len(backward_ops)) + 1
    longest_round = max(len(turns) for turns in rounds)
    schedules = []
    for stage in range(stages):
        # As in Megatron-LM: a round through all parts but the last, and twice the distance to the last stage.
        warmup = 2 * (stages - 1 - stage) + (parts - 1) * longest_round + warmup_extra
        schedules.append(
            _weave(forward_ops, backward_ops, np.minimum(np.maximum(turn + warmup, needed), len(forward_ops)).tolist())
        )
    return tuple(schedules)


def zero_bubble(
    chunks: Chunks,
    k: int,
    stages: int,
    seconds: OperationSeconds,
    warmup_extra: int = 0,
    *,
    most_live: int | None = None,
) -> tuple[Schedule, ...]:
    """State-aware 1F1B with split backwards: `I` sends the gradient on, `W` waits until its stage has nothing to do.

    After ZB-H1 (Qi et al. 2024, arXiv 2401.10241). A stage runs a `W` while it waits for a message, if that takes up
    enough of the `W`; how much is enough is chosen by simulation. Activations live until their `W`, so a stage
    that has no more room runs one first: no stage holds more than the fullest stage of state-aware 1F1B.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        seconds: with both halves of the backward.
        warmup_extra: warm-up forwards more than P - 1 - s.
        most_live: live activations that a stage has room for, instead of those of the fullest stage.

    Raises:
        ValueError: `seconds` has no split backward, or `most_live` is less than state-aware 1F1B needs.
    """
    if seconds.input_gradient is None or seconds.weight_gradient is None:
        raise ValueError("zero_bubble needs the seconds of input_gradient and weight_gradient")
    whole = state_aware_1f1b(chunks, k, stages, warmup_extra)
    needed = max((live_activations(schedule) for schedule in whole), default=0)
    room = needed if most_live is None else most_live
    if room < needed:
        raise ValueError(f"most_live={room}: state-aware 1F1B with this warm-up holds {needed} live activations")
    candidates = [_delay_weight_gradients(whole, seconds, room, share) for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    return min(candidates, key=lambda schedules: simulate(schedules, seconds).makespan)  # the first of equals


def searched(
    chunks: Chunks,
    k: int,
    stages: int,
    seconds: OperationSeconds,
    most_warmup_extra: int = 2,
    *,
    most_live: int | None = None,
    simulated_operations: int = 1_000_000,
) -> tuple[Schedule, ...]:
    """The fastest state-aware 1F1B that was found: its order of standalone chunks and long sequences, its warm-up.

    First the orders that rules give (standalone chunks before, after, around and between the long sequences; each kind
    as it comes, longest or shortest first), each with each warm-up; then moves of one unit from the best on, as long as
    the budget lasts. The result depends on nothing but the arguments. Of equally fast ones the one with the fewest live
    activations wins, then the first.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        stages: of the pipeline.
        seconds: what the schedules are simulated with.
        most_warmup_extra: warm-up forwards more than P - 1 - s are tried from 0 up to this.
        most_live: live activations that a stage has room for; None: as many as the fastest takes.
        simulated_operations: when to stop; a million take about two seconds.

    Raises:
        ValueError: state-aware 1F1B without extra warm-up already exceeds `most_live`.
    """
    search = _Search(chunks, k, stages, seconds, most_live, simulated_operations)
    units = units_of(chunks)
    warmups = range(most_warmup_extra + 1)
    best = search.measure(units, 0)
    if best is None:
        raise ValueError(f"most_live={most_live}: state-aware 1F1B holds more live activations than that")
    for order in itertools.chain([tuple(units)], _orders_by_rule(units, seconds)):
        for warmup in warmups:
            best = min(best, search.measure(order, warmup) or best)
    improved = True
    while improved and search.has_budget:
        improved = False
        for order in _moves(best.units):
            found = search.measure(order, best.warmup_extra)
            if not search.has_budget:
                break
            if found is not None and found < best:
                best, improved = found, True
                break
    return state_aware_1f1b(chunks, k, stages, best.warmup_extra, best.units)


@dataclass(frozen=True, order=True)
class _Found:
    makespan: float
    live: int
    turn: int
    """How many schedules were measured before: of equals the first wins."""
    warmup_extra: int
    units: tuple[Unit, ...]


class _Search:
    """Measures each schedule once, and counts what that took."""

    def __init__(
        self,
        chunks: Chunks,
        k: int,
        stages: int,
        seconds: OperationSeconds,
        most_live: int | None,
        simulated_operations: int,
    ) -> None:
        self._chunks, self._k, self._stages, self._seconds = chunks, k, stages, seconds
        self._most_live = most_live
        self._operations_left = simulated_operations
        self._found: dict[tuple[tuple[Unit, ...], int], _Found | None] = {}

    @property
    def has_budget(self) -> bool:
        return self._operations_left > 0

    def measure(self, units: Sequence[Unit], warmup_extra: int) -> _Found | None:
        """None if the schedule holds too much, or if the budget is spent; the first is measured in any case."""
        key = (tuple(units), warmup_extra)
        if key in self._found:
            return self._found[key]
        if self._found and not self.has_budget:
            return None
        schedules = state_aware_1f1b(self._chunks, self._k, self._stages, warmup_extra, units)
        self._operations_left -= sum(len(schedule.ops) for schedule in schedules)
        live = max(live_activations(schedule) for schedule in schedules)
        found = None
        if self._most_live is None or live <= self._most_live:
            makespan = simulate(schedules, self._seconds).makespan
            found = _Found(makespan, live, len(self._found), warmup_extra, key[0])
        self._found[key] = found
        return found


def _orders_by_rule(units: Sequence[Unit], seconds: OperationSeconds) -> Iterator[tuple[Unit, ...]]:
    work = (seconds.forward + seconds.backward).sum(axis=0)
    cost = {unit: float(sum(work[chunk] for chunk in unit)) for unit in units}
    standalone: list[Unit] = [unit for unit in units if len(unit) == 1]
    long: list[Unit] = [unit for unit in units if len(unit) > 1]

    def sorted_ways(same_kind: list[Unit]) -> list[list[Unit]]:
        ascending = sorted(same_kind, key=lambda unit: cost[unit])
        return [same_kind, ascending[::-1], ascending]

    for long_order in sorted_ways(long):
        for order in sorted_ways(standalone):
            half = len(order) // 2
            yield (*order, *long_order)
            yield (*long_order, *order)
            yield (*order[:half], *long_order, *order[half:])
            yield _spread(order, long_order)


def _spread(standalone: Sequence[Unit], long: Sequence[Unit]) -> tuple[Unit, ...]:
    """As many standalone chunks before each long sequence as after the last one."""
    shares = np.array_split(np.arange(len(standalone)), len(long) + 1)
    order: list[Unit] = []
    for share, sequence in itertools.zip_longest(shares, long):
        order += [standalone[index] for index in share]
        order += [sequence] if sequence is not None else []
    return tuple(order)


def _moves(units: tuple[Unit, ...]) -> Iterator[tuple[Unit, ...]]:
    """Every order in which one unit stands elsewhere: long sequences are moved first, they matter most."""
    for unit in sorted(units, key=lambda unit: (-len(unit), unit)):
        others = [other for other in units if other != unit]
        for place in range(len(units)):
            moved = (*others[:place], unit, *others[place:])
            if moved != units:
                yield moved


def live_activations(schedule: Schedule) -> int:
    """The most chunks that hold activations at once on a stage that runs this; each counts once for each part."""
    live = most = 0
    for op in schedule.ops:
        if op.kind in (OpKind.forward, OpKind.recompute):
            live += len(op.chunks)
            most = max(most, live)
        elif op.kind in (OpKind.backward, OpKind.weight_gradient):
            live -= len(op.chunks)
    return most


def activation_bound(chunks: Chunks, k: int, layout: PipelineLayout) -> tuple[int, ...]:
    """Live activations that no stage exceeds, whatever the lengths: (stages,).

    Plain 1F1B: K (P - s + warmup_extra). State-aware: K + P - 1 - s + warmup_extra; `searched` has the largest warm-up
    it may try, and `zero_bubble` the room of the fullest stage on all. Interleaved, with rounds of at most Q chunks
    and V parts: the larger of V (K + 2 Q) and what is in flight, 2 (P - 1 - s + warmup_extra) + (V - 1) Q + 1.
    """
    stages, parts = layout.stages, layout.parts
    in_flight = [stages - stage + layout.warmup_extra for stage in range(stages)]
    match layout.schedule:
        case "1f1b":
            return tuple(k * held for held in in_flight)
        case "interleaved":
            longest_round = -(-len(chunks) // max(1, len(chunks) // stages))
            return tuple(
                max(parts * (k + 2 * longest_round), 2 * (held - 1) + (parts - 1) * longest_round + 1)
                for held in in_flight
            )
        case "zero_bubble":
            return (k - 1 + in_flight[0] if layout.most_live is None else layout.most_live,) * stages
        case "searched":
            tried = max(2, layout.warmup_extra)
            held = [k - 1 + stages - stage + tried for stage in range(stages)]
            return tuple(held if layout.most_live is None else [min(layout.most_live, most) for most in held])
        case _:
            return tuple(k - 1 + held for held in in_flight)


def _first_forwards(units: Iterable[Unit], k: int) -> list[Op]:
    """S for the chunks that will be recomputed, F for the last K of a sequence and for standalone chunks."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return [
        Op(OpKind.state_pass if place < len(unit) - k else OpKind.forward, (chunk,))
        for unit in units
        for place, chunk in enumerate(unit)
    ]


def _backwards(units: Iterable[Unit], k: int) -> list[list[Op]]:
    """Each unit's backwards, descending; those of chunks that had a state pass come right after their recompute."""
    return [
        ([Op(OpKind.recompute, (chunk,))] if place < len(unit) - k else []) + [Op(OpKind.backward, (chunk,))]
        for unit in units
        for place, chunk in reversed(list(enumerate(unit)))
    ]


def _on_part(op: Op, part: int) -> Op:
    return Op(op.kind, op.chunks, part)


def _weave(forwards: Sequence[Op], backwards: Sequence[Sequence[Op]], forwards_before: Sequence[int]) -> Schedule:
    """All forwards and backwards of a stage; before the j-th backward stand the first `forwards_before[j]` forwards."""
    ops: list[Op] = []
    issued = 0
    for backward, before in zip(backwards, forwards_before, strict=True):
        ops += forwards[issued:before]
        issued = max(issued, before)
        ops += backward
    return Schedule(tuple(ops))


def _delay_weight_gradients(
    whole: Sequence[Schedule], seconds: OperationSeconds, room: int, least_share: float
) -> tuple[Schedule, ...]:
    """Split every backward; run a `W` in a wait that lasts for at least that share of it, or when room runs out.

    Stages are run as `simulate` runs them: when a stage decides, it knows how long it will wait.
    """
    stages = [_SplitStage(schedule, stage, seconds, room, least_share) for stage, schedule in enumerate(whole)]
    forward_stop: dict[tuple[int, int], float] = {}
    gradient_stop: dict[tuple[int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for stage in itertools.chain(stages, reversed(stages)):
            moved |= stage.run(forward_stop, gradient_stop, len(stages))
    return tuple(Schedule((*stage.ops, *map(_weight_gradient, stage.pending))) for stage in stages)


def _weight_gradient(chunk: int) -> Op:
    return Op(OpKind.weight_gradient, (chunk,))


class _SplitStage:
    """One stage on its way through a schedule with whole backwards, which it splits."""

    def __init__(
        self, schedule: Schedule, stage: int, seconds: OperationSeconds, room: int, least_share: float
    ) -> None:
        self.ops: list[Op] = []
        self.pending: deque[int] = deque()
        """Chunks that wait for their weight gradient, the oldest first."""
        self._left = deque(schedule.ops)
        self._stage = stage
        self._room = room
        self._least_share = least_share
        self._now = 0.0
        self._live = 0
        self._transfer = seconds.transfer
        assert seconds.input_gradient is not None
        assert seconds.weight_gradient is not None
        self._weight_seconds = seconds.weight_gradient[stage]
        self._seconds = {
            OpKind.state_pass: seconds.state_pass[stage],
            OpKind.forward: seconds.forward[stage],
            OpKind.recompute: seconds.recompute[stage],
            OpKind.backward: seconds.input_gradient[stage],
        }

    def run(
        self,
        forward_stop: dict[tuple[int, int], float],
        gradient_stop: dict[tuple[int, int], float],
        stages: int,
    ) -> bool:
        """Go on until a message is missing; whether anything ran.

        Args:
            forward_stop: when the forward of (stage, chunk) stopped; extended.
            gradient_stop: the same of backwards.
            stages: of the pipeline.
        """
        before = len(self._left)
        while self._left:
            op = self._left[0]
            chunk = op.chunks[0]
            is_forward = op.kind in (OpKind.state_pass, OpKind.forward)
            if is_forward:
                ready = self._arrival(forward_stop, self._stage - 1, chunk, self._stage - 1) if self._stage else 0.0
            elif self._stage < stages - 1:
                ready = self._arrival(gradient_stop, self._stage + 1, chunk, self._stage)
            else:
                ready = 0.0
            if ready is None:
                break
            if op.kind is OpKind.recompute:
                # Its backward follows at once, so nothing may come between: what can wait is both together.
                ready -= float(self._seconds[op.kind][chunk])
            self._fill(ready)
            if op.kind in (OpKind.forward, OpKind.recompute):
                if self._live == self._room:
                    self._run_weight_gradient()
                self._live += 1
            self._left.popleft()
            # A recompute waits for no message, its backward does.
            start = self._now if op.kind is OpKind.recompute else max(self._now, ready)
            self._now = start + float(self._seconds[op.kind][chunk])
            if is_forward:
                forward_stop[self._stage, chunk] = self._now
            if op.kind is OpKind.backward:
                gradient_stop[self._stage, chunk] = self._now
                self.pending.append(chunk)
                op = Op(OpKind.input_gradient, op.chunks)
            self.ops.append(op)
        return len(self._left) < before

    def _arrival(self, stops: dict[tuple[int, int], float], stage: int, chunk: int, edge: int) -> float | None:
        stop = stops.get((stage, chunk))
        if stop is None:
            return None
        return stop + (float(self._transfer[edge, chunk]) if self._transfer is not None else 0.0)

    def _fill(self, until: float) -> None:
        """Run weight gradients in the time that the stage would wait."""
        if self.ops and self.ops[-1].kind is OpKind.recompute:
            return
        while self.pending and until > self._now:
            if until - self._now < self._least_share * self._weight_seconds[self.pending[0]]:
                return
            self._run_weight_gradient()

    def _run_weight_gradient(self) -> None:
        chunk = self.pending.popleft()
        self.ops.append(_weight_gradient(chunk))
        self._now += float(self._weight_seconds[chunk])
        self._live -= 1


def validate_pipeline(
    schedules: Sequence[Schedule], chunks: Chunks, k: int, *, parts: int = 1, most_live: Sequence[int] | None = None
) -> None:
    """Prove what gradient, memory and an end of the step rest on.

    On each part of the model of every stage: each chunk has one first forward and one backward, whole or in its two
    halves; state is read only after it was written and before it was freed; backwards of a sequence descend, with live
    activations; at most K chunks of a sequence hold activations at once until they go backward; a recompute stands
    right before its backward. No stage exceeds its bound of live activations. The stages together never deadlock.

    Args:
        schedules: one a stage.
        chunks: the chunks of the step.
        k: how many chunks of a long sequence may keep their activations.
        parts: parts of the model on each stage.
        most_live: (stages,) bound of live activations, or None.

    Raises:
        ValueError: names the stage and the first operation that breaks a rule, and the rule.
    """
    groups = chunks.dependent_groups()
    group_of = {chunk: group for group in groups for chunk in group}
    for stage, schedule in enumerate(schedules):
        proof = _StageProof(stage, len(chunks), group_of, k, parts, None if most_live is None else most_live[stage])
        for position, op in enumerate(schedule.ops):
            proof.step(position, op)
        proof.close()
    if len(chunks):
        simulate(schedules, OperationSeconds.proportional(np.ones(len(chunks)), len(schedules) * parts))


_Place = tuple[int, int]
"""(part, chunk)"""


class _StageProof:
    """Walks through the schedule of one stage and refuses the first operation that breaks a rule."""

    def __init__(
        self, stage: int, chunks: int, group_of: dict[int, range], k: int, parts: int, most_live: int | None
    ) -> None:
        self._stage = stage
        self._chunks = chunks
        self._group_of = group_of
        self._k = k
        self._parts = parts
        self._most_live = most_live
        self._passed: set[_Place] = set()
        self._written: set[_Place] = set()
        self._kept: set[_Place] = set()
        """Forwarded with activations, not yet backward."""
        self._freed: set[_Place] = set()
        """Gone backward: state is freed."""
        self._half_done: set[_Place] = set()
        """Input gradient taken, weight gradient not."""
        self._kept_of_group: dict[_Place, int] = {}
        self._recomputed: _Place | None = None

    def step(self, position: int, op: Op) -> None:
        def refuse(rule: str) -> ValueError:
            return ValueError(f"stage {self._stage}, operation {position} ({op}): {rule}")

        if len(op.chunks) != 1:
            raise refuse("operations of a pipeline take one chunk")
        chunk, part = op.chunks[0], op.part
        if not 0 <= chunk < self._chunks:
            raise refuse(f"there are only {self._chunks} chunks")
        if part >= self._parts:
            raise refuse(f"a stage holds only {self._parts} parts of the model")
        place = (part, chunk)
        group = self._group_of.get(chunk, range(chunk, chunk + 1))
        is_gradient = op.kind in (OpKind.backward, OpKind.input_gradient)
        if self._recomputed is not None and not (is_gradient and place == self._recomputed):
            raise refuse(f"the recompute of chunk {self._recomputed[1]} must stand right before its backward")
        self._recomputed = None
        if op.kind is OpKind.weight_gradient:
            if place not in self._half_done:
                raise refuse(f"chunk {chunk} has no input gradient without its weight gradient")
            self._half_done.remove(place)
            return
        if place in self._freed:
            raise refuse(f"chunk {chunk} already went backward, its state is freed")
        if any((part, earlier) in self._freed for earlier in range(group.start, chunk)):
            raise refuse(f"the state of an earlier chunk of the sequence of chunk {chunk} is freed")
        if is_gradient:
            if place not in self._kept:
                raise refuse(f"chunk {chunk} holds no activations")
            if any((part, later) not in self._freed for later in range(chunk + 1, group.stop)):
                raise refuse(f"a later chunk of the sequence of chunk {chunk} has yet to give it gradient")
            self._kept.remove(place)
            self._kept_of_group[part, group.start] -= 1
            self._freed.add(place)
            if op.kind is OpKind.input_gradient:
                self._half_done.add(place)
            return
        if place in self._kept:
            raise refuse(f"chunk {chunk} already holds activations")
        if any((part, earlier) not in self._written for earlier in range(group.start, chunk)):
            raise refuse(f"an earlier chunk of the sequence of chunk {chunk} has not written its state")
        if op.kind is OpKind.state_pass:
            if chunk not in self._group_of or place in self._passed:
                raise refuse(f"chunk {chunk} needs no state pass")
            self._passed.add(place)
        elif (op.kind is OpKind.recompute) != (place in self._passed):
            raise refuse(f"chunk {chunk} is recomputed if and only if it had a state pass")
        else:
            self._keep(place, group, refuse)
            if op.kind is OpKind.recompute:
                self._recomputed = place
        self._written.add(place)

    def _keep(self, place: _Place, group: range, refuse: Callable[[str], ValueError]) -> None:
        of_group = (place[0], group.start)
        self._kept.add(place)
        self._kept_of_group[of_group] = self._kept_of_group.get(of_group, 0) + 1
        if self._kept_of_group[of_group] > self._k:
            raise refuse(f"{self._kept_of_group[of_group]} chunks of a sequence hold activations, K is {self._k}")
        live = len(self._kept) + len(self._half_done)
        if self._most_live is not None and live > self._most_live:
            raise refuse(f"{live} chunks hold activations, the stage has room for {self._most_live}")

    def close(self) -> None:
        for part in range(self._parts):
            for chunk in range(self._chunks):
                if (part, chunk) not in self._freed:
                    raise ValueError(f"stage {self._stage}: chunk {chunk} never goes backward on part {part}")
                if (part, chunk) in self._half_done:
                    raise ValueError(f"stage {self._stage}: chunk {chunk} has no weight gradient on part {part}")
