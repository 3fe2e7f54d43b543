"""Prepare a run: meet the other processes, prove parity, read the data, plan the steps, load model and checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import counted, working
from chunkflow_cli.data.data_sets import has_evaluation_data
from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.engine import all_or_none, join_processes
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.acceleration import Acceleration
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token
from chunkflow_cli.execution.attention.choice import BackendChoice, choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel, base_model
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.model.language_part import what_is_trained
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.training.assembly import Assembly, assemble
from chunkflow_cli.training.checkpoint import load_checkpoint
from chunkflow_cli.training.checkpoint_folder import set_aside, steps_of
from chunkflow_cli.training.description import describe_environment, describe_plan
from chunkflow_cli.training.determinism import warn_of_kernels
from chunkflow_cli.training.disk_room import warning_of_little_room
from chunkflow_cli.training.display import few_steps_warning
from chunkflow_cli.training.hardware import agreed_peak_flops, device_name
from chunkflow_cli.training.host_room import check_host_room
from chunkflow_cli.training.inputs import FoundData, RunData
from chunkflow_cli.training.joining import load_data
from chunkflow_cli.training.judgement import Judgement, RunPreferences
from chunkflow_cli.training.learning_rate import learning_rate_schedule
from chunkflow_cli.training.preferences import with_references
from chunkflow_cli.training.prepared import Joined, Prepared, operations_wait
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.recorder import Recorder
from chunkflow_cli.training.requirements import CheckedModel
from chunkflow_cli.training.run_folder import RunFolder, abandoned_checkpoints
from chunkflow_cli.training.setup import RunSetup, described_device, planned_topology, read_setup

PROBE_TOKENS = 256
"""Tokens of the forward that measures the bytes of activations per token."""


def prepare(
    config: Config, model: CheckedModel, found: RunData | FoundData, folder: RunFolder, console: Console,
    state: RunState,
) -> Prepared:  # fmt: skip
    """Load everything that the steps of a run need, its last checkpoint included. Every process calls it.

    Args:
        found: the data, or where another process has found it.
        console: where messages go.
        state: receives the progress of the checkpoint. Later operations ask it whether to stop, and report to it.

    Raises:
        UsageError: the configuration, the data, the model or the checkpoint is wrong.
        RunError: chunked and whole-sequence gradients of this architecture differ, or the checkpoint is damaged.
    """
    device = training_device()
    processes = join_processes(device, planned_topology(config))
    joined = Joined(config, model.hf_config, folder, console, processes, device)
    attention = choose_backend(config.model.attention, model.hf_config, device, joined.dtype)
    if processes.is_first:
        _print_what_runs(joined, attention, model.lines)
        _prove_parity(joined, state)
    state.at("reading the data")
    data = load_data(config, model.hf_config, found)
    if processes.is_first:
        _write_rejected(joined, data)
    run = _load_model(joined, attention, data, state)
    if folder.checkpoint is None:
        _refuse_spoilt_model(run, state)
    if (objective := Objective.of(config)) is not None:
        run = replace(run, preferences=_preferences(objective, run))
        run = replace(run, preferences=with_references(run, state))
    _resume(run, state)
    if processes.is_first:
        _warn_of_little_room(run)
    return run


def _print_what_runs(run: Joined, attention: BackendChoice, lines: Sequence[str]) -> None:
    topology = run.topology
    processes = "" if topology.processes == 1 else f", {topology.processes} processes ({topology})"
    run.console.print(
        Text.assemble(
            (str(run.folder.path), "bold"),
            f"  {run.device.type}{processes}, {run.config.model.dtype.value}, "
            f"attention {attention.backend.name} ({attention.reason})",
        ),
        soft_wrap=True,
    )
    for line in lines:
        run.console.print(line, soft_wrap=True)


def _prove_parity(run: Joined, state: RunState) -> None:
    config = run.config
    if not config.train.guard:
        run.console.print("train.guard=false: skipped the check that this model trains exactly in chunks")
        return
    doing = "checking that this architecture trains exactly in chunks"
    state.at(doing)
    with working(run.console, doing):
        parity = guard(
            run.hf_config, requested=config.model.attention, device=run.device, dtype=run.dtype,
            activation_checkpointing=config.model.activation_checkpointing, is_pipeline=config.parallel.pipeline > 1,
            offload_state=config.chunk.offload_state,
            acceleration=Acceleration.of(config),
        )  # fmt: skip
    run.console.print(
        f"Parity check passed: a small {run.hf_config.model_type} has the same gradients in chunks as whole "
        f"({parity.grad_rel_error:.0e} apart)", soft_wrap=True,
    )  # fmt: skip


def _write_rejected(run: Joined, data: RunData) -> None:
    """List the rows that are skipped and the samples that are duplicates, each with its reason, in rejected.jsonl."""
    rejected = [*data.read.rejected, *(data.evaluation.rejected if has_evaluation_data(run.config.data) else ())]
    duplicates = data.read.duplicates
    if not rejected and not duplicates:
        return
    listed = [*rejected, *duplicates]
    rows = [{"file": where.file, "line": where.line, "reason": reason} for where, reason in listed]
    path = run.folder.path / "rejected.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if rejected:
        skipped = counted(len(rejected), "row")
        run.console.print(f"Skipped {skipped} that cannot be trained on; reasons: {path}", soft_wrap=True)
    if duplicates:
        left_out = counted(len(duplicates), "sample")
        run.console.print(f"Left out {left_out} that repeat an earlier one, listed in {path}", soft_wrap=True)


def _load_model(joined: Joined, attention: BackendChoice, data: RunData, state: RunState) -> Prepared:
    """Plan the steps, and load the model that they train. Every process calls it."""
    config, processes, device, console = joined.config, joined.processes, joined.device, joined.console
    state.at("loading the model")
    settle_vector_math()
    with working(console, "loading the model"):
        setup = _agreed_setup(joined)
        shape, plan = setup.shape, setup.plan(data.train)
        assert shape is not None
        warn_of_kernels(config, shape, device)
        with all_or_none("planning"):  # machines may differ in what room they have
            check_host_room(setup, plan)
        parts = assemble(
            config, joined.hf_config, attention.backend, device, processes=processes,
            stages=plan.stage_layers(shape.layers),
            stop_requested=lambda: state.stop_requested and not operations_wait(plan, joined.topology),
            announce=state.at,
        )  # fmt: skip
    if processes.is_first:
        for line in (what_is_trained(base_model(parts.model)), few_steps_warning(plan, config.train)):
            if line is not None:
                console.print(line, soft_wrap=True)
    assert plan.is_zero_3 == parts.engine.is_divided
    if processes.rank:  # all weights are drawn: from here on, dropout differs between ranks
        torch.manual_seed(int(np.random.SeedSequence((config.train.seed, processes.rank)).generate_state(1)[0]))
    return Prepared(
        **vars(joined),
        data=data,
        plan=plan,
        shape=shape,
        parts=parts,
        peak_flops=agreed_peak_flops(processes, device, joined.dtype),
        identity=joined.folder.read_identity() if processes.is_first else None,
        learning_rate=learning_rate_schedule(config.optim, plan.steps),
        activation_bytes=_measure_activations(data, parts),
        recorder=Recorder(processes.rank) if config.train.trace else None,
        described=_describe(setup, plan, device, attention) if processes.is_first else {},
    )


def _agreed_setup(run: Joined) -> RunSetup:
    """Return the setup of the first rank on all ranks: their machines may differ, but not their plans."""
    own = None
    with all_or_none("planning"):
        if run.processes.is_first:
            device = described_device(run.config, present_device())
            own = read_setup(run.config, run.hf_config, device)
    setup: RunSetup = run.processes.gather(own)[0]
    return setup


def _measure_activations(data: RunData, parts: Assembly) -> float | None:
    """Return the bytes of activations per token, or None if this process cannot measure them.

    Under ZeRO-3, weights are whole within the engine's forward only; a pipeline stage holds only some of the layers.
    """
    if parts.engine.is_divided or parts.engine.is_stage:
        return None
    whole = data.train[int(np.argmax(data.train.lengths))]
    probe = TokenizedSample(whole.input_ids[:PROBE_TOKENS], whole.targets[:PROBE_TOKENS])
    assert isinstance(parts.engine.module, ChunkModel)
    return activation_bytes_per_token(parts.engine.module, probe)


def _describe(setup: RunSetup, plan: RunPlan, device: torch.device, attention: BackendChoice) -> dict[str, Any]:
    return {
        "plan": describe_plan(setup, plan),
        "environment": describe_environment(device_name(device), attention.backend.name),
    }


def _refuse_spoilt_model(run: Prepared, state: RunState) -> None:
    """Refuse a model that holds NaN or infinity: what is trained from it would, too. Every process calls it.

    Raises:
        UsageError: names the parameter.
    """
    state.at("looking for numbers that are not finite")
    if (found := run.parts.engine.first_not_finite()) is not None:
        raise UsageError(
            f"model.path={run.config.model.path}: {found} holds NaN or infinity\n"
            "  download the model again, or take another one"
        )


def _preferences(objective: Objective, run: Prepared) -> RunPreferences:
    train, evaluation = run.data.train, run.data.evaluation
    batches = run.plan.batches
    return RunPreferences(
        objective,
        Judgement.of(objective, train, batches),
        Judgement.of(objective, evaluation, replace(batches, samples=len(evaluation), shuffle=False)),
    )


def _resume(run: Prepared, state: RunState) -> None:
    """Load the checkpoint that the run continues from, if there is one.

    Raises:
        UsageError: it has done more steps than the plan has.
        RunError: it is damaged.
    """
    if run.folder.checkpoint is None:
        return
    state.at("loading the checkpoint")
    resumed = load_checkpoint(run.folder.checkpoint, run.parts.engine, seed=run.config.train.seed)
    state.progress = resumed.progress
    step = resumed.progress.step
    if step > run.plan.steps:
        raise UsageError(
            f"checkpoint.resume={run.config.checkpoint.resume}: the checkpoint is from after step {step}, and this run "
            f"has {counted(run.plan.steps, 'step')}\n  raise train.steps or train.epochs, or name an earlier checkpoint"
        )
    run.console.print(f"Continuing after step {step} from {run.folder.checkpoint}", soft_wrap=True)
    if run.processes.is_first:
        _set_later_aside(run, step)
    if resumed.saved_on != run.layout:
        run.console.print(f"  saved on {resumed.saved_on}, continued on {run.layout}", soft_wrap=True)
    if resumed.is_reseeded:
        run.console.print(
            f"  random numbers (dropout) are drawn again, seeded by train.seed and step {step}", soft_wrap=True
        )


def _set_later_aside(run: Prepared, step: int) -> None:
    """Move the checkpoints of the steps that are about to be trained again out of the way."""
    abandoned = abandoned_checkpoints(run.folder, step)
    if (aside := set_aside(run.folder.checkpoints, abandoned, run.folder.metrics)) is not None:
        names = ", ".join(path.name for path in abandoned)
        run.console.print(
            f"  {names}: moved to {aside}, with a copy of the metrics; delete it when you no longer need it",
            soft_wrap=True,
        )  # fmt: skip


def _warn_of_little_room(run: Prepared) -> None:
    free, saved = shutil.disk_usage(run.folder.path).free, len(steps_of(run.folder.checkpoints))
    if (warning := warning_of_little_room(run.config, run.shape, free=free, checkpoints=saved)) is not None:
        print(f"warning: {warning}", file=sys.stderr)
