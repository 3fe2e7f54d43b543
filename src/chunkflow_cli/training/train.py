"""`chunkflow train`: fine-tune a model on this process, alone or as one rank of a run."""

from __future__ import annotations

from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import stderr_console, stdout_console
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.processes import environment, worker
from chunkflow_cli.processes.failures import failures_recorded
from chunkflow_cli.processes.stop_signals import stop_on_signals
from chunkflow_cli.training.display import print_training_summary
from chunkflow_cli.training.finish import finish
from chunkflow_cli.training.joining import open_folder, watched
from chunkflow_cli.training.prepare import Prepared, prepare
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.requirements import check_requirements
from chunkflow_cli.training.run_folder import RunFolder
from chunkflow_cli.training.steps import run_steps


def run(loaded: LoadedConfig, *, json_output: bool = False) -> dict[str, Any]:
    """Fine-tune as configured, and return the content of report.json.

    Args:
        loaded: the configuration of the run.
        json_output: print no summary.

    Raises:
        UsageError: the configuration or the data is at fault.
        RunError: a loss is not finite, or the accounting does not add up.
        KeyboardInterrupt: the user stopped the run, and a checkpoint was saved.
    """
    hf_config = check_requirements(loaded)
    folder = open_folder(loaded, hf_config)
    try:
        with failures_recorded(), watched(folder, loaded.config.launch.hang_seconds):
            if folder.report.exists():
                stderr_console().print(
                    f"This run is finished already. To run it again: checkpoint.resume=never\n  {folder.path}"
                )
                report = folder.read_report()
            else:
                report = _train(loaded.config, hf_config, folder)
    finally:
        folder.close()
        close_process_group()  # a process that ends with an open one may abort in native code
    if not json_output and environment.rank() == 0:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def _train(config: Config, hf_config: Any, folder: RunFolder) -> dict[str, Any]:
    """Run all steps that are left, and return the report."""
    state = RunState(worker.heartbeat(folder.path))
    prepared = prepare(config, hf_config, folder, stderr_console(), state)
    with stop_on_signals(lambda: _request_stop(prepared, state)):
        run_steps(prepared, state)
        # A request to stop has no effect from here on: the steps are done, and the model is being saved.
        return finish(prepared, state)


def _request_stop(run: Prepared, state: RunState) -> None:
    state.stop_requested = True
    what = "step" if run.stops_between_steps_only else "chunk"
    again = "" if environment.is_started_by_launcher() else " Press Ctrl-C again to stop at once."
    run.console.print(f"Stopping after this {what}, then saving a checkpoint.{again}", soft_wrap=True)
