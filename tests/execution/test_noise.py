"""Noise in the embeddings: what a plain loop over whole sequences computes that adds the same noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.noise import SequenceNoise, TokenNoise
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import cut_layers
from support.exact import float64_throughout

CPU = torch.device("cpu")
LENGTHS = (50, 7, 37, 12, 5)
ALPHA = 5.0
NOISE = SequenceNoise.of_step(ALPHA, 0, 3, (8, 1, 6, 2, 9))


def noise_of(sequence: int, width: int) -> Tensor:
    """Return the noise of a whole sequence, (tokens, width)."""
    tokens = LENGTHS[sequence]
    keys = NOISE.keys_of(np.full(tokens, sequence), np.arange(tokens))
    noise = TokenNoise(torch.from_numpy(keys), torch.full((tokens,), ALPHA / tokens**0.5, dtype=torch.float32))
    return noise.of(torch.zeros(1, tokens, width, dtype=torch.float64))[0]


@pytest.mark.parametrize(("size", "k", "stages"), [(16, 1, 1), (23, 2, 1), (99, 1, 1), (16, 1, 2)])
@pytest.mark.parametrize("model_type", ["llama", "gemma"])  # gemma's embedding also scales
def test_training_with_noise(size: int, k: int, stages: int, model_type: str, tiny_model: Callable[..., Any]) -> None:
    with float64_throughout():
        attention.register()
        whole = tiny_model(model_type, dtype=torch.float64, num_hidden_layers=2)
        sequences = random_sequences(LENGTHS, 96, seed=1)
        chunked = copy.deepcopy(whole)
        chunked.set_attn_implementation(attention.NAME)
        if stages == 1:
            module: Any = ChunkModel(chunked, ReferenceBackend())
        else:
            cut = cut_layers(2, stages)
            module = StageChain([StageModel(copy.deepcopy(chunked), ReferenceBackend(), layers) for layers in cut])
        chunks = build_chunks(LENGTHS, size)
        batch = StepBatch(chunks, sequences, np.full(5, 1 / 100), noise=NOISE)
        loss = Runner(DirectEngine(module), RunnerSettings(CPU, torch.float64)).run((plan(chunks, k),), batch).loss
        found = {name: p.grad for name, p in chunked.named_parameters()} if stages == 1 else module.gradients()

        expected = torch.zeros((), dtype=torch.float64)
        for i, sequence in enumerate(sequences):
            embeddings = whole.get_input_embeddings()(torch.from_numpy(sequence.input_ids.astype(np.int64))[None])
            logits = whole(inputs_embeds=embeddings + noise_of(i, embeddings.shape[-1])).logits[0]
            targets = torch.from_numpy(sequence.targets.astype(np.int64))
            expected = expected + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 100
        expected.backward()  # type: ignore[no-untyped-call]
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        for name, parameter in whole.named_parameters():
            assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-12), name


def test_noise_is_uniform_and_its_numbers_are_independent() -> None:
    """Of NEFTune's size, and without a correlation of neighbours: channels, positions, samples, steps."""
    width, tokens = 256, 50
    unit = noise_of(0, width) * (tokens * width) ** 0.5 / ALPHA
    assert unit.abs().max() <= 1
    histogram = torch.histc(unit, 16, -1, 1) / unit.numel()
    assert (histogram - 1 / 16).abs().max() < 0.008  # four standard deviations of 12,800 draws
    others = [unit[:, 1:].flatten(), unit[1:].flatten()]
    for noise in (SequenceNoise.of_step(ALPHA, 0, 4, (8,)), SequenceNoise.of_step(ALPHA, 0, 3, (7,))):
        keys = torch.from_numpy(noise.keys_of(np.zeros(tokens, dtype=np.int64), np.arange(tokens)))
        others.append(TokenNoise(keys, torch.ones(tokens)).of(torch.zeros(1, tokens, width))[0].flatten())
    for other in others:
        own = (unit[:, :-1] if len(other) == tokens * (width - 1) else unit).flatten()[: len(other)]
        assert abs(torch.corrcoef(torch.stack([own, other.to(own)]))[0, 1]) < 0.04
    again = SequenceNoise.of_step(ALPHA, 0, 3, (2, 8))  # another rank, with other samples beside
    assert again.keys[1] == NOISE.keys[0]
