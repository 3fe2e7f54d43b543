"""No order of lengths hangs: plans run through a model of what waits for what.

In the model a process is a list of events. A collective ends when every process of its group has come to it, and all of
them to the same one; a message is waited for, but sent without waiting. The rules are those that were found by trying
(DeepSpeed 0.19.8): without ZeRO-3 ranks meet once, at the end of the step, with a gradient each; ZeRO-3 fetches weights
in every pass through the model; Ulysses exchanges in every operation on a spread chunk; stages wait for neighbours.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.schedule import DUMMY, Layout, Op, OpKind, Schedule
from chunkflow_cli.planning.schedule_proof import validate, validate_lockstep
from chunkflow_cli.planning.topology import Topology

FORWARDS = (OpKind.forward, OpKind.recompute)


@dataclass(frozen=True)
class Meet:
    """A collective: over when all ranks of the group are there."""

    group: tuple[int, ...]
    what: tuple[object, ...]


@dataclass(frozen=True)
class Send:
    to: int
    what: tuple[object, ...]


@dataclass(frozen=True)
class Receive:
    source: int
    what: tuple[object, ...]


Event = Meet | Send | Receive


class HangError(Exception):
    """Some process waits for ever; says where each stands."""


def run_to_end(processes: list[list[Event]]) -> None:
    """
    Raises:
        HangError: nobody can go on, or two processes come to different collectives of one group.
    """
    left = [deque(events) for events in processes]
    mail: dict[tuple[int, int], deque[tuple[object, ...]]] = {}
    moved = True
    while moved:
        moved = False
        for rank, events in enumerate(left):
            while events:
                event = events[0]
                if isinstance(event, Send):
                    mail.setdefault((rank, event.to), deque()).append(event.what)
                elif isinstance(event, Receive):
                    box = mail.get((event.source, rank))
                    if not box:
                        break
                    if box.popleft() != event.what:
                        raise HangError(f"rank {rank} receives something else than {event.what}")
                elif len(event.group) > 1:
                    heads = [left[other][0] if left[other] else None for other in event.group]
                    there = [head for head in heads if isinstance(head, Meet) and head.group == event.group]
                    if any(head.what != event.what for head in there):
                        raise HangError(f"ranks of {event.group} come to {[head.what for head in there]}")
                    if len(there) < len(event.group):
                        break
                    for other in event.group:
                        if other != rank:
                            left[other].popleft()
                events.popleft()
                moved = True
    if any(left):
        raise HangError(str([events[0] if events else "done" for events in left]))


def events_of(plan: RunPlan, step: int, topology: Topology, zero_stage: int) -> list[list[Event]]:
    """What each process of a step waits for, in its order."""
    ranks = plan[step].ranks
    assert len(ranks) == topology.replicas
    processes: list[list[Event]] = []
    for process in range(topology.processes):
        place = topology.place_of(process)
        rank = ranks[process % topology.replicas]
        first = place.stage * topology.replicas
        replicas, group = tuple(range(first, first + topology.replicas)), tuple(topology.sequence_group(process))
        stages = topology.pipeline_group(process)
        events: list[Event] = []
        backwards = 0
        for op in rank.schedules[place.stage].ops:
            events += _received(op, place.stage, stages)
            if zero_stage == 3:
                events.append(Meet(replicas, (_pass(op), len(op.chunks))))
            events += [Meet(group, (op.kind, chunk)) for chunk in op.chunks if chunk in rank.spread]
            backwards += op.kind is OpKind.backward
            events += _sent(op, place.stage, stages)
        assert backwards or plan.pipeline is not None, "a rank without a gradient crashes ZeRO-1 and is wrong in ZeRO-0"
        events.append(Meet(replicas, ("gradients",)))
        processes.append(events)
    return processes


def _pass(op: Op) -> str:
    """As ZeRO-3's trace sees it."""
    return "forward" if op.kind in FORWARDS else "forward without graph" if op.kind is OpKind.state_pass else "backward"


def _received(op: Op, stage: int, stages: list[int]) -> list[Event]:
    if stage > 0 and op.kind in (OpKind.forward, OpKind.state_pass):
        return [Receive(stages[stage - 1], ("activations", chunk)) for chunk in op.chunks]
    if stage < len(stages) - 1 and op.kind in (OpKind.backward, OpKind.input_gradient):
        return [Receive(stages[stage + 1], ("gradient", chunk)) for chunk in op.chunks]
    return []


def _sent(op: Op, stage: int, stages: list[int]) -> list[Event]:
    if stage < len(stages) - 1 and op.kind in (OpKind.forward, OpKind.state_pass):
        return [Send(stages[stage + 1], ("activations", chunk)) for chunk in op.chunks]
    if stage > 0 and op.kind in (OpKind.backward, OpKind.input_gradient):
        return [Send(stages[stage - 1], ("gradient", chunk)) for chunk in op.chunks]
    return []


LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(13, 90)), min_size=1, max_size=14)


@given(
    lengths=LENGTHS,
    chunk_size=st.integers(2, 16),
    k=st.integers(1, 4),
    zero_stage=st.integers(0, 3),
    data=st.integers(1, 4),
    sequence=st.sampled_from([1, 1, 2, 4]),
    stages=st.sampled_from([1, 1, 2, 3, 4]),
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
        layout=Layout(join_retained=zero_stage == 3, lockstep=zero_stage == 3),
        pipeline=None if stages == 1 else PipelineLayout(stages, schedule, warmup_extra),
        ranks=topology.replicas,
        sequence=sequence,
        spread_all=spread_all and sequence > 1,
    )
    for step in range(plan.steps):
        run_to_end(events_of(plan, step, topology, zero_stage))
        for rank in plan[step].ranks:
            if stages == 1 and len(rank.chunks):
                validate(rank.schedule, rank.chunks, plan.k)
        if zero_stage == 3:
            validate_lockstep([rank.schedule for rank in plan[step].ranks])


def test_lockstep_by_hand() -> None:
    """One rank with a sequence of four chunks beside one with three standalone chunks, and one with nothing."""
    from chunkflow_cli.planning.chunks import build_chunks
    from chunkflow_cli.planning.schedule import plan_in_lockstep

    ranks = [build_chunks([7], 2), build_chunks([2, 2, 2], 2), build_chunks([], 2)]
    assert list(map(str, plan_in_lockstep(ranks, 2))) == [
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
    with pytest.raises(HangError):
        run_to_end([[Receive(1, ("a",)), Send(1, ("b",))], [Receive(0, ("b",)), Send(0, ("a",))]])
    run_to_end([[Send(1, ("b",)), Receive(1, ("a",))], [Receive(0, ("b",)), Send(0, ("a",))]])
    assert str(Op(OpKind.forward, (3, DUMMY))) == "F3+-"
    assert Schedule.parse("S- F3+- B-+3").dummies == 3
