"""The samples of a step depend on seed, epoch and step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.batches import GlobalBatches, held_out


def epoch_of(batches: GlobalBatches, epoch: int) -> list[int]:
    first = epoch * batches.steps_per_epoch
    return np.concatenate([batches[step] for step in range(first, first + batches.steps_per_epoch)]).tolist()


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.booleans(), st.integers(0, 3))
def test_every_sample_once_an_epoch(samples: int, size: int, seed: int, shuffle: bool, epoch: int) -> None:
    """A sample missing from the last, partial batch is never trained on; one taken twice counts twice."""
    batches = GlobalBatches(samples, size, seed, shuffle)
    assert sorted(epoch_of(batches, epoch)) == list(range(samples))


def test_last_batch_of_an_epoch_is_smaller() -> None:
    """The partial batch ends the epoch; it must not be filled from the next one."""
    batches = GlobalBatches(samples=10, global_batch_size=4, seed=0, shuffle=True)
    assert batches.steps_per_epoch == 3
    assert [len(batches[step]) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def test_batch_larger_than_the_data_holds_all_samples() -> None:
    """With global_batch_size above the number of samples, an epoch is one step, not an empty one."""
    batches = GlobalBatches(samples=3, global_batch_size=8, seed=0, shuffle=False)
    assert batches.steps_per_epoch == 1
    assert batches[0].tolist() == batches[5].tolist() == [0, 1, 2]


def test_unshuffled_batches_follow_the_data() -> None:
    """`train.shuffle=false` means the order of the file, in every epoch."""
    batches = GlobalBatches(samples=5, global_batch_size=2, seed=3, shuffle=False)
    assert [batches[step].tolist() for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_batches_do_not_depend_on_the_order_of_requests() -> None:
    """A resumed run may ask for step 7 first; it must get the same samples as the uninterrupted run."""
    first, second = (GlobalBatches(samples=100, global_batch_size=8, seed=7, shuffle=True) for _ in range(2))
    forwards = [first[step].tolist() for step in range(40)]
    backwards = [second[step].tolist() for step in reversed(range(40))]
    assert forwards == backwards[::-1]


def test_order_depends_on_seed_and_epoch() -> None:
    """One permutation for all epochs, or for all seeds, would go unnoticed in a loss curve."""
    batches = GlobalBatches(samples=100, global_batch_size=8, seed=1, shuffle=True)
    other = GlobalBatches(samples=100, global_batch_size=8, seed=2, shuffle=True)
    orders = [epoch_of(batches, 0), epoch_of(batches, 1), epoch_of(batches, 2), epoch_of(other, 0), epoch_of(other, 1)]
    assert len({tuple(order) for order in [*orders, list(range(100))]}) == 6


def test_order_does_not_depend_on_the_batch_size() -> None:
    """Runs with other batch sizes see the samples in the same order, so they can be compared."""
    small, large = (GlobalBatches(samples=50, global_batch_size=size, seed=1, shuffle=True) for size in (3, 50))
    assert epoch_of(small, 2) == epoch_of(large, 2)


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 5))
def test_held_out_is_disjoint_and_complete(samples: int, fraction: float, seed: int) -> None:
    """A sample on both sides would falsify the held-out loss; one on neither side would be lost."""
    train, held = held_out(samples, fraction, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(samples))
    assert train.tolist() == sorted(train.tolist())
    assert held.tolist() == sorted(held.tolist())
    if samples > 1 and fraction > 0:
        assert len(train) >= 1
        assert len(held) >= 1


@pytest.mark.parametrize(
    ("samples", "fraction", "count"),
    [(100, 0.1, 10), (100, 0.001, 1), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0), (9, 0.0, 0)],
)
def test_held_out_count(samples: int, fraction: float, count: int) -> None:
    """The requested share, but at least one of two or more samples, and never all."""
    assert len(held_out(samples, fraction, 0)[1]) == count


def test_held_out_depends_on_the_seed_only() -> None:
    """A resumed run must not train on what it held out before."""
    assert held_out(100, 0.1, 3)[1].tolist() == held_out(100, 0.1, 3)[1].tolist()
    assert held_out(100, 0.1, 3)[1].tolist() != held_out(100, 0.1, 4)[1].tolist()


def test_held_out_is_not_the_start_of_the_first_epoch() -> None:
    """Drawn with the same random numbers as the first epoch, the held-out set would be its first batch."""
    batches = GlobalBatches(samples=100, global_batch_size=10, seed=5, shuffle=True)
    assert set(batches[0].tolist()) != set(held_out(100, 0.1, 5)[1].tolist())
