"""Decide what `tune-chunk-size` tries and on which costs, and measure the best pairs."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config, Cuts, Device
from chunkflow_cli.console import human_seconds, stderr_console
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import to_be_writable
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.choices import Choices, Search, lay_out
from chunkflow_cli.planning.search import Candidate
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.processes.environment import child_environment, module_command
from chunkflow_cli.training.inputs import load_run_data
from chunkflow_cli.training.setup import RunSetup, calibration_path, planned_device, planned_topology, read_setup

LARGEST_TIMED = 4096
"""Tokens of the largest chunk that is timed. Larger ones take long, and their costs are linear by then."""
DISTURBED = 0.4
"""Relative error of a fit above which the timings are doubted."""
ALLOCATOR_WASTE = 0.05
"""Share of a device's memory that allocators cannot use; unused if `tune.memory_gib` sets the limit."""
Pair = tuple[int, int, str]
"""chunk.size, chunk.k and chunk.offload_state."""


@dataclass(frozen=True)
class Tuning:
    """The choices to search, and the facts that the result is reported with."""

    setup: RunSetup
    search: Search
    memory_limit_bytes: int
    longest: int
    """Tokens of the longest sample."""


def prepare_tuning(loaded: LoadedConfig, config_dir: str | None, keys: Sequence[str]) -> Tuning:
    """Read the model's sizes and the data, measure or look up costs, and lay out all choices.

    Args:
        config_dir: `--config-dir` of the command line, for the process that measures.
        keys: `FoundData.keys`, if this process has read the data before.

    Raises:
        UsageError: the grid is empty, or a layout does not fit the model or the number of processes.
        RunError: the process that measures failed.
    """
    config = loaded.config
    layouts = tried_layouts(config)
    hf_config = load_config(config.model)
    from chunkflow_cli.training.requirements import check_planned  # imports torch

    check_planned(config, hf_config, layouts)
    data = load_run_data(config, hf_config, keys).train
    setup = _setup(loaded, config_dir, hf_config)
    assert setup.shape is not None
    run = setup.plan(data)
    tried = config.tune
    try:
        search = lay_out(
            run,
            Choices(
                tuple(tried.chunk_sizes),
                tuple(tried.ks),
                tuple(layouts),
                tuple(cuts is Cuts.time for cuts in tried.cuts or [config.chunk.cuts]),
                setup.pipeline,
            ),
            samples=tried.samples,
            shape=setup.shape,
            settings=setup.memory,
            device=setup.device,
            measured=None if setup.calibration is None else setup.calibration.memory,
        )
    except ValueError as error:
        raise UsageError(f"tune.{error}\n  such as tune.chunk_sizes=[2048,4096,8192] tune.ks=[1,2,4]") from error
    limit = setup.device.memory_bytes if tried.memory_gib else int((1 - ALLOCATOR_WASTE) * setup.device.memory_bytes)
    return Tuning(setup, search, limit, longest=int(run.sequence_lengths.max()))


def _setup(loaded: LoadedConfig, config_dir: str | None, hf_config: Any) -> RunSetup:
    """Return the setup with costs measured on this machine, or with those of a profile."""
    config = loaded.config
    device = planned_device(config)
    measure = partial(_measure_chunks, loaded, config_dir) if config.tune.device is Device.measured else None
    setup = read_setup(config, hf_config, device, measure=measure)
    if setup.calibration is not None and setup.calibration.worst_error > DISTURBED:
        stderr_console().print(
            f"warning: timings of chunks differ by up to {100 * setup.calibration.worst_error:.0f} % from the fitted "
            f"costs; other work may have disturbed them\n"
            f"  to time them again, delete {calibration_path(config, hf_config, device)}",
            soft_wrap=True,
        )
    return setup


