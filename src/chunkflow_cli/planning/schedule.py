"""What one rank does in one optimizer step: a list of operations that can be read, checked and simulated.

    S0 S1 F2 B2 R1 B1 R0 B0        one sequence of three chunks, K = 1
    S0 F1+2 B2+1 R0 B0             K = 2, the retained chunks in one engine call (ZeRO-3 needs that)
    F0 I0 W0                       a pipeline stage whose backwards are split in two
    S- F3+- B-+3                   in lock-step with ranks that have more to do: `-` is a token that nothing comes of

Source: ChunkFlow (arXiv 2503.02356), section 4.2, in the reading of its prose: the *last* K chunks of a sequence keep
their activations, and backwards descend strictly, for the keys and values of a chunk collect gradient from every later
one. (Algorithm 2 as printed keeps the others and ends ascending, which breaks the memory bound and the gradient.)
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from chunkflow_cli.planning.chunks import Chunks

DUMMY = -1
"""Instead of a chunk: one token of zero loss, where a rank must do something because the others do."""


class OpKind(str, Enum):
    state_pass = "S"
    """Forward of a chunk that will be recomputed: no autograd, only its keys and values are kept."""
    forward = "F"
    """Forward that keeps its activations."""
    recompute = "R"
    """Second forward of a chunk that had a state pass, right before its backward."""
    backward = "B"
    input_gradient = "I"
    """First half of a split backward: the gradient that the previous stage waits for."""
    weight_gradient = "W"
    """Second half of a split backward: nobody waits for it, so it fills the bubbles of a pipeline."""


@dataclass(frozen=True, slots=True)
class Op:
    kind: OpKind
    chunks: tuple[int, ...]
    """Usually one. Retained chunks of a sequence may share one engine call; a backward lists them descending."""

    def __str__(self) -> str:
        names = ("-" if chunk == DUMMY else str(chunk) for chunk in self.chunks)
        return self.kind.value + "+".join(names)

    @property
    def real_chunks(self) -> tuple[int, ...]:
        """Without dummies."""
        return self.chunks if DUMMY not in self.chunks else tuple(chunk for chunk in self.chunks if chunk != DUMMY)


@dataclass(frozen=True)
class Schedule:
    ops: tuple[Op, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.ops))

    @classmethod
    def parse(cls, line: str) -> Schedule:
        """The inverse of `str`.

        Raises:
            ValueError: a word is not an operation.
        """
        ops = []
        for word in line.split():
            if re.fullmatch(r"[SFRBIW](\d+|-)(\+(\d+|-))*", word) is None:
                raise ValueError(f"{word!r} is not an operation such as S0, F2, R1, B1 or F1+2")
            chunks = tuple(DUMMY if name == "-" else int(name) for name in word[1:].split("+"))
            ops.append(Op(OpKind(word[0]), chunks))
        return cls(tuple(ops))

    @property
    def recomputed_chunks(self) -> int:
        return sum(len(op.chunks) for op in self.ops if op.kind is OpKind.recompute)

    @property
    def dummies(self) -> int:
        """Passes of a single token through the model, forward or backward, that only keep step with other ranks."""
        return sum(chunk == DUMMY for op in self.ops for chunk in op.chunks)


@dataclass(frozen=True)
class Layout:
    """How the work lies on the machine, as far as a schedule must know it."""

    join_retained: bool = False
    """Run the retained chunks of a sequence as one engine call: ZeRO-3 traces one forward for one backward."""
    lockstep: bool = False
    """All ranks run the same kinds of operations, at each position: ZeRO-3 communicates within them."""


def plan(chunks: Chunks, k: int, layout: Layout | None = None) -> Schedule:
    """The operations of one step on one stage.

    A standalone chunk is forwarded and goes backward at once. A sequence of N dependent chunks runs state passes over
    the first N - K, forwards over the last K, then all backwards descending, each early chunk recomputed right before.

    Args:
        chunks: the chunks of the step.
        k: how many chunks of a long sequence keep their activations.
        layout: defaults to one rank that runs every chunk as its own engine call.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    layout = layout or Layout()
    ops: list[Op] = []
    groups = chunks.dependent_groups()
    first_dependent = groups[0].start if groups else len(chunks)
    for chunk in range(first_dependent):
        ops += [Op(OpKind.forward, (chunk,)), Op(OpKind.backward, (chunk,))]
    for group in groups:
        retained_from = max(group.start, group.stop - k)
        early, retained = range(group.start, retained_from), range(retained_from, group.stop)
        ops += [Op(OpKind.state_pass, (chunk,)) for chunk in early]
        if layout.join_retained:
            ops += [Op(OpKind.forward, tuple(retained)), Op(OpKind.backward, tuple(reversed(retained)))]
        else:
            ops += [Op(OpKind.forward, (chunk,)) for chunk in retained]
            ops += [Op(OpKind.backward, (chunk,)) for chunk in reversed(retained)]
        for chunk in reversed(early):
            ops += [Op(OpKind.recompute, (chunk,)), Op(OpKind.backward, (chunk,))]
    return Schedule(tuple(ops))


