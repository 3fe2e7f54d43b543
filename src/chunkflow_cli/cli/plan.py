"""`chunkflow plan`: what training will do, without a model in memory.

It makes the `RunPlan` that `train` runs, from the same configuration, the same token cache and the same code. Of the
model only the configuration is read.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.console import progress_bar, stdout_console
from chunkflow_cli.data.dataset import TokenizedData
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.layouts import check_layouts
from chunkflow_cli.planning.costs import DeviceProfile
from chunkflow_cli.planning.memory_parts import ELEMENT_BYTES, MemoryParts, state_bytes
from chunkflow_cli.planning.peak_memory import memory_of_fullest
from chunkflow_cli.planning.pipeline import PipelineLayout, plan_pipeline, sequences_as_chunks
from chunkflow_cli.planning.prediction import rank_seconds, seconds_of_whole_samples, timeline
from chunkflow_cli.planning.run_plan import RunPlan, StepPlan
from chunkflow_cli.planning.search import SimulatedStep
from chunkflow_cli.planning.simulate import Timeline, simulate
from chunkflow_cli.planning.trace import TRACE_FILE, measured_timeline
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.setup import RunSetup, planned_device, planned_topology, read_setup


@dataclass(frozen=True)
class PlannedRun:
    """All that the screen and the JSON are made of."""

    recipe: str
    setup: RunSetup
    data: TokenizedData
    plan: RunPlan
    totals: Totals
    memory: MemoryParts | None
    """None if no model is named."""
    step: StepPlan
    """The chosen step."""
    timeline: Timeline
    """Of the chosen step, all ranks and stages."""


def run(
    loaded: LoadedConfig,
    *,
    step: int = 1,
    plot: str | None = None,
    trace: str | None = None,
    json_output: bool = False,
) -> dict[str, Any]:
    """Plan the configured run; print it, unless it is wanted as JSON.

    Args:
        step: whose schedule is shown, counted from 1.
        plot: draw that step's operations over time into this PNG or SVG file.
        trace: folder of a run with train.trace=true: what that step took is shown beside what is predicted.

    Raises:
        UsageError: configuration or data is at fault.
    """
    if plot is not None:
        from chunkflow_cli.cli.screens.plots import check_plot_path

        check_plot_path(plot)
    measured = None if trace is None else read_trace(Path(trace), step)
    planned = make_plan(loaded, step=step)
    if plot is not None:
        from chunkflow_cli.cli.screens.plots import plot_timeline

        panels = {f"step {step} of {planned.plan.steps}: predicted": planned.timeline}
        if measured is not None:
            panels["measured"] = measured
        plot_timeline(panels, Path(plot))
    result = as_json(planned)
    if measured is not None:
        result["measured"] = _measured_json(measured, planned)
    if not json_output:
        from chunkflow_cli.cli.screens.plan import print_plan

        print_plan(stdout_console(), result, planned.timeline, measured)
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return result


def read_trace(run_folder: Path, step: int) -> Timeline:
    """What a step of a traced run took.

    Raises:
        UsageError: there is no trace, or it does not hold the step.
    """
    path = run_folder / TRACE_FILE
    try:
        return measured_timeline(json.loads(path.read_text(encoding="utf-8")), step)
    except FileNotFoundError as error:
        raise UsageError(f"--trace={run_folder}: it holds no {TRACE_FILE}; train with train.trace=true") from error
    except ValueError as error:
        raise UsageError(f"--trace={run_folder}: {path}: {error}") from error


def _measured_json(measured: Timeline, planned: PlannedRun) -> dict[str, Any]:
    """
    Raises:
        UsageError: another plan ran than the one that is configured.
    """

    def order(timeline: Timeline) -> list[tuple[Any, ...]]:
        columns = (timeline.rank, timeline.stage, timeline.kind, timeline.chunk)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    if order(measured) != order(planned.timeline):
        raise UsageError(
            "--trace: the run had other operations in this step than these overrides plan: give those of the run "
            "(its .hydra/overrides.yaml)"
        )
    return {
        "makespan": measured.makespan,
        "bubble_ratio": measured.bubble_ratio,
        "bubble_ratio_recompute_idle": measured.bubble_ratio_recompute_idle,
        "live_activations": measured.live_activations.tolist(),
    }


def make_plan(loaded: LoadedConfig, *, step: int) -> PlannedRun:
    """Plan every step of the run, and simulate one.

    Raises:
        UsageError: no data, strings without a tokenizer, or a step that the run does not have.
    """
    config = loaded.config
    if not config.data.path:
        raise UsageError("data.path is not set: your training data (.jsonl, .json, .parquet, a folder, a data set id)")
    hf_config = load_config(config.model) if config.model.path else None
    if hf_config is not None:
        check_layouts(config, hf_config, [planned_topology(config)])
    elif config.data.format is not DataFormat.tokens:
        raise UsageError(
            "model.path is not set: the plan needs the model's tokenizer and configuration, not its weights\n"
            "  without a model only rows of token ids can be planned: data.format=tokens"
        )
    data = load_run_data(config, hf_config).train
    setup = read_setup(config, hf_config, planned_device(config))
    plan = setup.plan(data)
    if not 1 <= step <= plan.steps:
        raise UsageError(f"--step={step}: the run has steps 1 to {plan.steps}")
    chosen, memory = plan[step - 1], None
    if setup.shape is not None:
        memory = memory_of_fullest(setup.shape, setup.memory, plan, [SimulatedStep(plan, chosen)])
    return PlannedRun(
        recipe=loaded.recipe,
        setup=setup,
        data=data,
        plan=plan,
        totals=add_up(plan),
        memory=memory,
        step=chosen,
        timeline=timeline(plan, chosen),
    )


@dataclass(frozen=True)
class Totals:
    """Sums over all steps."""

    samples: int
    tokens: int
    target_tokens: int
    chunks: int
    standalone: int
    dependent: int
    long_samples: int
    filled_tails: int
    recomputed: int
    operations: int
    dummies: int
    lower_bound: int
    step_seconds: NDArray[np.float64]  # (steps,), predicted, until the last rank is done
    room: int
    """Tokens that the chunks could hold."""
    spread_samples: int
    """That whole sequence-parallel groups run."""
    seconds: NDArray[np.float64]  # (steps, ranks), predicted; in units of tokens if costs are proportional
    whole_seconds: NDArray[np.float64]  # (steps, ranks), predicted, if every rank ran whole samples alone
    most_operations: int
    """Of a rank in a step."""


def add_up(plan: RunPlan) -> Totals:
    """Walk through all steps: what is counted here is what each step's plan holds."""
    count = dict.fromkeys(
        ("samples", "tokens", "target_tokens", "chunks", "standalone", "long_samples", "filled_tails", "recomputed",
         "operations", "dummies", "lower_bound", "room", "spread_samples"), 0,
    )  # fmt: skip
    most_operations = 0
    seconds, whole_seconds = np.zeros((plan.steps, plan.ranks)), np.zeros((plan.steps, plan.ranks))
    step_seconds = np.zeros(plan.steps)
    with progress_bar("planning", plan.steps) as progress:
        for step in plan:
            count["samples"] += len(step.samples)
            count["tokens"] += step.tokens
            count["target_tokens"] += step.target_tokens
            count["dummies"] += step.dummies
            for index, rank in enumerate(step.ranks):
                groups = [group for group in rank.chunks.dependent_groups() if group.start in rank.counted]
                segments = np.diff(rank.chunks.first_segment)
                operations = len(rank.schedule.ops)
                count["chunks"] += len(rank.counted)
                count["standalone"] += len(rank.counted) - sum(len(group) for group in groups)
                count["long_samples"] += len(groups)
                count["filled_tails"] += sum(int(segments[group[-1]] > 1) for group in groups)
                count["operations"] += operations
                count["room"] += int(rank.room[rank.counted.start :].sum())
                count["lower_bound"] += rank.lower_bound
                most_operations = max(most_operations, operations)
                seconds[step.step, index] = rank_seconds(rank, plan.costs)
            step_seconds[step.step] = timeline(plan, step).makespan if plan.is_in_lockstep else seconds[step.step].max()
            count["recomputed"] += step.recomputed_chunks
            if plan.sequence > 1:
                count["spread_samples"] += step.spread_samples
                whole_seconds[step.step] = seconds_of_whole_samples(plan, step.samples)
            progress(step.step + 1)
    return Totals(
        **count,
        dependent=count["chunks"] - count["standalone"],
        most_operations=most_operations,
        seconds=seconds,
        step_seconds=step_seconds,
        whole_seconds=whole_seconds if plan.sequence > 1 else seconds,
    )


