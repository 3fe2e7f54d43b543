"""A trace holds what ran: it opens in Perfetto, and comes back as the Timeline that it was made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.pipeline import PipelineLayout, plan_pipeline
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.planning.simulate import OperationSeconds, simulate, simulate_ranks
from chunkflow_cli.planning.timeline import Timeline
from chunkflow_cli.planning.topology import Place, Topology
from chunkflow_cli.planning.trace import TracedOperation, chrome_trace, measured_timeline


def timeline_of(lengths: list[int], stages: int) -> tuple[Timeline, list[list[str]]]:
    chunks = build_chunks(lengths, 10)
    schedules = plan_pipeline(chunks, 1, PipelineLayout(stages))
    tokens = [chunk.tokens for chunk in chunks]
    return simulate(schedules, OperationSeconds.proportional(tokens, stages)), [
        [str(op) for op in schedule.ops] for schedule in schedules
    ]


def test_a_timeline_survives_its_trace() -> None:
    """Two pipelines of three stages, simulated, traced as if they had run, and read again."""
    topology = Topology(data=2, pipeline=3)
    made = [timeline_of(lengths, 3) for lengths in ([35, 8, 4], [12, 9, 9, 3])]
    operations = []
    for data_rank, (timeline, ops) in enumerate(made):
        for stage in range(3):
            rows = timeline.stage == stage
            for op, start, stop in zip(
                ops[stage], timeline.start_seconds[rows], timeline.stop_seconds[rows], strict=True
            ):
                rank = topology.rank_of(Place(stage, data_rank, 0))
                operations.append(TracedOperation(rank, 7, op, 1e9 + start, 1e9 + stop))
    trace = json.loads(json.dumps(chrome_trace(operations, topology)))
    measured = measured_timeline(trace, 7)
    chunks = [build_chunks(lengths, 10) for lengths in ([35, 8, 4], [12, 9, 9, 3])]
    expected = simulate_ranks(
        [
            (plan_pipeline(c, 1, PipelineLayout(3)), OperationSeconds.proportional([chunk.tokens for chunk in c], 3))
            for c in chunks
        ]
    )
    for name in ("rank", "stage", "kind", "chunk"):
        assert np.array_equal(getattr(measured, name), getattr(expected, name)), name
    assert measured.bubble_ratio == pytest.approx(expected.bubble_ratio, abs=1e-6)
    assert measured.makespan == pytest.approx(expected.makespan)
    assert np.array_equal(measured.live_activations, expected.live_activations)


def test_joined_chunks_and_the_ranks_of_a_group_come_back_as_planned() -> None:
    """A rank runs several chunks in one operation, backwards from last to first; both ranks of a group are planned."""
    topology, ops = Topology(sequence=2), ["F0+1+2", "B2+1+0"]
    trace = chrome_trace(
        [TracedOperation(rank, 1, op, at, at + 3) for rank in (0, 1) for at, op in zip((0.0, 3.0), ops, strict=True)],
        topology,
    )
    schedule = Schedule.parse(" ".join(ops))
    expected = simulate_ranks([((schedule,), OperationSeconds.proportional([1, 1, 1], 1))] * 2)
    measured = measured_timeline(trace, 1)
    for name in ("rank", "stage", "kind", "chunk"):
        assert np.array_equal(getattr(measured, name), getattr(expected, name)), name
    assert measured.busy_seconds.tolist() == [[6.0], [6.0]]


def test_events_are_what_perfetto_reads() -> None:
    """The fields of the format: without `ph`, `ts` in microseconds and `dur` it shows an empty page."""
    topology = Topology(data=1, sequence=2, pipeline=1)
    trace = chrome_trace([TracedOperation(1, 3, "F1+2", 5.0, 5.25), TracedOperation(0, 3, "S0", 4.5, 5.0)], topology)
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["rank 0, sequence 0", "rank 1, sequence 1"]
    first, second = (event for event in trace["traceEvents"] if event["ph"] == "X")
    assert (first["name"], first["ts"], first["dur"], first["pid"]) == ("F1+2", 500_000.0, 250_000.0, 1)
    assert first["args"] == {"chunk": [1, 2], "kind": "forward", "step": 3}
    assert (second["name"], second["ts"], second["cat"]) == ("S0", 0.0, "state pass")


def test_what_is_no_trace_is_named() -> None:
    with pytest.raises(ValueError, match="not a trace that train wrote"):
        measured_timeline({"traceEvents": []}, 1)
    trace = chrome_trace([TracedOperation(0, 3, "F0", 0.0, 1.0), TracedOperation(0, 4, "B0", 1.0, 2.0)], Topology())
    with pytest.raises(ValueError, match="holds steps 3 to 4, not 1"):
        measured_timeline(trace, 1)
