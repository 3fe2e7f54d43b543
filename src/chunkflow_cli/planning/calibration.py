"""From measured operations to a cost model, from measured peaks to a memory model, and both to a file and back.

What is measured, and how, is in `measure`; here are only the fits, which need no device.
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

from chunkflow_cli.files import write_json
from chunkflow_cli.planning.costs import CostModel, ModelShape, OperationCost

CALIBRATION_VERSION = 4
"""Goes up when what is measured, or what is made of it, changes."""


@dataclass(frozen=True)
class OperationSample:
    """One operation that was timed."""

    kind: str
    """A letter of `OpKind`: S, F, R or B."""
    tokens: float
    pairs: float
    targets: float
    seconds: float


@dataclass(frozen=True)
class MemorySample:
    """The peak of a schedule with K = 1, in chunks of so many tokens, with so much state."""

    chunk_tokens: int
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of a rank: the larger of the optimizer step's peak and that of forward and backward.

    Against measured runs (SmolLM2-135M on a CPU, chunks of 256 to 4096, K 1 to 4; benchmarks/LOG.md): at most 10 % off.
    """

    step_peak_bytes: int
    base_bytes: int
    """All that does not depend on the chunks: weights, gradients, optimizer, libraries, one tile of logits."""
    activation_bytes_per_token: float
    """What the layers keep for backward: counted, for each token that holds activations."""
    running_bytes_per_token: float
    """What the one chunk that is running takes beside it: results on their way, and room that the allocator cannot use
    a second time."""

    def peak_bytes(
        self, chunk_size: int, activation_tokens: NDArray[np.float64], state_bytes: NDArray[np.float64]
    ) -> int:
        """Of a run over these sequences, each of which goes backward alone.

        Args:
            chunk_size: most tokens in a chunk.
            activation_tokens: (sequences,) tokens whose activations are held at once, K x chunk_size at most.
            state_bytes: (sequences,) keys, values and their gradients.
        """
        running = self.running_bytes_per_token * np.minimum(activation_tokens, chunk_size)
        chunks = self.base_bytes + running + self.activation_bytes_per_token * activation_tokens + state_bytes
        return int(max(self.step_peak_bytes, chunks.max()))


@dataclass(frozen=True)
class Calibration:
    """What was measured of one model on one device."""

    device: str
    shape: ModelShape
    costs: CostModel
    memory: MeasuredMemory
    worst_error: float
    """Largest relative error of the fitted seconds among the timed operations."""

    def save(self, path: Path) -> None:
        """Written aside and renamed: complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": CALIBRATION_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Calibration | None:
        """None if there is none, or if it is of another version."""
        if not path.exists():
            return None
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("version", None) != CALIBRATION_VERSION:
            return None
        costs = saved["costs"]
        costs["shape"] = None if costs["shape"] is None else ModelShape(**costs["shape"])
        for kind in ("forward", "backward", "recompute", "state_pass"):
            costs[kind] = OperationCost(**costs[kind])
        return cls(
            device=saved["device"],
            shape=ModelShape(**saved["shape"]),
            costs=CostModel(**costs),
            memory=MeasuredMemory(**saved["memory"]),
            worst_error=saved["worst_error"],
        )


def fit_costs(
    samples: Sequence[OperationSample], *, step_seconds: float, source: str, shape: ModelShape | None = None
) -> tuple[CostModel, float]:
    """The cost model that is closest to the samples in relative terms, and its largest relative error.

    Forward and recompute are the same work and share their coefficients, the seconds of a target included.

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
    """Coefficients of 1, tokens, pairs and targets, none negative, with the least sum of squared relative errors."""
    if not samples:
        raise ValueError("no samples of one kind of operation: nothing can be fitted")
    columns = range(4 if with_targets else 3)
    # Of operations that the model holds to be equal, the fastest: other work on the machine only adds.
    fastest: dict[tuple[float, ...], float] = {}
    for sample in samples:
        row = (1.0, sample.tokens, sample.pairs, sample.targets if with_targets else 0.0)
        fastest[row] = min(fastest.get(row, np.inf), sample.seconds)
    features, seconds = np.array(list(fastest)), np.array(list(fastest.values()))
    best = np.zeros(4)
    least = np.inf
    # Non-negative least squares over so few columns: the solution is the unconstrained one of some subset of them.
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
    """What brings features @ x closest to 1; columns are scaled first, for tokens and pairs differ by thousands."""
    scale = np.abs(features).max(axis=0)
    scale[scale == 0] = 1.0
    found, *_ = np.linalg.lstsq(features / scale, np.ones(len(features)), rcond=None)
    return np.asarray(found / scale, dtype=np.float64)


def fit_memory(
    samples: Sequence[MemorySample], *, step_peak_bytes: int, activation_bytes_per_token: float
) -> MeasuredMemory:
    """A line through the peaks without their state. With K = 1 a token of a chunk is retained and runs, both.

    Args:
        samples: of chunks of several sizes.
        step_peak_bytes: no run peaks below it.
        activation_bytes_per_token: what the layers keep, counted; what the line rises by beyond that is of running.

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
