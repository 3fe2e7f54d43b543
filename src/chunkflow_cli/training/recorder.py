"""Record the operations of a run, and write them as a trace."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from chunkflow_cli.planning.schedule import Op
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.planning.trace import TRACE_FILE, TracedOperation, chrome_trace

RANK_FOLDER = "trace"
"""Folder in a run's folder for the operations of each rank, before they are merged."""


class Recorder:
    """Collects the operations of one rank; `on_operation` of the runners calls `record`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._operations: list[TracedOperation] = []
        self.step = 1
        """The step that the next operations belong to."""

    def record(self, op: Op, seconds: float) -> None:
        """Add an operation that has just stopped."""
        stop = time.time()
        self._operations.append(TracedOperation(self._rank, self.step, str(op), stop - seconds, stop))

    def write(self, run_folder: Path) -> None:
        """Write or replace the file of this rank."""
        path = _file_of_rank(run_folder, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(asdict(operation)) + "\n" for operation in self._operations)
        path.write_text(rows, encoding="utf-8")


def merge(run_folder: Path, topology: Topology) -> Path:
    """Write the trace of all ranks, and return its path; every rank must have written its own file.

    Raises:
        OSError: the file of a rank is missing.
    """
    operations: list[TracedOperation] = []
    for rank in range(topology.processes):
        rows = _file_of_rank(run_folder, rank).read_text(encoding="utf-8").splitlines()
        operations += [TracedOperation(**json.loads(row)) for row in rows]
    target = run_folder / TRACE_FILE
    target.write_text(json.dumps(chrome_trace(operations, topology)), encoding="utf-8")
    return target


def _file_of_rank(run_folder: Path, rank: int) -> Path:
    return run_folder / RANK_FOLDER / f"rank-{rank:05d}.jsonl"
