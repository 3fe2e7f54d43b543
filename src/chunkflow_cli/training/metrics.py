"""The metrics of each step, and the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.files import write_atomically


@dataclass(frozen=True)
class StepMetrics:
    """One row of metrics.jsonl."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    target_tokens: int
    chunks: int
    recomputed_chunks: int
    step_seconds: float
    tokens_per_second: float
    mfu: float
    peak_memory_bytes: int
    eval_loss: float | None = None
    """Held-out loss after this step, if it was measured."""


@contextmanager
def metric_files(
    backends: Sequence[LogBackend], run_folder: Path, first_step: int
) -> Iterator[Callable[[StepMetrics], None]]:
    """Open the metric files of a run, and yield a function that writes a row to all of them.

    Args:
        first_step: rows of this step and later ones, which an earlier attempt has left, are dropped.
    """
    with ExitStack() as opened:
        jsonl = tensorboard = None
        if LogBackend.jsonl in backends:
            path = run_folder / "metrics.jsonl"
            _keep_rows_before(path, first_step)
            jsonl = opened.enter_context(path.open("a", encoding="utf-8"))
        if LogBackend.tensorboard in backends:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]
            tensorboard = opened.enter_context(closing(writer))

        def write(row: StepMetrics) -> None:
            values = {name: value for name, value in asdict(row).items() if value is not None}
            if jsonl is not None:
                jsonl.write(json.dumps(values) + "\n")
                jsonl.flush()
            if tensorboard is not None:
                for name, value in values.items():
                    if name != "step":
                        tensorboard.add_scalar(f"train/{name}", value, row.step)

        yield write


def _keep_rows_before(path: Path, first_step: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint, and a last line that is half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] >= first_step:
            break
        kept.append(line + "\n")
    write_atomically(path, "".join(kept))
