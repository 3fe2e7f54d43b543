"""`chunkflow tune-chunk-size`: the best (ChunkSize, K) for these data, this model and this memory.

Every pair of the grid plans real global batches of the run with the code that training uses, on costs that were
measured on this machine's device (`tune.device=measured`, in a process of its own, kept for the next time) or computed
from another device's profile. Where the device is here, the best few then run a real step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config, Cuts, Device
from chunkflow_cli.console import progress_bar, stderr_console, stdout_console
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.calibration import Calibration
from chunkflow_cli.planning.costs import CostModel, DeviceProfile, ModelShape
from chunkflow_cli.planning.memory_parts import ELEMENT_BYTES, state_bytes_per_token, step_seconds
from chunkflow_cli.planning.peak_memory import activations_and_state, memory_of_fullest
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import Candidate, SimulatedStep, best_first, grid, search
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.from_config import (
    calibration_path,
    check_heads,
    check_stages,
    cost_model,
    memory_settings,
    pipeline_layout,
    plan_run,
    planned_device,
    planned_topology,
    with_links,
)
from chunkflow_cli.training.inputs import load_run_data

LARGEST_TIMED = 4096
"""Chunk sizes beyond it are not timed: costs are linear by then, and a large chunk takes long."""

Measured = dict[tuple[int, int], float]
"""Real seconds of a step by chunk size and K."""

DISTURBED = 0.4
"""Relative error of a fit above which what was timed is doubted."""


@dataclass(frozen=True)
class Basis:
    """What the prediction rests on."""

    costs: CostModel
    device: DeviceProfile
    shape: ModelShape
    calibration: Calibration | None
    """None where costs come from a profile."""


def run(
    loaded: LoadedConfig,
    *,
    config_dir: str | None = None,
    output: str | None = None,
    plot: str | None = None,
    json_output: bool = False,
) -> dict[str, Any]:
    """Search; print the ranking, unless it is wanted as JSON; write the overrides of the best pair.

    Args:
        config_dir: as the command line was given it, for the processes that measure.
        output: where the overrides go; default outputs/<recipe>/tuned.yaml.
        plot: draw the heat map into this PNG or SVG file.

    Raises:
        UsageError: no data, an empty grid, or nothing that fits.
        RunError: measuring failed.
    """
    config = loaded.config
    if plot is not None:
        from chunkflow_cli.cli.screens.plots import check_plot_path

        check_plot_path(plot)
    if not config.data.path:
        raise UsageError("data.path is not set: the chunk size is tuned to your data")
    if config.tune.device is Device.measured:
        refuse_what_cannot_be_measured(config)
    hf_config = load_config(config.model)
    data = load_run_data(config, hf_config).train
    longest = int(data.lengths.max())
    try:
        pairs = grid(config.tune.chunk_sizes, config.tune.ks, longest)
    except ValueError as error:
        raise UsageError(f"tune.{error}\n  such as tune.chunk_sizes=[2048,4096,8192] tune.ks=[1,2,4]") from error
    layouts = layouts_of(config)
    basis = find_basis(loaded, config_dir, hf_config, [size for size, _ in pairs])
    for layout in layouts:
        check_stages(basis.shape, layout.pipeline)
        check_heads(config, hf_config, layout.sequence)
    run_plan = plan_run(config, data, basis.costs)
    steps = sampled_steps(run_plan, config.tune.samples)
    limit = memory_limit(config, basis.device)
    runs = [
        choice(config, run_plan, basis, layout, equal_time, *pair)
        for layout in layouts
        for equal_time in cuts_of(config, layout.pipeline)
        for pair in grid(
            config.tune.chunk_sizes, config.tune.ks, longest, replace(run_plan, equal_time=equal_time).pair_weight
        )
    ]
    candidates = []
    is_planned_whole = len(steps) == run_plan.steps

    def memory_of(run: RunPlan, simulated: Sequence[SimulatedStep]) -> int:
        return peak_memory(config, basis, run, simulated, is_planned_whole=is_planned_whole)

    with progress_bar("searching", len(runs)) as progress:
        for candidate in search(runs, steps, memory_of, limit):
            candidates.append(candidate)
            progress(len(candidates))
    ranked = best_first(candidates)
    if not ranked:
        raise UsageError(_nothing_fits(candidates, limit, longest))
    measured = _measure_best(loaded, config_dir, ranked, steps[0], basis)
    best = min(ranked, key=lambda candidate: measured.get(_measured_as(candidate), np.inf)) if measured else ranked[0]
    result: dict[str, Any] = {
        "best": _row(best, measured),
        "explanation": explain(best, candidates),
        "layouts": [_row(candidate, measured) for candidate in best_of_layouts(candidates)],
        "candidates": [_row(candidate, measured) for candidate in candidates],
        "device": basis.device.name,
        "processes": config.launch.processes,
        "cost_model": basis.costs.source,
        "cost_model_worst_error": None if basis.calibration is None else basis.calibration.worst_error,
        "memory_limit_bytes": limit,
        "longest": longest,
        "steps_planned": len(steps),
        "overrides_file": str(_write_overrides(best, loaded, output)),
    }
    if plot is not None:
        from chunkflow_cli.cli.screens.plots import plot_grid

        plot_grid(
            [_row(candidate, measured) for candidate in candidates if candidate.is_like(best)],
            result["best"],
            Path(plot),
        )
    if not json_output:
        from chunkflow_cli.cli.screens.tuning import print_tuning

        print_tuning(stdout_console(), result, loaded.recipe)
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return result


def refuse_what_cannot_be_measured(config: Config) -> None:
    """
    Raises:
        UsageError: the run is one of several processes.
    """
    for key, value, most in (
        ("launch.processes", config.launch.processes, config.launch.processes),
        ("parallel.pipeline", config.parallel.pipeline, config.parallel.pipeline),
        ("parallel.sequence", config.parallel.sequence, config.parallel.sequence),
        ("cluster.sequences", config.cluster.sequences, max(config.cluster.sequences, default=1)),
        ("cluster.pipelines", config.cluster.pipelines, max(config.cluster.pipelines, default=1)),
    ):
        if most > 1:
            raise UsageError(
                f"{key}={value}: only one process can be measured here\n"
                "  name the device to predict for: tune.device=h100"
            )


def find_basis(loaded: LoadedConfig, config_dir: str | None, hf_config: Any, sizes: Sequence[int]) -> Basis:
    """Costs and memory: measured here (or found measured before), or from the profile of `tune.device`.

    Raises:
        RunError: the process that measures failed.
    """
    config = loaded.config
    device = planned_device(config)
    if config.tune.device is not Device.measured:
        from chunkflow_cli.model.shape import shape_without_weights

        shape = shape_without_weights(config.model, hf_config)
        return Basis(cost_model(config, shape, device, hf_config), with_links(config, device), shape, None)
    path = calibration_path(config, hf_config, device)
    calibration = Calibration.load(path)
    if calibration is None:
        timed = sorted({size for size in sizes if size <= LARGEST_TIMED} | set(sorted(sizes)[:2]))
        if len(timed) < 2:
            timed = [max(16, timed[0] // 2), *timed]
        stderr_console().print("Timing chunks of this model on this machine; kept for the next time.")
        _run_measurement(
            ["--out", str(path), "--budget", str(config.tune.budget_seconds / 2), "--sizes", *map(str, timed)],
            loaded,
            config_dir,
        )
        calibration = Calibration.load(path)
        assert calibration is not None
    if calibration.worst_error > DISTURBED:
        stderr_console().print(
            f"warning: timed chunks are up to {100 * calibration.worst_error:.0f} % off what was fitted to them: other "
            f"work may have disturbed them\n  to time them again, delete {path}",
            soft_wrap=True,
        )
    return Basis(calibration.costs, device, calibration.shape, calibration)


def _run_measurement(arguments: list[str], loaded: LoadedConfig, config_dir: str | None) -> None:
    folder = ["--config-dir", config_dir] if config_dir is not None else []
    command = [
        sys.executable, "-m", "chunkflow_cli.training.measure", *arguments, *folder, "--overrides", *loaded.overrides,
    ]  # fmt: skip
    code = subprocess.run(command, stdout=2, check=False).returncode  # stdout may be for JSON: its prints go to stderr
    if code in (130, -2):
        raise KeyboardInterrupt
    if code == 2:
        raise UsageError("the model cannot be measured here: the reason stands above")
    if code != 0:
        raise RunError(
            f"the process that measures ended with exit code {code}"
            + (" (killed: out of memory?)" if code == -9 else "")
            + "\n  without measuring: tune.device=NAME takes a profile instead"
        )


def sampled_steps(plan: RunPlan, samples: int) -> list[int]:
    """The first steps of the run, as many as hold `samples`: their samples are drawn at random from the data."""
    count = max(1, min(plan.steps, round(samples / plan.batches.global_batch_size)))
    return list(range(count))


def memory_limit(config: Config, device: DeviceProfile) -> int:
    """Bytes that a pair may take."""
    if config.tune.memory_gib is not None:
        return device.memory_bytes
    return int(0.95 * device.memory_bytes)


def layouts_of(config: Config) -> list[Topology]:
    """Every way to divide the devices that is to be tried.

    Raises:
        UsageError: a size that does not divide `launch.processes`, or sizes that do so only one at a time.
    """
    tried = config.cluster
    if not tried.pipelines and not tried.sequences:
        return [planned_topology(config)]
    processes = config.launch.processes
    for key, sizes, noun in (
        ("cluster.pipelines", tried.pipelines, "pipelines of {} stages"),
        ("cluster.sequences", tried.sequences, "groups of {} ranks"),
    ):
        for size in sizes:
            if size < 1 or processes % size:
                raise UsageError(
                    f"{key}={sizes}: launch.processes={processes} cannot be divided among {noun.format(size)}"
                )
    found = [
        Topology.of(processes, sequence=sequence, pipeline=stages)
        for sequence in sorted(set(tried.sequences or [config.parallel.sequence]))
        for stages in sorted(set(tried.pipelines or [config.parallel.pipeline]))
        if processes % (sequence * stages) == 0
    ]
    if not found:
        raise UsageError(
            f"launch.processes={processes} cannot be divided into groups of cluster.sequences={tried.sequences} "
            f"x cluster.pipelines={tried.pipelines}"
        )
    return found


def cuts_of(config: Config, stages: int) -> list[bool]:
    """Whether long samples are cut into pieces of equal time: what to try. One stage takes as long either way."""
    tried = config.tune.cuts if stages > 1 and config.tune.cuts else [config.chunk.cuts]
    return [cuts is Cuts.time for cuts in dict.fromkeys(tried)]


def choice(
    config: Config, run: RunPlan, basis: Basis, topology: Topology, equal_time: bool, chunk_size: int, k: int
) -> RunPlan:
    """The run with another chunk size, K, way to cut long samples and division of the devices."""
    ranks, stages, sequence = topology.replicas, topology.pipeline, topology.sequence
    chosen = replace(
        run, chunk_size=chunk_size, k=k, equal_time=equal_time, ranks=ranks, sequence=sequence,
        pipeline=pipeline_layout(config, stages),
    )  # fmt: skip
    if basis.calibration is not None or run.costs.is_of_one_stage:
        return chosen
    settings = memory_settings(config, basis.device, chunk_size=chunk_size, ranks=ranks)
    update = max(
        step_seconds(basis.shape, settings, basis.device, held) for held in chosen.stage_layers(basis.shape.layers)
    )
    return replace(chosen, costs=replace(run.costs, step_seconds=update))


def peak_memory(
    config: Config, basis: Basis, run: RunPlan, steps: Sequence[SimulatedStep], *, is_planned_whole: bool = False
) -> int:
    """Predicted bytes of the fullest rank or stage, in the planned steps or in that of the longest sample."""
    if basis.calibration is not None:
        live, stored = activations_and_state(run, is_planned_whole=is_planned_whole)
        state = stored * state_bytes_per_token(basis.shape, ELEMENT_BYTES[config.model.dtype.value])
        return basis.calibration.memory.peak_bytes(run.chunk_size, live, state)
    settings = memory_settings(config, basis.device, chunk_size=run.chunk_size, ranks=run.ranks)
    if run.pipeline is not None:
        longest_step = run.batches.step_of(int(run.lengths.argmax()))
        if all(step.plan.step != longest_step for step in steps):
            steps = [*steps, SimulatedStep(run, run[longest_step])]
    return memory_of_fullest(basis.shape, settings, run, steps).device_total


def _measure_best(
    loaded: LoadedConfig, config_dir: str | None, ranked: Sequence[Candidate], step: int, basis: Basis
) -> Measured:
    """Real seconds of a step of the best few; none where the device is not here or the budget has no room."""
    config = loaded.config
    if basis.calibration is None or config.tune.measure == 0:
        return {}
    room = config.tune.budget_seconds / 2
    chosen: list[Candidate] = []
    for candidate in ranked:
        room -= candidate.step_seconds
        if room < 0 or len(chosen) == config.tune.measure:
            break
        chosen.append(candidate)
    if len(chosen) < 2:
        stderr_console().print(
            f"Not measured: a step takes about {ranked[0].step_seconds:,.0f} s, and tune.budget_seconds="
            f"{config.tune.budget_seconds:g} has no room for two"
        )
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds.json")
        pairs = [f"{candidate.chunk_size}:{candidate.k}" for candidate in chosen]
        _run_measurement(["--out", str(out), "--pairs", *pairs, "--step", str(step)], loaded, config_dir)
        rows = json.loads(out.read_text(encoding="utf-8"))
    return {(row["chunk_size"], row["k"]): row["seconds"] for row in rows}


def _measured_as(candidate: Candidate) -> tuple[int, int]:
    return candidate.chunk_size, candidate.k


def explain(best: Candidate, candidates: Sequence[Candidate]) -> str:
    """Two sentences: where the best pair's time goes, and what its neighbours would lose."""
    total = best.step_seconds
    shares = {
        "second forwards of long samples": best.recompute_seconds,
        "the fixed cost of chunks": best.fixed_seconds,
        "waiting between stages": best.bubble_seconds,
        "the optimizer step": best.optimizer_seconds,
    }
    told = [f"{100 * seconds / total:.0f} % is {name}" for name, seconds in shares.items() if seconds > 0.005 * total]
    first = f"A step is predicted to take {total:.3g} s" + (f", of which {_and(told)}" if told else "")
    if best.data_parallel > 1 and best.bubble_ratio > 0.005:
        first += f"; with the wait for the slowest rank, devices are idle {100 * best.bubble_ratio:.0f} % of the time"
    first += "."
    alike = [each for each in candidates if each.is_like(best)]
    larger = [each for each in alike if each.chunk_size > best.chunk_size]
    refused = [each for each in larger if not each.fits]
    smaller = [each for each in alike if each.chunk_size < best.chunk_size and each.fits]
    parts = []
    if smaller:
        near = min(smaller, key=lambda each: (-each.chunk_size, each.step_seconds))
        parts.append(
            f"chunks of {near.chunk_size} take {near.step_seconds / total:.2f} times as long ({_why(near, best)})"
        )
    fitting = [each for each in larger if each.fits]
    if fitting:
        near = min(fitting, key=lambda each: (each.chunk_size, each.step_seconds))
        times = near.step_seconds / total
        parts.append(f"chunks of {near.chunk_size} take {times:.2f} times as long ({_why(near, best)})")
    elif refused:
        near = min(refused, key=lambda each: (each.chunk_size, each.k))
        parts.append(f"chunks of {near.chunk_size} would need {near.memory_bytes / 2**30:.1f} GiB")
    others = [each for each in best_of_layouts(candidates) if each.layout != best.layout]
    if fitting_others := [each for each in others if each.fits]:
        near = min(fitting_others, key=lambda each: each.step_seconds)
        parts.append(f"{_stages(near)} would take {near.step_seconds / total:.2f} times as long ({_why(near, best)})")
    elif others:
        near = min(others, key=lambda each: each.memory_bytes)
        parts.append(f"{_stages(near)} would need {near.memory_bytes / 2**30:.1f} GiB")
    twins = [each for each in candidates if each.fits and each.is_at(best) and each.cuts != best.cuts]
    if twins:
        times = twins[0].step_seconds / total
        parts.append(f"cuts of equal {twins[0].cuts} would take {times:.2f} times as long ({_why(twins[0], best)})")
    second = f" {_and(parts)[0].upper()}{_and(parts)[1:]}." if parts else ""
    return first + second


