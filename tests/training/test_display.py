"""What a person sees of a run: a line for each logged step, on a terminal with a bar below, and the closing summary."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from chunkflow_cli.config.schema import TrainConfig
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.training.display import few_steps_warning, print_training_summary, training_display
from chunkflow_cli.training.metrics import StepMetrics

ROW = StepMetrics(
    step=3, loss=1.23456, grad_norm=0.5, lr=2e-4, samples=16, tokens=1000, target_tokens=900, chunks=4,
    recomputed_chunks=1, step_seconds=0.5, tokens_per_second=2000.0, mfu=0.44, peak_memory_bytes=2**30, eval_loss=2.5,
)  # fmt: skip


def shown(*, is_terminal: bool, device_type: str = "cuda") -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, color_system=None, width=120)
    with training_display(console, 9, device_type) as display:
        display.begin(9000, 0)
        display.phase("held-out loss")
        display.held_out_before(3.25)
        display.advance(3000)
        display.step(ROW)
    return output.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_all_that_a_pipe_shows(is_terminal: bool) -> None:
    text = shown(is_terminal=is_terminal)
    assert "held-out loss 3.2500 before the first step" in text
    assert (
        "step 3/9  loss 1.2346  held-out 2.5000  lr 0.0002  grad norm 0.5  2,000 tokens/s  MFU 44 %  1.00 GiB" in text
    )
    assert ("3.0 s left" in text) is not is_terminal, "the bar shows the time that is left"


def test_a_cpu_has_no_mfu() -> None:
    """No data sheet says what a CPU can do, and what it does in a short test is no limit: it came to over 100 %."""
    assert "MFU" not in shown(is_terminal=False, device_type="cpu")


@pytest.mark.parametrize(
    ("samples", "config", "said"),
    [
        (
            500,
            TrainConfig(),
            ["only 2 optimizer steps", "train.global_batch_size from 256 to 25", "train.epochs above 1"],
        ),
        (500, TrainConfig(epochs=3, global_batch_size=64), []),
        (500, TrainConfig(steps=2), []),
        (8, TrainConfig(global_batch_size=1), ["only 8 optimizer steps", "raise train.epochs above 1"]),
    ],
)
def test_few_steps_are_warned_of(samples: int, config: TrainConfig, said: list[str]) -> None:
    lengths = np.full(samples, 10)
    batches = GlobalBatches(samples, config.global_batch_size, 0, False)
    steps = config.steps or config.epochs * batches.steps_per_epoch
    plan = RunPlan(batches, steps, lengths, lengths, chunk_size=64, k=1)
    warning = few_steps_warning(plan, config)
    assert (warning is not None) == bool(said)
    for words in said:
        assert words in str(warning)


def test_the_summary_tells_samples_from_passes() -> None:
    report: dict[str, Any] = {
        "rows_read": 64, "samples_read": 64, "samples_to_train": 58, "samples_trained": 290, "samples_held_out": 6,
        "samples_rejected": 0, "samples_dropped": 0, "samples_truncated": 0, "epochs": 5.0, "eval_loss_start": None,
        "target_tokens_trained": 100, "target_tokens_planned": 100, "longest_sample": 9, "loss_first": 2.0,
        "loss_last": 1.0, "tokens_per_second": 10.0, "mfu": 2.0, "train_seconds": 3.0, "steps": 20, "chunks": 5,
        "chunk_size": 8, "recomputed_chunks": 0, "k": 1, "peak_memory_bytes": 1, "device": "cpu", "lora": False,
    }  # fmt: skip
    output = io.StringIO()
    print_training_summary(Console(file=output, width=120), report, Path("run"))
    text = output.getvalue()
    assert "64 read; 58 trained on in 5 epochs (290 passes), 6 held out" in text
    assert "MFU" not in text
