"""Prove that schedules compute the whole gradient, within the memory bound, and that no rank or stage hangs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def validate(schedule: Schedule, chunks: Chunks, k: int, *, answers: int = 0) -> None:
    """Prove that the schedule of a rank without a pipeline is right.

    Each chunk goes backward exactly once, with live activations. State is read only after it was written and before it
    was freed. Backwards of a sequence descend. At most K chunks hold activations at once. The weights of preferences
    are known before a forward uses them.

    Args:
        answers: sequences of a sample of preferences, whose log-probabilities weigh its targets; 0 in supervised
            training.

    Raises:
        ValueError: names the first operation that breaks a rule, and the rule.
    """
    _WholeModel(chunks, k, chunks_of_samples(chunks, answers) if answers else None).walk(schedule)


def validate_pipeline(
    schedules: Sequence[Schedule], chunks: Chunks, k: int, *, most_live: Sequence[int] | None = None
) -> None:
    """Prove that the schedules of all stages of a pipeline are right, one by one and together.

    On every stage, each chunk has one first forward and one backward, whole or in two halves. State is read only after
    it was written and before it was freed. Backwards of a sequence descend, with live activations, and a recompute is
    directly followed by its backward. At most K chunks of a sequence hold activations at once until they go backward.
    No stage exceeds its bound of live activations. The stages together never deadlock.

    Args:
        most_live: (stages,) bound of live activations; no bound by default.

    Raises:
        ValueError: names the stage and the first operation that breaks a rule, and the rule.
    """
    for stage, schedule in enumerate(schedules):
        try:
            _Stage(chunks, k, None if most_live is None else most_live[stage]).walk(schedule)
        except ValueError as error:
            raise ValueError(f"stage {stage}: {error}") from error
    if len(chunks):
        simulate(schedules, OperationSeconds.proportional(np.ones(len(chunks)), len(schedules)))


def validate_lockstep(schedules: Sequence[Schedule]) -> None:
    """Prove that no rank waits forever in a collective of an operation that another rank does not run.

    A forward and a recompute are the same to the engine. A state pass differs, because it builds no graph.

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


