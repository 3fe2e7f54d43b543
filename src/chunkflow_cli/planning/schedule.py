"""The operations of one rank in one optimizer step, as a list that can be read, checked and simulated.

    S0 S1 F2 B2 R1 B1 R0 B0        one sequence of three chunks, K = 1
    S0 F1+2 B2+1 R0 B0             K = 2, the retained chunks in one engine call (ZeRO-3 needs that)
    F0 I0 W0                       a pipeline stage with a backward that is split in two
    S- F3+- B-+3                   in lock-step with ranks that have more to do: `-` is a dummy token
    P0 P1 P2 F3 B3 R2 B2 F1 B1 R0 B0   the answers of a preference pair, chunks 0, 1 and 2, 3

Source: ChunkFlow (arXiv 2503.02356), section 4.2, as its prose has it: the *last* K chunks of a sequence keep their
activations, and backwards descend strictly, because the keys and values of a chunk collect gradient from every later
one. (Algorithm 2 as printed keeps the others and ends ascending, which breaks the memory bound and the gradient.)
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from chunkflow_cli.planning.chunks import Chunks, Unit

DUMMY = -1
"""Stands for a chunk of one token with zero loss, which a rank runs because the others run one."""


class OpKind(str, Enum):
    """What an operation does with its chunks. The name is that of its field in `OperationSeconds`."""

    state_pass = "S"
    """Forward of a chunk that will be recomputed: without autograd, only its keys and values are kept."""
    forward = "F"
    """Forward that keeps its activations."""
    recompute = "R"
    """Second forward of a chunk that had a state pass, right before its backward."""
    backward = "B"
    input_gradient = "I"
    """First half of a split backward: the gradient that the previous stage waits for."""
    weight_gradient = "W"
    """Second half of a split backward. No stage waits for it, so it fills the bubbles of a pipeline."""
    first_pass = "P"
    """Forward without autograd that keeps log-probabilities, and keys and values as a state pass does."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on one or more chunks."""

    kind: OpKind
    chunks: tuple[int, ...]
    """Usually one. Retained chunks of a sequence may share one engine call; a backward lists them descending."""

    def __str__(self) -> str:
        names = ("-" if chunk == DUMMY else str(chunk) for chunk in self.chunks)
        return self.kind.value + "+".join(names)

    @property
    def real_chunks(self) -> tuple[int, ...]:
        """The chunks without dummies."""
        return self.chunks if DUMMY not in self.chunks else tuple(chunk for chunk in self.chunks if chunk != DUMMY)


@dataclass(frozen=True)
class Schedule:
    """Operations in the order in which they run."""

    ops: tuple[Op, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.ops))

    @classmethod
    def parse(cls, line: str) -> Schedule:
        """Return the schedule that `str` turned into this line.

        Raises:
            ValueError: a word is not an operation.
        """
        ops = []
        for word in line.split():
            if re.fullmatch(r"[SFRBIWP](\d+|-)(\+(\d+|-))*", word) is None:
                raise ValueError(f"{word!r} is not an operation such as S0, F2, R1, B1 or F1+2")
            chunks = tuple(DUMMY if name == "-" else int(name) for name in word[1:].split("+"))
            ops.append(Op(OpKind(word[0]), chunks))
        return cls(tuple(ops))

    @property
    def dummies(self) -> int:
        """Number of forwards and backwards of a single token that only keep step with other ranks."""
        return sum(chunk == DUMMY for op in self.ops for chunk in op.chunks)


