"""When each operation of a simulated or recorded step ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Timeline:
    """When each operation runs, as arrays with one row per operation, ordered by rank, then stage, then time.

    An operation on several chunks has one row per chunk.
    """

    ranks: int
    stages: int
    rank: NDArray[np.int64]
    stage: NDArray[np.int64]
    kind: NDArray[np.str_]
    """The letters of `OpKind`."""
    chunk: NDArray[np.int64]
    start_seconds: NDArray[np.float64]
    stop_seconds: NDArray[np.float64]

    @classmethod
    def of_rows(cls, ranks: int, stages: int, rows: Iterable[tuple[int, int, float, float, str, int]]) -> Timeline:
        """Return the timeline of ordered rows of rank, stage, start, stop, kind and chunk."""
        names = ("rank", "stage", "start_seconds", "stop_seconds", "kind", "chunk")
        table = np.array(list(rows), dtype=list(zip(names, ("i8", "i8", "f8", "f8", "U1", "i8"), strict=True)))
        return cls(ranks, stages, **{name: table[name] for name in names})

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop of any rank: all ranks meet at the optimizer step."""
        return float(self.stop_seconds.max(initial=0.0))

    @property
    def busy_seconds(self) -> NDArray[np.float64]:
        """(ranks, stages) seconds of operations, recompute included."""
        return self._sum(self.stop_seconds - self.start_seconds)

    @property
    def recompute_seconds(self) -> NDArray[np.float64]:
        """(ranks, stages)"""
        return self._sum(np.where(self.kind == "R", self.stop_seconds - self.start_seconds, 0.0))

    @property
    def bubble_ratio(self) -> float:
        """Share of the machine's time in which it runs nothing, between 0 and 1."""
        return self._idle_share(self.busy_seconds)

    @property
    def bubble_ratio_recompute_idle(self) -> float:
        """The bubble ratio with recompute counted as idle, because it is extra work: for comparing different K."""
        return self._idle_share(self.busy_seconds - self.recompute_seconds)

    @property
    def live_activations(self) -> NDArray[np.int64]:
        """(stages,) most chunks that hold activations at once, on any rank."""
        ones = np.ones(int(self.chunk.max(initial=-1)) + 1)
        most = [
            [self.live_bytes(rank, stage, ones)[1].max(initial=0) for stage in range(self.stages)]
            for rank in range(self.ranks)
        ]
        return np.asarray(np.max(most, axis=0), dtype=np.int64)

    def live_bytes(
        self, rank: int, stage: int, activation_bytes: ArrayLike, state_bytes: ArrayLike | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the seconds at which an operation of a stage starts or stops, and the bytes held from then on.

        Args:
            activation_bytes: (chunks,) held from the start of F or R to the end of B (of W, if split).
            state_bytes: (chunks,) held from the start of S or F to the end of B (of I, if split): keys and values,
                their gradients, and the input of the stage for a chunk that will be recomputed.
        """
        rows = np.flatnonzero((self.rank == rank) & (self.stage == stage))
        kind, chunk = self.kind[rows], self.chunk[rows]
        activations = np.asarray(activation_bytes, dtype=np.float64)[chunk]
        taken = np.where((kind == "F") | (kind == "R"), activations, 0.0)
        freed = np.where((kind == "B") | (kind == "W"), activations, 0.0)
        if state_bytes is not None:
            state = np.asarray(state_bytes, dtype=np.float64)[chunk]
            is_again = (kind == "F") & np.isin(chunk, chunk[kind == "P"])
            taken += np.where(((kind == "S") | (kind == "P") | (kind == "F")) & ~is_again, state, 0.0)
            freed += np.where((kind == "B") | (kind == "I"), state, 0.0)
        # A stage runs one operation after the other, so start, stop, start, stop... is already the order of time.
        seconds = np.stack([self.start_seconds[rows], self.stop_seconds[rows]], axis=1).ravel()
        return seconds, np.cumsum(np.stack([taken, -freed], axis=1).ravel())

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        place = self.rank * self.stages + self.stage
        sums = np.bincount(place, values, minlength=self.ranks * self.stages).astype(np.float64)
        return sums.reshape(self.ranks, self.stages)

    def _idle_share(self, busy: NDArray[np.float64]) -> float:
        room = self.ranks * self.stages * self.makespan
        return 1.0 - float(busy.sum()) / room if room else 0.0