def best_of_layouts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """For each division of the devices the fastest that fits; where none does, the one that needs least."""
    found = []
    for layout in sorted({each.layout for each in candidates}):
        rows = [each for each in candidates if each.layout == layout]
        found.append((best_first(rows) or sorted(rows, key=lambda each: each.memory_bytes))[0])
    return found


def _stages(candidate: Candidate) -> str:
    grouped = f" in groups of {candidate.sequence}" if candidate.sequence > 1 else ""
    if candidate.stages == 1:
        return f"{candidate.data_parallel} ranks{grouped or ' without a pipeline'}"
    several = candidate.data_parallel > 1
    pipelines = f"{candidate.data_parallel} pipelines of " if several else "a pipeline of "
    return f"{pipelines}{candidate.stages} stages{grouped}"


def _why(other: Candidate, best: Candidate) -> str:
    """What mainly makes the difference between two pairs."""
    differences = {
        "second forwards": other.recompute_seconds - best.recompute_seconds,
        "the fixed cost of chunks": other.fixed_seconds - best.fixed_seconds,
        "waiting": other.waiting_seconds - best.waiting_seconds,
        "the optimizer step": other.optimizer_seconds - best.optimizer_seconds,
    }
    slower = other.step_seconds >= best.step_seconds
    name = max(differences, key=lambda key: differences[key] if slower else -differences[key])
    return f"{'more' if slower else 'less'} {'of ' if name.startswith('the ') else ''}{name}"


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _row(candidate: Candidate, measured: Measured) -> dict[str, Any]:
    return {**asdict(candidate), "measured_step_seconds": measured.get(_measured_as(candidate))}


