"""Metric rows and where they go; memory and the rate that MFU is measured against."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.files import write_atomically
from chunkflow_cli.model.device import known_matmul_flops


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
    """Held-out loss after this step, where one was taken."""


class MetricWriters:
    """Writes every row to all configured backends."""

    def __init__(self, backends: Sequence[LogBackend], run_folder: Path, first_step: int) -> None:
        """
        Args:
            backends: where rows go.
            run_folder: of this run.
            first_step: rows of this step and later ones, left by an earlier try, are dropped.
        """
        self._jsonl = None
        self._tensorboard: Any = None
        if LogBackend.jsonl in backends:
            path = run_folder / "metrics.jsonl"
            _keep_rows_before(path, first_step)
            self._jsonl = path.open("a", encoding="utf-8")
        if LogBackend.tensorboard in backends:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]

    def write(self, row: StepMetrics) -> None:
        values = {name: value for name, value in asdict(row).items() if value is not None}
        if self._jsonl is not None:
            self._jsonl.write(json.dumps(values) + "\n")
            self._jsonl.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if name != "step":
                    self._tensorboard.add_scalar(f"train/{name}", value, row.step)

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _keep_rows_before(path: Path, first_step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint, a half-written last line too."""
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


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory taken so far: of the device's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the device could do: its data sheet's figure, or the rate of a large product, measured.

    MFU is model operations over this. On a CPU it is measured in float32, the fastest that all of them have.
    """
    known = known_matmul_flops(device) if dtype in (torch.bfloat16, torch.float16) else None
    if known is not None:
        return known
    size = 4096 if device.type == "cuda" else 1536
    matrix = torch.randn(size, size, device=device, dtype=dtype if device.type == "cuda" else torch.float32)
    best = 0.0
    for _ in range(12):
        _synchronise(device)
        start = time.perf_counter()
        matrix @ matrix
        _synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