IDLE = Schedule((Op(OpKind.forward, (DUMMY,)), Op(OpKind.backward, (DUMMY,))))
"""Of a rank that got no samples: it has gradients to give all the same, which are zero."""


def plan_in_lockstep(ranks: Sequence[Chunks], k: int) -> tuple[Schedule, ...]:
    """The operations of one step of all ranks, which run the same kind on as many chunks at each position.

    The i-th longest sequences of all ranks go together: state passes, one forward and one backward over the retained
    chunks, and a forward and a backward for each recompute. Where a rank has less to do, a standalone chunk of its own
    fills a forward and its backward, and dummies fill the rest; nothing but a dummy can fill a state pass.

    Args:
        ranks: the chunks of each rank.
        k: how many chunks of a long sequence keep their activations.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    lanes = [_Lane(chunks, k) for chunks in ranks]
    for slot in range(max(len(lane.groups) for lane in lanes)):
        early = max(len(lane.early(slot)) for lane in lanes)
        retained = max(len(lane.retained(slot)) for lane in lanes)
        for lane in lanes:
            lane.pass_state(slot, early)
            lane.forward_and_backward(lane.retained(slot), retained)
            lane.recompute(slot, early)
    left = max(max(len(lane.standalone) for lane in lanes), 0 if any(lane.ops for lane in lanes) else 1)
    for lane in lanes:
        for _ in range(left):
            lane.forward_and_backward((), 1)
    return tuple(Schedule(tuple(lane.ops)) for lane in lanes)


class _Lane:
    """The operations of one rank, while it keeps step with others."""

    def __init__(self, chunks: Chunks, k: int) -> None:
        self._k = k
        self.groups = sorted(chunks.dependent_groups(), key=len, reverse=True)
        self.standalone = deque(range(len(chunks) - sum(map(len, self.groups))))  # they come first
        self.ops: list[Op] = []

    def retained(self, slot: int) -> tuple[int, ...]:
        return tuple(self.groups[slot][-self._k :]) if slot < len(self.groups) else ()

    def early(self, slot: int) -> tuple[int, ...]:
        """Those that are recomputed."""
        return tuple(self.groups[slot][: -self._k]) if slot < len(self.groups) else ()

    def pass_state(self, slot: int, count: int) -> None:
        early = self.early(slot)
        self.ops += [Op(OpKind.state_pass, (chunk,)) for chunk in early]
        self.ops += [Op(OpKind.state_pass, (DUMMY,))] * (count - len(early))

    def forward_and_backward(self, chunks: tuple[int, ...], width: int) -> None:
        """One engine call of `width` chunks: these, then standalone ones, then dummies."""
        own = [self.standalone.popleft() for _ in range(min(width - len(chunks), len(self.standalone)))]
        joined = (*chunks, *own, *[DUMMY] * (width - len(chunks) - len(own)))
        self.ops += [Op(OpKind.forward, joined), Op(OpKind.backward, joined[::-1])]

    def recompute(self, slot: int, count: int) -> None:
        early = self.early(slot)
        for chunk in reversed(early):
            self.ops += [Op(OpKind.recompute, (chunk,)), Op(OpKind.backward, (chunk,))]
        for _ in range(count - len(early)):
            self.forward_and_backward((), 1)


def validate_lockstep(schedules: Sequence[Schedule]) -> None:
    """Prove that no rank waits for ever in a collective of an operation that another does not run.

    A forward and a recompute are the same to the engine; a state pass is not, for it builds no graph.

    Raises:
        ValueError: names the first position at which two ranks differ.
    """

    def kind(op: Op) -> tuple[OpKind, int]:
        return OpKind.forward if op.kind is OpKind.recompute else op.kind, len(op.chunks)

    first = schedules[0]
    for rank, schedule in enumerate(schedules):
        if len(schedule.ops) != len(first.ops):
            raise ValueError(f"rank {rank} runs {len(schedule.ops)} operations, rank 0 {len(first.ops)}")
        for position, (op, other) in enumerate(zip(schedule.ops, first.ops, strict=True)):
            if kind(op) != kind(other):
                raise ValueError(f"operation {position}: rank {rank} runs {op}, rank 0 {other}")


def validate(schedule: Schedule, chunks: Chunks, k: int) -> None:
    """Prove, for a schedule of one stage, what the gradient and the memory bound rest on.

    Each chunk goes backward exactly once, with live activations; state is read only after it was written and before
    it was freed; backwards of a sequence descend; at most K chunks hold activations at once.

    Raises:
        ValueError: names the first operation that breaks a rule, and the rule.
    """
    groups = chunks.dependent_groups()
    group_of = {chunk: group for group in groups for chunk in group}
    written: set[int] = set()
    passed: set[int] = set()
    live: dict[int, tuple[int, ...]] = {}  # chunk -> the chunks of its engine call
    done: set[int] = set()
    for position, op in enumerate(schedule.ops):

        def refuse(rule: str, position: int = position, op: Op = op) -> ValueError:
            return ValueError(f"operation {position} ({op}): {rule}")

        if op.kind in (OpKind.input_gradient, OpKind.weight_gradient):
            raise refuse("only pipeline stages split backwards")
        if len(op.chunks) > 1 and op.kind not in (OpKind.forward, OpKind.backward):
            raise refuse("only forwards and backwards may join chunks")
        for chunk in op.real_chunks:
            if not 0 <= chunk < len(chunks):
                raise refuse(f"there are only {len(chunks)} chunks")
            group = group_of.get(chunk, range(chunk, chunk + 1))
            if chunk in done:
                raise refuse(f"chunk {chunk} already went backward, its state is freed")
            if op.kind is OpKind.backward:
                if chunk not in live:
                    raise refuse(f"chunk {chunk} holds no activations")
                if chunk + 1 < group.stop and chunk + 1 not in done:  # which had to wait for those after it
                    raise refuse(f"a later chunk of the sequence of chunk {chunk} has yet to give it gradient")
                if live[chunk] not in (op.chunks, op.chunks[::-1]):
                    raise refuse("the chunks were not forwarded by one engine call of their own")
                del live[chunk]
                done.add(chunk)
                continue
            if chunk in live:
                raise refuse(f"chunk {chunk} already holds activations")
            if chunk > group.start and chunk - 1 not in written:  # which had to wait for those before it
                raise refuse(f"an earlier chunk of the sequence of chunk {chunk} has not written its state")
            if op.kind is OpKind.state_pass:
                if chunk not in group_of or chunk in passed:
                    raise refuse(f"chunk {chunk} needs no state pass")
                passed.add(chunk)
            elif (op.kind is OpKind.recompute) != (chunk in passed):
                raise refuse(f"chunk {chunk} is recomputed if and only if it had a state pass")
            else:
                live[chunk] = op.chunks
            written.add(chunk)
        if len(live) > k:
            raise refuse(f"{len(live)} chunks hold activations, K is {k}")
    missing = [chunk for chunk in range(len(chunks)) if chunk not in done]
    if missing:
        raise ValueError(f"chunk {missing[0]} never goes backward")
