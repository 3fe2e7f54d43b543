"""The samples that are held out or drawn from a data set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.data.tokenized import drawn, held_out
from chunkflow_cli.planning.batches import GlobalBatches


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


def test_drawn_samples_are_exactly_as_many_as_asked() -> None:
    assert len(set(drawn(50, 20, 1).tolist())) == 20
    assert drawn(50, 20, 1).tolist() == drawn(50, 20, 1).tolist() == sorted(drawn(50, 20, 1).tolist())
    assert drawn(50, 20, 1).tolist() != drawn(50, 20, 2).tolist()
    assert drawn(5, 20, 1).tolist() == [0, 1, 2, 3, 4]
