"""Fits of costs to timed operations and of memory to peaks, and the calibration file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.calibration import (
    Calibration,
    MeasuredMemory,
    MemorySample,
    OperationSample,
    fit_costs,
    fit_memory,
)
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers

SHAPE = ModelShape(
    layers=2, hidden_size=8, intermediate_size=16, attention=(AttentionLayers(2, 2, 1, 4, 4),), vocab_size=32,
    matmul_parameters=1000, parameters=1200, trainable_parameters=1200, recurrent=RecurrentLayers(incomplete=((4, 8.0),)),
)  # fmt: skip
PLACES = [(size, past, share) for size in (64, 128, 256) for past in (0, size, 2 * size) for share in (1.0, 0.1)]


def samples_of(costs: CostModel, noise: np.ndarray | None = None) -> list[OperationSample]:
    """Return the timings of a device with exactly these costs, for the operations that `measure` times."""
    found = []
    for size, past, share in PLACES:
        tokens, pairs, targets = float(size), size * (past + size / 2), share * size
        for kind in "SFRB":
            cost = {"S": costs.state_pass, "F": costs.forward, "R": costs.recompute, "B": costs.backward}[kind]
            seconds = float(cost(np.array([tokens]), np.array([pairs]))[0])
            seconds += costs.seconds_per_target * targets if kind in "FR" else 0.0
            found.append(OperationSample(kind, tokens, pairs, targets, seconds))
    if noise is None:
        return found
    return [
        OperationSample(s.kind, s.tokens, s.pairs, s.targets, s.seconds * factor)
        for s, factor in zip(found, noise, strict=False)
    ]


coefficients = st.builds(
    OperationCost,
    st.floats(1e-4, 1e-1),
    st.floats(1e-6, 1e-3),
    st.floats(1e-9, 1e-6),
)


@given(forward=coefficients, backward=coefficients, state_pass=coefficients, target=st.floats(1e-6, 1e-3))
def test_a_fit_to_exact_timings_finds_the_costs(
    forward: OperationCost, backward: OperationCost, state_pass: OperationCost, target: float
) -> None:
    """A fit that does not find its own model in clean data cannot find it in measurements."""
    truth = CostModel("", forward, backward, forward, state_pass, seconds_per_target=target)
    found, worst = fit_costs(samples_of(truth), step_seconds=0.5, source="here")
    assert worst < 1e-6
    assert found.step_seconds == 0.5
    tokens, pairs = np.array([512.0]), np.array([512 * 4096.0])
    for name in ("forward", "backward", "recompute", "state_pass"):
        assert getattr(found, name)(tokens, pairs) == pytest.approx(getattr(truth, name)(tokens, pairs), rel=1e-4)
    assert found.seconds_per_target == pytest.approx(target, rel=1e-3)


@given(seed=st.integers(0, 1000))
def test_noise_never_makes_a_cost_negative(seed: int) -> None:
    """A negative coefficient would rank pairs by how noisy the machine was."""
    cost = OperationCost(1e-3, 1e-5, 0.0)  # pairs cost nothing: half of the time, noise would make their cost negative
    truth = CostModel("", cost, cost, cost, cost, seconds_per_target=0.0)
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, 4 * len(PLACES))
    found, worst = fit_costs(samples_of(truth, noise), step_seconds=0.0, source="")
    for each in (found.forward, found.backward, found.state_pass):
        assert min(each.fixed_seconds, each.seconds_per_token, each.seconds_per_pair) >= 0
    assert found.seconds_per_target >= 0
    assert 0 < worst < 0.5


def test_a_kind_that_was_not_timed_is_an_error() -> None:
    cost = OperationCost(1e-3, 1e-5, 0.0)
    only_forward = [s for s in samples_of(CostModel("", cost, cost, cost, cost)) if s.kind in "FR"]
    with pytest.raises(ValueError, match="no samples of one kind"):
        fit_costs(only_forward, step_seconds=0.0, source="")


def test_memory_is_a_line_above_the_state() -> None:
    """By hand: 1,000 bytes always, 10 per token, and the state on top; the optimizer step has a peak of its own."""
    memory = fit_memory(
        [MemorySample(tokens, 7 * tokens, 1000 + 10 * tokens + 7 * tokens) for tokens in (100, 200, 400)],
        step_peak_bytes=3100,
        activation_bytes_per_token=7,
    )
    assert memory.activation_bytes_per_token == pytest.approx(7)
    assert memory.running_bytes_per_token == pytest.approx(3)
    one = np.array([50])
    assert memory.peak_bytes(50, one, 0 * one) == 3100
    assert memory.peak_bytes(400, 8 * one, 0 * one) == pytest.approx(5000, abs=1)
    assert memory.peak_bytes(100, 8 * one, 0 * one) == pytest.approx(1000 + 400 * 7 + 100 * 3, abs=1)
    tokens = np.array([400, 100, 300])
    assert memory.peak_bytes(400, tokens, np.array([90, 2000, 1080])) == pytest.approx(5090, abs=1)
    assert memory.peak_bytes(400, tokens, np.array([90, 2000, 1200])) == pytest.approx(5200, abs=1)
    steeper = fit_memory(
        [MemorySample(tokens, 0, 10 * tokens) for tokens in (100, 200)],
        step_peak_bytes=0,
        activation_bytes_per_token=12,
    )
    assert steeper.activation_bytes_per_token == pytest.approx(10), "no more can be kept than the peaks rise by"
    with pytest.raises(ValueError, match="at least two chunk sizes"):
        fit_memory([MemorySample(100, 0, 2000)], step_peak_bytes=0, activation_bytes_per_token=1)


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    cost = OperationCost(1e-3, 1e-5, 1e-9)
    saved = Calibration(
        "a device", SHAPE, CostModel("here", cost, cost, cost, cost, 1e-6, 0.25), MeasuredMemory(1, 2, 3.5, 0.5), 0.1
    )
    path = tmp_path / "folder" / "calibration.json"
    assert Calibration.load(path) is None
    saved.save(path)
    assert Calibration.load(path) == saved
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing half-written is left"
    old = json.loads(path.read_text()) | {"version": 0}
    path.write_text(json.dumps(old))
    assert Calibration.load(path) is None, "a calibration of another version is measured again"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1', '"x"', "\xff\xfe"])
def test_a_damaged_calibration_is_none(text: str, tmp_path: Path) -> None:
    """It is measured again; a file that was cut must not stop every later search."""
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="latin-1")
    assert Calibration.load(path) is None


def test_a_calibration_without_one_of_its_parts_is_none(tmp_path: Path) -> None:
    cost = OperationCost(1e-3, 1e-5, 1e-9)
    costs = CostModel("here", cost, cost, cost, cost, 1e-6, 0.25)
    path = tmp_path / "calibration.json"
    Calibration("a device", SHAPE, costs, MeasuredMemory(1, 2, 3.5, 0.5), 0.1).save(path)
    whole = json.loads(path.read_text())
    for part in whole:
        for wrong in (None, "text", 3, {}):
            if part in ("device", "worst_error") and wrong is not None:
                continue
            damaged = {**whole, part: wrong} if wrong is not None else {k: v for k, v in whole.items() if k != part}
            path.write_text(json.dumps(damaged))
            assert Calibration.load(path) is None, (part, wrong)


def test_an_operation_that_was_disturbed_once_does_not_count() -> None:
    """Other work on the machine only adds time, so the faster of two equal operations counts."""
    cost = OperationCost(1e-3, 1e-5, 1e-9)
    truth = CostModel("", cost, cost, cost, cost, seconds_per_target=1e-6)
    clean = samples_of(truth)
    disturbed = [replace(sample, seconds=3 * sample.seconds) for sample in clean]
    found, worst = fit_costs([*disturbed, *clean], step_seconds=0.0, source="")
    assert worst < 1e-6
    assert found.backward.seconds_per_token == pytest.approx(1e-5, rel=1e-4)
