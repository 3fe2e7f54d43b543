"""No order of lengths hangs: plans run through a model of what waits for what.

In the model a process is a list of events. A collective ends when every process of its group has come to it, and all of
them to the same one. Sends and receives are issued without waiting; a process waits for a message, and at its end for
all that it has issued. The rules are those that were found by trying (DeepSpeed 0.19.8): without ZeRO-3 ranks meet once,
at the end of the step, with a gradient each; ZeRO-3 fetches weights in every pass through the model; Ulysses exchanges
in every operation on a spread chunk; stages wait for neighbors.

Messages follow NCCL, as torch runs it once a device is bound to the process group: the sends and receives of a group run
strictly in the order in which a process has issued them, and each is over when both sides have come to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.message_order import Receive, receives_of
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.schedule import DUMMY, Op, OpKind, Schedule
from chunkflow_cli.planning.schedule_proof import validate, validate_lockstep
from chunkflow_cli.planning.topology import Topology
from support.posting import always_ahead

FORWARDS = (OpKind.forward, OpKind.recompute)


@dataclass(frozen=True)
class Meet:
    """A collective: over when all ranks of the group are there."""

    group: tuple[int, ...]
    what: tuple[object, ...]


@dataclass(frozen=True)
class Message:
    sender: int
    receiver: int
    what: tuple[object, ...]


@dataclass(frozen=True)
class Issue:
    """Put a send or a receive, whichever it is to this process, at the end of the queue of a group."""

    group: Hashable
    message: Message


@dataclass(frozen=True)
class Wait:
    """Wait for a message; without one, for all that this process has issued."""

    message: Message | None = None


Event = Meet | Issue | Wait


class HangError(Exception):
    """Some process waits for ever; says where each stands."""


def run_to_end(processes: list[list[Event]]) -> None:
    """
    Raises:
        HangError: nobody can go on, or two processes come to different collectives or messages of one group.
    """
    left = [deque(events) for events in processes]
    queues: list[dict[Hashable, deque[Message]]] = [{} for _ in processes]
    moved = True
    while moved:
        moved = False
        for rank, events in enumerate(left):
            while events and _is_over(events[0], rank, left, queues):
                event = events.popleft()
                moved = True
                if isinstance(event, Issue):
                    queues[rank].setdefault(event.group, deque()).append(event.message)
                    _deliver(event.group, rank, queues)
    if any(left):
        raise HangError(str([events[0] if events else "done" for events in left]))


def _is_over(event: Event, rank: int, left: list[deque[Event]], queues: list[dict[Hashable, deque[Message]]]) -> bool:
    """Return whether a process can go on from an event; if so, the others of a collective have done so already."""
    if isinstance(event, Issue):
        return True
    if isinstance(event, Wait):
        return not any(queue if event.message is None else event.message in queue for queue in queues[rank].values())
    if len(event.group) == 1:
        return True
    heads = [left[other][0] if left[other] else None for other in event.group]
    there = [head for head in heads if isinstance(head, Meet) and head.group == event.group]
    if any(head.what != event.what for head in there):
        raise HangError(f"ranks of {event.group} come to {[head.what for head in there]}")
    if len(there) == len(event.group):
        for other in event.group:
            if other != rank:
                left[other].popleft()
    return len(there) == len(event.group)


def _deliver(group: Hashable, rank: int, queues: list[dict[Hashable, deque[Message]]]) -> None:
    """Run what can run of a group's queues, now that one has changed."""
    changed = [rank]
    while changed:
        one = changed.pop()
        if not queues[one].get(group):
            continue
        message = queues[one][group][0]
        other = message.receiver if one == message.sender else message.sender
        if not queues[other].get(group):
            continue
        theirs = queues[other][group][0]
        if (theirs.sender, theirs.receiver) != (message.sender, message.receiver):
            continue
        if theirs.what != message.what:
            raise HangError(f"{message} meets {theirs}")
        queues[one][group].popleft()
        queues[other][group].popleft()
        changed += [one, other]


def each_edge(edge: int, onward: bool) -> Hashable:
    """Return the group of a message: as `Links` has it, one for each direction of each edge."""
    return edge, onward


