"""Evaluate a run: the held-out loss, the best model, sample answers, and early stopping."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from chunkflow_cli.errors import RunError
from chunkflow_cli.training.best_model import save_best
from chunkflow_cli.training.checkpoint_folder import newest_checkpoint
from chunkflow_cli.training.display import TrainingDisplay
from chunkflow_cli.training.held_out import HeldOutLoss, held_out_loss
from chunkflow_cli.training.metrics import StepMetrics
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.sample_answers import answer_prompts


def evaluate_at_start(run: Prepared, state: RunState, display: TrainingDisplay) -> None:
    """Evaluate the model before the first step.

    Raises:
        RunError: the held-out loss is not finite.
        Interrupted: a process was asked to stop.
    """
    progress = state.progress
    if len(run.data.evaluation):
        display.phase("held-out loss")
        found = _finite_held_out_loss(run, state)
        progress.eval_loss_start, progress.eval_parts_start = found.loss, found.parts
        display.held_out_before(found.loss)
    answer_prompts(run, state, display)


def evaluate_after_step(row: StepMetrics, run: Prepared, state: RunState, display: TrainingDisplay) -> StepMetrics:
    """Evaluate the model after the step of a row, and return the row with the held-out loss. Every process calls it.

    If it is interrupted, the evaluation is left to the run that goes on: `Progress.unevaluated`.

    Raises:
        RunError: the held-out loss is not finite, or the best model could not be saved.
        Interrupted: a process was asked to stop.
    """
    progress = state.progress
    progress.unevaluated = asdict(row)
    if len(run.data.evaluation):
        display.phase("held-out loss")
        found = _finite_held_out_loss(run, state)
        progress.eval_loss_end, progress.eval_parts_end = found.loss, found.parts
        if progress.add_evaluation(found.loss) and run.config.eval.keep_best:
            display.phase("saving the best model so far")
            save_best(run, state)
        parts = {f"eval_loss/{name}": loss for name, loss in found.parts.items()}
        row = replace(row, eval_loss=found.loss, parts=row.parts | parts | state.held_out_rewards)
    progress.unevaluated = None
    return row


def stops_early(run: Prepared, state: RunState) -> bool:
    """Return whether the held-out loss has not fallen for too long (`eval.early_stopping_patience`)."""
    patience = run.config.eval.early_stopping_patience
    return patience is not None and state.progress.evaluations_since_best >= patience


def why_it_stops_early(run: Prepared, state: RunState) -> str:
    """Return a line that says why a run ends before its last step."""
    progress = state.progress
    return (
        f"Stopped early after step {progress.step} of {run.plan.steps}: the held-out loss has not fallen below "
        f"{progress.best_eval_loss:.4f} (step {progress.best_step}) in {progress.evaluations_since_best} evaluations"
    )


def _finite_held_out_loss(run: Prepared, state: RunState) -> HeldOutLoss:
    """Return `held_out_loss`. Every process calls it.

    Raises:
        RunError: it is not finite.
        Interrupted: a process was asked to stop.
    """
    found = held_out_loss(run, state)
    if not np.isfinite(found.loss):
        step = state.progress.step
        when = f"after step {step} is not finite: the step has corrupted the weights" if step else "is not finite"
        raise RunError(f"the held-out loss {when}\n  {remedy_of_spoilt_numbers(run)}")
    return found


def remedy_of_spoilt_numbers(run: Prepared) -> str:
    """Return what to do about numbers that are not finite, and where the last good ones are."""
    newest = newest_checkpoint(run.folder.path)
    last = "no checkpoint was saved before" if newest is None else f"the last good checkpoint is {newest}"
    return f"lower optim.lr, or look at the data of the last steps; {last}"