def as_json(planned: PlannedRun) -> dict[str, Any]:
    """Plain values. Shares are between 0 and 1."""
    plan, totals, config = planned.plan, planned.totals, planned.setup.config
    longest = int(plan.lengths.max())
    element_bytes = ELEMENT_BYTES[config.model.dtype.value]
    shape = planned.setup.shape
    state = None if shape is None else state_bytes(shape, longest, plan.chunk_size, element_bytes)
    slowest, busy = totals.step_seconds, totals.seconds.mean(axis=1)
    seconds = None if plan.costs.is_of_one_stage else float(slowest.sum() + plan.steps * plan.costs.step_seconds)
    return {
        "recipe": planned.recipe,
        "global_batch_size": config.train.global_batch_size,
        "chunk_size": plan.chunk_size,
        "k": plan.k,
        "steps": plan.steps,
        "ranks": plan.ranks,
        "sequence": plan.sequence,
        "samples": totals.samples,
        "tokens": totals.tokens,
        "target_tokens": totals.target_tokens,
        "longest": longest,
        "chunks": totals.chunks,
        "standalone": totals.standalone,
        "dependent": totals.dependent,
        "long_samples": totals.long_samples,
        "filled_tails": totals.filled_tails,
        "recomputed_chunks": totals.recomputed,
        "recompute_share": totals.recomputed / totals.chunks,
        "fill": totals.tokens / totals.room,
        "lower_bound_chunks": totals.lower_bound,
        "operations": totals.operations,
        "dummies": totals.dummies,
        "operations_per_step_and_rank": totals.operations / (plan.steps * plan.ranks),
        "most_operations": totals.most_operations,
        "cost_model": plan.costs.source,
        "predicted_seconds": seconds,
        "balance": {
            "idle_share": float(1 - busy.sum() / slowest.sum()),
            "worst_step": int((slowest / np.maximum(busy, 1e-30)).argmax()) + 1,
            "worst_ratio": float((slowest / np.maximum(busy, 1e-30)).max()),
            **({} if plan.sequence == 1 else _spread_json(totals, float(slowest.sum()))),
        },
        "state_bytes_longest": state,
        "memory": _memory_json(planned),
        "step": {
            "step": planned.step.step + 1,
            "samples": len(planned.step.samples),
            "tokens": planned.step.tokens,
            "target_tokens": planned.step.target_tokens,
            "chunks": planned.step.chunks,
            "recomputed_chunks": planned.step.recomputed_chunks,
            "dummies": planned.step.dummies,
            "schedules": [[str(schedule) for schedule in rank.schedules] for rank in planned.step.ranks],
        },
        **({} if plan.pipeline is None else {"pipeline": _pipeline_json(planned, plan.pipeline)}),
    }


