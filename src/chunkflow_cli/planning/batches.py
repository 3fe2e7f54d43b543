"""Choose the samples of each optimizer step as a pure function of seed, epoch and step: resuming needs no replay.

Two decisions make a step. `_order` puts the samples of an epoch in a row, and `_cuts` cuts that row into steps: of
equally many samples, or of as many whole samples as fit a number of tokens.

Without weights, an epoch holds every sample once. With weights it holds as many samples as there are, and each source
has its share of them. Turns are dealt by the method of Sainte-Lague: the k-th sample of a source, counted from 0, comes
at time (k + 1/2) / weight. So the sources stay close to their shares in every step, not only in the mean. A source goes
through its samples in whole passes, each in an order of its own: none comes a third time before all have come twice.
Where an epoch ends in the middle of a pass, the next one goes on from there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightedSource:
    """Consecutive samples of the training data that are drawn with a weight of their own."""

    samples: int
    weight: float
    """Share of the samples drawn, relative to the other sources' weights."""


@dataclass(frozen=True, eq=False)
class GlobalBatches:
    """The global batches of a run. The last batch of an epoch may be smaller; no sample is left out."""

    samples: int
    global_batch_size: int | None
    """Samples in a step; None if `tokens` decides."""
    seed: int
    shuffle: bool
    sources: tuple[WeightedSource, ...] = ()
    """All samples, in order, if they are drawn by weight."""
    tokens: int | None = None
    """Most tokens of a step. A longer sample has a step of its own."""
    lengths: NDArray[np.int64] | None = None
    """(samples,) tokens of each sample; only needed with `tokens`."""
    _first_steps: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    """First step of each epoch that was asked for so far, and of the one after them. Only used with `tokens`."""

    def __post_init__(self) -> None:
        assert (self.global_batch_size is None) == (self.tokens is not None) == (self.lengths is not None)
        assert not self.sources or sum(source.samples for source in self.sources) == self.samples

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in the first epoch. With a number of tokens, others may have more or less."""
        return self.steps_of_epochs(1)

    def steps_of_epochs(self, epochs: int) -> int:
        """Return the number of optimizer steps in the first `epochs` epochs."""
        if self.global_batch_size is not None:
            return epochs * -(-self.samples // self.global_batch_size)
        while len(self._first_steps) <= epochs:
            self._first_steps.append(self._first_steps[-1] + len(_cuts(self, len(self._first_steps) - 1)) - 1)
        return self._first_steps[epochs]

    def epoch_and_position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the step's place in it; both are counted from 0."""
        if self.global_batch_size is not None:
            return divmod(step, self.steps_per_epoch)
        while self._first_steps[-1] <= step:
            self.steps_of_epochs(len(self._first_steps))
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def epochs_after(self, step: int) -> float:
        """Return the number of epochs that are done when `step` steps are."""
        epoch, position = self.epoch_and_position(step)
        return epoch + position / (self.steps_of_epochs(epoch + 1) - self.steps_of_epochs(epoch))

    def __getitem__(self, step: int) -> NDArray[np.int64]:
        """Return the indices of a step's samples, (samples,). Steps are counted from 0 over all epochs."""
        epoch, position = self.epoch_and_position(step)
        if self.global_batch_size is not None:
            start = position * self.global_batch_size
            stop = start + self.global_batch_size
        else:
            start, stop = _cuts(self, epoch)[position : position + 2].tolist()
        return _order(self, epoch)[start:stop].copy()  # the order itself is cached

    def step_of(self, sample: int, steps: int) -> int | None:
        """Return the first step that takes this sample; None if none of the first `steps` steps does."""
        epoch = 0
        while (first := self.steps_of_epochs(epoch)) < steps:
            places = np.flatnonzero(_order(self, epoch) == sample)
            if len(places):
                place = int(places[0])
                if self.global_batch_size is not None:
                    step = first + place // self.global_batch_size
                else:
                    step = first + int(np.searchsorted(_cuts(self, epoch), place, side="right")) - 1
                return step if step < steps else None
            epoch += 1
        return None

    @cached_property
    def turns(self) -> NDArray[np.int64]:
        """The weighted source of each sample of an epoch, (samples,); the same in every epoch."""
        weights = np.array([source.weight for source in self.sources])
        # A source gets its share to within one sample for each source.
        most = np.minimum(self.samples * weights / weights.sum() + len(weights) + 1, self.samples).astype(np.int64)
        owners = np.repeat(np.arange(len(weights)), most)
        times = np.concatenate([(np.arange(count) + 0.5) / weight for count, weight in zip(most, weights, strict=True)])
        return owners[np.argsort(times, kind="stable")[: self.samples]]

    @cached_property
    def draws_per_epoch(self) -> NDArray[np.int64]:
        """Samples of each weighted source in an epoch, (sources,)."""
        return np.bincount(self.turns, minlength=len(self.sources))

    @property
    def mean_samples(self) -> float:
        """Samples of a usual step."""
        return self.global_batch_size or self.samples / self.steps_per_epoch

    @cached_property
    def most_samples(self) -> int:
        """Samples that a step can hold at most."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        assert self.tokens is not None
        assert self.lengths is not None
        return max(1, self.tokens // max(1, int(self.lengths.min())))

    @cached_property
    def most_repeats(self) -> int:
        """How often a step can hold the same sample at most: more than once only if a small source is drawn often."""
        if not self.sources:
            return 1
        size, total = self.most_samples, sum(source.weight for source in self.sources)
        draws = [min(size, size * source.weight / total + len(self.sources) + 1) for source in self.sources]
        return max(1, *(-(-int(drawn) // source.samples) for drawn, source in zip(draws, self.sources, strict=True)))


@lru_cache(maxsize=2)
def _order(batches: GlobalBatches, epoch: int) -> NDArray[np.int64]:
    """Return the samples of an epoch in their order, (samples,)."""
    if batches.sources:
        return _weighted_order(batches, epoch)
    return _permutation(batches.samples, batches.shuffle, (batches.seed, epoch))


def _weighted_order(batches: GlobalBatches, epoch: int) -> NDArray[np.int64]:
    order = np.empty(batches.samples, np.int64)
    first = 0
    for number, source in enumerate(batches.sources):
        draws = int(batches.draws_per_epoch[number])
        start = epoch * draws
        passes = range(start // source.samples, -(-(start + draws) // source.samples))
        # A key of its own for each source: those of equal size would otherwise come in the same order.
        orders = [
            _permutation(source.samples, batches.shuffle, (batches.seed, each, 0x50CE + number)) for each in passes
        ]
        begin = start - passes.start * source.samples
        drawn = np.concatenate([*orders, np.arange(0)])[begin : begin + draws]
        order[batches.turns == number] = first + drawn
        first += source.samples
    return order


def _permutation(samples: int, shuffle: bool, key: Sequence[int]) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(samples) if shuffle else np.arange(samples)


@lru_cache(maxsize=2)
def _cuts(batches: GlobalBatches, epoch: int) -> NDArray[np.int64]:
    """Return where the steps of an epoch begin in its order, and where the last one ends, (steps + 1,)."""
    assert batches.tokens is not None
    assert batches.lengths is not None
    ends = np.cumsum(batches.lengths[_order(batches, epoch)])
    cuts, done = [0], 0
    while cuts[-1] < len(ends):
        fitting = int(np.searchsorted(ends, done + batches.tokens, side="right"))
        cuts.append(max(fitting, cuts[-1] + 1))
        done = int(ends[cuts[-1] - 1])
    return np.array(cuts)
