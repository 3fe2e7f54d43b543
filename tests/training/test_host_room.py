"""State in host memory is refused before it overflows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel
from chunkflow_cli.planning.devices import DEVICES, GIB
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.host_room import check_host_room
from chunkflow_cli.training.setup import RunSetup

SHAPE = ModelShape(
    layers=32, hidden_size=8, intermediate_size=20, attention=(AttentionLayers(32, 32, 8, 128, 128),), vocab_size=50,
    matmul_parameters=2000, parameters=2500, trainable_parameters=2500,
)  # fmt: skip
LENGTHS = np.array([2**18 + 1])
RUN = RunPlan(GlobalBatches(1, 1, 0, False), 1, LENGTHS, LENGTHS, chunk_size=8192, k=1)


def setup_of(host_gib: int | None, ranks: int, place: str = "host") -> RunSetup:
    config = load(["chunk.size=8192", f"chunk.offload_state={place}"]).config
    device = replace(DEVICES["h100"], host_memory_bytes=None if host_gib is None else host_gib * GIB)
    costs = CostModel.proportional()
    if place == "host":
        costs = costs.with_state_on_host(device)
    return RunSetup(config, SHAPE, device, costs, Topology.of(ranks))


@pytest.mark.parametrize(("host_gib", "ranks"), [(97, 1), (193, 2), (None, 8), (769, 8), (769, 16)])
def test_state_that_fits_is_not_refused(host_gib: int | None, ranks: int) -> None:
    """A rank keeps 96 GiB, and a node has eight of them. The memory of other machines is not known."""
    check_host_room(setup_of(host_gib, ranks), RUN)


@pytest.mark.parametrize(("host_gib", "ranks", "words"), [
    (95, 1, r"the host has 95\S* GiB for 96\S* GiB, 96\S* GiB of it state"),
    (191, 2, r"the host has 191\S* GiB for 2 ranks of 96\S* GiB, 96\S* GiB of it state"),
])  # fmt: skip
def test_state_that_overflows_is_refused(host_gib: int, ranks: int, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^chunk.offload_state=host: {words}"):
        check_host_room(setup_of(host_gib, ranks), RUN)
    check_host_room(setup_of(host_gib, ranks, "none"), RUN)
