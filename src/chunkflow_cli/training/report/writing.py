"""Write report.html into the folder of a run, however the run has ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import describe
from chunkflow_cli.files import write_atomically
from chunkflow_cli.training.description import describe_config
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.report.page import RunRecord, page
from chunkflow_cli.training.run_folder import PAGE
from chunkflow_cli.training.trackers.backends import flattened


def write_page(run: Prepared, report: Mapping[str, Any], outcome: str = "finished") -> None:
    """Write the page about a run. If that fails, a line says so: a page never ends a run.

    Args:
        report: the content of report.json, or of a run that is not finished what is known of it.
        outcome: how the run ended.
    """
    path = run.folder.path / PAGE
    try:
        keys, defaults = flattened(describe_config(run.config)), flattened(describe_config(Config()))
        set_keys = {name: value for name, value in keys.items() if name not in defaults or defaults[name] != value}
        rows = _rows(run.folder.metrics)
        write_atomically(path, page(RunRecord(str(run.folder.path), outcome, rows, report, set_keys, keys)))
    except Exception as error:  # whatever is wrong with a page, what was learned is worth more
        run.console.print(f"warning: {path} could not be written: {describe(error)}", soft_wrap=True)


def write_page_of_unfinished(run: Prepared, state: RunState, error: BaseException) -> None:
    """Write the page about a run that was stopped or has failed, as far as it went. Other processes may have ended."""
    if not run.processes.is_first:
        return
    step, steps = state.progress.step, run.plan.steps
    if isinstance(error, KeyboardInterrupt):
        outcome = f"stopped after step {step:,} of {steps:,}"
    else:
        outcome = f"failed after step {step:,} of {steps:,}: {describe(error).partition(chr(10))[0]}"
    write_page(run, {**run.counts, **asdict(state.progress), **run.described}, outcome)


def _rows(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
