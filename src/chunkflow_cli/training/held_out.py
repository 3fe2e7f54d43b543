"""The loss over held-out samples, on whatever layout trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkflow_cli.data.dataset import TokenizedData
from chunkflow_cli.engine import Processes
from chunkflow_cli.execution.runner import Interrupted, ScheduleRunner
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.planning.balance import balance
from chunkflow_cli.planning.chunks import build_chunks

GROUP = 256
"""Samples that are planned together."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples, and what runs them."""

    data: TokenizedData
    model: Any
    """What is put into evaluation mode meanwhile."""
    runner: ScheduleRunner
    processes: Processes
    chunk_size: int
    """Tokens on each rank: chunks are spread over the sequence-parallel group, if there is one."""
    is_in_lockstep: bool
    """Whether all ranks must run equally many forwards."""
    stop_requested: Callable[[], bool]
    """Asked after every group of samples; if one process is told to stop, all do."""

    def __len__(self) -> int:
        return len(self.data)

    def loss(self) -> float:
        """Token-mean loss over all samples, whatever the training loss weighs; the same on all processes.

        Raises:
            Interrupted: the user asked to stop.
        """
        self.model.eval()
        weight = 1.0 / int(self.data.target_counts.sum())
        total = sum(
            self._group_loss(np.arange(start, min(start + GROUP, len(self.data))), weight)
            for start in range(0, len(self.data), GROUP)
        )
        self.model.train()
        return total

    def _group_loss(self, samples: Any, weight: float) -> float:
        """
        Args:
            samples: (samples,) indices.
            weight: of a target.
        """
        topology, place = self.processes.topology, self.processes.place
        lengths = self.data.lengths[samples]
        shares = balance(lengths, topology.data)
        chunks = [build_chunks(lengths[share], self.chunk_size * topology.sequence) for share in shares]
        sequences = [self.data[int(sample)] for sample in samples[shares[place.data_rank]]]
        batch = StepBatch(chunks[place.data_rank], sequences, np.full(len(sequences), weight))
        is_whole, loss = True, 0.0
        try:
            loss = self.runner.evaluate(batch, forwards=max(map(len, chunks)) if self.is_in_lockstep else 0)
        except Interrupted:
            is_whole = False
        # All stages of a pipeline know its loss: one of them says it.
        loss, whole = self.processes.sum(loss if place.stage == 0 else 0.0, is_whole and not self.stop_requested())
        if whole < topology.processes:
            raise Interrupted
        return loss
