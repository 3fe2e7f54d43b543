"""Length statistics, compared with plain Python over lists and with examples computed by hand; estimates of lengths."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chunkflow_cli.config.schema import DataFormat, TrainOn
from chunkflow_cli.data.estimate import estimate_sizes
from chunkflow_cli.data.lengths import (
    describe,
    histogram,
    idle_share,
    padding_share,
    short_count,
    truncation,
)
from chunkflow_cli.data.source import open_source

# Both sides of every threshold, and lengths whose sum overflows 32 bits.
LENGTH = st.one_of(
    st.integers(1, 40),
    st.sampled_from([k * 1024 + shift for k in (1, 4, 8, 32, 128) for shift in (-1, 0, 1)]),
    st.integers(1, 2**31),
)
LENGTHS = st.lists(LENGTH, min_size=1, max_size=60)
LIMITS = {"<1K": 1024, "<4K": 4096, "<8K": 8192, "<32K": 32768, "<128K": 131072}
SHARES = {"p50": Fraction(1, 2), "p90": Fraction(9, 10), "p99": Fraction(99, 100), "p999": Fraction(999, 1000)}


def array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# Statistics


def test_statistics_by_hand() -> None:
    """Ten lengths whose statistics can be read off."""
    found = describe(array([1024, 10, 1023, 4096, 20, 30, 9000, 40, 50, 131072]))
    assert (found.samples, found.tokens, found.max) == (10, 146365, 131072)
    assert found.mean == 14636.5
    assert found.quantiles == {"p50": 50, "p90": 9000, "p99": 131072, "p999": 131072}
    assert found.shorter == {"<1K": 0.6, "<4K": 0.7, "<8K": 0.8, "<32K": 0.9, "<128K": 0.9}
    assert found.tokens_in_shorter["<1K"] == (10 + 20 + 30 + 40 + 50 + 1023) / 146365


@given(LENGTHS)
@example([1023, 1024])
@example([131072])
def test_statistics_against_plain_python(lengths: list[int]) -> None:
    """A cumulative table that is off by one sample, or a sum that overflows, would go unnoticed on a screen."""
    found = describe(array(lengths))
    assert found.samples == len(lengths)
    assert found.tokens == sum(lengths)
    assert found.mean == pytest.approx(sum(lengths) / len(lengths))
    assert found.max == max(lengths)
    assert found.shorter == {
        name: sum(length < limit for length in lengths) / len(lengths) for name, limit in LIMITS.items()
    }
    assert found.tokens_in_shorter == pytest.approx(
        {name: sum(n for n in lengths if n < limit) / sum(lengths) for name, limit in LIMITS.items()}
    )


@given(LENGTHS)
def test_a_quantile_is_the_smallest_length_that_covers_its_share(lengths: list[int]) -> None:
    """Computed with exact fractions: in floating point, `ceil(0.9 * n)` can be one too large."""
    found = describe(array(lengths)).quantiles
    assert list(found) == list(SHARES)
    for name, share in SHARES.items():
        covering = [n for n in lengths if Fraction(sum(other <= n for other in lengths), len(lengths)) >= share]
        assert found[name] == min(covering)


@pytest.mark.parametrize("samples", [10, 100, 1000, 3000, 9990, 10_000, 100_000])
def test_quantiles_of_round_numbers_of_samples(samples: int) -> None:
    """For lengths 1 to n the quantile is ceil(share x n), even if share x n is a whole number."""
    found = describe(np.arange(samples, 0, -1)).quantiles
    assert found == {name: math.ceil(share * samples) for name, share in SHARES.items()}


def test_statistics_of_no_samples_are_an_error() -> None:
    """An average over nothing would be printed as nan."""
    with pytest.raises(ValueError, match="no samples"):
        describe(array([]))


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "1"), (512, "512"), (1024, "1K"), (1536, "1536"), (4096, "4K"), (131072, "128K"), (2**20, "1M"), (3 << 19, "1536K")],
)  # fmt: skip
def test_lengths_are_named_in_powers_of_two(tokens: int, name: str) -> None:
    """K is 1024 here: 4000 tokens are not `4K`."""
    assert short_count(tokens) == name


# Histogram


@given(LENGTHS)
def test_histogram_against_plain_python(lengths: list[int]) -> None:
    """Every sample and token is in exactly one bin. Edges are powers of two, and no bin is before or after the data."""
    found = histogram(array(lengths))
    edges = found.edges.tolist()
    assert edges == [2**power for power in range(min(lengths).bit_length() - 1, max(lengths).bit_length() + 1)]
    bins = list(itertools.pairwise(edges))
    assert found.samples.tolist() == [sum(low <= n < high for n in lengths) for low, high in bins]
    assert found.tokens.tolist() == [sum(n for n in lengths if low <= n < high) for low, high in bins]


def test_histogram_by_hand() -> None:
    """A power of two begins a bin. An empty bin between two others is kept."""
    found = histogram(array([4, 7, 8, 33]))
    assert found.edges.tolist() == [4, 8, 16, 32, 64]
    assert found.samples.tolist() == [2, 1, 0, 1]
    assert found.tokens.tolist() == [11, 8, 0, 33]


# Truncation, padding, waiting


@given(LENGTHS, st.integers(1, 5000))
def test_truncation_against_plain_python(lengths: list[int], limit: int) -> None:
    """A sample of exactly the limit is not cut. Only tokens beyond the limit are lost."""
    found = truncation(array(lengths), limit)
    assert found.limit == limit
    assert found.samples_cut == sum(n > limit for n in lengths)
    assert found.tokens_lost == sum(n - limit for n in lengths if n > limit)


@given(LENGTHS, st.integers(1, 9))
def test_padding_against_batches_that_are_padded(lengths: list[int], batch_size: int) -> None:
    """Builds each batch as a rectangle, including the last, smaller one."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    positions = sum(max(batch) * len(batch) for batch in batches)
    assert padding_share(array(lengths), batch_size) == pytest.approx(1 - sum(lengths) / positions)


