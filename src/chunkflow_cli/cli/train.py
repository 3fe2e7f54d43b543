"""`chunkflow train`: train in this process, start the ranks, or with `--multirun` start one process per run."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.command import Request, Result
from chunkflow_cli.cli.screens.tables import columns
from chunkflow_cli.config.effects import unmet
from chunkflow_cli.config.load import LoadedConfig, compose, convert, load
from chunkflow_cli.config.overrides import sweep
from chunkflow_cli.config.sources import has_data, shown_data
from chunkflow_cli.config.texts import quoted
from chunkflow_cli.config.words import as_word, read_words
from chunkflow_cli.console import stderr_console, stdout_console
from chunkflow_cli.data.dataset import check_data
from chunkflow_cli.data.names import printable
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes import environment, worker
from chunkflow_cli.processes.environment import SWEEP, child_environment, module_command
from chunkflow_cli.processes.stop_signals import is_second, stop_signals_handled
from chunkflow_cli.training.reading_ahead import read_ahead
from chunkflow_cli.training.required_inputs import check_inputs


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
    keys: Sequence[str] = ()
    if environment.worker_folder() is None:  # the launcher of a worker has checked all this
        _announce_and_check(loaded)
        if not environment.is_started_by_launcher():
            keys = read_ahead(loaded.config)
    if launch.is_needed(loaded):
        return launch.run(
            loaded, keys=keys, config_dir=request.config_dir, debug=request.debug, json_output=request.json_output
        )
    from chunkflow_cli.training import train

    return train.run(loaded, keys=keys, json_output=request.json_output)


def _announce_and_check(loaded: LoadedConfig) -> None:
    """Print model and data, and check that they exist, before torch is imported."""
    config = loaded.config
    if config.model.path and has_data(config.data) and environment.rank() == 0:
        recipe = "" if loaded.recipe == "default" else f"recipe {loaded.recipe}: "
        data = printable(shown_data(config.data))
        stderr_console().print(f"{recipe}training {config.model.path} on {data}", soft_wrap=True)
        check_data(config.data)
    check_inputs(loaded)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Return the runs of a sweep in Hydra's syntax: `a=1,2 b=x` gives `[a=1, b=x]` and `[a=2, b=x]`.

    Raises:
        UsageError: an override cannot be parsed.
    """
    return [list(words) for words in itertools.product(*sweep(overrides))]


def without_idle_words(
    jobs: Sequence[Sequence[str]], config_dir: str | None = None
) -> tuple[list[list[str]], list[str]]:
    """Leave words out of the runs of a sweep in which they have no effect, if they have one in another run.

    `optim=adamw,sgd optim.momentum=0.9` becomes `[optim=adamw]` and `[optim=sgd, optim.momentum=0.9]`. A word that has
    no effect in any run stays: it is a mistake, which `load` refuses.

    Returns:
        The runs, each different one once, and the words that were left out of a run.

    Raises:
        UsageError: one of the configurations is wrong.
    """
    names = {word: tuple(each.name for each in read_words([word])[0]) for words in jobs for word in words}
    idle = []
    for words in jobs:
        recipe, tree = compose(words, config_dir)
        config = convert(tree, recipe=recipe, overrides=words).config
        idle.append({word for word in words if all(unmet(config, name) for name in names[word])})
    used = {names[word] for words, without in zip(jobs, idle, strict=True) for word in words if word not in without}
    left_out = [{word for word in without if names[word] in used} for without in idle]
    kept = (tuple(word for word in words if word not in out) for words, out in zip(jobs, left_out, strict=True))
    return [list(words) for words in dict.fromkeys(kept)], sorted(set().union(*left_out))


def run_sweep(overrides: Sequence[str], *, config_dir: str | None, json_output: bool) -> dict[str, Any]:
    """Run all combinations one after the other, each in a process of its own, so that none affects the next.

    Raises:
        UsageError: one of the configurations is wrong. No run has started.
        RunError: a run failed. The other runs were still made.
    """
    console = stderr_console()
    jobs, left_out = without_idle_words(combinations(overrides), config_dir)
    loaded = [load(words, config_dir) for words in jobs]
    folders = dict.fromkeys(str(each.config.train.output_dir) for each in loaded)
    if len(folders) > 1:
        raise UsageError(
            f"train.output_dir={','.join(folders)}: the runs of a sweep are folders in one directory\n  name one"
        )
    default = f"outputs/{loaded[0].recipe}/multirun-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    root = Path(loaded[0].config.train.output_dir or default)
    runs, failed = [], []
    if left_out:
        console.print(f"Left out where they have no effect: {' '.join(left_out)}", soft_wrap=True)
    for number, words in enumerate(jobs):
        folder = root / str(number)
        console.print(
            Text.assemble((f"run {number + 1} of {len(jobs)}", "bold"), f" {' '.join(words)}"), soft_wrap=True
        )
        options = ["--config-dir", config_dir] if config_dir is not None else []
        kept = [word for word in words if not word.startswith("train.output_dir=")]
        train = ["train", *options, *kept, as_word("train.output_dir", str(folder))]
        try:
            code = _run_job(train, number, show_output=not json_output)
        except KeyboardInterrupt:
            console.print(f"To resume all runs, repeat the command with train.output_dir={root}", soft_wrap=True)
            raise
        runs.append({"overrides": words, "output_dir": str(folder), "exit_code": code, **_losses(folder)})
        if code != 0:
            failed.append(folder)
    if not json_output:
        stdout_console().print(_table_of_runs(runs))
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(map(str, failed))}")
    return {"runs": runs}


def _losses(folder: Path) -> dict[str, float | None]:
    """Return the last training loss and the last held-out loss of a run; an empty result if it has no report."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: report[name] for name in ("loss_last", "eval_loss_end")}


def _table_of_runs(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the runs of a sweep: the keys in which they differ, and how each ended."""
    common = set.intersection(*(set(run["overrides"]) for run in runs))
    table = columns("run", "with", ">loss", ">held-out", "")
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
    for run in runs:
        words = " ".join(word for word in run["overrides"] if word not in common)
        losses = (run.get(name) for name in ("loss_last", "eval_loss_end"))
        table.add_row(
            Text(run["output_dir"]), Text(words), *("" if loss is None else f"{loss:.4f}" for loss in losses),
            "" if run["exit_code"] == 0 else f"failed, exit code {run['exit_code']}",
        )  # fmt: skip
    return table


def _run_job(words: Sequence[str], number: int, *, show_output: bool) -> int:
    """Run `chunkflow WORDS` in a process of its own and return its exit code. Stop signals are passed on to it.

    Raises:
        KeyboardInterrupt: it was asked to stop, and has saved a checkpoint; or it was asked twice, and was killed.
    """
    job: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if job is not None:
            job.send_signal(signal.SIGKILL if is_second(received) else signal.SIGTERM)

    with stop_signals_handled(pass_on):
        job = subprocess.Popen(
            module_command("chunkflow_cli", words),
            env={**child_environment(), SWEEP: str(number)},
            stdout=None if show_output else sys.stderr,
            start_new_session=True,  # so that Ctrl-C in a terminal reaches it once, from here
        )
        if received:  # before there was a process to pass it on to
            job.send_signal(signal.SIGTERM)
        code = job.wait()
    if received or code == 130:
        raise KeyboardInterrupt
    return code
