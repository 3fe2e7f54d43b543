"""Show a training run on the console: its progress, and the closing summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from chunkflow_cli.console import counted, human_bytes, human_seconds, plain_column
from chunkflow_cli.training.metrics import StepMetrics


class _Bar:
    """A progress bar over the tokens of all steps, for a terminal."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._task = progress.add_task("step", total=None, numbers="")

    def begin(self, total_tokens: int, done_tokens: int) -> None:
        self._progress.update(self._task, total=total_tokens, completed=done_tokens)

    def advance(self, tokens: float) -> None:
        self._progress.advance(self._task, tokens)

    def phase(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def step(self, row: StepMetrics) -> None:
        self._progress.update(
            self._task,
            description=f"step {row.step}/{self._steps}",
            numbers=(
                f"loss {row.loss:.3f}  {row.tokens_per_second:,.0f} tok/s  MFU {100 * row.mfu:.0f}%  "
                f"{human_bytes(row.peak_memory_bytes)}"
            ),
        )


class _Lines:
    """One line per step, for logs and pipes."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._tokens_left = 0.0

    def begin(self, total_tokens: int, done_tokens: int) -> None:
        self._tokens_left = total_tokens - done_tokens

    def advance(self, tokens: float) -> None:
        self._tokens_left -= tokens

    def phase(self, text: str) -> None:
        """Show nothing: a log has steps only."""

    def step(self, row: StepMetrics) -> None:
        left = max(0.0, self._tokens_left) / max(row.tokens_per_second, 1e-9)  # a rounded sum may end below zero
        held_out = "" if row.eval_loss is None else f"  held-out {row.eval_loss:.4f}"
        self._console.print(
            f"step {row.step}/{self._steps}  loss {row.loss:.4f}{held_out}  grad norm {row.grad_norm:.3g}  "
            f"{row.tokens_per_second:,.0f} tok/s  MFU {100 * row.mfu:.0f}%  "
            f"{human_bytes(row.peak_memory_bytes)}  {human_seconds(left)} left",
            soft_wrap=True,
        )


@contextmanager
def training_display(console: Console, steps: int) -> Iterator[_Bar | _Lines]:
    """Yield a display of the run: a live bar on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield _Lines(console, steps)
        return
    columns = (
        SpinnerColumn(),
        plain_column("{task.description}"),
        BarColumn(bar_width=None),
        plain_column("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bar(progress, steps)


def print_training_summary(console: Console, report: dict[str, Any], run_folder: Path) -> None:
    """Print the closing table of a run, from the content of its report.json."""
    rows = {
        "samples": _samples(report),
        "targets": f"{report['target_tokens_trained']:,} of {report['target_tokens_planned']:,} planned",
    }
    if report["eval_loss_start"] is not None:
        rows["held-out loss"] = f"{report['eval_loss_start']:.4f} before, {report['eval_loss_end']:.4f} after"
    whole = report.get("whole_sequence_peak_bytes_predicted")
    longest = f"whole sequences ({report['longest_sample']:,} tokens)"
    against = f"; {longest} would take about {human_bytes(whole)}" if whole else ""
    rows |= {
        "training loss": f"{report['loss_first']:.4f} first step, {report['loss_last']:.4f} last",
        "speed": f"{report['tokens_per_second']:,.0f} tokens/s, MFU {100 * report['mfu']:.0f} %, "
        f"{human_seconds(report['train_seconds'])} in {counted(report['steps'], 'step')}",
        "chunks": f"{report['chunks']:,} of at most {report['chunk_size']:,} tokens; "
        f"{report['recomputed_chunks']:,} recomputed "
        f"({100 * report['recomputed_chunks'] / max(1, report['chunks']):.1f} %, K = {report['k']})",
        "peak memory": human_bytes(report["peak_memory_bytes"]) + against,
        "model": str(run_folder / "final"),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in rows.items():
        table.add_row(name, Text(said))
    console.print()
    console.print(table)
    package, loader = ("peft", "AutoPeft") if report["lora"] else ("transformers", "Auto")
    loader += "ModelForCausalLM"
    console.print(f"\nLoad it:  from {package} import {loader}", soft_wrap=True)
    console.print(f'          model = {loader}.from_pretrained("{run_folder / "final"}")', soft_wrap=True)


def _samples(report: dict[str, Any]) -> str:
    parts = [f"{report['samples_trained']:,} trained on"]
    for word in ("held out", "rejected", "dropped", "truncated"):
        count = report["samples_" + word.replace(" ", "_")]
        if count:
            parts.append(f"{count:,} {word}")
    return f"{report['samples_read']:,} read; " + ", ".join(parts)