def chunks_of_samples(chunks: Chunks, answers: int) -> list[set[int]]:
    """Return for each chunk all chunks that hold a part of any of its samples of preferences, itself included."""
    chunk_of_segment = np.repeat(np.arange(len(chunks)), np.diff(chunks.first_segment)).tolist()
    samples = (chunks.sequence // answers).tolist()
    of_sample: dict[int, set[int]] = {}
    for chunk, sample in zip(chunk_of_segment, samples, strict=True):
        of_sample.setdefault(sample, set()).add(chunk)
    needed: list[set[int]] = [{chunk} for chunk in range(len(chunks))]
    for chunk, sample in zip(chunk_of_segment, samples, strict=True):
        if len(of_sample[sample]) > 1:
            needed[chunk] |= of_sample[sample]
    return needed


def _reads(chunks: Chunks) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return for each chunk of a branch the chunks of the prompt that it reads, and the reverse."""
    reads: dict[int, list[int]] = {}
    read_by: dict[int, list[int]] = {}
    branches = chunks.branches()
    groups = {chunks.first_sequence(group.start): group for group in chunks.dependent_groups()}
    for sequence, begin in branches.items():
        prompt = [chunk for chunk in groups.get(sequence ^ 1, ()) if chunks.begin(chunk) < begin]
        for chunk in groups[sequence]:
            reads[chunk] = prompt
            for read in prompt:
                read_by.setdefault(read, []).append(chunk)
    return reads, read_by


class _Proof:
    """The state of the chunks while a schedule runs, and the rules that hold with and without a pipeline."""

    def __init__(self, chunks: Chunks, k: int) -> None:
        self._count = len(chunks)
        self._k = k
        self._group_of = {chunk: group for group in chunks.dependent_groups() for chunk in group}
        self._reads, self._read_by = _reads(chunks)
        self._passed: set[int] = set()
        """Chunks that had a state pass or a first pass."""
        self._summed: set[int] = set()
        """Chunks whose log-probabilities are known, which may be forwarded again."""
        self._written: set[int] = set()
        self._live: dict[int, tuple[int, ...]] = {}
        """The chunks that wait for their backward, each with the chunks of its engine call."""
        self._live_of_group: Counter[int] = Counter()
        """Number of those in each sequence, by its first chunk."""
        self._freed: set[int] = set()
        """Chunks that went backward, so that their state is freed."""
        self._half_done: set[int] = set()
        """Chunks that have an input gradient and no weight gradient yet."""

    def walk(self, schedule: Schedule) -> None:
        """Run a schedule to its end.

        Raises:
            ValueError: names the first operation that breaks a rule, and the rule.
        """
        for position, op in enumerate(schedule.ops):
            try:
                self._step(op)
            except ValueError as error:
                raise ValueError(f"operation {position} ({op}): {error}") from error
        for chunk in range(self._count):
            if chunk not in self._freed:
                raise ValueError(f"chunk {chunk} never goes backward")
            if chunk in self._half_done:
                raise ValueError(f"chunk {chunk} has no weight gradient")

    def _step(self, op: Op) -> None:
        for chunk in op.real_chunks:
            if not 0 <= chunk < self._count:
                raise ValueError(f"there are only {self._count} chunks")
            if op.kind is OpKind.weight_gradient:
                if chunk not in self._half_done:
                    raise ValueError(f"chunk {chunk} has no input gradient without its weight gradient")
                self._half_done.remove(chunk)
            elif chunk in self._freed:
                raise ValueError(f"chunk {chunk} already went backward, its state is freed")
            elif _is_gradient(op):
                self._go_backward(op, chunk)
            else:
                self._go_forward(op, chunk)

    def _group(self, chunk: int) -> range:
        return self._group_of.get(chunk, range(chunk, chunk + 1))

    def _go_backward(self, op: Op, chunk: int) -> None:
        group = self._group(chunk)
        if chunk not in self._live:
            raise ValueError(f"chunk {chunk} holds no activations")
        # It suffices to look at the next chunk, because that one had to wait for those after it.
        if chunk + 1 < group.stop and chunk + 1 not in self._freed:
            raise ValueError(f"a later chunk of the sequence of chunk {chunk} has yet to give it gradient")
        for branch in self._read_by.get(chunk, ()):
            if branch not in self._freed:
                raise ValueError(f"chunk {branch} has yet to give gradient to the prompt in chunk {chunk}")
        if self._live[chunk] not in (op.chunks, op.chunks[::-1]):
            raise ValueError("the chunks were not forwarded by one engine call of their own")
        del self._live[chunk]
        self._live_of_group[group.start] -= 1
        self._freed.add(chunk)
        if op.kind is OpKind.input_gradient:
            self._half_done.add(chunk)

    def _go_forward(self, op: Op, chunk: int) -> None:
        group = self._group(chunk)
        if chunk in self._live:
            raise ValueError(f"chunk {chunk} already holds activations")
        if chunk > group.start and chunk - 1 not in self._written:  # that one had to wait for those before it
            raise ValueError(f"an earlier chunk of the sequence of chunk {chunk} has not written its state")
        for read in self._reads.get(chunk, ()):
            if read not in self._written or read in self._freed:
                raise ValueError(f"the prompt in chunk {read} is not in the state that chunk {chunk} reads")
        if op.kind is OpKind.state_pass:
            if chunk not in self._group_of or chunk in self._passed:
                raise ValueError(f"chunk {chunk} needs no state pass")
            self._passed.add(chunk)
        elif op.kind is OpKind.first_pass:
            if chunk in self._written:
                raise ValueError(f"chunk {chunk} needs no first pass after another forward")
            self._passed.add(chunk)
            self._summed.add(chunk)
        elif chunk not in self._summed and (op.kind is OpKind.recompute) != (chunk in self._passed):
            raise ValueError(f"chunk {chunk} is recomputed if and only if it had a state pass")
        else:
            self._summed.add(chunk)
            self._live[chunk] = op.chunks
            self._live_of_group[group.start] += 1
        self._written.add(chunk)


class _WholeModel(_Proof):
    """The rules of a rank without a pipeline."""

    def __init__(self, chunks: Chunks, k: int, needed: list[set[int]] | None) -> None:
        """
        Args:
            needed: for each chunk, those whose log-probabilities weigh its targets; None in supervised training.
        """
        super().__init__(chunks, k)
        self._needed = needed

    def _step(self, op: Op) -> None:
        if op.kind in (OpKind.input_gradient, OpKind.weight_gradient):
            raise ValueError("only pipeline stages split backwards")
        if len(op.chunks) > 1 and op.kind not in (OpKind.forward, OpKind.backward):
            raise ValueError("only forwards and backwards may join chunks")
        super()._step(op)
        if op.kind is OpKind.first_pass and self._needed is None:
            raise ValueError("only preferences have a first pass")
        if op.kind in (OpKind.forward, OpKind.recompute) and self._needed is not None:
            for chunk in op.real_chunks:
                if missing := self._needed[chunk] - self._summed:
                    raise ValueError(
                        f"the log-probabilities of chunk {min(missing)} weigh the targets of chunk {chunk}"
                    )
        if len(self._live) > self._k:
            raise ValueError(f"{len(self._live)} chunks hold activations, K is {self._k}")


class _Stage(_Proof):
    """The rules of a pipeline stage."""

    def __init__(self, chunks: Chunks, k: int, most_live: int | None) -> None:
        super().__init__(chunks, k)
        self._most_live = most_live
        self._recomputed: int | None = None
        """The chunk that the operation before recomputed."""

    def _step(self, op: Op) -> None:
        if len(op.chunks) != 1 or op.chunks != op.real_chunks:
            raise ValueError("operations of a pipeline take one chunk")
        chunk = op.chunks[0]
        if self._recomputed is not None and not (_is_gradient(op) and chunk == self._recomputed):
            raise ValueError(f"its backward must directly follow the recompute of chunk {self._recomputed}")
        self._recomputed = chunk if op.kind is OpKind.recompute else None
        super()._step(op)
        of_sequence = self._live_of_group[self._group(chunk).start]
        if of_sequence > self._k:
            raise ValueError(f"{of_sequence} chunks of a sequence hold activations, K is {self._k}")
        live = len(self._live) + len(self._half_done)
        if self._most_live is not None and live > self._most_live:
            raise ValueError(f"{live} chunks hold activations, the stage has room for {self._most_live}")


def _is_gradient(op: Op) -> bool:
    return op.kind in (OpKind.backward, OpKind.input_gradient)
