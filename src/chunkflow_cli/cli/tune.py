"""`chunkflow tune-chunk-size`: find the best chunk size and K for your data, model and memory.

Every pair of the grid plans real global batches of the run with the code that training uses. Costs are measured on
this machine (`tune.device=measured`, in a process of its own, kept for the next time) or computed from the profile of
another device. If the device is on this machine, the best few pairs then run a real step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.cli.screens.explanation import explain, nothing_fits
from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Device
from chunkflow_cli.console import progress_bar, stdout_console
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.search import Candidate, best_first, best_of_layouts, search
from chunkflow_cli.training.tuning import Pair, check_measurable, measure_best, prepare_tuning


def run(
    loaded: LoadedConfig,
    *,
    config_dir: str | None = None,
    output: str | None = None,
    plot: str | None = None,
    json_output: bool = False,
) -> dict[str, Any]:
    """Search, print the ranking, and write the overrides of the best pair.

    Args:
        config_dir: as given on the command line, for the processes that measure.
        output: file for the overrides; by default outputs/<recipe>/tuned.yaml.
        plot: PNG or SVG file for the heat map.
        json_output: return the result without printing it.

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
        check_measurable(config)
    tuning = prepare_tuning(loaded, config_dir)
    with progress_bar("searching", len(tuning.search.runs)) as progress:
        candidates = search(
            tuning.search.runs, tuning.search.steps, tuning.search.memory_bytes, tuning.memory_limit_bytes, progress
        )
    ranked, layouts = best_first(candidates), best_of_layouts(candidates)
    if not ranked:
        raise UsageError(nothing_fits(candidates, tuning.memory_limit_bytes, tuning.longest))
    measured = measure_best(loaded, config_dir, ranked, tuning)
    best = min(ranked, key=lambda each: measured.get(_pair(each), np.inf)) if measured else ranked[0]
    setup = tuning.setup
    result: dict[str, Any] = {
        "best": _row(best, measured),
        "explanation": explain(best, candidates, layouts),
        "layouts": [_row(candidate, measured) for candidate in layouts],
        "candidates": [_row(candidate, measured) for candidate in candidates],
        "device": setup.device.name,
        "processes": config.launch.processes,
        "cost_model": setup.costs.source,
        "cost_model_worst_error": None if setup.calibration is None else setup.calibration.worst_error,
        "memory_limit_bytes": tuning.memory_limit_bytes,
        "longest": tuning.longest,
        "steps_planned": len(tuning.search.steps),
        "overrides_file": str(_write_overrides(best, loaded, output)),
    }
    if plot is not None:
        from chunkflow_cli.cli.screens.plots import plot_grid

        alike = [_row(candidate, measured) for candidate in candidates if candidate.is_like(best)]
        plot_grid(alike, result["best"], Path(plot))
    if not json_output:
        from chunkflow_cli.cli.screens.tuning import print_tuning

        print_tuning(stdout_console(), result, loaded.recipe)
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return result


def _pair(candidate: Candidate) -> Pair:
    return candidate.chunk_size, candidate.k


def _row(candidate: Candidate, measured: Mapping[Pair, float]) -> dict[str, Any]:
    return {**asdict(candidate), "measured_step_seconds": measured.get(_pair(candidate))}


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
