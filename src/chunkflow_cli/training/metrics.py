"""The metrics of each step, and metrics.jsonl, the file that they are written to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    fill: float | None = None
    """Share of the room in the chunks that tokens fill."""
    predicted_seconds: float | None = None
    """What the plan's costs predict for the step; None if they know no seconds."""
    eval_loss: float | None = None
    """Held-out loss after this step, if it was measured."""
    parts: dict[str, float] = field(default_factory=dict)
    """Losses of parts of the data, `loss/SOURCE`, `eval_loss/SOURCE` and `eval_loss/LENGTHS`, and metrics of
    preferences, by their names."""

    def values(self) -> dict[str, float]:
        """Return the numbers of the row by their names in metrics.jsonl, without those that were not measured."""
        values = {name: value for name, value in asdict(self).items() if name != "parts" and value is not None}
        return values | self.parts


@contextmanager
def metrics_file(
    backends: Sequence[LogBackend], path: Path, first_step: int
) -> Iterator[Callable[[StepMetrics], None]]:
    """Open metrics.jsonl, and yield a function that writes a row to it; without `jsonl` in `backends` it does nothing.

    Args:
        path: metrics.jsonl in the run's folder.
        first_step: rows of this step and later ones, which an earlier attempt has left, are dropped.

    Raises:
        RunError: metrics.jsonl holds something else, or cannot be written.
    """
    if LogBackend.jsonl not in backends:
        yield lambda row: None
        return
    with _explained(path):
        keep_rows_before(path, first_step)
        file = path.open("ab", buffering=0)

    def write(row: StepMetrics) -> None:
        line = json.dumps(row.values()).encode() + b"\n"
        with _explained(path):
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with file:
        yield write


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror}\n"
            "  make room, or make it writable; the same command resumes from the last checkpoint"
        ) from error


def keep_rows_before(path: Path, first_step: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint, and an end that is half written.

    Args:
        path: a file of JSON rows with a `step`; it need not be there.
        first_step: the step of the first row to drop.

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
                "  move it away: the run continues without the rows in it"
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
