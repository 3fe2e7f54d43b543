"""`chunkflow train`: read the overrides, then train in this process, or start the ranks or the sweep."""

from __future__ import annotations

from chunkflow_cli.cli.command import Request, Result
from chunkflow_cli.processes import worker


def run(request: Request, *, overrides_file: str | None, multirun: bool) -> Result:
    """Train, and return the run's report.

    Args:
        overrides_file: YAML file of keys; those on the command line come after them and win.
        multirun: run every combination of the values in the overrides.

    Raises:
        UsageError: the command, the configuration or the data is at fault.
        RunError: a run failed.
    """
    worker.enter()  # before anything imports torch: it divides the machine's cores among the ranks
    overrides = request.overrides or []
    if overrides_file is not None:
        from chunkflow_cli.config.load import read_overrides

        overrides = [*read_overrides(overrides_file), *overrides]
    if multirun:
        from chunkflow_cli.cli import multirun as sweep

        return sweep.run(overrides, config_dir=request.config_dir, json_output=request.json_output)
    from chunkflow_cli.training import launch

    loaded = launch.with_processes(request.load(overrides))
    if launch.is_needed(loaded):
        return launch.run(loaded, config_dir=request.config_dir, debug=request.debug, json_output=request.json_output)
    from chunkflow_cli.training import train

    return train.run(loaded, json_output=request.json_output)
