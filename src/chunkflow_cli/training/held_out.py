"""The loss of held-out samples, on the layout that trains."""

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
"""Number of samples that are planned together."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples, and everything needed to compute their loss."""

    data: TokenizedData
    model: Any
    """The model, which is in evaluation mode while the loss is computed."""
    runner: ScheduleRunner
    processes: Processes
    chunk_size: int
    """Tokens of a chunk on each rank; a sequence-parallel group shares chunks of this size times its ranks."""
    is_in_lockstep: bool
    """True if all ranks must run the same number of forwards."""
    stop_requested: Callable[[], bool]
    """Called after every group of samples; if it returns True on one process, all processes stop."""

    def __len__(self) -> int:
        return len(self.data)

    def loss(self) -> float:
        """Return the mean loss per target token, the same on all processes. Every process calls it.

        `train.loss_weighting` has no influence on it.

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
        """Return the loss of the samples with these indices, summed over all processes, with `weight` per target."""
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
        # All stages of a pipeline know its loss: only the first stage counts it.
        loss, whole = self.processes.sum(loss if place.stage == 0 else 0.0, is_whole and not self.stop_requested())
        if whole < topology.processes:
            raise Interrupted
        return loss
