"""The recorder writes the operations of each rank, and the merged trace can be read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chunkflow_cli.planning.schedule import Op, OpKind
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.planning.trace import TRACE_FILE, measured_timeline
from chunkflow_cli.training.recorder import Recorder, merge


def test_one_rank_merges_what_all_ranks_wrote(tmp_path: Path) -> None:
    topology = Topology(pipeline=2)
    for rank in range(2):
        recorder = Recorder(rank)
        for step in (1, 2):
            recorder.step = step
            recorder.record(Op(OpKind.forward, (0,)), 0.5)
        recorder.write(tmp_path)
    assert merge(tmp_path, topology) == tmp_path / TRACE_FILE
    timeline = measured_timeline(json.loads((tmp_path / TRACE_FILE).read_text()), 2)
    assert (timeline.ranks, timeline.stages, timeline.kind.tolist()) == (1, 2, ["F", "F"])
    assert timeline.busy_seconds == pytest.approx(np.array([[0.5, 0.5]]))
