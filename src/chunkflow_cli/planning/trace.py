"""What ran and when: operations of all ranks, as a trace that Perfetto (https://ui.perfetto.dev) opens.

Every rank records its operations and writes them to a file of its own; one rank merges the files into `trace.json` in
Chrome's trace event format: a process for each rank, an event for each operation, named as schedules print it. From
that file comes a Timeline again, so what was measured is drawn and counted as what was predicted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.planning.schedule import Op, OpKind, Schedule
from chunkflow_cli.planning.simulate import Timeline
from chunkflow_cli.planning.topology import Topology

TRACE_FILE = "trace.json"
"""Within a run's folder."""
RANK_FOLDER = "trace"
"""Within a run's folder: what the ranks write before it is merged."""

KIND_NAMES = {kind.value: kind.name.replace("_", " ") for kind in OpKind}


@dataclass(frozen=True, slots=True)
class TracedOperation:
    """One operation of one rank."""

    rank: int
    step: int
    """Counted from 1, as in metrics.jsonl."""
    op: str
    """As schedules print it: F3, B2."""
    start_seconds: float
    """By the wall clock, which the ranks of a node share."""
    stop_seconds: float


class Recorder:
    """Collects the operations of one rank; `on_operation` of the runners calls `record`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._operations: list[TracedOperation] = []
        self.step = 1
        """Whose operations come next."""

    def record(self, op: Op, seconds: float) -> None:
        """An operation that has just stopped, after so many seconds."""
        stop = time.time()
        self._operations.append(TracedOperation(self._rank, self.step, str(op), stop - seconds, stop))

    def write(self, run_folder: Path) -> None:
        """Into this rank's file; what it held is replaced."""
        folder = run_folder / RANK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(asdict(operation)) + "\n" for operation in self._operations)
        (folder / f"rank-{self._rank:05d}.jsonl").write_text(rows, encoding="utf-8")


def merge(run_folder: Path, topology: Topology) -> Path:
    """Write the trace of all ranks, once every rank has written its own.

    Raises:
        OSError: the file of a rank is missing.
    """
    operations: list[TracedOperation] = []
    for rank in range(topology.processes):
        path = run_folder / RANK_FOLDER / f"rank-{rank:05d}.jsonl"
        operations += [TracedOperation(**json.loads(row)) for row in path.read_text(encoding="utf-8").splitlines()]
    target = run_folder / TRACE_FILE
    target.write_text(json.dumps(chrome_trace(operations, topology)), encoding="utf-8")
    return target


def chrome_trace(operations: Iterable[TracedOperation], topology: Topology) -> dict[str, Any]:
    """The trace event format: complete events ("X"), times in microseconds from the first start.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
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
        events.append(
            {
                "ph": "X",
                "name": operation.op,
                "cat": KIND_NAMES[op.kind.value],
                "pid": operation.rank,
                "tid": 0,
                "ts": (operation.start_seconds - origin) * 1e6,
                "dur": (operation.stop_seconds - operation.start_seconds) * 1e6,
                "args": {
                    "chunk": list(op.chunks), "kind": KIND_NAMES[op.kind.value], "step": operation.step,
                },
            }
        )  # fmt: skip
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": asdict(topology),
    }


def measured_timeline(trace: Mapping[str, Any], step: int) -> Timeline:
    """When the operations of a step ran, from its first start; of sequence-parallel ranks, the first one's.

    Raises:
        ValueError: the trace is none of ours, or does not hold the step.
    """
    try:
        topology = Topology(**trace["otherData"])
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        steps = sorted({event["args"]["step"] for event in events})
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not a trace that train wrote ({error!r} is missing)") from error
    if step not in steps:
        raise ValueError(f"it holds steps {steps[0]} to {steps[-1]}, not {step}" if steps else "it holds no steps")
    rows: list[tuple[int, int, float, float, str, int]] = []
    for event in events:
        place = topology.place_of(int(event["pid"]))
        if event["args"]["step"] != step or place.sequence_rank:
            continue
        op, start = _parsed(event["name"]), float(event["ts"]) / 1e6
        stop = start + float(event["dur"]) / 1e6
        rows += [(place.data_rank, place.stage, start, stop, op.kind.value, chunk) for chunk in op.real_chunks]
    rows.sort()
    rank, stage, start_seconds, stop_seconds, kind, chunk = (np.array(column) for column in zip(*rows, strict=True))
    origin = start_seconds.min()
    return Timeline(
        topology.data, topology.pipeline, rank, stage, kind, chunk, start_seconds - origin, stop_seconds - origin
    )


def _parsed(op: str) -> Op:
    (parsed,) = Schedule.parse(op).ops
    return parsed
