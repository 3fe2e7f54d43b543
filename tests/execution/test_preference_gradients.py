"""Preferences: chunked gradients against autograd of the loss over whole sequences, and losses against TRL's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import PreferenceConfig, PreferenceLoss, Task
from chunkflow_cli.execution import chunk_model
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.loss import log_probabilities
from chunkflow_cli.execution.parity import DirectEngine, InChunks, compare, random_sequences, use_implementation
from chunkflow_cli.execution.preference_parity import preference_batch
from chunkflow_cli.execution.preferences import Known, Sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings
from chunkflow_cli.planning.chunks import build_chunks

OBJECTIVES = {
    "sigmoid": Objective(Task.dpo, PreferenceConfig(label_smoothing=0.1)),
    "ipo, imitating": Objective(Task.dpo, PreferenceConfig(loss=PreferenceLoss.ipo, nll_weight=0.3)),
    "simpo": Objective(Task.dpo, PreferenceConfig(loss=PreferenceLoss.simpo, beta=2.0, gamma=0.7, label_smoothing=0.1)),
    "orpo": Objective(Task.orpo, PreferenceConfig()),
    "kto": Objective(Task.kto, PreferenceConfig(desirable_weight=1.5)),
}
LENGTHS = (90, 70, 12, 9, 25, 20, 8, 75)
"""Two long answers; a pair that shares a chunk; two that fill a chunk each; a short and a long one."""


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_in_chunks_are_those_of_whole_sequences(
    tiny_model: Callable[..., Any], name: str, k: int, share_prompts: bool
) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    parity = compare(
        model,
        random_sequences(LENGTHS, 96),
        InChunks(ReferenceBackend(), chunk_size=32, k=k, objective=OBJECTIVES[name], share_prompts=share_prompts),
    )
    assert parity.passed, parity


@pytest.mark.parametrize("window", [9, 25, 33])
def test_an_answer_longer_than_the_window_does_not_see_the_shared_prompt(
    tiny_model: Callable[..., Any], window: int
) -> None:
    """Its later chunks see nothing of the prompt, of which the other answer's state holds a block that goes on."""
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=window)
    parity = compare(
        model, random_sequences((90, 80, 40, 40), 96), InChunks(CpuBackend(), chunk_size=16, k=1,
        objective=OBJECTIVES["sigmoid"]),
    )  # fmt: skip
    assert parity.passed, parity


def test_a_dummy_in_lockstep_runs_the_head_as_other_chunks_do(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 fetches the head's weights from all ranks at its first use: one that left it out would never send them."""
    model, objective = tiny_model("llama", dtype=torch.float64), OBJECTIVES["simpo"]
    sequences = Sequences.of(random_sequences((20, 30), 96), objective)
    known = Known(sequences.counts, None, None, samples=1)
    used: list[int] = []

    def counting(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        used.append(len(hidden))
        return log_probabilities(hidden, *others)

    monkeypatch.setattr(chunk_model, "log_probabilities", counting)
    with use_implementation(model, attention.NAME):
        settings = RunnerSettings(torch.device("cpu"), torch.float64, lockstep=True)
        runner = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), settings)
        sums = []
        for forwards in (0, 3):
            batch = preference_batch(build_chunks([20, 30], 50), objective, sequences, known, torch.device("cpu"))
            assert batch.preferences is not None
            runner.evaluate(batch, forwards=forwards)
            sums.append(batch.preferences.whole_sums()[0].tolist())
    answers = int(sequences.counts.sum())
    assert used == [answers, answers, 1, 1]
    assert sums[0] == sums[1]
