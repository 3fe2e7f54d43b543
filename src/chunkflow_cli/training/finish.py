"""Finish a run whose steps are done: write its trace, its final model and its report.

Nothing is lost silently: the report accounts for every sample and every target, or the run fails.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.engine import all_or_none
from chunkflow_cli.errors import RunError, first_line
from chunkflow_cli.execution.activation_probe import whole_sequence_bytes
from chunkflow_cli.files import delete_aside, write_json
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.model_shape import training_flops
from chunkflow_cli.training.best_model import BEST, copy_model, folder_of_best
from chunkflow_cli.training.checkpoint_folder import delete_leftovers, newest_checkpoint
from chunkflow_cli.training.contributions import contributions
from chunkflow_cli.training.final_model import model_writer
from chunkflow_cli.training.hardware import agreed_peak_flops, device_name, peak_memory_bytes
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import Progress, RunState
from chunkflow_cli.training.recorder import merge
from chunkflow_cli.training.report.writing import write_page
from chunkflow_cli.training.steps import refuse_spoilt_weights, save_progress


def finish(run: Prepared, state: RunState) -> dict[str, Any]:
    """Write the trace, the model and the reports, and return the content of report.json. Every process calls it.

    Raises:
        RunError: a weight is not finite, the model could not be saved, or the accounting does not add up.
    """
    refuse_spoilt_weights(run, state)
    _write_trace(run)
    final_step = _save_final(run, state)
    report = _make_report(run, state.progress)
    report |= {"final_step": final_step, "stopped_early": state.progress.step < run.plan.steps}
    _check_accounting(report, run.plan.batches)
    if run.processes.is_first:
        delete_leftovers(run.folder.checkpoints)
        write_page(run, report)
        try:
            write_json(run.folder.report, report)
        except OSError as error:
            raise RunError(
                f"{run.folder.report} could not be written: {error.strerror}\n"
                f"  the model is in {run.folder.final}; make room, and give the same command again"
            ) from error
        shutil.rmtree(run.folder.path / BEST, ignore_errors=True)
    return report


def _write_trace(run: Prepared) -> None:
    if run.recorder is None:
        return
    run.recorder.write(run.folder.path)
    run.processes.barrier()
    if run.processes.is_first:
        path = merge(run.folder.path, run.topology)
        run.console.print(f"trace: {path}, for https://ui.perfetto.dev and plan --trace", soft_wrap=True)


def _save_final(run: Prepared, state: RunState) -> int:
    """Save the model into `final/`, with `eval.keep_best` the best one, and return the step that it is from."""
    state.at("saving the model")
    save = model_writer(run)
    last, best = state.progress.step, state.progress.best_step if run.config.eval.keep_best else None
    if best is None or best == last:
        _save_model(run, state, save)
        return last
    with all_or_none(f"copying the model of step {best} to {run.folder.final}"):
        if run.processes.is_first:
            copy_model(folder_of_best(run.folder.path, best), run.folder.final)
    return best


def _save_model(run: Prepared, state: RunState, save: Callable[[Path], None]) -> None:
    """Save the model into `final/`. If that fails (a full disk), save what was learned in another way.

    A checkpoint comes first, because the same command then finishes the run. It takes three times the room, so the next
    is the model itself in the folder for temporary files, which is often on another disk.

    Raises:
        RunError: names final/, why it could not be saved, and where to find what was learned.
    """
    try:
        save(run.folder.final)
    except Exception as error:
        if run.processes.is_first:
            delete_aside(run.folder.final)  # its half would take the room that the checkpoint needs
        raise RunError(
            f"the model could not be saved to {run.folder.final}: {_reason(error)}\n  {_rescue(run, state, save)}"
        ) from error


def _rescue(run: Prepared, state: RunState, save: Callable[[Path], None]) -> str:
    """Save what was learned, and say where. Every process calls it."""
    try:
        path = save_progress(run, state)
        return f"what was learned is in {path}: make room, and the same command finishes the run"
    except Exception as error:
        no_checkpoint = _reason(error)
    if run.processes.is_first:
        shutil.rmtree(run.folder.checkpoints / f".step-{state.progress.step:08d}.writing", ignore_errors=True)
    elsewhere = run.processes.gather(_folder_elsewhere(run))[0]
    try:
        save(elsewhere)
        return (
            f"the model is in {elsewhere} instead: move it away from there\n"
            f"  a checkpoint could not be saved either: {no_checkpoint}"
        )
    except Exception as error:
        newest = newest_checkpoint(run.folder.path)
        lost = "all steps are lost" if newest is None else f"the steps after {newest} are lost"
        return (
            f"a checkpoint could not be saved either ({no_checkpoint}), nor the model in {elsewhere} "
            f"({_reason(error)}): {lost}"
        )


def _folder_elsewhere(run: Prepared) -> Path:
    """Return a new folder for temporary files on the first process, which is the one that saves; any path on others."""
    try:
        folder = tempfile.mkdtemp(prefix="chunkflow-") if run.processes.is_first else tempfile.gettempdir()
    except OSError:
        folder = os.devnull  # the save will fail and say why
    return Path(folder, "final")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _make_report(run: Prepared, progress: Progress) -> dict[str, Any]:
    config, batches, device = run.config, run.plan.batches, run.device
    longest, kept = int(run.plan.sequence_lengths.max()), config.chunk.size * config.chunk.k
    peak = int(run.processes.maximum(peak_memory_bytes(device))[0])
    flops = sum(training_flops(run.plan.lengths_of(batches[step]), run.shape) for step in range(progress.step))
    # Measured again, because other work on the machine may have slowed the first measurement: the better one counts.
    device_flops = max(run.peak_flops, agreed_peak_flops(run.processes, device, run.dtype))
    seconds = max(progress.train_seconds, 1e-9)
    whole = None
    if run.activation_bytes is not None and longest > kept:
        whole = whole_sequence_bytes(
            peak, run.activation_bytes, kept, longest, run.shape.vocab_size, run.dtype.itemsize
        )
    return {
        **run.counts,
        **_sources(run, progress.step),
        **{key: value for key, value in asdict(progress).items() if key not in ("step", "unevaluated")},
        "steps": progress.step,
        "epochs": batches.epochs_after(progress.step),
        "longest_sample": longest,
        "k": config.chunk.k,
        "lora": config.model.lora.enabled,
        "tokens_per_second": progress.tokens_trained / seconds,
        "mfu": flops / seconds / (device_flops * run.topology.processes),
        "processes": run.topology.processes,
        "peak_memory_bytes": peak,
        "activation_bytes_per_token": run.activation_bytes,
        "whole_sequence_peak_bytes_predicted": whole,
        "device": device_name(device),
        **run.described,
    }


def _sources(run: Prepared, steps: int) -> dict[str, Any]:
    """Return what became of the rows of each source, and what it contributed; nothing without `data.sources`."""
    data = run.data
    if not data.train.names:
        return {}
    trained = contributions(run.plan, data.train, steps)
    truncated = np.bincount(data.read.sources[data.read.is_truncated], minlength=len(data.read.wholes)).tolist()
    return {
        "sources": {
            name: {
                **asdict(counts),
                "samples_truncated": truncated[number],
                "samples_held_out": counts.samples_left - len(data.train.samples_of(number)),
                "samples_to_train": len(data.train.samples_of(number)),
                "samples_trained": trained[name].samples,
                **{key: value for key, value in asdict(trained[name]).items() if key != "samples"},
            }
            for number, (name, counts) in enumerate(zip(data.train.names, data.read.counts, strict=True))
        }
    }


def _check_accounting(report: dict[str, Any], batches: GlobalBatches) -> None:
    """Check that every sample read and every target planned is accounted for.

    Raises:
        RunError: names each sum that does not add up.
    """
    words = ("rejected", "dropped", "duplicate", "beyond_limit", "held_out", "to_train")
    accounted = sum(report[f"samples_{word}"] for word in words)
    planned = sum(len(batches[step]) for step in range(report["steps"]))
    problems = []
    if accounted != report["samples_read"]:
        problems.append(f"{report['samples_read']} samples were read, {accounted} are accounted for")
    if planned != report["samples_trained"]:
        problems.append(f"{planned} samples were planned, {report['samples_trained']} trained on")
    if report["target_tokens_planned"] != report["target_tokens_trained"]:
        problems.append(
            f"{report['target_tokens_planned']} targets were planned, {report['target_tokens_trained']} trained on"
        )
    if problems:
        raise RunError("the accounting does not add up: " + "; ".join(problems))
