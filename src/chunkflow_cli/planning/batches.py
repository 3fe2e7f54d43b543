"""Choose the samples of each optimizer step as a pure function of seed, epoch and step: resuming needs no replay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GlobalBatches:
    """The global batches of a run. The last batch of an epoch may be smaller; no sample is left out."""

    samples: int
    global_batch_size: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in one epoch."""
        return -(-self.samples // self.global_batch_size)

    def __getitem__(self, step: int) -> NDArray[np.int64]:
        """Return the indices of a step's samples, (samples,). Steps are counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return _epoch_order(self, epoch)[start : start + self.global_batch_size].copy()  # the order itself is cached

    def step_of(self, sample: int) -> int:
        """Return the step of the first epoch that takes this sample."""
        return int(np.flatnonzero(_epoch_order(self, 0) == sample)[0]) // self.global_batch_size


@lru_cache(maxsize=2)
def _epoch_order(batches: GlobalBatches, epoch: int) -> NDArray[np.int64]:
    if not batches.shuffle:
        return np.arange(batches.samples)
    return np.random.default_rng((batches.seed, epoch)).permutation(batches.samples)


def held_out(samples: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the samples to train on and of those to hold out, each ascending.

    With more than one sample, a fraction above zero holds out at least one and leaves at least one.
    """
    if fraction == 0 or samples < 2:
        return np.arange(samples), np.arange(0)
    count = min(max(1, round(samples * fraction)), samples - 1)
    # A key of its own; otherwise the first epoch would be shuffled by the same numbers.
    order = np.random.default_rng((seed, 0x4E1D)).permutation(samples)
    return np.sort(order[count:]), np.sort(order[:count])
