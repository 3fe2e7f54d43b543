"""Show a training run on the console: its progress, and the closing summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TimeRemainingColumn
from rich.text import Text

from chunkflow_cli.config.schema import TrainConfig
from chunkflow_cli.console import counted, facts, human_bytes, human_seconds, percent, plain_column
from chunkflow_cli.model.saving import loading_code
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.training.metrics import StepMetrics
from chunkflow_cli.training.run_folder import PAGE


class TrainingDisplay:
    """A line for each logged step; on a terminal, with a progress bar over the tokens of all steps below them."""

    def __init__(self, console: Console, steps: int, device_type: str, bar: Progress | None) -> None:
        """
        Args:
            steps: the steps of the whole run.
            device_type: "cuda", or "cpu", whose MFU is left out: no data sheet says what a CPU can do.
            bar: None where the output is not a terminal.
        """
        self._console = console
        self._steps = steps
        self._device_type = device_type
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=None)
        self._tokens_left = 0.0

    def begin(self, total_tokens: int, done_tokens: int) -> None:
        """Start to count tokens."""
        self._tokens_left = total_tokens - done_tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total_tokens, completed=done_tokens)

    def advance(self, tokens: float) -> None:
        """Count tokens whose backward pass is done."""
        self._tokens_left -= tokens
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, tokens)

    def phase(self, text: str) -> None:
        """Say what the run is doing, next to the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)

    def held_out_before(self, loss: float) -> None:
        """Print the held-out loss before the first step."""
        self._print(f"held-out loss {loss:.4f} before the first step")

    def answer(self, prompt: str, answer: str) -> None:
        """Print a prompt and what the model answers."""
        lines = (answer.strip() or "(nothing)").replace("\n", "\n  ")
        self._console.print(Text(f"  > {prompt}\n  {lines}"), soft_wrap=True)

    def step(self, row: StepMetrics) -> None:
        """Print a logged step."""
        left = max(0.0, self._tokens_left) / max(row.tokens_per_second, 1e-9)  # a rounded sum may end below zero
        held_out = "" if row.eval_loss is None else f"  held-out {row.eval_loss:.4f}"
        margin, accuracy = (row.parts.get(f"rewards/{name}") for name in ("margins", "accuracies"))
        rewards = "" if margin is None else f"  margin {margin:.3f}"
        rewards += "" if accuracy is None else f"  accuracy {percent(accuracy)}"
        if (accuracy := row.parts.get("eval_rewards/accuracies")) is not None:
            held_out += f", accuracy {percent(accuracy)}"
        mfu = "" if self._device_type == "cpu" else f"  MFU {100 * row.mfu:.0f} %"
        time_left = "" if self._bar is not None else f"  {human_seconds(round(left))} left"  # the bar shows it
        self._print(
            f"step {row.step}/{self._steps}  loss {row.loss:.4f}{rewards}{held_out}  lr {row.lr:.3g}  "
            f"grad norm {row.grad_norm:.3g}  {row.tokens_per_second:,.0f} tokens/s{mfu}  "
            f"{human_bytes(row.peak_memory_bytes)}{time_left}"
        )
        self.phase(f"step {row.step}/{self._steps}")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


