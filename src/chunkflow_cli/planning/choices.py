"""Lay out every choice of chunk size, K, cuts and layout that a search compares, as runs over the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkflow_cli.planning.calibration import MeasuredMemory
from chunkflow_cli.planning.devices import DeviceProfile
from chunkflow_cli.planning.memory_parts import merged_bytes_per_chunk, step_seconds
from chunkflow_cli.planning.memory_settings import MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.peak_memory import activations_and_state, memory_of_fullest
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import SimulatedStep, grid
from chunkflow_cli.planning.topology import Topology


@dataclass(frozen=True)
class Choices:
    """The values to try; every combination of them is one choice."""

    chunk_sizes: tuple[int, ...]
    ks: tuple[int, ...]
    layouts: tuple[Topology, ...]
    equal_time: tuple[bool, ...]
    """Ways to cut long samples: into pieces of equal time, or of equal tokens. Without a pipeline all cuts take equally
    long, so only those of the run are tried."""
    pipeline: PipelineLayout
    """How stages take turns; the number of stages comes from `layouts`."""


@dataclass(frozen=True)
class Search:
    """The runs to compare, and what they run on."""

    runs: tuple[RunPlan, ...]
    steps: range
    """Steps that are planned; they represent all steps of the run."""
    shape: ModelShape
    settings: MemorySettings
    measured: MeasuredMemory | None
    """Measured memory; None to predict it by formula, as for models that compute attention themselves."""
    device: DeviceProfile

    def memory_bytes(self, run: RunPlan, steps: Sequence[SimulatedStep]) -> int:
        """Predict the bytes of the fullest rank or stage, in `steps` or in the step of the longest sample."""
        if self.measured is not None and not self.shape.score_bytes:  # scores do not grow with the tokens alone
            held = activations_and_state(run, is_planned_whole=len(self.steps) == run.steps)
            state = held.state_bytes(self.shape, settings_of(run, self.settings))
            # The first chunk's copies are part of the measured base.
            copies = (held.chunks - 1) * merged_bytes_per_chunk(self.shape, self.settings, self.shape.layers)
            return self.measured.peak_bytes(run.chunk_size, held.live, state + copies)
        return memory_of_fullest(self.shape, settings_of(run, self.settings), run, steps).device_total

    def offloaded(self, run: RunPlan) -> RunPlan | None:
        """Return the run with its state in host memory; None if that helps nothing or does not fit there.

        On a CPU, host and device are the same memory.
        """
        if run.costs.moves_state or run.costs.is_of_one_stage or self.settings.device_type == "cpu":
            return None
        moved, device = replace(run, costs=run.costs.with_state_on_host(self.device)), self.device
        if device.host_memory_bytes is not None:
            parts = memory_of_fullest(self.shape, settings_of(moved, self.settings), moved, ())
            ranks = min(run.ranks * run.stages, device.devices_of_node)
            if ranks * (parts.host + parts.host_state) > device.host_memory_bytes:
                return None
        return moved


def settings_of(run: RunPlan, settings: MemorySettings) -> MemorySettings:
    """Return the memory settings with the chunk size and the number of ranks of `run`."""
    offload_state = "host" if run.costs.moves_state else settings.offload_state
    return replace(settings, chunk_size=run.chunk_size, data_parallel=run.ranks, offload_state=offload_state)


def lay_out(
    run: RunPlan,
    choices: Choices,
    *,
    samples: int,
    shape: ModelShape,
    settings: MemorySettings,
    device: DeviceProfile,
    measured: MeasuredMemory | None,
) -> Search:
    """Lay out every choice as a run over the same samples.

    Args:
        run: the run as configured; its costs are used for all choices.
        samples: number of samples to plan, rounded to whole global batches.
        shape: the shape of the whole model.
        device: gives the seconds of the optimizer step; with `measured`, costs include it already.
        measured: measured memory; by default, memory is predicted by formula.

    Raises:
        ValueError: chunk sizes or Ks are missing, or not positive.
    """
    longest = int(run.sequence_lengths.max())
    runs = []
    for layout in choices.layouts:
        is_pipeline = layout.pipeline > 1
        for equal_time in dict.fromkeys(choices.equal_time) if is_pipeline else [run.equal_time]:
            divided = replace(
                run,
                equal_time=equal_time,
                ranks=layout.replicas,
                sequence=layout.sequence,
                pipeline=replace(choices.pipeline, stages=layout.pipeline) if is_pipeline else None,
            )
            for chunk_size, k in grid(choices.chunk_sizes, choices.ks, longest, divided.pair_weight):
                chosen = replace(divided, chunk_size=chunk_size, k=k)
                if measured is None and not run.costs.is_of_one_stage:
                    own = settings_of(chosen, settings)
                    slowest = max(step_seconds(shape, own, device, held) for held in chosen.stage_layers(shape.layers))
                    chosen = replace(chosen, costs=replace(run.costs, step_seconds=slowest))
                runs.append(chosen)
    steps = max(1, min(run.steps, round(samples / run.batches.mean_samples)))
    return Search(tuple(runs), range(steps), shape, settings, measured, device)
