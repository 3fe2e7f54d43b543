"""Train one process of a run: alone, or as one of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.console import stderr_console, stdout_console
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.processes import environment, streams
from chunkflow_cli.processes.failures import failures_recorded
from chunkflow_cli.processes.stop_signals import stop_on_signals
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.training.determinism import ask_for_determinism
from chunkflow_cli.training.display import print_training_summary
from chunkflow_cli.training.finish import finish
from chunkflow_cli.training.joining import open_folder, watched
from chunkflow_cli.training.prepare import prepare
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.report.writing import write_page_of_unfinished
from chunkflow_cli.training.requirements import check_requirements
from chunkflow_cli.training.steps import run_steps


def run(loaded: LoadedConfig, *, keys: Sequence[str] = (), json_output: bool = False) -> dict[str, Any]:
    """Fine-tune as configured, print a summary unless `json_output` is set, and return the content of report.json.

    Args:
        keys: `FoundData.keys`, if this process has read the data before.

    Raises:
        UsageError: the configuration or the data is wrong.
        RunError: a loss is not finite, or the accounting does not add up.
        KeyboardInterrupt: the user stopped the run, and a checkpoint was saved.
    """
    config = loaded.config
    ask_for_determinism(config.train.deterministic)
    model = check_requirements(loaded)
    folder, data = open_folder(loaded, model.hf_config, keys)
    streams.fall_back_to(WatchFolder(folder.path).log(environment.rank()))
    try:
        with failures_recorded(), watched(folder.path, config.launch.hang_seconds) as heartbeat:
            report = folder.report_of_finished()
            if report is None:
                state = RunState(heartbeat)
                prepared = prepare(config, model, data, folder, stderr_console(), state)
                report = _train(prepared, state)
    finally:
        folder.close()
        close_process_group()  # a process that ends with an open one may abort in native code
    if not json_output and environment.rank() == 0:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def _train(run: Prepared, state: RunState) -> dict[str, Any]:
    """Run the remaining steps, and return the report. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop the run."""

    def request_stop() -> None:
        state.stop_requested = True
        what = "step" if run.stops_between_steps_only else "chunk"
        again = "" if environment.is_started_by_launcher() else " Press Ctrl-C again to stop at once."
        run.console.print(f"Stopping after this {what}, then saving a checkpoint.{again}", soft_wrap=True)

    with stop_on_signals(request_stop):
        try:
            run_steps(run, state)
            # A request to stop has no effect from here on: the steps are done, and the model is being saved.
            return finish(run, state)
        except BaseException as error:
            write_page_of_unfinished(run, state, error)
            raise