@contextmanager
def training_display(console: Console, steps: int, device_type: str) -> Iterator[TrainingDisplay]:
    """Yield the display of a run. The bar disappears at the end; the lines stay."""
    if not console.is_terminal:
        yield TrainingDisplay(console, steps, device_type, None)
        return
    columns = (
        SpinnerColumn(),
        plain_column("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True, transient=True) as progress:
        yield TrainingDisplay(console, steps, device_type, progress)


FEW_STEPS = 20
"""Optimizer steps below which a warning is printed: the learning rate has hardly risen when it falls again."""


def few_steps_warning(plan: RunPlan, config: TrainConfig) -> str | None:
    """Return a warning if `train.epochs` gives so few steps that the model hardly trains; None if not.

    It says nothing about a run whose number of steps is set.
    """
    if config.steps is not None or plan.steps >= FEW_STEPS:
        return None
    if config.global_batch_tokens is None:
        key, size, most = "train.global_batch_size", config.global_batch_size, len(plan.lengths)
    else:
        key, size, most = "train.global_batch_tokens", config.global_batch_tokens, int(plan.lengths.sum())
    batch = most * config.epochs // FEW_STEPS
    smaller = f"lower {key} from {size} to {batch}, or " if batch else ""
    return (
        f"warning: the run has only {counted(plan.steps, 'optimizer step')}, which hardly changes a model\n"
        f"  {smaller}raise train.epochs above {config.epochs}"
    )


def print_training_summary(console: Console, report: dict[str, Any], run_folder: Path) -> None:
    """Print the closing table of a run, from the content of its report.json."""
    rows = {
        "samples": _samples(report),
        "targets": f"all {report['target_tokens_trained']:,} that were planned",
    }
    if "sources" in report:
        rows["sources"] = ", ".join(
            f"{name} {part['samples_trained']:,} ({part['passes']:.2f} passes)"
            for name, part in report["sources"].items()
        )
    if report["eval_loss_start"] is not None:
        rows["held-out loss"] = f"{report['eval_loss_start']:.4f} before, {report['eval_loss_end']:.4f} after"
        after = report.get("eval_parts_end", {})
        parts = [f"{name} {loss:.4f} -> {after[name]:.4f}" for name, loss in report.get("eval_parts_start", {}).items()]
        if parts:
            rows["held-out parts"] = ", ".join(parts)
    if (accuracy := report.get("eval_accuracy_end")) is not None:
        before = report["eval_accuracy_start"]
        rows["held-out accuracy"] = ("" if before is None else f"{percent(before)} before, ") + (
            f"{percent(accuracy)} of the pairs after"
        )
    whole = report.get("whole_sequence_peak_bytes_predicted")
    longest = f"whole sequences ({report['longest_sample']:,} tokens)"
    against = f"; {longest} would take about {human_bytes(whole)}" if whole else ""
    mfu = "" if report["device"] == "cpu" else f", MFU {100 * report['mfu']:.0f} %"
    rows |= {
        "training loss": f"{report['loss_first']:.4f} first step, {report['loss_last']:.4f} last",
        "speed": f"{report['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{human_seconds(report['train_seconds'])} for {counted(report['steps'], 'step')}",
        "chunks": f"{report['chunks']:,} of at most {report['chunk_size']:,} tokens; "
        f"{report['recomputed_chunks']:,} recomputed "
        f"({100 * report['recomputed_chunks'] / max(1, report['chunks']):.1f} %, K = {report['k']})",
        "peak memory": human_bytes(report["peak_memory_bytes"]) + against,
        "model": str(run_folder / "final"),
    }
    if (page := run_folder / PAGE).exists():
        rows["report"] = str(page)
    console.print()
    console.print(facts((name, Text(said)) for name, said in rows.items()))
    what_is_imported, call = loading_code(run_folder / "final")
    console.print(Text(f"\nLoad it:  {what_is_imported}\n          {call}"), soft_wrap=True)


def _samples(report: dict[str, Any]) -> str:
    """Return `64 read; 58 trained on in 5 epochs (290 passes), 6 held out`."""
    passes, trained = report["samples_trained"], report["samples_to_train"]
    if passes > trained:
        again = f"{trained:,} trained on in {report['epochs']:.3g} epochs ({passes:,} passes)"
    else:
        again = (f"{passes:,} of {trained:,}" if passes < trained else f"{passes:,}") + " trained on"
    parts = [again]
    for word in ("held out", "rejected", "dropped", "truncated", "duplicate", "beyond limit"):
        count = report.get("samples_" + word.replace(" ", "_"))
        if count:
            parts.append(f"{count:,} {word}")
    rows, samples = report["rows_read"], report["samples_read"]
    source = "" if rows == samples else f" of {rows:,} rows"
    return f"{samples:,} read{source}; " + ", ".join(parts)