def _spread_json(totals: Totals, seconds: float) -> dict[str, Any]:
    """What spreading samples over sequence-parallel groups brings, beside whole samples on as many ranks."""
    slowest, busy = totals.whole_seconds.max(axis=1), totals.whole_seconds.mean(axis=1)
    return {
        "spread_samples": totals.spread_samples,
        "idle_share_of_whole_samples": float(1 - busy.sum() / slowest.sum()),
        "times_faster_than_whole_samples": float(slowest.sum() / seconds),
    }


def _memory_json(planned: PlannedRun) -> dict[str, Any] | None:
    parts = planned.memory
    if parts is None:
        return None
    return {
        **{f"{name}_bytes": value for name, value in asdict(parts).items()},
        "total_bytes": parts.device_total,
        "device": planned.setup.device.name,
        "device_bytes": planned.setup.device.memory_bytes,
        "fits": parts.device_total <= planned.setup.device.memory_bytes,
        "remedy": what_does_not_fit(parts, planned.setup.device),
    }


def _pipeline_json(planned: PlannedRun, pipeline: PipelineLayout) -> dict[str, Any]:
    timeline, plan = planned.timeline, planned.plan
    baseline = baseline_timeline(planned.step, plan, pipeline)
    return {
        "stages": pipeline.stages,
        "schedule": pipeline.schedule,
        "makespan": timeline.makespan,
        "bubble_ratio": timeline.bubble_ratio,
        "bubble_ratio_recompute_idle": timeline.bubble_ratio_recompute_idle,
        "baseline_bubble_ratio": baseline.bubble_ratio,
        "baseline_makespan": baseline.makespan,
        "live_activations": timeline.live_activations.tolist(),
    }


def baseline_timeline(step: StepPlan, plan: RunPlan, pipeline: PipelineLayout) -> Timeline:
    """Plain 1F1B with a micro-batch a sequence, in the data's order: what is gained is measured against it.

    Of the slowest rank, if samples are dealt to the ranks in turn.
    """
    lengths, targets = plan.lengths[step.samples], plan.target_counts[step.samples]
    plain = PipelineLayout(pipeline.stages, "1f1b")
    cut = replace(plan, pipeline=plain).cut
    timelines = []
    for rank in range(plan.ranks):
        share = lengths[rank :: plan.ranks]
        if len(share):
            chunks = sequences_as_chunks(share)
            seconds = plan.costs.of_chunks(chunks, targets[rank :: plan.ranks], pipeline.stages, cut)
            timelines.append(simulate(plan_pipeline(chunks, 1, plain), seconds))
    return max(timelines, key=lambda timeline: timeline.makespan)


def what_does_not_fit(parts: MemoryParts, device: DeviceProfile) -> str | None:
    """Which part is the largest, and what lowers it; None if all fits."""
    if parts.device_total <= device.memory_bytes:
        return None
    sizes = {name: value for name, value in asdict(parts).items() if name != "host"}
    largest = max(sizes, key=lambda name: sizes[name])
    remedy = {
        "weights": "engine.zero_stage=3 on more ranks divides them",
        "gradients": "model.lora.enabled=true needs few; engine.zero_stage=2 on more ranks divides them",
        "optimizer": "engine.offload=optimizer, model.lora.enabled=true, or more ranks",
        "activations": "a smaller chunk.size or chunk.k, or model.activation_checkpointing=full",
        "head": "it is one tile of logits and the gradient of the head; model.lora.enabled=true spares the latter",
        "state": "it grows with the longest sample; data.max_length with data.overlong=drop limits that",
    }[largest]
    return f"{largest} is the largest part: {remedy}"