def tried_layouts(config: Config) -> list[Topology]:
    """Return every way to divide the devices that is tried; by default, only that of the run.

    Raises:
        UsageError: a size does not divide `launch.processes`, or no combination of sizes does.
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


def check_measurable(config: Config) -> None:
    """Check that the run has one process, because only that can be measured.

    Raises:
        UsageError: a key asks for several processes.
    """
    for key, value in (
        ("launch.processes", config.launch.processes),
        ("parallel.pipeline", config.parallel.pipeline),
        ("parallel.sequence", config.parallel.sequence),
        ("cluster.sequences", config.cluster.sequences),
        ("cluster.pipelines", config.cluster.pipelines),
    ):
        if (max(value, default=1) if isinstance(value, list) else value) > 1:
            raise UsageError(
                f"{key}={value}: only one process can be measured on this machine\n"
                "  name the device to predict for, such as tune.device=h100"
            )


def _measure_chunks(loaded: LoadedConfig, config_dir: str | None, path: Path) -> None:
    """Time chunks of the model, and save the calibration to `path`."""
    tried = sorted(set(loaded.config.tune.chunk_sizes))
    timed = sorted({size for size in tried if size <= LARGEST_TIMED} | set(tried[:2]))
    if len(timed) < 2:
        timed = [max(16, timed[0] // 2), *timed]
    with to_be_writable(f"the calibration {path}", "set data.cache_dir to a folder that you can write to"):
        path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that measuring takes
        path.with_suffix(".tmp").touch()
        path.with_suffix(".tmp").unlink()
    stderr_console().print("Timing chunks of this model on this machine; the result is kept for the next time.")
    _run_measurement(
        ["--out", str(path), "--budget", str(loaded.config.tune.budget_seconds / 2), "--sizes", *map(str, timed)],
        loaded,
        config_dir,
    )


def measure_best(
    loaded: LoadedConfig, config_dir: str | None, ranked: Sequence[Candidate], tuning: Tuning
) -> dict[Pair, float]:
    """Return the measured seconds of a step for the best few candidates.

    The result is empty if costs come from a profile, if `tune.measure` is 0, or if `tune.budget_seconds` has no room
    for two steps (one, if there is only one candidate to run).

    Args:
        ranked: candidates, fastest first.
    """
    config = loaded.config
    if tuning.setup.calibration is None or config.tune.measure == 0:
        return {}
    place = ranked[0].offload_state  # one process measures all
    # A larger chunk that changes nothing has the same seconds and bytes, and only noise would choose between them.
    distinct: dict[tuple[float, int], Candidate] = {}
    for candidate in ranked:
        if candidate.offload_state == place:
            distinct.setdefault((candidate.step_seconds, candidate.memory_bytes), candidate)
    best = list(distinct.values())[: config.tune.measure]
    least = min(len(best), 2)  # a comparison, unless there is nothing to compare
    totals = itertools.accumulate(candidate.step_seconds for candidate in best)
    pairs = [
        f"{each.chunk_size}:{each.k}"
        for each, total in zip(best, totals, strict=True)
        if total <= config.tune.budget_seconds / 2
    ]
    if len(pairs) < least:
        stderr_console().print(
            f"Not measured: a step takes about {human_seconds(ranked[0].step_seconds)}, and half of "
            f"tune.budget_seconds={config.tune.budget_seconds:g} has no room for {'two' if least == 2 else 'it'}"
        )
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds.json")
        _run_measurement(
            ["--out", str(out), "--pairs", *pairs, "--step", str(tuning.search.steps[0])],
            replace(loaded, overrides=(*loaded.overrides, f"chunk.offload_state={place}")),
            config_dir,
        )
        rows = json.loads(out.read_text(encoding="utf-8"))
    return {(row["chunk_size"], row["k"], place): row["seconds"] for row in rows}


def _run_measurement(arguments: list[str], loaded: LoadedConfig, config_dir: str | None) -> None:
    """Run `training.measure` in a process of its own.

    Raises:
        UsageError: the model cannot be trained here; the process has printed why.
        RunError: the process failed or was killed.
    """
    folder = ["--config-dir", config_dir] if config_dir is not None else []
    words = [*arguments, *folder, "--overrides", *loaded.overrides]
    code = subprocess.run(
        module_command("chunkflow_cli.training.measure", words),
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=2,  # stdout may carry JSON
        start_new_session=True,  # Ctrl-C in a terminal is for this process, which ends the other one
        check=False,
    ).returncode
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code == 2:
        raise UsageError("the model cannot be measured on this machine; the reason is printed above")
    if code != 0:
        raise RunError(
            f"the process that measures ended with exit code {code}"
            + (" (killed: out of memory?)" if code == -9 else "")
            + "\n  to use a profile instead of measuring, set tune.device=NAME"
        )
