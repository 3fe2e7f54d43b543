"""The metrics of each step, and the files that they are written to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.errors import RunError
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
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Metrics of preferences, each written under its own name."""


@contextmanager
def metric_files(
    backends: Sequence[LogBackend], path: Path, first_step: int
) -> Iterator[Callable[[StepMetrics], None]]:
    """Open the metric files of a run, and yield a function that writes a row to all of them.

    Args:
        path: metrics.jsonl in the run's folder.
        first_step: rows of this step and later ones, which an earlier attempt has left, are dropped.

    Raises:
        RunError: metrics.jsonl holds something else, or cannot be written.
    """
    with ExitStack() as opened:
        jsonl = tensorboard = None
        if LogBackend.jsonl in backends:
            with _explained(path):
                _keep_rows_before(path, first_step)
                jsonl = opened.enter_context(path.open("ab", buffering=0))
        if LogBackend.tensorboard in backends:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]
            tensorboard = opened.enter_context(closing(writer))

        def write(row: StepMetrics) -> None:
            values = {name: value for name, value in asdict(row).items() if value is not None}
            values |= values.pop("rewards")
            if jsonl is not None:
                line = json.dumps(values).encode() + b"\n"
                with _explained(path):
                    if jsonl.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if tensorboard is not None:
                for name, value in values.items():
                    if name != "step":
                        tensorboard.add_scalar(f"train/{name}", value, row.step)

        yield write


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror}\n"
            "  make room, or make it writable; the same command goes on from the last checkpoint"
        ) from error


def _keep_rows_before(path: Path, first_step: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint, and an end that is half written.

    Raises:
        RunError: another line is not a row.
    """
    if not path.exists():
        return
    kept = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        step = _step_of(line)
        if step is None:
            raise RunError(
                f"{path}:{number} is not a row of metrics: the file is damaged, or of something else\n"
                "  move it away: the run goes on without the rows in it"
            )
        if step >= first_step:
            break
        kept.append(line.decode() + "\n")
    write_atomically(path, "".join(kept))


def _step_of(line: bytes) -> int | None:
    """Return the step of a row; None if the line is not a row."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
