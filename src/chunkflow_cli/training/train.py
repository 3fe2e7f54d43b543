"""`chunkflow train`: fine-tune.

The order of this file is the order of a run: what is needed, data, model, steps, report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import stderr_console, stdout_console, working
from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.data.tokenizer import load_tokenizer
from chunkflow_cli.engine import close_process_group, join_processes
from chunkflow_cli.errors import RunError
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token, whole_sequence_bytes
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch, StepResult
from chunkflow_cli.files import write_json
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.model.loading import skeleton
from chunkflow_cli.planning.costs import training_flops
from chunkflow_cli.planning.run_plan import RankPlan, StepPlan
from chunkflow_cli.planning.trace import Recorder, merge
from chunkflow_cli.processes import environment
from chunkflow_cli.processes.failures import failures_recorded
from chunkflow_cli.processes.stop_signals import stop_on_signals
from chunkflow_cli.processes.worker import heartbeat
from chunkflow_cli.training.accounting import check_accounting, samples_account
from chunkflow_cli.training.assembly import assemble
from chunkflow_cli.training.checkpoint import (
    Progress,
    describe_layout,
    load_checkpoint,
    random_states,
    save_checkpoint,
    save_final,
)
from chunkflow_cli.training.display import print_training_summary, training_display
from chunkflow_cli.training.held_out import HeldOut
from chunkflow_cli.training.inputs import target_weights
from chunkflow_cli.training.joining import load_data, open_folder, watched
from chunkflow_cli.training.layout import planned_topology
from chunkflow_cli.training.learning_rate import learning_rate_schedule
from chunkflow_cli.training.metrics import MetricWriters, StepMetrics, peak_flops, peak_memory_bytes
from chunkflow_cli.training.requirements import check_requirements
from chunkflow_cli.training.run_folder import RunFolder
from chunkflow_cli.training.setup import RunSetup, described_device, read_setup

PROBE_TOKENS = 256
"""Length of the forward that measures activation bytes a token."""


def run(loaded: LoadedConfig, *, json_output: bool = False) -> dict[str, Any]:
    """Fine-tune as configured; returns what stands in report.json.

    Raises:
        UsageError: configuration or data is at fault.
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
                report = _Training(loaded.config, hf_config, folder, stderr_console()).run()
    finally:
        folder.close()
        close_process_group()  # a process that ends with an open one may abort in native code
    if not json_output and environment.rank() == 0:
        print_training_summary(stdout_console(), report, folder.path)
    return report


