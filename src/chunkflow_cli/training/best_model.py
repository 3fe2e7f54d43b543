"""The model of the lowest held-out loss (`eval.keep_best`), in the folder best/ of a run until it becomes final/.

A run may resume from a checkpoint that is older than the best model so far. So each best model has a folder of its own,
best/step-<step>, which is kept as long as the run or one of its checkpoints refers to it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from chunkflow_cli.engine import all_or_none
from chunkflow_cli.files import written_aside
from chunkflow_cli.training.checkpoint_folder import read_state, steps_of
from chunkflow_cli.training.final_model import model_writer
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import Progress, RunState

BEST = "best"
"""Folder in a run's folder."""


def folder_of_best(run_folder: Path, step: int) -> Path:
    """Return the folder of the model after a step."""
    return run_folder / BEST / f"step-{step:08d}"


def save_best(run: Prepared, state: RunState) -> None:
    """Save the model as it is now, the best one so far, and delete those that nothing counts on any more.

    Every process calls it.

    Raises:
        RunError: it could not be saved.
    """
    state.at("saving the best model so far")
    kept = folder_of_best(run.folder.path, state.progress.step)
    with all_or_none(f"saving {kept}"):
        if run.processes.is_first:
            kept.parent.mkdir(exist_ok=True)
    model_writer(run, is_final=False)(kept)
    if run.processes.is_first:
        counted_on = {read_state(checkpoint).progress.best_step for checkpoint in steps_of(run.folder.checkpoints)}
        needed = {folder_of_best(run.folder.path, step) for step in counted_on if step is not None} | {kept}
        for folder in set(kept.parent.glob("step-*")) - needed:
            shutil.rmtree(folder)


def bring_best(run: Prepared, progress: Progress) -> None:
    """See that the best model that a checkpoint counts on is in the run's folder; otherwise forget it, in words.

    Every process calls it, when a run goes on.
    """
    checkpoint, step = run.folder.checkpoint, progress.best_step
    if not run.config.eval.keep_best or checkpoint is None or step is None:
        return
    wanted, theirs = folder_of_best(run.folder.path, step), folder_of_best(checkpoint.resolve().parents[1], step)
    with all_or_none(f"copying {theirs}"):
        if run.processes.is_first and not wanted.exists() and theirs.exists():
            copy_model(theirs, wanted)
    if run.processes.gather(wanted.exists())[0]:
        return
    run.console.print(
        f"warning: the best model so far, of step {step}, is not in {theirs}: the best one from here on is kept",
        soft_wrap=True,
    )
    progress.forget_best()


def copy_model(source: Path, target: Path) -> None:
    """Copy the folder of a model, completely or not at all."""
    with written_aside(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
