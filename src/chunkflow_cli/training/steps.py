"""Run the optimizer steps of a run: each is planned, proved, run, logged, and saved when a checkpoint is due."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from chunkflow_cli.errors import RunError
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch, StepResult
from chunkflow_cli.planning.costs import training_flops
from chunkflow_cli.planning.proof import validate_step
from chunkflow_cli.planning.run_plan import RankPlan, StepPlan
from chunkflow_cli.training.checkpoint import random_states, save_checkpoint
from chunkflow_cli.training.checkpoint_folder import newest_checkpoint
from chunkflow_cli.training.continuation import how_to_go_on
from chunkflow_cli.training.display import training_display
from chunkflow_cli.training.hardware import peak_memory_bytes
from chunkflow_cli.training.held_out import held_out_loss
from chunkflow_cli.training.inputs import target_weights
from chunkflow_cli.training.metrics import StepMetrics, metric_files
from chunkflow_cli.training.preferences import step_batch
from chunkflow_cli.training.prepare import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.saved_config import CONFIG

NOTHING = StepResult(0.0, 0, 0, ())
"""The result of a process that adds nothing to the loss."""


def run_steps(run: Prepared, state: RunState) -> None:
    """Train until every step of the plan is done.

    Raises:
        RunError: a loss, a gradient or a weight is not finite, or the plan of a step breaks a rule of exact training.
        KeyboardInterrupt: a process was asked to stop, and a checkpoint was saved.
    """
    config, progress, steps = run.config, state.progress, run.plan.steps
    state.random_states = random_states()
    backends = config.log.backends if run.processes.is_first else []
    with (
        training_display(run.console, steps, run.device.type) as display,
        metric_files(backends, run.folder.metrics, progress.step + 1) as write,
    ):
        display.begin(_tokens_before(steps, run), _tokens_before(progress.step, run))
        try:
            if progress.eval_loss_start is None and progress.step == 0 and len(run.data.evaluation):
                display.phase("held-out loss")
                progress.eval_loss_start = _finite_held_out_loss(run, state)
                display.held_out_before(progress.eval_loss_start)
            while progress.step < steps:
                _stop_together(run, state)
                row = _run_step(run, state, display.advance)
                if len(run.data.evaluation) and (row.step == steps or _is_due(config.eval.every, row.step)):
                    display.phase("held-out loss")
                    row = _with_held_out_loss(row, run, state)
                if _is_due(config.log.every, row.step) or row.step == steps or row.eval_loss is not None:
                    write(row)
                    display.step(row)
                if _is_due(config.checkpoint.every, row.step):
                    display.phase("saving a checkpoint")
                    save_progress(run, state)
            _stop_together(run, state)
            if len(run.data.evaluation) and progress.eval_step != steps:  # the run was stopped while it was measured
                progress.eval_loss_end = _finite_held_out_loss(run, state)
        except Interrupted:
            run.parts.engine.discard_gradients()
            display.phase("saving a checkpoint")
            path = save_progress(run, state)
            going_on = how_to_go_on(config, run.folder.path, path, sys.argv[1:])
            run.console.print(f"Stopped after step {progress.step}. {going_on}", soft_wrap=True)
            raise KeyboardInterrupt from None


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _stop_together(run: Prepared, state: RunState) -> None:
    """Raise `Interrupted` on all processes if any was asked to stop. Every process calls it, between two steps."""
    if run.processes.sum(state.stop_requested)[0]:
        raise Interrupted


def _run_step(run: Prepared, state: RunState, on_backward: Callable[[float], None]) -> StepMetrics:
    start = time.perf_counter()
    progress = state.progress
    state.step = progress.step + 1
    if run.recorder is not None:
        run.recorder.step = state.step
    state.at("reading the samples")
    step = _planned_step(run, progress.step)
    result = _run_operations(run, step, on_backward)
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
        rewards=dict(result.metrics),
    )


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


def _run_operations(run: Prepared, step: StepPlan, on_backward: Callable[[float], None]) -> StepResult:
    """Run the operations of this process, and return the loss and the targets of all processes.

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
    names = () if run.preferences is None else run.preferences.objective.metrics
    rewards = [counted.metrics.get(name, 0.0) for name in names]
    loss, targets, whole, *rewards = run.processes.sum(counted.loss, counted.target_tokens, is_whole, *rewards)
    if whole < run.topology.processes:
        raise Interrupted
    if not np.isfinite(loss):
        _refuse_loss(run, step, rank, result)
    metrics = dict(zip(names, rewards, strict=True))
    return replace(result, loss=loss, target_tokens=round(targets), metrics=metrics)


def _run_schedule(run: Prepared, step: StepPlan, rank: RankPlan, on_backward: Callable[[int], None]) -> StepResult:
    record = None if run.recorder is None else run.recorder.record
    if run.preferences is not None:
        return run.parts.runner.run(rank.schedules, step_batch(run, step, rank), on_backward, record)
    weights = target_weights(rank, step, run.config.train.loss_weighting)
    sequences = [run.data.train[int(sample)] for sample in rank.samples]
    batch = StepBatch(rank.chunks, sequences, weights, None if run.plan.pipeline is not None else rank.spread)
    return run.parts.runner.run(rank.schedules, batch, on_backward, record)


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


def _with_held_out_loss(row: StepMetrics, run: Prepared, state: RunState) -> StepMetrics:
    """Return the row with the held-out loss, or without it if the user stops the run meanwhile: the step is done."""
    try:
        loss = _finite_held_out_loss(run, state)
    except Interrupted:
        return row
    state.progress.eval_loss_end, state.progress.eval_step = loss, row.step
    return replace(row, eval_loss=loss, rewards={**row.rewards, **state.held_out_rewards})


def _finite_held_out_loss(run: Prepared, state: RunState) -> float:
    """Return `held_out_loss`. Every process calls it.

    Raises:
        RunError: it is not finite.
        Interrupted: a process was asked to stop.
    """
    loss = held_out_loss(run, state)
    if not np.isfinite(loss):
        step = state.progress.step
        when = f"after step {step} is not finite: the step has spoilt the weights" if step else "is not finite"
        raise RunError(f"the held-out loss {when}\n  {_remedy_of_spoilt_numbers(run)}")
    return loss


def refuse_spoilt_weights(run: Prepared, state: RunState) -> None:
    """Fail if a weight or an optimizer state is not finite: nothing spoilt is ever saved. Every process calls it.

    Raises:
        RunError: names the first one; the same on all processes.
    """
    state.at("looking for numbers that are not finite")
    found = run.parts.engine.first_not_finite()
    if found is not None:
        raise RunError(
            f"after step {state.progress.step}, {found} is not finite: it is not saved\n"
            f"  {_remedy_of_spoilt_numbers(run)}"
        )


def _remedy_of_spoilt_numbers(run: Prepared) -> str:
    newest = newest_checkpoint(run.folder.path)
    last = "no checkpoint was saved before" if newest is None else f"the last good checkpoint is {newest}"
    return f"lower optim.lr, or look at the data of the last steps; {last}"


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
    epochs, rest = divmod(step, batches.steps_per_epoch)
    return epochs * int(lengths.sum()) + sum(int(lengths[batches[i]].sum()) for i in range(step - rest, step))