class _Training:
    """One run of `train`, from loading to the report; one such object on each process."""

    def __init__(self, config: Config, hf_config: Any, folder: RunFolder, console: Console) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.hf_config = hf_config
        self.device = training_device()
        self.dtype: torch.dtype = getattr(torch, self.config.model.dtype.value)
        self.topology = planned_topology(self.config)
        self.stop_requested = False
        self.heartbeat = heartbeat(folder.path)
        self.recorder: Recorder | None = None
        self.step_now = 0
        """From 1; 0 before the first."""

    def run(self) -> dict[str, Any]:
        self.processes = join_processes(self.device, self.topology)
        if self.processes.is_first:
            self._say_what_runs()
            self._prove_parity()
        self._load_data()
        self._load_model()
        progress = self._resume()
        with stop_on_signals(self._request_stop):
            self._train(progress)
            # Whoever is told to stop from here on has nothing left to stop: what was learnt is saved.
            self._write_trace()
            self._save_model(progress)
            report = self._report(progress)
            check_accounting(report, self.batches)
            if self.processes.is_first:
                write_json(self.folder.report, report)
        return report

    # What is needed

    def _say_what_runs(self) -> None:
        choice = choose_backend(self.config.model.attention, self.hf_config, self.device, self.dtype)
        processes = "" if self.topology.processes == 1 else f", {self.topology.processes} processes ({self.topology})"
        self.console.print(
            f"[bold]{self.folder.path}[/]  {self.device.type}{processes}, {self.config.model.dtype.value}, "
            f"attention {choice.backend.name} ({choice.reason})", soft_wrap=True,
        )  # fmt: skip

    def _prove_parity(self) -> None:
        model = self.config.model
        if not self.config.train.guard:
            self.console.print("train.guard=false: nothing has shown that this model trains exactly in chunks")
            return
        self._stand_at("proving that this architecture trains exactly in chunks")
        with working(self.console, "proving that this architecture trains exactly in chunks"):
            parity = guard(
                self.hf_config, requested=model.attention, device=self.device, dtype=self.dtype,
                activation_checkpointing=model.activation_checkpointing, is_pipeline=self.topology.pipeline > 1,
            )  # fmt: skip
        self.console.print(
            f"Parity guard: chunked and whole-sequence gradients of a small {self.hf_config.model_type} agree to "
            f"{parity.grad_rel_error:.0e}", soft_wrap=True,
        )  # fmt: skip

    def _load_data(self) -> None:
        self._stand_at("reading the data")
        self.data = load_data(self.config, self.hf_config)
        self.train_data, self.eval_data = self.data.train, self.data.evaluation
        if self.processes.is_first:
            self._write_rejected()

    def _write_rejected(self) -> None:
        import json

        rejected = [
            *self.data.read.rejected,
            *(self.eval_data.rejected if self.config.data.eval_path is not None else ()),
        ]
        if not rejected:
            return
        rows = [{"file": where.file, "line": where.line, "reason": reason} for where, reason in rejected]
        path = self.folder.path / "rejected.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.console.print(
            f"{len(rows):,} rows cannot be trained on and are skipped; each with its reason: {path}", soft_wrap=True
        )

    def _load_model(self) -> None:
        config = self.config
        self._stand_at("loading the model")
        settle_vector_math()
        backend = choose_backend(config.model.attention, self.hf_config, self.device, self.dtype).backend
        with working(self.console, "loading the model"):
            # The first rank's setup decides for all: ranks may run on different machines, and must plan alike.
            own = None
            if self.processes.is_first:
                own = read_setup(config, self.hf_config, described_device(config, present_device()))
            setup: RunSetup = self.processes.gather(own)[0]
            assert setup.shape is not None
            self.shape, self.plan = setup.shape, setup.plan(self.train_data)
            parts = assemble(
                config, self.hf_config, backend, self.device, processes=self.processes,
                stages=self.plan.stage_layers(self.shape.layers), stop_requested=self._must_stop_now,
                announce=self._stand_at,
            )  # fmt: skip
        self.model, self.engine, self.runner = parts.model, parts.engine, parts.runner
        if self.processes.rank:  # all weights are drawn: from here on, dropout differs from rank to rank
            torch.manual_seed(
                int(np.random.SeedSequence((config.train.seed, self.processes.rank)).generate_state(1)[0])
            )
        self.batches, self.steps = self.plan.batches, self.plan.steps
        assert self.plan.layout.join_retained == self.engine.needs_joined_retained_chunks
        self.peak_flops = 0.0
        self._measure_peak_flops()
        self.held_out = HeldOut(
            self.eval_data, self.model, self.runner, self.processes, config.chunk.size, self.plan.is_in_lockstep,
            lambda: self.stop_requested,
        )  # fmt: skip
        self.learning_rate = learning_rate_schedule(config.optim, self.steps)
        if config.train.trace:
            self.recorder = Recorder(self.processes.rank)

    def _resume(self) -> Progress:
        if self.folder.checkpoint is None:
            return Progress()
        resumed = load_checkpoint(self.folder.checkpoint, self.engine, seed=self.config.train.seed)
        step = resumed.progress.step
        self.console.print(f"Continuing after step {step} from {self.folder.checkpoint}", soft_wrap=True)
        if resumed.saved_on != self._layout():
            self.console.print(f"  saved on {resumed.saved_on}, continued on {self._layout()}", soft_wrap=True)
        if resumed.is_reseeded:
            self.console.print(
                f"  random numbers (dropout) begin anew, from train.seed and step {step}", soft_wrap=True
            )
        return resumed.progress

    # Steps

    def _train(self, progress: Progress) -> None:
        config = self.config
        self.activation_bytes = self._measure_activations()
        self.random_states = random_states()
        """After the last whole step; an interrupted step has drawn more."""
        with (
            training_display(self.console, self.steps) as display,
            MetricWriters(
                config.log.backends if self.processes.is_first else [], self.folder.path, progress.step + 1
            ) as writers,
        ):
            done, total = self._tokens_until(progress.step), self._tokens_until(self.steps)
            display.begin(total, done)
            try:
                if progress.eval_loss_start is None and progress.step == 0 and len(self.held_out):
                    display.phase("held-out loss")
                    progress.eval_loss_start = self.held_out.loss()
                while progress.step < self.steps:
                    self._stop_together()
                    row = self._step(progress, display.advance)
                    if self._evaluates_after(progress.step):
                        display.phase("held-out loss")
                        row = self._with_held_out_loss(row, progress)
                    if row.step % config.log.every == 0 or row.step == self.steps or row.eval_loss is not None:
                        writers.write(row)
                        display.step(row)
                    if config.checkpoint.every is not None and row.step % config.checkpoint.every == 0:
                        display.phase("saving a checkpoint")
                        self._save_checkpoint(progress)
                self._stop_together()
                if len(self.held_out) and progress.eval_step != self.steps:  # stopped within the last one
                    progress.eval_loss_end = self.held_out.loss()
            except Interrupted:
                self.engine.discard_gradients()
                display.phase("saving a checkpoint")
                path = self._save_checkpoint(progress)
                self.console.print(
                    f"Stopped after step {progress.step}. The same command goes on from {path}", soft_wrap=True
                )
                raise KeyboardInterrupt from None

    def _must_stop_now(self) -> bool:
        """Asked before every operation. Where operations wait for other ranks, a run stops between steps only."""
        ranks_wait = self.plan.is_in_lockstep or self.topology.sequence > 1 or self.topology.pipeline > 1
        return self.stop_requested and not ranks_wait

    def _stop_together(self) -> None:
        """Between steps: whatever process was told to stop, all of them stop.

        Raises:
            Interrupted: one was.
        """
        if self.processes.sum(self.stop_requested)[0]:
            raise Interrupted

    def _step(self, progress: Progress, on_backward: Callable[[float], None]) -> StepMetrics:
        start = time.perf_counter()
        self.step_now = progress.step + 1
        if self.recorder is not None:
            self.recorder.step = self.step_now
        self._stand_at("reading the samples")
        step = self.plan[progress.step]
        result = self._run_operations(step, on_backward)
        lr = self.learning_rate(progress.step)
        self.engine.set_learning_rate(lr)
        self._stand_at("optimizer step")
        norm = self.engine.step()
        self.random_states = random_states()
        seconds = time.perf_counter() - start

        progress.step += 1
        progress.samples_trained += len(step.samples)
        progress.target_tokens_planned += step.target_tokens
        progress.target_tokens_trained += result.target_tokens
        progress.tokens_trained += step.tokens
        progress.chunks += step.chunks
        progress.recomputed_chunks += step.recomputed_chunks
        progress.train_seconds += seconds
        progress.loss_first = result.loss if progress.loss_first is None else progress.loss_first
        progress.loss_last = result.loss
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
            mfu=training_flops(self.train_data.lengths[step.samples], self.shape)
            / seconds
            / (self.peak_flops * self.topology.processes),
            peak_memory_bytes=int(self.processes.maximum(peak_memory_bytes(self.device))[0]),
        )

    def _run_operations(self, step: StepPlan, on_backward: Callable[[float], None]) -> StepResult:
        """Those of this process; loss and targets of the result are those of all.

        Raises:
            Interrupted: a process was told to stop and has not done all of its operations.
            RunError: a loss is not finite.
        """
        rank = step.ranks[self.processes.replica]
        share = step.tokens / max(1, rank.chunks.tokens)  # the bar counts the tokens of all ranks
        is_whole = True
        try:
            result = self._run_schedule(step, rank, lambda tokens: on_backward(tokens * share))
        except Interrupted:
            is_whole, result = False, StepResult(0.0, 0, 0, ())
        counts = self.processes.place.stage == 0  # all stages of a pipeline know the loss of their pipeline
        loss, targets, whole = self.processes.sum(
            result.loss if counts else 0.0, result.target_tokens if counts else 0, is_whole
        )
        if whole < self.topology.processes:
            raise Interrupted
        if not np.isfinite(loss):
            self._refuse_loss(step, rank, result)
        return replace(result, loss=loss, target_tokens=round(targets))

    def _run_schedule(self, step: StepPlan, rank: RankPlan, on_backward: Callable[[int], None]) -> StepResult:
        record = None if self.recorder is None else self.recorder.record
        return self.runner.run(rank.schedules, self._batch(step, rank), on_backward, record)

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.eval.every
        return len(self.held_out) > 0 and (step == self.steps or (every is not None and step % every == 0))

    def _with_held_out_loss(self, row: StepMetrics, progress: Progress) -> StepMetrics:
        """The row with its held-out loss; without it if the user stops the run meanwhile, for the step is done."""
        try:
            loss = self.held_out.loss()
        except Interrupted:
            return row
        progress.eval_loss_end, progress.eval_step = loss, row.step
        return replace(row, eval_loss=loss)

    def _measure_peak_flops(self) -> None:
        """One process measures while the others wait for it; of several measurements the best one holds."""
        measured = peak_flops(self.device, self.dtype) if self.processes.is_first else 0.0
        (measured,) = self.processes.maximum(measured)
        self.peak_flops = max(self.peak_flops, measured)

    def _batch(self, step: StepPlan, rank: RankPlan) -> StepBatch:
        """The sequences of a rank, read from the cache."""
        weights = target_weights(rank, step, self.config.train.loss_weighting)
        sequences = [self.train_data[int(sample)] for sample in rank.samples]
        return StepBatch(rank.chunks, sequences, weights, None if self.plan.pipeline is not None else rank.spread)

    def _refuse_loss(self, step: StepPlan, rank: RankPlan, result: StepResult) -> None:
        """
        Raises:
            RunError: names the first chunk whose loss is not finite, and its samples; the same on all processes.
        """
        found = None
        if result.not_finite:
            index = result.not_finite[0]
            where = [
                str(self.train_data.location(int(rank.samples[segment.sequence])))
                for segment in rank.chunks[index].segments
            ]
            found = (
                f"first in chunk {index} of {len(rank.chunks)}\n"
                f"  its samples: {', '.join(where[:8])}{' and more' if len(where) > 8 else ''}\n"
            )
        first = next((text for text in self.processes.gather(found) if text is not None), "in no single chunk\n")
        raise RunError(
            f"the loss of step {step.step + 1} is not finite, {first}"
            "  look at them, lower optim.lr, or lower optim.grad_clip; the last checkpoint is from before this step"
        )

    def _stand_at(self, doing: str) -> None:
        """Tell whoever watches over the ranks."""
        self.heartbeat.at(self.step_now, doing)

    def _save_checkpoint(self, progress: Progress) -> Path:
        self._stand_at("saving a checkpoint")
        return save_checkpoint(
            self.folder.checkpoints, self.engine, progress, self.random_states,
            layout=self._layout(), keep=self.config.checkpoint.keep,
        )  # fmt: skip

    def _layout(self) -> str:
        return describe_layout(self.topology, self.config.engine)

    def _tokens_until(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        epochs, rest = divmod(step, self.batches.steps_per_epoch)
        partial = sum(
            int(self.train_data.lengths[self.batches[epochs * self.batches.steps_per_epoch + i]].sum())
            for i in range(rest)
        )
        return epochs * int(self.train_data.lengths.sum()) + partial

    def _measure_activations(self) -> float | None:
        """Bytes of activations a token; not under ZeRO-3, where weights are whole only within the engine's forward,
        nor on a stage, which holds only some of the layers."""
        if self.config.engine.zero_stage == 3 or not self.runner.holds_whole_model:
            return None
        sample = int(np.argmax(self.train_data.lengths))
        whole = self.train_data[sample]
        probe = TokenizedSample(whole.input_ids[:PROBE_TOKENS], whole.targets[:PROBE_TOKENS])
        module = self.engine.module
        assert isinstance(module, ChunkModel)
        return activation_bytes_per_token(module, probe)

    def _request_stop(self) -> None:
        self.stop_requested = True
        what = "step" if self.topology.sequence * self.topology.pipeline > 1 or self.plan.is_in_lockstep else "chunk"
        again = "" if environment.is_started_by_launcher() else " Once more to stop at once."
        self.console.print(f"Stopping after the present {what}, then saving.{again}", soft_wrap=True)

    # Report

    def _write_trace(self) -> None:
        if self.recorder is None:
            return
        self.recorder.write(self.folder.path)
        self.processes.barrier()
        if self.processes.is_first:
            path = merge(self.folder.path, self.topology)
            self.console.print(f"trace: {path}, for https://ui.perfetto.dev and plan --trace", soft_wrap=True)

    def _save_model(self, progress: Progress) -> None:
        """Into `final/`; if that fails (a full disk), into a checkpoint, so that what was learnt is not lost."""
        from chunkflow_cli.data.tokenizer import has_tokenizer

        self._stand_at("saving the model")
        tokenizer = None
        if has_tokenizer(self.config.model.path):
            tokenizer = load_tokenizer(self.config.model.path, trust_remote_code=self.config.model.trust_remote_code)
        is_stage = not self.runner.holds_whole_model
        whole = skeleton(self.config.model, self.hf_config) if is_stage and self.processes.is_first else None
        try:
            with working(self.console, "saving the model"):
                save_final(self.folder.final, self.model, tokenizer, self.engine, skeleton=whole)
        except Exception:
            path = self._save_checkpoint(progress)
            self.console.print(f"The model could not be saved; its weights are in {path}", soft_wrap=True)
            raise

    def _report(self, progress: Progress) -> dict[str, Any]:
        chunk = self.config.chunk
        longest = int(self.train_data.lengths.max())
        peak = int(self.processes.maximum(peak_memory_bytes(self.device))[0])
        flops = self._trained_flops(progress)
        # Measured again, for other work on the machine may have slowed the first measurement.
        self._measure_peak_flops()
        whole = None
        if self.activation_bytes is not None and longest > chunk.size * chunk.k:
            whole = whole_sequence_bytes(
                peak, self.activation_bytes, chunk.size * chunk.k, longest, self.shape.vocab_size, self.dtype.itemsize
            )
        return {
            **samples_account(self.data, self.config.data),
            **{key: value for key, value in asdict(progress).items() if key != "step"},
            "steps": progress.step,
            "epochs": progress.step / self.batches.steps_per_epoch,
            "longest_sample": longest,
            "chunk_size": chunk.size,
            "k": chunk.k,
            "lora": self.config.model.lora.enabled,
            "tokens_per_second": progress.tokens_trained / max(progress.train_seconds, 1e-9),
            "mfu": flops / max(progress.train_seconds, 1e-9) / (self.peak_flops * self.topology.processes),
            "processes": self.topology.processes,
            "peak_memory_bytes": peak,
            "activation_bytes_per_token": self.activation_bytes,
            "whole_sequence_peak_bytes_predicted": whole,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }

    def _trained_flops(self, progress: Progress) -> float:
        return sum(
            training_flops(self.train_data.lengths[self.batches[step]], self.shape) for step in range(progress.step)
        )