def split_unit(unit: Unit, k: int) -> tuple[Unit, Unit]:
    """Return the chunks of a unit that are forwarded twice, and the last K, which keep their activations.

    Raises:
        ValueError: `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    return unit[:-k], unit[-k:]


@dataclass(frozen=True)
class Job:
    """Forwards without gradient, then the forwards and backwards of one unit."""

    passes: Unit
    """Chunks of `kind` that run first."""
    early: Unit
    """Chunks of the unit that are forwarded twice."""
    retained: Unit
    kind: OpKind = OpKind.state_pass

    def ops(self, *, join_retained: bool) -> list[Op]:
        """Return the operations of a rank that need not keep step with others."""
        calls: list[Unit] = [self.retained] if join_retained else [(chunk,) for chunk in self.retained]
        ops = [Op(self.kind, (chunk,)) for chunk in self.passes]
        ops += [Op(OpKind.forward, call) for call in calls]
        ops += [Op(OpKind.backward, call[::-1]) for call in reversed(calls)]
        for chunk in reversed(self.early):
            ops += [Op(OpKind.recompute, (chunk,)), Op(OpKind.backward, (chunk,))]
        return ops


JobSequence = tuple[Job, ...]
"""Jobs that run one after the other: one for a sequence, two for a pair whose answers are in different chunks."""


def tasks_of(chunks: Chunks, k: int) -> list[JobSequence]:
    """Return the jobs of supervised training, one for each unit."""
    return [(Job(early, early, retained),) for early, retained in (split_unit(unit, k) for unit in chunks.units())]


def plan(chunks: Chunks, k: int, *, join_retained: bool = False) -> Schedule:
    """Return the operations of one step of a rank without a pipeline.

    A standalone chunk goes forward and backward at once. A sequence of N dependent chunks runs state passes over the
    first N - K and forwards over the last K, then all backwards descending, each early chunk recomputed right before.

    Args:
        k: how many chunks of a long sequence keep their activations.
        join_retained: run the retained chunks of a sequence as one engine call: ZeRO-3 traces one forward for one
            backward.
    """
    return plan_tasks(tasks_of(chunks, k), join_retained=join_retained)


def plan_tasks(tasks: Sequence[JobSequence], *, join_retained: bool) -> Schedule:
    """Return the operations of these tasks, one after the other."""
    return Schedule(tuple(op for task in tasks for job in task for op in job.ops(join_retained=join_retained)))


IDLE = Schedule((Op(OpKind.forward, (DUMMY,)), Op(OpKind.backward, (DUMMY,))))
"""The schedule of a rank that got no samples: its gradients are zero, but the other ranks wait for them."""


NO_JOB = Job((), (), ())


def plan_in_lockstep(ranks: Sequence[Sequence[JobSequence]]) -> tuple[Schedule, ...]:
    """Return the operations of one step of all ranks, which run the same kind on as many chunks at each position.

    The i-th longest sequences of all ranks go together: state passes, one forward and one backward over the retained
    chunks, and a forward and a backward for each recompute. Where a rank has less to do, a standalone chunk of its own
    fills a forward and its backward, and dummies fill the rest. A state pass can only be filled by a dummy.

    Args:
        ranks: the tasks of each rank. Of all tasks, those that are a single standalone chunk come first.
    """
    lanes = [_Lane(deque(task[0].retained[0] for task in own if _size(task) == 1), []) for own in ranks]
    longest_first = (sorted((task for task in own if _size(task) > 1), key=_size, reverse=True) for own in ranks)
    for together in itertools.zip_longest(*longest_first, fillvalue=()):
        # The last jobs of all tasks go together: of a pair, the answer that needs no first pass of its last chunks.
        for jobs in itertools.zip_longest(*together, fillvalue=NO_JOB):
            kind = next((job.kind for job in jobs if job.passes), OpKind.state_pass)
            most = [max(len(getattr(job, part)) for job in jobs) for part in ("passes", "early", "retained")]
            for lane, job in zip(lanes, jobs, strict=True):
                lane.run(job, kind, *most)
    left = max(max(len(lane.standalone) for lane in lanes), 0 if any(lane.ops for lane in lanes) else 1)
    for lane in lanes:
        lane.run_standalone(left)
    return tuple(Schedule(tuple(lane.ops)) for lane in lanes)


def _size(task: JobSequence) -> int:
    """Return the number of chunks of a task."""
    return sum(len(job.early) + len(job.retained) for job in task)


@dataclass
class _Lane:
    """The schedule of one rank while it is built in step with the others."""

    standalone: deque[int]
    """Chunks that are not in the schedule yet."""
    ops: list[Op]

    def run(self, job: Job, kind: OpKind, most_passes: int, most_early: int, most_retained: int) -> None:
        """Run a job and fill up to the counts of the rank that has most to do."""
        self.ops += [Op(kind, (chunk,)) for chunk in (*job.passes, *[DUMMY] * (most_passes - len(job.passes)))]
        self._forward_and_backward(job.retained, most_retained)
        for chunk in reversed(job.early):
            self.ops += [Op(OpKind.recompute, (chunk,)), Op(OpKind.backward, (chunk,))]
        self.run_standalone(most_early - len(job.early))

    def run_standalone(self, count: int) -> None:
        """Run standalone chunks one by one, and dummies when there are no more."""
        for _ in range(count):
            self._forward_and_backward((), 1)

    def _forward_and_backward(self, chunks: Unit, width: int) -> None:
        """Run one engine call of `width` chunks: these, then standalone ones, then dummies."""
        own = [self.standalone.popleft() for _ in range(min(width - len(chunks), len(self.standalone)))]
        joined = (*chunks, *own, *[DUMMY] * (width - len(chunks) - len(own)))
        self.ops += [Op(OpKind.forward, joined), Op(OpKind.backward, joined[::-1])]
