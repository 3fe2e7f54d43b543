"""Run the optimizer steps of a run: each is planned, proved, run, logged, and saved when a checkpoint is due."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import LossWeighting
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.errors import RunError
from chunkflow_cli.execution.noise import SequenceNoise
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch, StepResult
from chunkflow_cli.planning.model_shape import training_flops
from chunkflow_cli.planning.prediction import step_seconds
from chunkflow_cli.planning.proof import validate_step
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.training.best_model import bring_best
from chunkflow_cli.training.checkpoint import random_states, save_checkpoint
from chunkflow_cli.training.continuation import how_to_go_on
from chunkflow_cli.training.display import TrainingDisplay, training_display
from chunkflow_cli.training.evaluation import (
    evaluate_after_step,
    evaluate_at_start,
    remedy_of_spoilt_numbers,
    stops_early,
    why_it_stops_early,
)
from chunkflow_cli.training.hardware import peak_memory_bytes
from chunkflow_cli.training.inputs import target_weights
from chunkflow_cli.training.metrics import StepMetrics, metrics_file
from chunkflow_cli.training.preferences import step_batch
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.sample_answers import answer_prompts
from chunkflow_cli.training.saved_config import CONFIG
from chunkflow_cli.training.trackers.following import followed, introduction

NOTHING = StepResult(0.0, 0, 0, ())
"""The result of a process that adds nothing to the loss."""


def run_steps(run: Prepared, state: RunState) -> None:
    """Train until every step of the plan is done, or the held-out loss has not fallen for too long.

    Raises:
        RunError: a loss, a gradient or a weight is not finite, or the plan of a step breaks a rule of exact training.
        KeyboardInterrupt: a process was asked to stop, and a checkpoint was saved.
    """
    progress, steps = state.progress, run.plan.steps
    state.random_states = random_states()
    backends = run.config.log.backends if run.processes.is_first else []
    first = progress.step + (progress.unevaluated is None)
    with (
        training_display(run.console, steps, run.device.type) as display,
        metrics_file(backends, run.folder.metrics, first) as write,
        followed(
            backends if progress.step < steps else [], introduction(run, first), run.folder.path, run.console
        ) as follow,
    ):
        display.begin(_tokens_before(steps, run), _tokens_before(progress.step, run))
        bring_best(run, progress)
        try:
            _Steps(run, state, display, (write, follow, display.step)).run_all()
        except Interrupted:
            _save_and_stop(run, state, display)


@dataclass(frozen=True)
class _Steps:
    """The steps that are left of a run, each with its evaluation, its row and its checkpoint, where they are due."""

    run: Prepared
    state: RunState
    display: TrainingDisplay
    logs: Sequence[Callable[[StepMetrics], None]]
    """Everything that takes the row of a step."""

    def run_all(self) -> None:
        """Run them.

        Raises:
            Interrupted: a process was asked to stop.
        """
        run, state, progress = self.run, self.state, self.state.progress
        if progress.eval_loss_start is None and progress.step == 0:
            evaluate_at_start(run, state, self.display)
        if progress.unevaluated is not None:
            self._finish_step(StepMetrics(**progress.unevaluated), is_evaluated=True)
        while progress.step < run.plan.steps and not stops_early(run, state):
            run.sum_of_whole(is_whole=not state.stop_requested)  # all stop between the same two steps
            row = _run_step(run, state, self.display.advance)
            is_last = row.step == run.plan.steps
            self._finish_step(row, is_evaluated=is_last or _is_due(run.config.eval.every, row.step))
            if _is_due(run.config.checkpoint.every, row.step):
                self.display.phase("saving a checkpoint")
                save_progress(run, state)
        run.sum_of_whole(is_whole=not state.stop_requested)
        if progress.step < run.plan.steps:
            run.console.print(why_it_stops_early(run, state), soft_wrap=True)

    def _finish_step(self, row: StepMetrics, *, is_evaluated: bool) -> None:
        """Evaluate the model after a step if it is due, and log the step, also if the evaluation is interrupted."""
        is_logged = _is_due(self.run.config.log.every, row.step) or row.step == self.run.plan.steps
        try:
            if is_evaluated:
                row = evaluate_after_step(row, self.run, self.state, self.display)
        except Interrupted:
            if is_logged:
                self._log(row)
            raise
        if is_logged or row.eval_loss is not None:
            self._log(row)
        if is_evaluated:
            answer_prompts(self.run, self.state, self.display)

    def _log(self, row: StepMetrics) -> None:
        for log in self.logs:
            log(row)


def _save_and_stop(run: Prepared, state: RunState, display: TrainingDisplay) -> NoReturn:
    """Save a checkpoint of the last whole step, and say how to go on. Every process calls it."""
    run.parts.engine.discard_gradients()
    display.phase("saving a checkpoint")
    path = save_progress(run, state)
    going_on = how_to_go_on(run.config, run.folder.path, path, sys.argv[1:])
    run.console.print(f"Stopped after step {state.progress.step}. {going_on}", soft_wrap=True)
    raise KeyboardInterrupt from None


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _run_step(run: Prepared, state: RunState, on_backward: Callable[[float], None]) -> StepMetrics:
    start = time.perf_counter()
    progress = state.progress
    state.step = progress.step + 1
    if run.recorder is not None:
        run.recorder.step = state.step
    state.at("reading the samples")
    step = _planned_step(run, progress.step)
    result, parts = _run_operations(run, step, on_backward)
    lr = run.learning_rate(progress.step)
    run.parts.engine.set_learning_rate(lr)
    state.at("optimizer step")
    norm = run.parts.engine.step()
    state.random_states = random_states()
    seconds = time.perf_counter() - start
    progress.add(step, result, seconds, chunk_size=run.config.chunk.size)
    flops = training_flops(run.plan.lengths_of(step.samples), run.shape)
    return StepMetrics(
        step=progress.step,
        loss=result.loss,
        grad_norm=norm,
        lr=lr,
        samples=len(step.samples),
        tokens=step.tokens,
        target_tokens=result.target_tokens,
        chunks=step.chunks,
        recomputed_chunks=step.recomputed_chunks,
        step_seconds=seconds,
        tokens_per_second=step.tokens / seconds,
        mfu=flops / seconds / (run.peak_flops * run.topology.processes),
        peak_memory_bytes=int(run.processes.maximum(peak_memory_bytes(run.device))[0]),
        fill=step.tokens / step.room,
        predicted_seconds=_predicted_seconds(run.plan, step),
        parts={f"loss/{name}": loss for name, loss in parts.items()} | dict(result.metrics),
    )


def _predicted_seconds(plan: RunPlan, step: StepPlan) -> float | None:
    """Predict the seconds of a step as `plan` does; None in a pipeline, or if the costs know no seconds."""
    if plan.pipeline is not None or plan.costs.is_of_one_stage:
        return None
    return step_seconds(plan, step) + plan.costs.step_seconds


def _planned_step(run: Prepared, index: int) -> StepPlan:
    """Return the plan of a step, counted from 0, after proving it.

    Raises:
        RunError: the plan breaks a rule. It is raised on all processes, because each plans and proves all ranks.
    """
    step = run.plan[index]
    try:
        validate_step(step, run.plan)
    except ValueError as error:
        raise RunError(
            f"the plan of step {index + 1} breaks a rule that exact training rests on: {error}\n"
            "  this is a bug in chunkflow, not a mistake of yours; nothing was trained on in this step\n"
            f"  please report it with {run.folder.path / CONFIG}; the last checkpoint is from before this step"
        ) from error
    return step


def _run_operations(
    run: Prepared, step: StepPlan, on_backward: Callable[[float], None]
) -> tuple[StepResult, dict[str, float]]:
    """Run the operations of this process, and return the loss and targets of all processes, and the loss by source.

    Raises:
        Interrupted: a process was asked to stop and has not run all of its operations.
        RunError: the loss is not finite.
    """
    rank = step.ranks[run.processes.replica]
    share = step.tokens / max(1, rank.chunks.tokens)  # the display counts the tokens of all ranks
    is_whole = True
    try:
        result = _run_schedule(run, step, rank, lambda tokens: on_backward(tokens * share))
    except Interrupted:
        is_whole, result = False, NOTHING
    counted = result if run.processes.place.stage == 0 else NOTHING  # all stages of a pipeline know its loss
    own = loss_by_source(run.data.train, rank, _weights(run, rank, step), result)
    names = () if run.preferences is None else run.preferences.objective.metrics
    rewards = [counted.metrics.get(name, 0.0) for name in names]
    loss, targets, *sums = run.sum_of_whole(
        counted.loss, counted.target_tokens, *own.tolist(), *rewards, is_whole=is_whole
    )
    sums, rewards = sums[: len(own)], sums[len(own) :]
    if not np.isfinite(loss):
        _refuse_loss(run, step, rank, result)
    metrics = {name: value for name, value in zip(names, rewards, strict=True) if name in result.metrics}
    result = replace(result, loss=loss, target_tokens=round(targets), metrics=metrics)
    return result, _mean_losses(run, step, np.array(sums))


def _run_schedule(run: Prepared, step: StepPlan, rank: RankPlan, on_backward: Callable[[int], None]) -> StepResult:
    record = None if run.recorder is None else run.recorder.record
    if run.preferences is not None:
        return run.parts.runner.run(rank.schedules, step_batch(run, step, rank), on_backward, record)
    weights = _weights(run, rank, step)
    sequences = [run.data.train[int(sample)] for sample in rank.samples]
    spread = None if run.plan.pipeline is not None else rank.spread
    train, noise = run.config.train, None
    if train.neftune_noise_alpha:
        noise = SequenceNoise.of_step(train.neftune_noise_alpha, train.seed, step.step, rank.samples.tolist())
    by_sequence = bool(run.data.train.names)
    batch = StepBatch(rank.chunks, sequences, weights, spread, by_sequence=by_sequence, noise=noise)
    return run.parts.runner.run(rank.schedules, batch, on_backward, record)


def _weights(run: Prepared, rank: RankPlan, step: StepPlan) -> NDArray[np.float64]:
    return target_weights(rank, step, run.config.train.loss_weighting)


def loss_by_source(
    data: TokenizedData, rank: RankPlan, weights: NDArray[np.float64], result: StepResult
) -> NDArray[np.float64]:
    """Return the weighted loss of each source, as far as this process has computed it, (sources,)."""
    losses = np.zeros(len(rank.samples)) if result.sequence_losses is None else result.sequence_losses
    sums = np.bincount(data.sources[rank.samples], weights * losses, minlength=len(data.names))
    return sums[: len(data.names)].astype(np.float64)


def _mean_losses(run: Prepared, step: StepPlan, sums: NDArray[np.float64]) -> dict[str, float]:
    """Return the mean loss of the step's targets of each source, weighted as the loss of the step is.

    Args:
        sums: the weighted loss of each source over all processes, (sources,).
    """
    data = run.data.train
    targets = data.target_counts[step.samples]
    if run.config.train.loss_weighting is LossWeighting.token:
        weights = targets / step.target_tokens
    else:
        weights = np.full(len(targets), 1 / len(targets))
    shares = np.bincount(data.sources[step.samples], weights, minlength=len(sums))
    return {name: float(sums[i] / shares[i]) for i, name in enumerate(data.names) if shares[i]}


def _refuse_loss(run: Prepared, step: StepPlan, rank: RankPlan, result: StepResult) -> None:
    """Fail on a loss that is not finite. Every process calls it.

    Raises:
        RunError: names the first chunk whose loss is not finite, and its samples; the same on all processes.
    """
    found = None
    if result.not_finite:
        index = result.not_finite[0]
        segments = rank.chunks[index].segments
        where = [str(run.data.train.location(rank.sample_of(segment.sequence))) for segment in segments]
        found = (
            f"first in chunk {index} of {len(rank.chunks)}\n"
            f"  its samples: {', '.join(where[:8])}{' and more' if len(where) > 8 else ''}\n"
        )
    first = next((text for text in run.processes.gather(found) if text is not None), "in no single chunk\n")
    raise RunError(
        f"the loss of step {step.step + 1} is not finite, {first}"
        "  check these samples, lower optim.lr, or lower optim.grad_clip; the last checkpoint is from before this step"
    )


def refuse_spoilt_weights(run: Prepared, state: RunState) -> None:
    """Fail if a weight or an optimizer state is not finite: nothing spoiled is ever saved. Every process calls it.

    Raises:
        RunError: names the first one; the same on all processes.
    """
    state.at("looking for numbers that are not finite")
    found = run.parts.engine.first_not_finite()
    if found is not None:
        raise RunError(
            f"after step {state.progress.step}, {found} is not finite: it is not saved\n"
            f"  {remedy_of_spoilt_numbers(run)}"
        )


def save_progress(run: Prepared, state: RunState) -> Path:
    """Save a checkpoint after the last whole step, and return its folder. Every process calls it.

    Raises:
        RunError: a number is not finite, or a rank could not write; earlier checkpoints are untouched.
    """
    refuse_spoilt_weights(run, state)
    state.at("saving a checkpoint")
    return save_checkpoint(
        run.folder.checkpoints, run.parts.engine, state.progress, state.random_states,
        layout=run.layout, keep=run.config.checkpoint.keep, identity=run.identity,
    )  # fmt: skip


def _tokens_before(step: int, run: Prepared) -> int:
    """Return the number of tokens in all steps before `step`."""
    batches, lengths = run.plan.batches, run.data.train.lengths
    return sum(int(lengths[batches[index]].sum()) for index in range(step))
