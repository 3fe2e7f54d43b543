"""Fit a cost model to timed operations and a memory model to measured peaks, and keep both in a file.

`training.measure` takes the measurements; the fits need no device.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.files import to_be_writable, write_json
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers

CALIBRATION_VERSION = 7
"""Version of calibration files. Increase it when the measurements or the fits change."""


@dataclass(frozen=True)
class OperationSample:
    """A timed operation."""

    kind: str
    """Letter of the `OpKind`: S, F, R or B."""
    tokens: float
    pairs: float
    targets: float
    seconds: float


@dataclass(frozen=True)
class MemorySample:
    """The measured peak of a schedule with K = 1."""

    chunk_tokens: int
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class MeasuredMemory:
    """A memory model of a rank: its peak is that of the optimizer step or that of the chunks, whichever is larger.

    Accuracy: within 10 % of measured runs (SmolLM2-135M on a CPU, chunks of 256 to 4096, K of 1 to 4;
    benchmarks/LOG.md).
    """

    step_peak_bytes: int
    base_bytes: int
    """Bytes that do not depend on the chunks: weights, gradients, optimizer, libraries, one tile of logits."""
    activation_bytes_per_token: float
    """Bytes that the layers keep for backward, for each token that holds activations; counted, not measured."""
    running_bytes_per_token: float
    """Extra bytes per token of the running chunk: temporary results, and memory that the allocator cannot reuse."""

    def peak_bytes(
        self, chunk_size: int, activation_tokens: NDArray[np.float64], state_bytes: NDArray[np.float64]
    ) -> int:
        """Predict the peak of a run over sequences that go backward one at a time.

        Args:
            chunk_size: most tokens in a chunk.
            activation_tokens: (sequences,) tokens whose activations are held at once, at most K x chunk_size.
            state_bytes: (sequences,) bytes of the state store.
        """
        running = self.running_bytes_per_token * np.minimum(activation_tokens, chunk_size)
        chunks = self.base_bytes + running + self.activation_bytes_per_token * activation_tokens + state_bytes
        return int(max(self.step_peak_bytes, chunks.max()))


@dataclass(frozen=True)
class Calibration:
    """The measured costs and memory of one model on one device."""

    device: str
    shape: ModelShape
    costs: CostModel
    memory: MeasuredMemory
    worst_error: float
    """Largest relative error of the fitted seconds among the timed operations."""

    def save(self, path: Path) -> None:
        """Write the calibration to a file, which is complete or absent at any time.

        Raises:
            UsageError: the file cannot be written.
        """
        with to_be_writable(f"the calibration {path}", "set data.cache_dir to a folder that you can write to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": CALIBRATION_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Calibration | None:
        """Read a calibration; None if the file does not exist, is damaged or has another version."""
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if saved.pop("version", None) != CALIBRATION_VERSION:
                return None
            costs = saved["costs"]
            costs["shape"] = None if costs["shape"] is None else _shape(costs["shape"])
            for kind in ("forward", "backward", "recompute", "state_pass"):
                costs[kind] = OperationCost(**costs[kind])
            return cls(
                device=saved["device"],
                shape=_shape(saved["shape"]),
                costs=CostModel(**costs),
                memory=MeasuredMemory(**saved["memory"]),
                worst_error=saved["worst_error"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _shape(saved: dict[str, Any]) -> ModelShape:
    attention = tuple(AttentionLayers(**part) for part in saved["attention"])
    incomplete = tuple(tuple(part) for part in saved["recurrent"]["incomplete"])
    recurrent = RecurrentLayers(**{**saved["recurrent"], "incomplete": incomplete})
    return ModelShape(**{**saved, "attention": attention, "recurrent": recurrent})


def fit_costs(
    samples: Sequence[OperationSample], *, step_seconds: float, source: str, shape: ModelShape | None = None
) -> tuple[CostModel, float]:
    """Return the cost model with the least squared relative errors, and its largest relative error.

    Forward and recompute are the same work and share their coefficients, including the seconds per target.

    Raises:
        ValueError: a kind of operation was not timed.
    """
    forward, forward_error = _fit([sample for sample in samples if sample.kind in "FR"], with_targets=True)
    backward, backward_error = _fit([sample for sample in samples if sample.kind == "B"])
    state_pass, state_error = _fit([sample for sample in samples if sample.kind == "S"])
    first = OperationCost(*forward[:3])
    costs = CostModel(
        source=source,
        forward=first,
        backward=OperationCost(*backward[:3]),
        recompute=first,
        state_pass=OperationCost(*state_pass[:3]),
        seconds_per_target=forward[3],
        step_seconds=step_seconds,
        shape=shape,
    )
    return costs, max(forward_error, backward_error, state_error)


def _fit(samples: Sequence[OperationSample], *, with_targets: bool = False) -> tuple[list[float], float]:
    """Return non-negative coefficients of 1, tokens, pairs and targets with the least squared relative errors."""
    if not samples:
        raise ValueError("no samples of one kind of operation: nothing can be fitted")
    columns = range(4 if with_targets else 3)
    # Of operations that the model does not distinguish, use the fastest: other work on the machine only adds time.
    fastest: dict[tuple[float, ...], float] = {}
    for sample in samples:
        row = (1.0, sample.tokens, sample.pairs, sample.targets if with_targets else 0.0)
        fastest[row] = min(fastest.get(row, np.inf), sample.seconds)
    features, seconds = np.array(list(fastest)), np.array(list(fastest.values()))
    best = np.zeros(4)
    least = np.inf
    # Non-negative least squares: the solution is the unconstrained one for some subset of the few columns.
    for count in range(1, len(columns) + 1):
        for subset in itertools.combinations(columns, count):
            found = _least_squares(features[:, subset] / seconds[:, None])
            if (found < 0).any():
                continue
            candidate = np.zeros(4)
            candidate[list(subset)] = found
            error = float(((features @ candidate / seconds - 1) ** 2).sum())
            if error < least:
                best, least = candidate, error
    return best.tolist(), float(np.abs(features @ best / seconds - 1).max())


def _least_squares(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the x that brings features @ x closest to 1. Columns are scaled first: tokens and pairs differ a lot."""
    scale = np.abs(features).max(axis=0)
    scale[scale == 0] = 1.0
    found, *_ = np.linalg.lstsq(features / scale, np.ones(len(features)), rcond=None)
    return np.asarray(found / scale, dtype=np.float64)


def fit_memory(
    samples: Sequence[MemorySample], *, step_peak_bytes: int, activation_bytes_per_token: float
) -> MeasuredMemory:
    """Fit a line through the peaks without their state. With K = 1, a chunk's tokens are both retained and running.

    Args:
        step_peak_bytes: peak of the optimizer step; no run peaks below it.
        activation_bytes_per_token: counted bytes that the layers keep; the rest of the slope is due to running.

    Raises:
        ValueError: fewer than two different numbers of tokens were measured.
    """
    tokens = np.array([sample.chunk_tokens for sample in samples], dtype=np.float64)
    if len(np.unique(tokens)) < 2:
        raise ValueError("the memory of at least two chunk sizes must be measured")
    without_state = np.array([sample.peak_bytes - sample.state_bytes for sample in samples], dtype=np.float64)
    slope, intercept = np.polyfit(tokens, without_state, 1)
    slope = max(0.0, float(slope))
    kept = min(slope, activation_bytes_per_token)
    return MeasuredMemory(step_peak_bytes, int(intercept), kept, slope - kept)
