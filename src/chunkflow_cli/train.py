"""`chunkflow train`: fine-tune.

The order of this file is the order of a run: what is needed, data, model, steps, report.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from chunkflow_cli.assembly import assemble
from chunkflow_cli.checkpoint import Progress, load_checkpoint, random_states, save_checkpoint, save_final
from chunkflow_cli.chunks import build_chunks
from chunkflow_cli.config import Config, LearningRateSchedule, LoadedConfig, LossWeighting, PipelineSchedule
from chunkflow_cli.costs import training_flops
from chunkflow_cli.devices import present_device, training_device
from chunkflow_cli.engine import EngineSettings, check_settings, close_process_group
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token, whole_sequence_bytes
from chunkflow_cli.execution.backend_choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.parity import guard
from chunkflow_cli.execution.runner import Interrupted, StepBatch, StepResult, call_of
from chunkflow_cli.execution.state import StateStore
from chunkflow_cli.hf_config import load_config
from chunkflow_cli.metrics import MetricWriters, StepMetrics, peak_flops, peak_memory_bytes
from chunkflow_cli.report import stderr_console, stdout_console, working
from chunkflow_cli.report.training import print_training_summary, training_display
from chunkflow_cli.run_data import cost_model, load_run_data, plan_run
from chunkflow_cli.run_folder import RunFolder, open_run_folder, write_json
from chunkflow_cli.run_plan import StepPlan
from chunkflow_cli.tokens import load_tokenizer

EVAL_GROUP = 256
"""Held-out samples that are planned together."""

PROBE_TOKENS = 256
"""Length of the forward that measures activation bytes a token."""


def run(loaded: LoadedConfig, *, json_output: bool = False) -> dict[str, Any]:
    """Fine-tune as configured; returns what stands in report.json.

    Raises:
        UsageError: configuration or data is at fault.
        RunError: a loss is not finite, or the accounting does not add up.
        KeyboardInterrupt: the user stopped the run, and a checkpoint was saved.
    """
    import json

    console = stderr_console()
    hf_config = check_requirements(loaded)
    folder = open_run_folder(loaded)
    try:
        if folder.report.exists():
            report: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
            console.print(f"This run is finished already. To run it again: checkpoint.resume=never\n  {folder.path}")
        else:
            report = _Training(loaded.config, hf_config, folder, console).run()
    finally:
        folder.close()
        close_process_group()
    if not json_output:
        print_training_summary(stdout_console(), report, folder.path)
    return report


def check_requirements(loaded: LoadedConfig) -> Any:
    """The Hugging Face configuration, after a look for everything that must be at hand: all that is missing at once.

    Raises:
        UsageError: one error that names each missing thing.
    """
    config = loaded.config
    missing: list[str] = []
    hf_config = None
    if not config.model.path:
        missing.append("model.path is not set: a Hugging Face id, a folder or a GGUF file")
    else:
        try:
            hf_config = load_config(config.model)
        except UsageError as error:
            missing.append(str(error))
    if not config.data.path:
        missing.append("data.path is not set: your training data (.jsonl, .json, .parquet, a folder, or a data set id)")
    if missing and config.hardware and not torch.cuda.is_available():
        missing.append(f"a GPU: this machine has none, and the recipe is made for {config.hardware}")
    if missing:
        lines = "\n".join(f"- {text}" for text in missing)
        raise UsageError(
            f"recipe {loaded.recipe} cannot run here yet. Missing:\n{lines}" if len(missing) > 1 else missing[0]
        )
    if config.parallel.schedule is PipelineSchedule.interleaved:
        raise UsageError(
            "parallel.schedule=interleaved: so far only plan and tune-chunk-size know several parts of a model on a "
            "stage\n  train with another schedule"
        )
    for key, value in (
        ("launch.processes", config.launch.processes),
        ("parallel.pipeline", config.parallel.pipeline),
    ):
        if value > 1:
            raise UsageError(f"{key}={value}: so far only plan knows more than one; train with {key}=1")
    device = training_device()
    check_settings(EngineSettings(config.engine, config.optim, config.model.dtype, device))
    return hf_config


class _Training:
    """One run of `train`, from loading to the report."""

    def __init__(self, config: Config, hf_config: Any, folder: RunFolder, console: Console) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.hf_config = hf_config
        self.device = training_device()
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        self.stop_requested = False

    def run(self) -> dict[str, Any]:
        config = self.config
        settle_vector_math()
        choice = choose_backend(config.model.attention, self.hf_config, self.device, self.dtype)
        self.console.print(f"[bold]{self.folder.path}[/]  {self.device.type}, {config.model.dtype.value}, "
                           f"attention {choice.backend.name} ({choice.reason})", soft_wrap=True)  # fmt: skip
        self._prove_parity()
        self._load_data()
        self._load_model(choice.backend)
        progress = self._resume()
        with _stop_on_signals(self._request_stop):
            self._train(progress)
        self._save_model()
        report = self._report(progress)
        self._check_accounting(report)
        write_json(self.folder.report, report)
        return report

    # What is needed

    def _prove_parity(self) -> None:
        model = self.config.model
        if not self.config.train.guard:
            self.console.print("train.guard=false: nothing has shown that this model trains exactly in chunks")
            return
        with working(self.console, "proving that this architecture trains exactly in chunks"):
            parity = guard(
                self.hf_config, requested=model.attention, device=self.device, dtype=self.dtype,
                activation_checkpointing=model.activation_checkpointing,
            )  # fmt: skip
        self.console.print(
            f"Parity guard: chunked and whole-sequence gradients of a small {self.hf_config.model_type} agree to "
            f"{parity.grad_rel_error:.0e}", soft_wrap=True,
        )  # fmt: skip

    def _load_data(self) -> None:
        data = load_run_data(self.config, self.hf_config)
        self.data, self.train_data, self.eval_data = data.read, data.train, data.evaluation
        self._write_rejected()

    def _write_rejected(self) -> None:
        import json

        rejected = [*self.data.rejected, *(self.eval_data.rejected if self.config.data.eval_path is not None else ())]
        if not rejected:
            return
        rows = [{"file": where.file, "line": where.line, "reason": reason} for where, reason in rejected]
        path = self.folder.path / "rejected.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.console.print(
            f"{len(rows):,} rows cannot be trained on and are skipped; each with its reason: {path}", soft_wrap=True
        )

    def _load_model(self, backend: Any) -> None:
        config = self.config
        with working(self.console, "loading the model"):
            parts = assemble(config, self.hf_config, backend, self.device, stop_requested=lambda: self.stop_requested)
        self.model, self.engine, self.runner, self.shape = parts.model, parts.engine, parts.runner, parts.shape
        self.plan = plan_run(config, self.train_data, cost_model(config, self.shape, present_device(), self.hf_config))
        self.batches, self.steps = self.plan.batches, self.plan.steps
        assert self.plan.layout.join_retained == self.engine.needs_joined_retained_chunks
        self.peak_flops = peak_flops(self.device, self.dtype)
        self.learning_rate = learning_rate_schedule(config, self.steps)

    def _resume(self) -> Progress:
        if self.folder.checkpoint is None:
            return Progress()
        progress = load_checkpoint(self.folder.checkpoint, self.engine)
        self.console.print(f"Continuing after step {progress.step} from {self.folder.checkpoint}", soft_wrap=True)
        return progress

    # Steps

    def _train(self, progress: Progress) -> None:
        config = self.config
        self.activation_bytes = self._measure_activations()
        self.random_states = random_states()
        """After the last whole step; an interrupted step has drawn more."""
        with (
            training_display(self.console, self.steps) as display,
            MetricWriters(config.log.backends, self.folder.path, progress.step + 1) as writers,
        ):
            done, total = self._tokens_until(progress.step), self._tokens_until(self.steps)
            display.begin(total, done)
            try:
                if progress.eval_loss_start is None and progress.step == 0 and len(self.eval_data):
                    display.phase("held-out loss")
                    progress.eval_loss_start = self._evaluate()
                while progress.step < self.steps:
                    row = self._step(progress, display.advance)
                    if self._evaluates_after(progress.step):
                        display.phase("held-out loss")
                        row = self._with_held_out_loss(row, progress)
                    if row.step % config.log.every == 0 or row.step == self.steps or row.eval_loss is not None:
                        writers.write(row)
                        display.step(row)
                    if self.stop_requested:
                        raise Interrupted
                    if config.checkpoint.every is not None and row.step % config.checkpoint.every == 0:
                        display.phase("saving a checkpoint")
                        self._save_checkpoint(progress)
                if len(self.eval_data) and progress.eval_step != self.steps:  # stopped within the last one
                    progress.eval_loss_end = self._evaluate()
            except Interrupted:
                self.engine.discard_gradients()
                display.phase("saving a checkpoint")
                path = self._save_checkpoint(progress)
                self.console.print(
                    f"Stopped after step {progress.step}. The same command goes on from {path}", soft_wrap=True
                )
                raise KeyboardInterrupt from None

    def _step(self, progress: Progress, on_backward: Callable[[int], None]) -> StepMetrics:
        start = time.perf_counter()
        step = self.plan[progress.step]
        (share,) = step.ranks
        result = self.runner.run(share.schedule, self._batch(step), on_backward)
        self._check_finite(step, result)
        lr = self.learning_rate(progress.step)
        self.engine.set_learning_rate(lr)
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
            mfu=training_flops(self.train_data.lengths[step.samples], self.shape) / seconds / self.peak_flops,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.eval.every
        return len(self.eval_data) > 0 and (step == self.steps or (every is not None and step % every == 0))

    def _with_held_out_loss(self, row: StepMetrics, progress: Progress) -> StepMetrics:
        """The row with its held-out loss; without it if the user stops the run meanwhile, for the step is done."""
        try:
            loss = self._evaluate()
        except Interrupted:
            return row
        progress.eval_loss_end, progress.eval_step = loss, row.step
        return replace(row, eval_loss=loss)

    def _batch(self, step: StepPlan) -> StepBatch:
        """The sequences of a step, read from the cache."""
        (share,) = step.ranks
        weights = target_weights(self.train_data.target_counts[share.samples], self.config.train.loss_weighting)
        return StepBatch(share.chunks, [self.train_data[int(sample)] for sample in share.samples], weights)

    def _evaluate(self) -> float:
        """Token-mean loss over all held-out samples, whatever the training loss weighs.

        Raises:
            Interrupted: the user asked to stop.
        """
        total = 0.0
        self.model.eval()
        weight = 1.0 / int(self.eval_data.target_counts.sum())
        for start in range(0, len(self.eval_data), EVAL_GROUP):
            samples = range(start, min(start + EVAL_GROUP, len(self.eval_data)))
            chunks = build_chunks(self.eval_data.lengths[samples.start : samples.stop], self.config.chunk.size)
            sequences = [self.eval_data[sample] for sample in samples]
            total += self.runner.evaluate(StepBatch(chunks, sequences, np.full(len(samples), weight)))
        self.model.train()
        return total

    def _check_finite(self, step: StepPlan, result: StepResult) -> None:
        if not result.not_finite:
            return
        index = result.not_finite[0]
        (share,) = step.ranks
        where = [
            str(self.train_data.location(int(share.samples[segment.sequence])))
            for segment in share.chunks[index].segments
        ]
        raise RunError(
            f"the loss of step {step.step + 1} is not finite, first in chunk {index} of {step.chunks}\n"
            f"  its samples: {', '.join(where[:8])}{' and more' if len(where) > 8 else ''}\n"
            "  look at them, lower optim.lr, or lower optim.grad_clip; the last checkpoint is from before this step"
        )

    def _save_checkpoint(self, progress: Progress) -> Path:
        return save_checkpoint(
            self.folder.checkpoints, self.engine, progress, self.random_states, keep=self.config.checkpoint.keep
        )

    def _tokens_until(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        epochs, rest = divmod(step, self.batches.steps_per_epoch)
        partial = sum(
            int(self.train_data.lengths[self.batches[epochs * self.batches.steps_per_epoch + i]].sum())
            for i in range(rest)
        )
        return epochs * int(self.train_data.lengths.sum()) + partial

    def _measure_activations(self) -> float | None:
        """Bytes of activations a token; not under ZeRO-3, where weights are whole only within the engine's forward."""
        if self.config.engine.zero_stage == 3:
            return None
        sample = int(np.argmax(self.train_data.lengths))
        probe = [_First(self.train_data[sample], PROBE_TOKENS)]
        chunks = build_chunks([len(probe[0].input_ids)], PROBE_TOKENS)
        tensors = self.runner.build(chunks[0], StepBatch(chunks, probe, np.ones(1)))
        module = self.engine.module
        assert isinstance(module, ChunkModel)
        return activation_bytes_per_token(module, call_of(chunks[0], tensors, chunks, StateStore()))

    def _request_stop(self) -> None:
        self.stop_requested = True
        self.console.print("Stopping after the present chunk, then saving. Once more to stop at once.", soft_wrap=True)

    # Report

    def _save_model(self) -> None:
        from chunkflow_cli.tokens import has_tokenizer

        tokenizer = None
        if has_tokenizer(self.config.model.path):
            tokenizer = load_tokenizer(self.config.model.path, trust_remote_code=self.config.model.trust_remote_code)
        with working(self.console, "saving the model"):
            save_final(self.folder.final, self.model, tokenizer, self.engine)

    def _report(self, progress: Progress) -> dict[str, Any]:
        chunk = self.config.chunk
        longest = int(self.train_data.lengths.max())
        peak = peak_memory_bytes(self.device)
        flops = self._trained_flops(progress)
        # Measured again, for other work on the machine may have slowed the first measurement.
        self.peak_flops = max(self.peak_flops, peak_flops(self.device, self.dtype))
        whole = None
        if self.activation_bytes is not None and longest > chunk.size * chunk.k:
            whole = whole_sequence_bytes(
                peak, self.activation_bytes, chunk.size * chunk.k, longest, self.shape.vocab_size, self.dtype.itemsize
            )
        return {
            "samples_read": self.data.samples_read,
            "samples_rejected": self.data.samples_rejected,
            "samples_dropped": self.data.samples_dropped,
            "samples_truncated": self.data.samples_truncated,
            "samples_held_out": 0 if self.config.data.eval_path is not None else len(self.eval_data),
            "samples_to_train": len(self.train_data),
            **self._eval_path_accounting(),
            **{key: value for key, value in asdict(progress).items() if key != "step"},
            "steps": progress.step,
            "epochs": progress.step / self.batches.steps_per_epoch,
            "longest_sample": longest,
            "chunk_size": chunk.size,
            "k": chunk.k,
            "lora": self.config.model.lora.enabled,
            "tokens_per_second": progress.tokens_trained / max(progress.train_seconds, 1e-9),
            "mfu": flops / max(progress.train_seconds, 1e-9) / self.peak_flops,
            "peak_memory_bytes": peak,
            "activation_bytes_per_token": self.activation_bytes,
            "whole_sequence_peak_bytes_predicted": whole,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }

    def _eval_path_accounting(self) -> dict[str, int]:
        """What became of the rows of `data.eval_path`; they are not among those of `data.path`."""
        if self.config.data.eval_path is None:
            return {}
        return {
            "eval_samples_read": self.eval_data.samples_read,
            "eval_samples_rejected": self.eval_data.samples_rejected,
            "eval_samples_dropped": self.eval_data.samples_dropped,
            "eval_samples_truncated": self.eval_data.samples_truncated,
        }

    def _trained_flops(self, progress: Progress) -> float:
        return sum(
            training_flops(self.train_data.lengths[self.batches[step]], self.shape) for step in range(progress.step)
        )

    def _check_accounting(self, report: dict[str, Any]) -> None:
        """Every sample and every target is somewhere, or the run has failed."""
        accounted = sum(
            report[key] for key in ("samples_rejected", "samples_dropped", "samples_held_out", "samples_to_train")
        )
        planned = sum(len(self.batches[step]) for step in range(report["steps"]))
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