def events_of(
    plan: RunPlan,
    step: int,
    topology: Topology,
    zero_stage: int,
    *,
    group_of: Callable[[int, bool], Hashable] = each_edge,
    posting: Callable[[Sequence[Schedule], int], Sequence[Sequence[Receive]]] = receives_of,
    stalls: int | None = None,
) -> list[list[Event]]:
    """What each process of a step waits for, in its order.

    Args:
        group_of: group of a message, by the stage before its edge and its direction.
        posting: what a stage receives before each operation.
        stalls: the stage that waits for its whole device before each operation, after it has posted receives.
    """
    ranks = plan[step].ranks
    assert len(ranks) == topology.replicas
    processes: list[list[Event]] = []
    for process in range(topology.processes):
        place = topology.place_of(process)
        rank = ranks[process % topology.replicas]
        first = place.stage * topology.replicas
        replicas, group = tuple(range(first, first + topology.replicas)), tuple(topology.sequence_group(process))
        link = _Link(place.stage, topology.pipeline_group(process), group_of)
        events: list[Event] = []
        backwards = 0
        posted = posting(rank.schedules, place.stage)
        for op, receives in zip(rank.schedules[place.stage].ops, posted, strict=True):
            events += [Issue(*link.from_neighbour(receive.chunk, receive.onward)) for receive in receives]
            if stalls == place.stage:
                events.append(Wait())
            events += [Wait(message) for _, message in link.received(op)]
            if zero_stage == 3:
                events.append(Meet(replicas, (_pass(op), len(op.chunks))))
            events += [Meet(group, (op.kind, chunk)) for chunk in op.chunks if chunk in rank.spread]
            backwards += op.kind is OpKind.backward
            events += [Issue(*sent) for sent in link.sent(op)]
        assert backwards or plan.pipeline is not None, "a rank without a gradient crashes ZeRO-1 and is wrong in ZeRO-0"
        events += [Wait(), Meet(replicas, ("gradients",))]
        processes.append(events)
    return processes


def _pass(op: Op) -> str:
    """As ZeRO-3's trace sees it."""
    return "forward" if op.kind in FORWARDS else "forward without graph" if op.kind is OpKind.state_pass else "backward"


@dataclass(frozen=True)
class _Link:
    """The messages of one stage, each with its group."""

    stage: int
    stages: list[int]
    group_of: Callable[[int, bool], Hashable]

    def _message(self, source: int, to: int, chunk: int) -> tuple[Hashable, Message]:
        message = Message(self.stages[source], self.stages[to], (chunk,))
        return self.group_of(min(source, to), to > source), message

    def from_neighbour(self, chunk: int, onward: bool) -> tuple[Hashable, Message]:
        return self._message(self.stage - (1 if onward else -1), self.stage, chunk)

    def received(self, op: Op) -> list[tuple[Hashable, Message]]:
        onward = op.kind in (OpKind.forward, OpKind.state_pass)
        if (onward and self.stage == 0) or (not onward and self.stage == len(self.stages) - 1):
            return []
        if op.kind in (OpKind.recompute, OpKind.weight_gradient):
            return []
        return [self.from_neighbour(chunk, onward) for chunk in op.chunks]

    def sent(self, op: Op) -> list[tuple[Hashable, Message]]:
        onward = op.kind in (OpKind.forward, OpKind.state_pass)
        if (onward and self.stage == len(self.stages) - 1) or (not onward and self.stage == 0):
            return []
        if op.kind in (OpKind.recompute, OpKind.weight_gradient):
            return []
        return [self._message(self.stage, self.stage + (1 if onward else -1), chunk) for chunk in op.chunks]


LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(13, 90)), min_size=1, max_size=14)


