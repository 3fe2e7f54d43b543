"""Hidden states and gradients between the stages of a pipeline.

Every process knows the plan of all stages, so it knows which messages come, in which order and in which shape: nothing
is exchanged about them. Sends return at once and receives are posted ahead, so messages overlap with computation.

Why there is no deadlock: a send never waits for its receiver, so a stage only ever waits for a message, and a message
is sent right after the operation that produces it. `simulate` runs a schedule by the same rules, so a schedule that
ends there ends here, too. Messages of one direction between two stages are received in the order in which the
*sender's* schedule produces them, even if the receiver wants them in another order; early ones wait in `_Inbox`. Each
direction has its own communicator: NCCL runs operations of one communicator strictly in turn, and a receive posted
ahead in one direction would hold up a send in the other until both stages waited for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from chunkflow_cli.engine import PATIENCE
from chunkflow_cli.planning.schedule import OpKind, Schedule

POSTED_AHEAD = 2
"""Receives that are posted before they are needed; each takes the memory of one chunk's hidden states."""

SENDS_ON = (OpKind.state_pass, OpKind.forward)
"""Operations whose result the next stage waits for."""
SENDS_BACK = (OpKind.backward, OpKind.input_gradient)
"""Operations whose result the stage before waits for."""


class Links:
    """A stage's connections to its neighbours. All processes must create theirs, once and in the same order."""

    def __init__(self, pipelines: list[list[int]], device: torch.device) -> None:
        """
        Args:
            pipelines: the ranks of every pipeline, in the order of its stages.
        """
        own = dist.get_rank()
        self.ranks = next(ranks for ranks in pipelines if own in ranks)
        self.stage = self.ranks.index(own)
        self._groups: dict[bool, dist.ProcessGroup] = {}
        for onward in (True, False):
            self._groups[onward], _ = dist.new_subgroups_by_enumeration(pipelines, timeout=PATIENCE)
        self._connect(device)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.ranks) - 1

    def send(self, tensor: Tensor, *, onward: bool) -> dist.Work:
        """Send to the next stage (`onward`) or to the one before; the tensor must live until the work is done."""
        work = dist.isend(tensor, self.ranks[self.stage + (1 if onward else -1)], group=self._groups[onward])
        assert work is not None
        return work

    def receive(self, tensor: Tensor, *, onward: bool) -> dist.Work:
        """Receive from the stage before (`onward`) or from the next one."""
        work = dist.irecv(tensor, self.ranks[self.stage - (1 if onward else -1)], group=self._groups[onward])
        assert work is not None
        return work

    def share(self, tensor: Tensor) -> None:
        """Overwrite the tensor of every stage with that of the last one."""
        dist.broadcast(tensor, self.ranks[-1], group=self._groups[True])

    def _connect(self, device: torch.device) -> None:
        """Send one message over each edge in each direction, edge by edge.

        NCCL opens a connection at its first message, and both sides wait for that.
        """
        nothing = torch.zeros(1, device=device)
        for edge in range(len(self.ranks) - 1):
            for onward, sender, receiver in ((True, edge, edge + 1), (False, edge + 1, edge)):
                if self.stage == sender:
                    self.send(nothing, onward=onward).wait()
                elif self.stage == receiver:
                    self.receive(nothing, onward=onward).wait()


class Messages:
    """The messages that one stage sends and receives within a step."""

    def __init__(self, links: Links, schedules: Sequence[Schedule], empty: Callable[[int], Tensor]) -> None:
        """
        Args:
            schedules: those of all stages.
            empty: returns a new tensor for the hidden states of a chunk.
        """
        self._links = links
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._inboxes: dict[bool, _Inbox] = {}
        if not links.is_first:
            chunks = _made(schedules[links.stage - 1], SENDS_ON)
            self._inboxes[True] = _Inbox(links, chunks, empty, onward=True)
        if not links.is_last:
            chunks = _made(schedules[links.stage + 1], SENDS_BACK)
            self._inboxes[False] = _Inbox(links, chunks, empty, onward=False)

    def send(self, tensor: Tensor, *, onward: bool) -> None:
        """Send hidden states to the next stage (`onward`), or their gradient to the one before; return at once."""
        tensor = tensor.contiguous()
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        self._sent.append((self._links.send(tensor, onward=onward), tensor))

    def receive(self, chunk: int, *, onward: bool) -> Tensor:
        """Wait for the hidden states of a chunk from the stage before (`onward`), or their gradient from the next."""
        return self._inboxes[onward].take(chunk)

    def close(self) -> None:
        """Wait until everything that was sent has arrived, and check that nothing is left unread."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        for inbox in self._inboxes.values():
            assert inbox.is_empty, "a neighbour's schedule sends what this stage's does not receive"


class _Inbox:
    """The messages from one neighbour."""

    def __init__(self, links: Links, chunks: Iterable[int], empty: Callable[[int], Tensor], *, onward: bool) -> None:
        self._links = links
        self._coming = deque(chunks)
        self._empty = empty
        self._onward = onward
        self._posted: deque[tuple[int, dist.Work, Tensor]] = deque()
        self._early: dict[int, Tensor] = {}
        self._post()

    def take(self, chunk: int) -> Tensor:
        while chunk not in self._early:
            assert self._posted, f"no message about chunk {chunk} is coming"
            arrived, work, tensor = self._posted.popleft()
            work.wait()
            self._early[arrived] = tensor
            self._post()
        return self._early.pop(chunk)

    @property
    def is_empty(self) -> bool:
        return not (self._coming or self._posted or self._early)

    def _post(self) -> None:
        while self._coming and len(self._posted) < POSTED_AHEAD:
            chunk = self._coming.popleft()
            tensor = self._empty(chunk)
            self._posted.append((chunk, self._links.receive(tensor, onward=self._onward), tensor))


def _made(schedule: Schedule, kinds: tuple[OpKind, ...]) -> list[int]:
    """Return the chunks that a schedule sends messages about, in its order."""
    return [chunk for op in schedule.ops if op.kind in kinds for chunk in op.chunks]
