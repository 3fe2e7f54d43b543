"""`chunkflow tune-chunk-size`: find the fastest chunk size and K for your data, model and memory.

The search plans global batches of the run for every pair, with the code that training uses. Costs are measured on this
machine (`tune.device=measured`: in a process of its own, and kept) or computed from the profile of another device. If
they were measured, the best few pairs then run a real step.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from chunkflow_cli.cli.screens.explanation import explain, nothing_fits
from chunkflow_cli.cli.screens.plots import check_plot_path, plot_grid
from chunkflow_cli.cli.screens.tuning import print_tuning
from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config, Device
from chunkflow_cli.console import progress_bar, stdout_console
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import to_be_writable, write_atomically
from chunkflow_cli.planning.search import Candidate, best_first, best_of_layouts, search
from chunkflow_cli.training.tuning import Pair, Tuning, check_measurable, measure_best, prepare_tuning


def run(
    loaded: LoadedConfig,
    *,
    config_dir: str | None = None,
    output: str | None = None,
    plot: str | None = None,
    keys: Sequence[str] = (),
    json_output: bool = False,
) -> dict[str, Any]:
    """Search, write the overrides of the best pair, print the ranking unless `json_output` is set, and return it.

    Args:
        config_dir: passed on to the processes that measure.
        output: file for the overrides; by default outputs/RECIPE/tuned.yaml.
        plot: a PNG, SVG or PDF file for the heat map.
        keys: `FoundData.keys`, if this process has read the data before.

    Raises:
        UsageError: the grid is empty, or no pair fits into memory.
        RunError: a process that measures failed.
    """
    config = loaded.config
    if plot is not None:
        check_plot_path(plot)
    if config.tune.device is Device.measured:
        check_measurable(config)
    tuning = prepare_tuning(loaded, config_dir, keys)
    with progress_bar("searching", len(tuning.search.runs)) as progress:
        candidates = search(
            tuning.search.runs, tuning.search.steps, tuning.search.memory_bytes, tuning.memory_limit_bytes, progress,
            tuning.search.offloaded,
        )  # fmt: skip
    ranked, layouts = best_first(candidates), best_of_layouts(candidates)
    if not ranked:
        raise UsageError(nothing_fits(candidates, tuning.memory_limit_bytes, tuning.longest))
    measured = measure_best(loaded, config_dir, ranked, tuning)
    best = min(ranked, key=lambda each: measured.get(_pair(each), np.inf)) if measured else ranked[0]
    result: dict[str, Any] = {
        "best": _row(best, measured),
        "explanation": explain(best, candidates, layouts, measured.get(_pair(best))),
        "layouts": [_row(candidate, measured) for candidate in layouts],
        "candidates": [_row(candidate, measured) for candidate in candidates],
        **_facts(tuning),
    }
    sections = _overrides(best, config)
    path = _write_overrides(sections, loaded.recipe, output)
    result |= {"overrides_file": str(path), "command": _train_command(loaded, config_dir, sections, path)}
    if plot is not None:
        alike = [_row(candidate, measured) for candidate in candidates if candidate.is_like(best)]
        plot_grid(alike, result["best"], Path(plot))
    if not json_output:
        print_tuning(stdout_console(), result)
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return result


def _facts(tuning: Tuning) -> dict[str, Any]:
    """Return what the ranking rests on, as `--json` prints it."""
    setup = tuning.setup
    return {
        "device": setup.device.name,
        "processes": setup.config.launch.processes,
        "cost_model": setup.costs.source,
        "cost_model_worst_error": None if setup.calibration is None else setup.calibration.worst_error,
        "memory_limit_bytes": tuning.memory_limit_bytes,
        "longest": tuning.longest,
        "steps_planned": len(tuning.search.steps),
    }


def _pair(candidate: Candidate) -> Pair:
    return candidate.chunk_size, candidate.k, candidate.offload_state


def _row(candidate: Candidate, measured: Mapping[Pair, float]) -> dict[str, Any]:
    return {**asdict(candidate), "measured_step_seconds": measured.get(_pair(candidate))}


def _overrides(best: Candidate, config: Config) -> dict[str, dict[str, Any]]:
    """Return the keys that `train` needs for the best pair, by section."""
    sections: dict[str, dict[str, Any]] = {"chunk": {"size": best.chunk_size, "k": best.k}, "parallel": {}}
    if best.cuts != config.chunk.cuts.value:
        sections["chunk"]["cuts"] = best.cuts
    if best.offload_state != config.chunk.offload_state.value:
        sections["chunk"]["offload_state"] = best.offload_state
    if best.sequence != config.parallel.sequence:
        sections["parallel"]["sequence"] = best.sequence
    if best.stages != config.parallel.pipeline:
        sections["parallel"]["pipeline"] = best.stages
    return {name: keys for name, keys in sections.items() if keys}


def _write_overrides(sections: dict[str, dict[str, Any]], recipe: str, output: str | None) -> Path:
    path = Path(output) if output is not None else Path("outputs", recipe, "tuned.yaml")
    head = f"# Written by chunkflow tune-chunk-size for recipe {recipe}; chunkflow train ... --overrides {path}\n"
    with to_be_writable(f"--output={path}", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, head + OmegaConf.to_yaml(sections))
    return path


def _train_command(
    loaded: LoadedConfig, config_dir: str | None, sections: dict[str, dict[str, Any]], path: Path
) -> str:
    """Return the command that trains with the best pair and otherwise as this search was configured.

    Keys that only a search has are left out, and those that the file sets, because the command line wins over it.
    """
    found = {f"{name}.{key}" for name, keys in sections.items() for key in keys}
    words = []
    for word in loaded.overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key not in found and key.partition(".")[0] not in ("tune", "plan", "cluster"):
            words.append(word)
    options = ["--config-dir", config_dir] if config_dir is not None else []
    return shlex.join(["chunkflow", "train", *words, *options, "--overrides", str(path)])