@given(
    lengths=LENGTHS,
    chunk_size=st.integers(2, 16),
    k=st.integers(1, 4),
    zero_stage=st.integers(0, 3),
    data=st.integers(1, 4),
    sequence=st.sampled_from([1, 1, 2, 4]),
    stages=st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8]),
    fill_tails=st.booleans(),
    spread_all=st.booleans(),
    schedule=st.sampled_from(["1f1b", "state_aware_1f1b", "zero_bubble"]),
    warmup_extra=st.integers(0, 2),
    equal_time=st.booleans(),
)
@settings(max_examples=300)
def test_no_order_of_lengths_hangs(
    lengths: list[int], chunk_size: int, k: int, zero_stage: int, data: int, sequence: int, stages: int,
    fill_tails: bool, spread_all: bool, schedule: str, warmup_extra: int, equal_time: bool,
) -> None:  # fmt: skip
    """Any lengths, any layout: every event of every process comes to its end."""
    if stages > 1:
        zero_stage = min(zero_stage, 1)
    topology = Topology(data, sequence, stages)
    plan = RunPlan(
        batches=GlobalBatches(len(lengths), 5, 0, True),
        steps=-(-len(lengths) // 5),
        lengths=np.array(lengths),
        target_counts=np.array(lengths),
        chunk_size=chunk_size,
        k=k,
        fill_tails=fill_tails,
        equal_time=equal_time,
        costs=replace(CostModel.proportional(), forward=OperationCost(0, 1, 0.1), backward=OperationCost(0, 2, 0.2)),
        is_zero_3=zero_stage == 3,
        pipeline=None if stages == 1 else PipelineLayout(stages, schedule, warmup_extra),
        ranks=topology.replicas,
        sequence=sequence,
        spread_all=spread_all and sequence > 1,
    )
    for step in range(plan.steps):
        run_to_end(events_of(plan, step, topology, zero_stage))
        run_to_end(events_of(plan, step, topology, zero_stage, stalls=step % stages))
        for rank in plan[step].ranks:
            if stages == 1 and len(rank.chunks):
                validate(rank.schedule, rank.chunks, plan.k)
        if zero_stage == 3:
            validate_lockstep([rank.schedule for rank in plan[step].ranks])


def hangs(stages: int, **changes: Any) -> bool:
    """Return whether a step of a pipeline hangs under other rules for its messages."""
    lengths = np.array([40, 35, 6, 5, 4, 30, 3, 3])
    plan = RunPlan(
        batches=GlobalBatches(len(lengths), len(lengths), 0, False), steps=1, lengths=lengths, target_counts=lengths,
        chunk_size=8, k=1, fill_tails=True, pipeline=PipelineLayout(stages), ranks=1,
    )  # fmt: skip
    try:
        run_to_end(events_of(plan, 0, Topology(1, 1, stages), 1, **changes))
    except HangError:
        return True
    return False


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_other_rules_for_messages_hang(stages: int) -> None:
    """Each of the two precautions is needed: a group for each direction of each edge, and receives that can arrive."""
    assert not hangs(stages)
    assert not hangs(stages, posting=always_ahead)
    # The receives of a middle stage hold up its sends, if they share a group.
    each_direction = hangs(stages, posting=always_ahead, group_of=lambda edge, onward: onward)
    assert each_direction == (stages > 2)
    assert hangs(stages, group_of=lambda edge, onward: "all")
    # The first stage waits for a gradient whose chunk it has not sent.
    assert not hangs(stages, stalls=0)
    assert hangs(stages, posting=always_ahead, stalls=0)


def test_lockstep_by_hand() -> None:
    """One rank with a sequence of four chunks beside one with three standalone chunks, and one with nothing."""
    from chunkflow_cli.planning.chunks import build_chunks
    from chunkflow_cli.planning.schedule import plan_in_lockstep, tasks_of

    ranks = [build_chunks([7], 2), build_chunks([2, 2, 2], 2), build_chunks([], 2)]
    assert list(map(str, plan_in_lockstep([tasks_of(chunks, 2) for chunks in ranks]))) == [
        "S0 S1 F2+3 B3+2 R1 B1 R0 B0",
        "S- S- F0+1 B1+0 F2 B2 F- B-",
        "S- S- F-+- B-+- F- B- F- B-",
    ]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (["F0 B0 F1 B1", "F0 B0"], "rank 1 runs 2 operations"),
        (["S0 F1 B1 R0 B0", "F0 B0 F- B- S-"], "operation 0: rank 1 runs F0, rank 0 S0"),
        (["F0+1 B1+0", "F0 B0"], "operation 0: rank 1 runs F0, rank 0 F0+1"),
    ],
)
def test_what_would_hang_is_told(broken: list[str], says: str) -> None:
    """The proof itself can fail."""
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        validate_lockstep([Schedule.parse(line) for line in broken])


def test_the_model_finds_a_hang() -> None:
    """Or the property above would prove nothing."""
    both = (0, 1)
    with pytest.raises(HangError, match="done"):
        run_to_end([[Meet(both, ("x",))], []])
    with pytest.raises(HangError, match="come to"):
        run_to_end([[Meet(both, ("x",))], [Meet(both, ("y",))]])
    there, back = Message(0, 1, ("a",)), Message(1, 0, ("b",))
    each_waits = [[Issue(0, back), Wait(back), Issue(1, there)], [Issue(1, there), Wait(there), Issue(0, back)]]
    with pytest.raises(HangError):
        run_to_end(each_waits)
    receives_first = [[Issue(0, back), Issue(1, there), Wait()], [Issue(1, there), Issue(0, back), Wait()]]
    run_to_end(receives_first)
    in_one_queue = [[replace(event, group=0) if isinstance(event, Issue) else event for event in events]
                    for events in receives_first]  # fmt: skip
    with pytest.raises(HangError):
        run_to_end(in_one_queue)
    with pytest.raises(HangError, match="meets"):
        run_to_end([[Issue(0, there)], [Issue(0, replace(there, what=("c",)))]])
    assert str(Op(OpKind.forward, (3, DUMMY))) == "F3+-"
    assert Schedule.parse("S- F3+- B-+3").dummies == 3
