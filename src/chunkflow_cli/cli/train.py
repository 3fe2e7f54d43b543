"""`chunkflow train`: train in this process, start the ranks, or with `--multirun` start one process per run."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chunkflow_cli.cli.command import Request, Result
from chunkflow_cli.config.load import load
from chunkflow_cli.config.overrides import sweep
from chunkflow_cli.config.texts import quoted
from chunkflow_cli.config.words import as_word
from chunkflow_cli.console import stderr_console
from chunkflow_cli.errors import RunError
from chunkflow_cli.processes import worker


def run(request: Request, *, overrides_file: str | None, multirun: bool) -> Result:
    """Train, and return the run's report.

    Args:
        overrides_file: YAML file of keys. They win over the recipe, and the words of the command line over them.
        multirun: run every combination of the values in the overrides.

    Raises:
        UsageError: the command, the configuration or the data is wrong.
        RunError: a run failed.
    """
    worker.enter()  # before anything imports torch: it divides the machine's cores among the ranks
    overrides = request.overrides or []
    if overrides_file is not None:
        overrides = [f"overrides={quoted(overrides_file)}", *overrides]
    if multirun:
        return run_sweep(overrides, config_dir=request.config_dir, json_output=request.json_output)
    from chunkflow_cli.training import launch

    loaded = launch.with_processes(request.load(overrides))
    if launch.is_needed(loaded):
        return launch.run(loaded, config_dir=request.config_dir, debug=request.debug, json_output=request.json_output)
    from chunkflow_cli.training import train

    return train.run(loaded, json_output=request.json_output)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Return the runs of a sweep in Hydra's syntax: `a=1,2 b=x` gives `[a=1, b=x]` and `[a=2, b=x]`.

    Raises:
        UsageError: an override cannot be parsed.
    """
    return [list(words) for words in itertools.product(*sweep(overrides))]


def run_sweep(overrides: Sequence[str], *, config_dir: str | None, json_output: bool) -> dict[str, Any]:
    """Run all combinations one after the other, each in a process of its own, so that none affects the next.

    Raises:
        UsageError: one of the configurations is wrong. No run has started.
        RunError: a run failed. The other runs were still made.
    """
    console = stderr_console()
    jobs = combinations(overrides)
    loaded = [load(words, config_dir) for words in jobs]
    default = f"outputs/{loaded[0].recipe}/multirun-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    root = Path(loaded[0].config.train.output_dir or default)
    runs, failed = [], []
    for number, words in enumerate(jobs):
        folder = root / str(number)
        console.print(f"[bold]run {number + 1} of {len(jobs)}[/] {' '.join(words)}", soft_wrap=True)
        options = ["--config-dir", config_dir] if config_dir is not None else []
        kept = [word for word in words if not word.startswith("train.output_dir=")]
        command = [sys.executable, "-m", "chunkflow_cli", "train", *options, *kept]
        command.append(as_word("train.output_dir", str(folder)))
        code = _wait_for(subprocess.Popen(command, stdout=sys.stderr if json_output else None))
        if code == 130:
            raise KeyboardInterrupt
        runs.append({"overrides": words, "output_dir": str(folder), "exit_code": code})
        if code != 0:
            failed.append(folder)
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(map(str, failed))}")
    return {"runs": runs}


def _wait_for(job: subprocess.Popen[bytes]) -> int:
    """Wait for the exit code. Ctrl-C also reaches the run, which saves a checkpoint and exits by itself."""
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:
            continue
