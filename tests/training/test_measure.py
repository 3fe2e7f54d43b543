"""Measuring chunks ends at the first size that does not fit into the device's memory, and keeps what it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.training.measure import calibrate, compare

SMALL = 64


@pytest.fixture
def config(tmp_path: Any) -> Config:
    words = ["recipe=tiny_random", "data.num_workers=1", f"data.cache_dir={tmp_path}", "train.global_batch_size=32"]
    return load(words).config


def limit_memory(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Make operations over more tokens than `largest` fail as they do on a full GPU."""
    plain = Runner.run

    def run(self: Runner, schedules: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = batch.chunks
        if max(stop - start for start, stop in zip(chunks.start, chunks.stop, strict=True)) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return plain(self, schedules, batch, *args, **kwargs)

    monkeypatch.setattr(Runner, "run", run)


def test_the_first_size_that_does_not_fit_ends_the_measuring(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The search ended with an error of CUDA at the first large chunk, after minutes of measuring."""
    limit_memory(monkeypatch, SMALL)
    found = calibrate(config, [16, 32, SMALL, 128, 256], budget_seconds=60)
    assert found.costs.forward.seconds_per_token >= 0
    assert found.memory.base_bytes > 0
    err = capfd.readouterr().err
    assert "chunks of 128 tokens do not fit into the memory of this device (3 of one sequence): their costs" in err
    assert "predicted from those of 16, 32, 64\n" in err
    assert "256" not in err
    assert list(compare(config, [(32, 1), (128, 1)], step=0)) == [(32, 1)]
    assert "chunk.size=128 chunk.k=1 does not fit into the memory of this device\n" in capfd.readouterr().err


@pytest.mark.parametrize("largest", [8, 16])
def test_too_few_sizes_that_fit_are_named(largest: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, largest)
    with pytest.raises(UsageError, match=r"chunks of (16|32) tokens do not fit.*: CUDA out of memory.*2.00 GiB.\n"):
        calibrate(config, [16, 32], budget_seconds=60)


def test_no_pair_that_fits_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that was seen not to fit must not be recommended."""
    plain = Runner.run
    calls = []

    def run(self: Runner, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:  # after the warm-up
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "run", run)
    with pytest.raises(UsageError, match="none of the best pairs fits into the memory"):
        compare(config, [(32, 1), (64, 1)], step=0)