def target_weights(targets: NDArray[np.int64], weighting: LossWeighting) -> NDArray[np.float64]:
    """(sequences,) what each target of a sequence counts, so that the weights of a global batch sum to 1."""
    if weighting is LossWeighting.token:
        return np.full(len(targets), 1.0 / targets.sum())
    return 1.0 / (len(targets) * targets)


def learning_rate_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0, by transformers' schedules.

    They are asked for step + 1 of steps + 1: so the first step does not idle at a rate of zero, nor does the last.
    """
    import math

    from transformers import get_scheduler

    optim = config.optim
    idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = math.ceil(optim.warmup_ratio * steps)
    if optim.schedule is LearningRateSchedule.wsd:
        decay = math.ceil(0.1 * steps) + 1  # it begins at the full rate: one more, for the last tenth to be below it
        scheduler = get_scheduler(
            "warmup_stable_decay", idle, num_warmup_steps=warmup, num_training_steps=steps + 1,
            scheduler_specific_kwargs={"num_decay_steps": decay},
        )  # fmt: skip
    elif optim.schedule is LearningRateSchedule.constant:
        scheduler = get_scheduler("constant_with_warmup", idle, num_warmup_steps=warmup)
    else:
        scheduler = get_scheduler(optim.schedule.value, idle, num_warmup_steps=warmup, num_training_steps=steps + 1)
    factor = scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    return lambda step: float(optim.lr * factor(step + 1))


class _First:
    """The first tokens of a sample."""

    def __init__(self, sample: Any, count: int) -> None:
        self.input_ids: NDArray[np.int32] = sample.input_ids[:count]
        self.targets: NDArray[np.int32] = sample.targets[:count]


@contextmanager
def _stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop; the second stops it at once."""
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, before[each])
        request_stop()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, before[number])
