"""The messages between the stages of a pipeline: in which order they come, and when a stage posts each receive.

A receive that is posted ahead lets its message arrive during computation. On a GPU it also runs on the device until the
message is there, and some things wait for the whole device: memory that the allocator gives back, the first use of a
kernel, a profiler. So a stage posts a receive only after it has sent all that its neighbor needs to get as far as that
message. Then the others can deliver whatever a stage waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkflow_cli.planning.schedule import Op, OpKind, Schedule

SENDS_ON = (OpKind.state_pass, OpKind.forward)
"""Operations that take hidden states from the stage before, and whose result the next stage waits for."""
SENDS_BACK = (OpKind.backward, OpKind.input_gradient)
"""Operations that take a gradient from the next stage, and whose result the stage before waits for."""
POSTED_AHEAD = 2
"""Receives that are posted before they are needed; each takes the memory of one chunk's hidden states."""


@dataclass(frozen=True)
class Receive:
    """A receive that a stage posts."""

    chunk: int
    onward: bool
    """Of hidden states, from the stage before; otherwise of their gradient, from the next stage."""


def receives_of(schedules: Sequence[Schedule], stage: int) -> tuple[tuple[Receive, ...], ...]:
    """Return the receives that a stage posts before each of its operations, in the order in which neighbors send.

    Args:
        schedules: those of all stages.
    """
    own = schedules[stage]
    sides = []
    if stage > 0:
        sides.append(_Neighbour(own, schedules[stage - 1], onward=True))
    if stage < len(schedules) - 1:
        sides.append(_Neighbour(own, schedules[stage + 1], onward=False))
    posted = []
    for op in own.ops:
        posted.append(tuple(receive for side in sides for receive in side.before(op)))
        for side in sides:
            side.after(op)
    return tuple(posted)


class _Neighbour:
    """What has been exchanged with a neighbor so far."""

    def __init__(self, own: Schedule, neighbour: Schedule, *, onward: bool) -> None:
        self._onward = onward
        self._comes, self._goes = (SENDS_ON, SENDS_BACK) if onward else (SENDS_BACK, SENDS_ON)
        going = [chunk for op in own.ops if op.kind in self._goes for chunk in op.chunks]
        number = {chunk: index for index, chunk in enumerate(going, start=1)}
        self._coming: list[tuple[int, int]] = []
        """Chunk of each message that comes, and how many must have gone before the neighbor can send it."""
        gone_before = 0
        for op in neighbour.ops:
            if op.kind in self._goes:
                gone_before = max(gone_before, *(number[chunk] for chunk in op.chunks))
            if op.kind in self._comes:
                self._coming += [(chunk, gone_before) for chunk in op.chunks]
        self._place = {chunk: index for index, (chunk, _) in enumerate(self._coming, start=1)}
        self._needed = self._posted = self._sent = 0  # messages, from the first on

    def before(self, op: Op) -> list[Receive]:
        """Return what to post before an operation, the receives that it waits for included."""
        if op.kind in self._comes:
            self._needed = max(self._needed, *(self._place[chunk] for chunk in op.chunks))
        receives = []
        for chunk, gone_before in self._coming[self._posted : self._needed + POSTED_AHEAD]:
            if gone_before > self._sent:
                break
            receives.append(Receive(chunk, self._onward))
        self._posted += len(receives)
        assert self._posted >= self._needed, f"{op} waits for a message that cannot come"
        return receives

    def after(self, op: Op) -> None:
        """Note that an operation has sent its result."""
        if op.kind in self._goes:
            self._sent += len(op.chunks)
