"""Turn the operations that ran into a trace that Perfetto (https://ui.perfetto.dev) opens, and back into a Timeline.

A trace is in Chrome's trace event format: a process for each rank, and an event for each operation, named as schedules
print it. Read back as a Timeline, a measured step is drawn and counted in the same way as a predicted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from chunkflow_cli.planning.schedule import Op, Schedule
from chunkflow_cli.planning.timeline import Timeline
from chunkflow_cli.planning.topology import Topology

TRACE_FILE = "trace.json"
"""Name of the trace in a run's folder."""


@dataclass(frozen=True, slots=True)
class TracedOperation:
    """One operation that a rank ran."""

    rank: int
    step: int
    """Counted from 1, as in metrics.jsonl."""
    op: str
    """The operation as schedules print it, such as F3 or B2."""
    start_seconds: float
    """Seconds of the wall clock, which the ranks of a node share."""
    stop_seconds: float


def chrome_trace(operations: Iterable[TracedOperation], topology: Topology) -> dict[str, Any]:
    """Return a trace of complete events ("X"), with times in microseconds from the first start.

    The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    operations = list(operations)
    origin = min((operation.start_seconds for operation in operations), default=0.0)
    events: list[dict[str, Any]] = []
    for rank in range(topology.processes):
        place = topology.place_of(rank)
        words = [f"rank {rank}"]
        words += [f"data {place.data_rank}"] if topology.data > 1 else []
        words += [f"sequence {place.sequence_rank}"] if topology.sequence > 1 else []
        words += [f"stage {place.stage}"] if topology.pipeline > 1 else []
        events += [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": ", ".join(words)}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}},
        ]
    for operation in operations:
        op = _parsed(operation.op)
        kind = op.kind.name.replace("_", " ")
        events.append(
            {
                "ph": "X",
                "name": operation.op,
                "cat": kind,
                "pid": operation.rank,
                "tid": 0,
                "ts": (operation.start_seconds - origin) * 1e6,
                "dur": (operation.stop_seconds - operation.start_seconds) * 1e6,
                "args": {"chunk": list(op.chunks), "kind": kind, "step": operation.step},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": asdict(topology)}


def measured_timeline(trace: Mapping[str, Any], step: int) -> Timeline:
    """Return when the operations of a step ran, in seconds from its first start.

    The ranks of a sequence-parallel group have rows of their own, as in the plan. An operation on several chunks is
    recorded as one: its chunks get equal shares of its time.

    Raises:
        ValueError: `train` did not write this trace, or it does not hold the step.
    """
    try:
        topology = Topology(**trace["otherData"])
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        steps = sorted({event["args"]["step"] for event in events})
    except (KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "it has another form"
        raise ValueError(f"it is not a trace that train wrote ({what})") from error
    if step not in steps:
        raise ValueError(f"it holds steps {steps[0]} to {steps[-1]}, not {step}" if steps else "it holds no steps")
    rows: list[tuple[int, int, float, float, str, int]] = []
    for event in events:
        place = topology.place_of(int(event["pid"]))
        if event["args"]["step"] != step:
            continue
        op, start = _parsed(event["name"]), float(event["ts"]) / 1e6
        replica = place.data_rank * topology.sequence + place.sequence_rank
        seconds = float(event["dur"]) / 1e6 / max(1, len(op.real_chunks))
        for index, chunk in enumerate(op.real_chunks):
            begin = start + index * seconds
            rows.append((replica, place.stage, begin, begin + seconds, op.kind.value, chunk))
    timeline = Timeline.of_rows(topology.replicas, topology.pipeline, sorted(rows, key=lambda row: row[:3]))
    origin = timeline.start_seconds.min()
    return replace(timeline, start_seconds=timeline.start_seconds - origin, stop_seconds=timeline.stop_seconds - origin)


def _parsed(op: str) -> Op:
    (parsed,) = Schedule.parse(op).ops
    return parsed
