"""The samples of a step depend on seed, epoch and step alone."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from chunkflow_cli.planning.batches import GlobalBatches, WeightedSource


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


# --- Weighted sources ------------------------------------------------------------------------------------------------

SOURCES = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.25])), min_size=1, max_size=5)


def weighted(sources: list[tuple[int, float]], size: int, *, shuffle: bool = True, seed: int = 0) -> GlobalBatches:
    total = sum(samples for samples, _ in sources)
    return GlobalBatches(total, size, seed, shuffle, tuple(WeightedSource(*source) for source in sources))


def owners_of(sources: list[tuple[int, float]]) -> np.ndarray:
    return np.repeat(np.arange(len(sources)), [samples for samples, _ in sources])


@given(SOURCES, st.integers(1, 30), st.integers(0, 3))
@example([(1, 0.5), (1, 0.5), (1, 0.5), (1, 7.25), (3, 0.5)], 1, 0)
def test_weighted_sources_keep_their_shares_at_every_moment(
    sources: list[tuple[int, float]], size: int, seed: int
) -> None:
    """A share that holds only in the mean lets a loss curve show the mixture and not the model."""
    batches, owners = weighted(sources, size, seed=seed), owners_of(sources)
    taken = owners[np.array(epoch_of(batches, 0))]
    assert len(taken) == batches.samples
    shares = np.array([weight for _, weight in sources]) / sum(weight for _, weight in sources)
    counts = np.cumsum(taken[:, None] == np.arange(len(sources)), axis=0)
    # Each source is within half a sample of its share of the time passed, so all of them together are within half a
    # sample for each source of that time.
    furthest = (1 + shares * len(sources)) / 2
    # Sainte-Lague, by its definition: the next sample is of the source with the largest weight / (2 x samples + 1).
    truth = np.zeros(len(sources), int)
    for place in range(len(taken)):
        truth[np.argmax(shares / (2 * truth + 1) * (1 + 1e-12 * np.arange(len(sources), 0, -1)))] += 1
        assert np.abs(counts[place] - truth).max() <= 1, "only ties may fall otherwise"
        assert (np.abs(counts[place] - shares * (place + 1)) <= furthest + 1e-9).all()


@given(SOURCES, st.integers(1, 30), st.booleans())
def test_sources_are_repeated_in_whole_passes(sources: list[tuple[int, float]], size: int, shuffle: bool) -> None:
    """No sample a third time before all of its source have come twice, also over the ends of epochs."""
    batches, owners = weighted(sources, size, shuffle=shuffle), owners_of(sources)
    stream = np.array([sample for epoch in range(4) for sample in epoch_of(batches, epoch)])
    for number, (samples, _) in enumerate(sources):
        own = stream[owners[stream] == number]
        passes = [own[start : start + samples] for start in range(0, len(own), samples)]
        for one in passes:
            assert len(set(one.tolist())) == len(one)
        if not shuffle:
            assert all(one.tolist() == (passes[0][: len(one)]).tolist() for one in passes)
        elif samples > 20 and len(passes) > 2:
            assert passes[0].tolist() != passes[1].tolist(), "each pass has an order of its own"


def test_weighted_batches_are_a_function_of_the_step() -> None:
    """A resumed run asks for its first step without having asked for those before it."""
    sources = [(30, 1.0), (5, 2.0)]
    asked = [weighted(sources, 8, seed=3)[step].tolist() for step in (13, 2, 7)]
    batches = weighted(sources, 8, seed=3)
    assert asked == [[batches[step].tolist() for step in range(20)][step] for step in (13, 2, 7)]
    assert batches.step_of(4, 20) == next(step for step in range(20) if 4 in batches[step])
    assert batches.step_of(4, 0) is None
    assert max(np.bincount(batches[step]).max() for step in range(20)) <= batches.most_repeats


# --- Batches by tokens -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.booleans(), st.integers(0, 2))
def test_steps_of_tokens_hold_as_many_whole_samples_as_fit(
    lengths: list[int], tokens: int, shuffle: bool, weighting: int
) -> None:
    """Against the definition, sample by sample: a step ends before the sample that would exceed the tokens."""
    half = len(lengths) // 2
    sources = [] if weighting == 0 or half == 0 else [(half, 2.0), (len(lengths) - half, 1.0)]
    made = tuple(WeightedSource(*source) for source in sources)
    by_size = GlobalBatches(len(lengths), 1, 0, shuffle, made)
    batches = GlobalBatches(len(lengths), None, 0, shuffle, made, tokens, np.array(lengths))
    expected: list[list[int]] = []
    firsts = [0]
    for epoch in range(3):
        step: list[int] = []
        for sample in epoch_of(by_size, epoch):
            if step and sum(lengths[other] for other in step) + lengths[sample] > tokens:
                expected.append(step)
                step = []
            step.append(sample)
        expected.append(step)
        firsts.append(len(expected))
    middle = len(expected) // 2
    fresh = GlobalBatches(len(lengths), None, 0, shuffle, made, tokens, np.array(lengths))
    assert fresh[middle].tolist() == expected[middle], "a resumed run begins anywhere"
    assert [batches[step].tolist() for step in range(len(expected))] == expected
    assert [batches.steps_of_epochs(epochs) for epochs in range(4)] == firsts
    assert [batches.epochs_after(first) for first in firsts] == [0, 1, 2, 3]
    assert max(map(len, expected)) <= batches.most_samples
    assert batches.step_of(0, len(expected)) == next((i for i, step in enumerate(expected) if 0 in step), None)
