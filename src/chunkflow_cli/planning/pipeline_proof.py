"""Prove that the schedules of a pipeline can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


def validate_pipeline(
    schedules: Sequence[Schedule], chunks: Chunks, k: int, *, most_live: Sequence[int] | None = None
) -> None:
    """Prove what gradient, memory and an end of the step rest on.

    On every stage: each chunk has one first forward and one backward, whole or in its two
    halves; state is read only after it was written and before it was freed; backwards of a sequence descend, with live
    activations; at most K chunks of a sequence hold activations at once until they go backward; a recompute stands
    right before its backward. No stage exceeds its bound of live activations. The stages together never deadlock.

    Args:
        schedules: one a stage.
        chunks: the chunks of the step.
        k: how many chunks of a long sequence may keep their activations.
        most_live: (stages,) bound of live activations, or None.

    Raises:
        ValueError: names the stage and the first operation that breaks a rule, and the rule.
    """
    groups = chunks.dependent_groups()
    group_of = {chunk: group for group in groups for chunk in group}
    for stage, schedule in enumerate(schedules):
        proof = _StageProof(stage, len(chunks), group_of, k, None if most_live is None else most_live[stage])
        for position, op in enumerate(schedule.ops):
            proof.step(position, op)
        proof.close()
    if len(chunks):
        simulate(schedules, OperationSeconds.proportional(np.ones(len(chunks)), len(schedules)))


class _StageProof:
    """Walks through the schedule of one stage and refuses the first operation that breaks a rule."""

    def __init__(self, stage: int, chunks: int, group_of: dict[int, range], k: int, most_live: int | None) -> None:
        self._stage = stage
        self._chunks = chunks
        self._group_of = group_of
        self._k = k
        self._most_live = most_live
        self._passed: set[int] = set()
        self._written: set[int] = set()
        self._kept: set[int] = set()
        """Forwarded with activations, not yet backward."""
        self._freed: set[int] = set()
        """Gone backward: state is freed."""
        self._half_done: set[int] = set()
        """Input gradient taken, weight gradient not."""
        self._kept_of_group: dict[int, int] = {}
        """By the first chunk of its sequence."""
        self._recomputed: int | None = None

    def step(self, position: int, op: Op) -> None:
        def refuse(rule: str) -> ValueError:
            return ValueError(f"stage {self._stage}, operation {position} ({op}): {rule}")

        if len(op.chunks) != 1:
            raise refuse("operations of a pipeline take one chunk")
        chunk = op.chunks[0]
        if not 0 <= chunk < self._chunks:
            raise refuse(f"there are only {self._chunks} chunks")
        group = self._group_of.get(chunk, range(chunk, chunk + 1))
        is_gradient = op.kind in (OpKind.backward, OpKind.input_gradient)
        if self._recomputed is not None and not (is_gradient and chunk == self._recomputed):
            raise refuse(f"the recompute of chunk {self._recomputed} must stand right before its backward")
        self._recomputed = None
        if op.kind is OpKind.weight_gradient:
            if chunk not in self._half_done:
                raise refuse(f"chunk {chunk} has no input gradient without its weight gradient")
            self._half_done.remove(chunk)
            return
        if chunk in self._freed:
            raise refuse(f"chunk {chunk} already went backward, its state is freed")
        if is_gradient:
            if chunk not in self._kept:
                raise refuse(f"chunk {chunk} holds no activations")
            if chunk + 1 < group.stop and chunk + 1 not in self._freed:  # which had to wait for those after it
                raise refuse(f"a later chunk of the sequence of chunk {chunk} has yet to give it gradient")
            self._kept.remove(chunk)
            self._kept_of_group[group.start] -= 1
            self._freed.add(chunk)
            if op.kind is OpKind.input_gradient:
                self._half_done.add(chunk)
            return
        if chunk in self._kept:
            raise refuse(f"chunk {chunk} already holds activations")
        if chunk > group.start and chunk - 1 not in self._written:  # which had to wait for those before it
            raise refuse(f"an earlier chunk of the sequence of chunk {chunk} has not written its state")
        if op.kind is OpKind.state_pass:
            if chunk not in self._group_of or chunk in self._passed:
                raise refuse(f"chunk {chunk} needs no state pass")
            self._passed.add(chunk)
        elif (op.kind is OpKind.recompute) != (chunk in self._passed):
            raise refuse(f"chunk {chunk} is recomputed if and only if it had a state pass")
        else:
            self._keep(chunk, group, refuse)
            if op.kind is OpKind.recompute:
                self._recomputed = chunk
        self._written.add(chunk)

    def _keep(self, chunk: int, group: range, refuse: Callable[[str], ValueError]) -> None:
        self._kept.add(chunk)
        self._kept_of_group[group.start] = self._kept_of_group.get(group.start, 0) + 1
        if self._kept_of_group[group.start] > self._k:
            raise refuse(f"{self._kept_of_group[group.start]} chunks of a sequence hold activations, K is {self._k}")
        live = len(self._kept) + len(self._half_done)
        if self._most_live is not None and live > self._most_live:
            raise refuse(f"{live} chunks hold activations, the stage has room for {self._most_live}")

    def close(self) -> None:
        for chunk in range(self._chunks):
            if chunk not in self._freed:
                raise ValueError(f"stage {self._stage}: chunk {chunk} never goes backward")
            if chunk in self._half_done:
                raise ValueError(f"stage {self._stage}: chunk {chunk} has no weight gradient")
