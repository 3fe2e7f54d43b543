"""`chunkflow plan`: show what training will do, without loading the model.

The `RunPlan` comes from the same configuration, token cache and code as that of `train`. Of the model, only its
configuration is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.cli.screens.plan import print_plan
from chunkflow_cli.cli.screens.plots import check_plot_path, plot_timeline
from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.console import progress_bar, stdout_console
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.devices import DeviceProfile
from chunkflow_cli.planning.memory_parts import MemoryParts, state_bytes
from chunkflow_cli.planning.memory_settings import ELEMENT_BYTES
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.peak_memory import memory_of_fullest
from chunkflow_cli.planning.pipeline import PipelineLayout
from chunkflow_cli.planning.prediction import timeline
from chunkflow_cli.planning.run_plan import RunPlan, StepPlan
from chunkflow_cli.planning.state_memory import page_lock_seconds, state_bytes_per_token
from chunkflow_cli.planning.timeline import Timeline
from chunkflow_cli.planning.totals import Totals, add_up, baseline_timeline
from chunkflow_cli.planning.trace import TRACE_FILE, measured_timeline
from chunkflow_cli.training.contributions import contributions
from chunkflow_cli.training.host_room import what_the_host_lacks
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.setup import RunSetup, planned_device, planned_topology, read_setup


@dataclass(frozen=True)
class PlannedRun:
    """The plan of a run, and one of its steps in detail."""

    recipe: str
    setup: RunSetup
    data: TokenizedData
    plan: RunPlan
    totals: Totals
    memory: MemoryParts | None
    """Memory of the fullest rank or stage; None if no model is named."""
    step: StepPlan
    """The step that is shown."""
    timeline: Timeline
    """The predicted timeline of that step, with all ranks and stages."""


def run(
    loaded: LoadedConfig,
    *,
    step: int = 1,
    plot: str | None = None,
    trace: str | None = None,
    keys: Sequence[str] = (),
    json_output: bool = False,
) -> dict[str, Any]:
    """Plan the configured run, print it unless `json_output` is set, and return what `--json` prints.

    Args:
        step: the step whose schedule is shown, counted from 1.
        plot: a PNG, SVG or PDF file for the operations of that step over time.
        trace: the folder of a run with `train.trace=true`; its measured times are shown next to the predicted ones.
        keys: `FoundData.keys`, if this process has read the data before.

    Raises:
        UsageError: the configuration, the data or the trace is wrong.
    """
    if plot is not None:
        check_plot_path(plot)
    measured = None if trace is None else _read_trace(Path(trace), step)
    planned = make_plan(loaded, step=step, keys=keys)
    if plot is not None:
        panels = {f"step {step} of {planned.plan.steps}: predicted": planned.timeline}
        if measured is not None:
            panels["measured"] = measured
        plot_timeline(panels, Path(plot))
    result = as_json(planned)
    if measured is not None:
        result["measured"] = _measured_json(measured, planned)
    if not json_output:
        print_plan(stdout_console(), result, planned.timeline, measured)
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return result


def _read_trace(run_folder: Path, step: int) -> Timeline:
    path = run_folder / TRACE_FILE
    try:
        return measured_timeline(json.loads(path.read_text(encoding="utf-8")), step)
    except FileNotFoundError as error:
        raise UsageError(f"--trace={run_folder} has no {TRACE_FILE}\n  train with train.trace=true") from error
    except ValueError as error:
        raise UsageError(f"--trace={run_folder}: {path}: {error}") from error


def _measured_json(measured: Timeline, planned: PlannedRun) -> dict[str, Any]:
    def order(timeline: Timeline) -> list[tuple[Any, ...]]:
        columns = (timeline.rank, timeline.stage, timeline.kind, timeline.chunk)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    if order(measured) != order(planned.timeline):
        raise UsageError(
            "--trace: in this step, the run had other operations than the configured plan\n"
            "  give the overrides of that run (its .hydra/overrides.yaml)"
        )
    return {**_times(measured), "live_activations": measured.live_activations.tolist()}


def _times(timeline: Timeline) -> dict[str, float]:
    return {
        "makespan": timeline.makespan,
        "bubble_ratio": timeline.bubble_ratio,
        "bubble_ratio_recompute_idle": timeline.bubble_ratio_recompute_idle,
    }


def make_plan(loaded: LoadedConfig, *, step: int, keys: Sequence[str] = ()) -> PlannedRun:
    """Plan every step of the run, and predict the timeline of one, counted from 1.

    Args:
        step: the one.
        keys: `FoundData.keys`, if this process has read the data before.

    Raises:
        UsageError: the data cannot be used, or the run has no such step.
    """
    config = loaded.config
    hf_config = load_config(config.model) if config.model.path else None
    if hf_config is not None:
        from chunkflow_cli.training.requirements import check_planned  # imports torch

        check_planned(config, hf_config, [planned_topology(config)])
    data = load_run_data(config, hf_config, keys).train
    setup = read_setup(config, hf_config, planned_device(config))
    plan = setup.plan(data)
    if not 1 <= step <= plan.steps:
        raise UsageError(f"--step={step}: the run has steps 1 to {plan.steps}")
    chosen, memory = plan[step - 1], None
    if setup.shape is not None:
        memory = memory_of_fullest(setup.shape, setup.memory, plan, ())
    with progress_bar("planning", plan.steps) as progress:
        totals = add_up(plan, progress)
    return PlannedRun(loaded.recipe, setup, data, plan, totals, memory, chosen, timeline(plan, chosen))


def as_json(planned: PlannedRun) -> dict[str, Any]:
    """Return a plan as plain values for JSON. Shares are between 0 and 1."""
    plan, step, totals, config = planned.plan, planned.step, planned.totals, planned.setup.config
    shape, counts, longest = planned.setup.shape, totals.counts, int(plan.sequence_lengths.max())
    element_bytes = ELEMENT_BYTES[config.model.dtype.value]
    state = None if shape is None else state_bytes(shape, longest, plan.chunk_size, element_bytes)
    seconds = float(totals.step_seconds.sum() + plan.steps * plan.costs.step_seconds)
    return {
        "recipe": planned.recipe,
        "global_batch_size": config.train.global_batch_size,
        "global_batch_tokens": config.train.global_batch_tokens,
        **_sources_json(planned),
        "chunk_size": plan.chunk_size,
        "k": plan.k,
        "steps": plan.steps,
        "ranks": plan.ranks,
        "sequence": plan.sequence,
        **asdict(counts),
        "longest": longest,
        "recompute_share": counts.recomputed_chunks / counts.chunks,
        "fill": totals.run_tokens / totals.room,
        "operations_per_step_and_rank": counts.operations / (plan.steps * plan.ranks),
        "cost_model": plan.costs.source,
        "predicted_seconds": None if plan.costs.is_of_one_stage else seconds,
        "balance": _balance_json(totals, plan),
        "state_bytes_longest": state,
        "memory": None if planned.memory is None else _memory_json(planned.memory, planned.setup),
        "step": {
            "step": step.step + 1,
            "samples": len(step.samples),
            "tokens": step.tokens,
            "target_tokens": step.target_tokens,
            "chunks": step.chunks,
            "recomputed_chunks": step.recomputed_chunks,
            "dummies": step.dummies,
            "schedules": [[str(schedule) for schedule in rank.schedules] for rank in step.ranks],
        },
        **({} if plan.pipeline is None else {"pipeline": _pipeline_json(planned, plan.pipeline)}),
        **_recurrent_json(shape, element_bytes),
    }


def _sources_json(planned: PlannedRun) -> dict[str, Any]:
    """Return what each source contributes to the run; an empty result without `data.sources`."""
    found = contributions(planned.plan, planned.data)
    return {"sources": {name: asdict(each) for name, each in found.items()}} if found else {}


def _recurrent_json(shape: ModelShape | None, element_bytes: int) -> dict[str, Any]:
    """Return what the recurrent layers of a model keep between two chunks; nothing for a model without them."""
    if shape is None or not shape.is_recurrent:
        return {}
    edge, of_a_token = shape.recurrent.edge_bytes, state_bytes_per_token(shape, element_bytes)
    equal_tokens = round(edge / of_a_token) if of_a_token else None
    return {"recurrent": {"edge_bytes": edge, "equal_tokens": equal_tokens, "block": shape.recurrent.block}}


def _balance_json(totals: Totals, plan: RunPlan) -> dict[str, Any]:
    """Return how ranks share the work, and what spreading samples over groups gains over whole samples."""
    slowest, busy = totals.step_seconds, totals.seconds.mean(axis=1)
    ratios = slowest / np.maximum(busy, 1e-30)
    balance = {
        "idle_share": float(1 - busy.sum() / slowest.sum()),
        "worst_step": int(ratios.argmax()) + 1,
        "worst_ratio": float(ratios.max()),
    }
    if plan.sequence > 1:
        whole, busy = totals.whole_seconds.max(axis=1), totals.whole_seconds.mean(axis=1)
        balance |= {
            "spread_samples": totals.spread_samples,
            "idle_share_of_whole_samples": float(1 - busy.sum() / whole.sum()),
            "times_faster_than_whole_samples": float(whole.sum() / slowest.sum()),
        }
    return balance


def _memory_json(parts: MemoryParts, setup: RunSetup) -> dict[str, Any]:
    device, shape = setup.device, setup.shape
    host_remedy = what_the_host_lacks(parts, setup)
    remedy = what_does_not_fit(parts, device, is_recurrent=shape is not None and shape.is_recurrent)
    return {
        **{f"{name}_bytes": value for name, value in asdict(parts).items()},
        "total_bytes": parts.device_total,
        "device": device.name,
        "device_bytes": device.memory_bytes,
        "page_lock_seconds": 0.0
        if setup.memory.device_type == "cpu"
        else page_lock_seconds(parts.host + parts.host_state),
        "fits": parts.device_total <= device.memory_bytes and host_remedy is None,
        "remedy": remedy or host_remedy,
    }


def _pipeline_json(planned: PlannedRun, pipeline: PipelineLayout) -> dict[str, Any]:
    baseline = baseline_timeline(planned.step, planned.plan, pipeline)
    return {
        "stages": pipeline.stages,
        "schedule": pipeline.schedule,
        **_times(planned.timeline),
        "baseline_bubble_ratio": baseline.bubble_ratio,
        "baseline_makespan": baseline.makespan,
        "live_activations": planned.timeline.live_activations.tolist(),
    }


def what_does_not_fit(parts: MemoryParts, device: DeviceProfile, *, is_recurrent: bool) -> str | None:
    """Return which part of the memory is the largest and what reduces it; None if everything fits.

    Args:
        is_recurrent: whether the model has recurrent layers, whose state grows with the number of chunks.
    """
    if parts.device_total <= device.memory_bytes:
        return None
    sizes = {name: value for name, value in asdict(parts).items() if not name.startswith("host")}
    largest = max(sizes, key=lambda name: sizes[name])
    remedy = {
        "weights": "engine.zero_stage=3 on more ranks divides them",
        "gradients": "model.lora.enabled=true needs few; engine.zero_stage=3 divides them or, with offload, moves them",
        "optimizer": "engine.offload=optimizer, model.lora.enabled=true, or more ranks",
        "activations": "a smaller chunk.size or chunk.k, or model.activation_checkpointing=full",
        "head": "it is one tile of logits and the gradient of the head; model.lora.enabled=true spares the latter",
        "state": ("a larger chunk.size leaves fewer recurrent states; " if is_recurrent else "")
        + "it grows with the longest sample; chunk.offload_state=host keeps it in host memory, and data.max_length "
        "with data.overlong=drop limits it",
        "step": "with engine.offload=optimizer, engine.zero_stage=3 needs no buffers for it",
    }[largest]
    return f"{largest} is the largest part: {remedy}"
