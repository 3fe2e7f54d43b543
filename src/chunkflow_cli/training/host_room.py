"""Check that host memory has room for state that is kept there (`chunk.offload_state=host`)."""

from __future__ import annotations

from chunkflow_cli.console import human_bytes
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.memory_parts import MemoryParts
from chunkflow_cli.planning.peak_memory import memory_of_fullest
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.training.setup import RunSetup


def what_the_host_lacks(parts: MemoryParts, setup: RunSetup) -> str | None:
    """Return why the host's memory does not hold what its ranks keep there; None if it does, or is not known.

    Args:
        parts: memory of the fullest rank.
    """
    device, ranks = setup.device, min(setup.topology.processes, setup.device.devices_of_node)
    if parts.host_state == 0 or device.host_memory_bytes is None:
        return None
    of_rank = parts.host + parts.host_state
    if setup.memory.device_type == "cpu":  # host and device are the same memory
        of_rank += parts.device_total
    if of_rank * ranks <= device.host_memory_bytes:
        return None
    each = f"{ranks} ranks of {human_bytes(of_rank)}" if ranks > 1 else human_bytes(of_rank)
    return (
        f"the host has {human_bytes(device.host_memory_bytes)} for {each}, {human_bytes(parts.host_state)} of it state "
        "of the longest sample; data.max_length with data.overlong=drop limits that"
    )


def check_host_room(setup: RunSetup, plan: RunPlan) -> None:
    """Check before a run that the memory of this host has room for its state.

    Raises:
        UsageError: it has not.
    """
    if setup.shape is None or not setup.costs.moves_state:
        return
    parts = memory_of_fullest(setup.shape, setup.memory, plan, ())
    if (lacks := what_the_host_lacks(parts, setup)) is not None:
        raise UsageError(f"chunk.offload_state=host: {lacks}")
