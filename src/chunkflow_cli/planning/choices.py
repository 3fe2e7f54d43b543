"""Every choice of chunk size, K, cuts and layout that a search compares, as runs over the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkflow_cli.planning.calibration import MeasuredMemory
from chunkflow_cli.planning.costs import DeviceProfile, ModelShape
from chunkflow_cli.planning.memory_parts import MemorySettings, state_bytes_per_token, step_seconds
from chunkflow_cli.planning.peak_memory import activations_and_state, memory_of_fullest
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import SimulatedStep, grid
from chunkflow_cli.planning.topology import Topology


@dataclass(frozen=True)
class Choices:
    """The values that are tried; every combination of them is one choice."""

    chunk_sizes: tuple[int, ...]
    ks: tuple[int, ...]
    layouts: tuple[Topology, ...]
    equal_time: tuple[bool, ...]
    """Ways to cut long samples: into pieces of equal time, or of equal tokens. A single stage takes as long with any
    cuts, so it keeps those of the run."""
    pipeline: PipelineLayout
    """How stages take turns, for any number of them."""


@dataclass(frozen=True)
class Search:
    """The runs that are compared, and what they run on."""

    runs: tuple[RunPlan, ...]
    steps: range
    """Steps that are planned; they stand for all steps of the run."""
    shape: ModelShape
    settings: MemorySettings
    measured: MeasuredMemory | None
    """Memory as it was measured; None to predict it by formula."""

    def memory_bytes(self, run: RunPlan, steps: Sequence[SimulatedStep]) -> int:
        """Return the predicted bytes of the fullest rank or stage, in `steps` or in the step of the longest sample."""
        if self.measured is not None:
            live, stored = activations_and_state(run, is_planned_whole=len(self.steps) == run.steps)
            state = stored * state_bytes_per_token(self.shape, self.settings.element_bytes)
            return self.measured.peak_bytes(run.chunk_size, live, state)
        if run.pipeline is not None:
            longest_step = run.batches.step_of(int(run.lengths.argmax()))
            if all(step.plan.step != longest_step for step in steps):
                steps = [*steps, SimulatedStep(run, run[longest_step])]
        return memory_of_fullest(self.shape, settings_of(run, self.settings), run, steps).device_total


def settings_of(run: RunPlan, settings: MemorySettings) -> MemorySettings:
    """Return the memory settings with the chunk size and the number of ranks of `run`."""
    return replace(settings, chunk_size=run.chunk_size, data_parallel=run.ranks)


def lay_out(
    run: RunPlan,
    choices: Choices,
    *,
    samples: int,
    shape: ModelShape,
    settings: MemorySettings,
    device: DeviceProfile,
    measured: MeasuredMemory | None = None,
) -> Search:
    """Lay out every choice as a run over the same samples.

    Args:
        run: the run as configured; its costs are used for all choices.
        samples: how many samples are planned, rounded to whole global batches.
        shape: of the whole model.
        settings: memory settings of the run as configured.
        device: gives the seconds of the optimizer step, unless `measured` is given: costs then include it.
        measured: memory as it was measured, if it was.

    Raises:
        ValueError: chunk sizes or Ks are missing, or not positive.
    """
    longest = int(run.lengths.max())
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
                    seconds = _optimizer_seconds(chosen, shape, settings_of(chosen, settings), device)
                    chosen = replace(chosen, costs=replace(run.costs, step_seconds=seconds))
                runs.append(chosen)
    steps = max(1, min(run.steps, round(samples / run.batches.global_batch_size)))
    return Search(tuple(runs), range(steps), shape, settings, measured)


def _optimizer_seconds(run: RunPlan, shape: ModelShape, settings: MemorySettings, device: DeviceProfile) -> float:
    """Return the seconds of the optimizer step on the stage that takes longest."""
    return max(step_seconds(shape, settings, device, held) for held in run.stage_layers(shape.layers))
