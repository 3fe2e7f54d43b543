"""How the processes of a run are divided."""

from __future__ import annotations

from typing import Any

from chunkflow_cli.config.schema import Config
from chunkflow_cli.model.layouts import check_layouts
from chunkflow_cli.planning.topology import Topology


def planned_topology(config: Config) -> Topology:
    """Return how the processes of the run are divided; by default there are as many as one group needs."""
    sequence, pipeline = config.parallel.sequence, config.parallel.pipeline
    return Topology.of(max(config.launch.processes, sequence * pipeline), sequence=sequence, pipeline=pipeline)


def checked_topology(config: Config, hf_config: Any) -> Topology:
    """Return `planned_topology`, if the model can be divided so.

    Raises:
        UsageError: as `check_layouts`.
    """
    topology = planned_topology(config)
    check_layouts(config, hf_config, [topology])
    return topology