def _write_overrides(best: Candidate, loaded: LoadedConfig, output: str | None) -> Path:
    path = Path(output) if output is not None else Path("outputs", loaded.recipe, "tuned.yaml")
    config = loaded.config
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"# Written by chunkflow tune-chunk-size for recipe {loaded.recipe}; "
            f"chunkflow train recipe=... --overrides {path}\n"
            f"chunk:\n  size: {best.chunk_size}\n  k: {best.k}\n"
            + (f"  cuts: {best.cuts}\n" if best.cuts != config.chunk.cuts.value else "")
            + ("parallel:\n" if best.layout != (config.parallel.sequence, config.parallel.pipeline) else "")
            + (f"  sequence: {best.sequence}\n" if best.sequence != config.parallel.sequence else "")
            + (f"  pipeline: {best.stages}\n" if best.stages != config.parallel.pipeline else ""),
            encoding="utf-8",
        )
    except OSError as error:
        raise UsageError(f"--output={path} cannot be written: {error}") from error
    return path


def _nothing_fits(candidates: Sequence[Candidate], limit: int, longest: int) -> str:
    least = min(candidates, key=lambda candidate: candidate.memory_bytes)
    layout = f" on {_stages(least)}" if least.stages * least.data_parallel > 1 else ""
    return (
        f"no pair fits into {limit / 2**30:.1f} GiB: the smallest, chunk.size={least.chunk_size} chunk.k={least.k}"
        f"{layout}, needs {least.memory_bytes / 2**30:.1f} GiB (the longest sample has {longest:,} tokens)\n"
        "  lower data.max_length or tune.chunk_sizes, take model.activation_checkpointing=full or\n"
        "  model.lora.enabled=true or engine.offload=optimizer; `chunkflow plan` shows the parts"
        + ("\n  more stages divide the model: cluster.pipelines" if layout else "")
    )
