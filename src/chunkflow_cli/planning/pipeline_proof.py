"""Prove that the schedules of a pipeline can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate


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
