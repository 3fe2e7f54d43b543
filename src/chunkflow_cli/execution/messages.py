"""Hidden states and gradients between the stages of a pipeline.

Every process knows the plan of all stages, so it knows which messages come, in which order and in which shape: nothing
is exchanged about them. Sends return at once and receives are posted ahead, so messages overlap with computation.

There is no deadlock, because no operation waits for a send: a stage waits only for messages, and a message is sent
right after the operation that produces it. `simulate` follows the same rules, so a schedule that ends there ends here.
Messages of one direction between two stages are received in the order in which the *sender's* schedule produces them,
even if the receiver needs them in another order; early ones wait in `_Inbox`.

NCCL adds two rules. It runs the operations of one process group strictly in turn, and a send is over only when it is
received. So each direction of each edge has a group of its own, in which both sides have the same order. And whatever
waits for the whole device waits for posted receives: `planning.message_order` says when each is posted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from chunkflow_cli.engine import PATIENCE
from chunkflow_cli.planning.message_order import SENDS_BACK, SENDS_ON, receives_of
from chunkflow_cli.planning.schedule import Op, Schedule


class Links:
    """A stage's connections to its neighbors. All processes must create theirs, once and in the same order."""

    def __init__(self, pipelines: list[list[int]], device: torch.device) -> None:
        """
        Args:
            pipelines: the ranks of every pipeline, in the order of its stages.
        """
        own = dist.get_rank()
        self.ranks = next(ranks for ranks in pipelines if own in ranks)
        self.stage = self.ranks.index(own)
        self._groups = self._new_groups(pipelines)
        self._connect(device)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.ranks) - 1

    def send(self, tensor: Tensor, *, onward: bool) -> dist.Work:
        """Send to the next stage (`onward`) or to the one before; the tensor must live until the work is done."""
        other = self.stage + (1 if onward else -1)
        work = dist.isend(tensor, self.ranks[other], group=self._groups[min(self.stage, other), onward])
        assert work is not None
        return work

    def receive(self, tensor: Tensor, *, onward: bool) -> dist.Work:
        """Receive from the stage before (`onward`) or from the next one."""
        other = self.stage - (1 if onward else -1)
        work = dist.irecv(tensor, self.ranks[other], group=self._groups[min(self.stage, other), onward])
        assert work is not None
        return work

    @staticmethod
    def _new_groups(pipelines: list[list[int]]) -> dict[tuple[int, bool], dist.ProcessGroup]:
        """Return the groups of this process, by (stage before the edge, onward).

        All pipelines share them, because NCCL makes every process take part in making each: a rank has only one peer in
        a group, and sends to it or receives from it.
        """
        groups = {}
        for edge in range(len(pipelines[0]) - 1):
            members = [rank for ranks in pipelines for rank in ranks[edge : edge + 2]]
            for onward in (True, False):
                groups[edge, onward] = dist.new_group(members, timeout=PATIENCE)
        return groups

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
        self._empty = empty
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._receives = deque(receives_of(schedules, links.stage))
        self._inboxes = {True: _Inbox(), False: _Inbox()}

    def send(self, tensor: Tensor, *, onward: bool) -> None:
        """Send hidden states to the next stage (`onward`), or their gradient to the one before; return at once."""
        tensor = tensor.contiguous()
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        self._sent.append((self._links.send(tensor, onward=onward), tensor))

    def receive(self, op: Op) -> Tensor | None:
        """Wait for the message that an operation needs. Every operation of the stage asks, in the schedule's order.

        Returns:
            The hidden states of the operation's chunk from the stage before, or their gradient from the next stage.
            None if the operation needs neither.
        """
        for planned in self._receives.popleft():
            tensor = self._empty(planned.chunk)
            work = self._links.receive(tensor, onward=planned.onward)
            self._inboxes[planned.onward].posted.append((planned.chunk, work, tensor))
        if op.kind in SENDS_ON and not self._links.is_first:
            return self._inboxes[True].take(op.chunks[0])
        if op.kind in SENDS_BACK and not self._links.is_last:
            return self._inboxes[False].take(op.chunks[0])
        return None

    def close(self) -> None:
        """Wait until everything that was sent has arrived, and check that nothing is left unread."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        for inbox in self._inboxes.values():
            assert inbox.is_empty, "a neighbor's schedule sends what this stage's does not receive"


@dataclass
class _Inbox:
    """The messages from one neighbor."""

    posted: deque[tuple[int, dist.Work, Tensor]] = field(default_factory=deque)
    """Chunk, receive and its tensor, in the order in which the neighbor sends."""
    _early: dict[int, Tensor] = field(default_factory=dict)

    def take(self, chunk: int) -> Tensor:
        while chunk not in self._early:
            arrived, work, tensor = self.posted.popleft()
            work.wait()
            self._early[arrived] = tensor
        return self._early.pop(chunk)

    @property
    def is_empty(self) -> bool:
        return not (self.posted or self._early)