def test_padding_by_hand() -> None:
    """Batches (4, 2) and (3): 2 of 8 + 3 positions are padding. In batches of one, none is."""
    assert padding_share(array([4, 2, 3]), 2) == pytest.approx(2 / 11)
    assert padding_share(array([4, 2, 3]), 1) == 0


def test_idle_share_by_hand() -> None:
    """Two steps of two ranks, with loads 4 and 2, then 1 and 5: 9 long, and 6 busy on average."""
    assert idle_share([np.array([4.0, 2.0]), np.array([1.0, 5.0])]) == pytest.approx(1 - 6 / 9)
    assert idle_share([np.array([3.0, 3.0, 3.0])]) == 0


def test_no_work_means_no_waiting() -> None:
    """Zero divided by zero."""
    assert idle_share([]) == idle_share([np.zeros(4)]) == 0


@given(st.lists(st.lists(st.integers(0, 100), min_size=3, max_size=3), min_size=1, max_size=6))
def test_idle_share_is_what_the_ranks_wait(loads: list[list[int]]) -> None:
    """Counts rank by rank: each waits from its own end to the end of the slowest."""
    waited = sum(max(step) - load for step in loads for load in step)
    room = sum(3 * max(step) for step in loads)
    assert idle_share([np.array(step, float) for step in loads]) == pytest.approx(waited / room if room else 0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The tide comes in twice a day, and each time it carries the small boats a little further up the beach, until the "
         "evening calm leaves them there.", 31),
        ("def tide(boats, days):\n    for day in range(days):\n        for boat in boats:\n            boat.position += 0.5 "
         "* boat.lift(day)\n    return [boat for boat in boats if boat.position > 3]\n", 54),
        ("Die Flut kommt zweimal am Tag und trägt die kleinen Boote jedes Mal etwas weiter den Strand hinauf, bis am Abend "
         "die Windstille eintritt und alles ruht.", 54),
        ("Прилив приходит дважды в день и каждый раз поднимает маленькие лодки чуть выше по берегу, пока вечерний штиль не "
         "оставит их там.", 94),
        ("潮水每天涨两次，每次都把小船往沙滩上再推一点，直到傍晚风平浪静时才把它们留在那里。", 86),
    ],
)  # fmt: skip
def test_estimates_of_other_scripts(text: str, tokens: int, tmp_path: Path) -> None:
    """The true numbers are those of SmolLM2's tokenizer, of which a Chinese character has two, and not 0.75."""
    path = tmp_path / "a.jsonl"
    for row, format in (
        ({"text": text * 50}, DataFormat.text),
        ({"messages": [{"role": "user", "content": text * 50}]}, DataFormat.messages),
    ):
        path.write_text(json.dumps(row))
        found = estimate_sizes(open_source(str(path)), format, train_on=TrainOn.all, progress=lambda _: None).lengths
        assert 0.67 < found.item() / (50 * tokens) < 1.25
