"""How the processes of a run are divided."""

from __future__ import annotations

from chunkflow_cli.config.schema import Config
from chunkflow_cli.planning.topology import Topology


def planned_topology(config: Config) -> Topology:
    """Return how the processes of the run are divided; by default there are as many as one group needs."""
    sequence, pipeline = config.parallel.sequence, config.parallel.pipeline
    return Topology.of(max(config.launch.processes, sequence * pipeline), sequence=sequence, pipeline=pipeline)
