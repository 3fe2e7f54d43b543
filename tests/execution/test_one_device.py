"""Everything that a step computes is on its device: on a CPU alone, a tensor that was made elsewhere would not show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_cli.config.schema import Attention, OffloadState
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences, use_implementation
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.execution.state_home import state_home
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import cut_layers
from support.models import BEYOND, MODELS, SHAPES, recurrent_model
from support.two_memories import DEVICE, HOST, TwoMemories

LENGTHS, SIZE, BLOCK = (40, 9, 1, 17), 16, 10


@pytest.mark.parametrize(
    ("name", "state", "stages"),
    [
        ("llama", "host", 1),
        ("llama", "none", 2),
        ("mistral, middle window", "none", 1),
        ("mixtral", "none", 1),
        ("gpt_oss, sinks", "none", 1),
        ("gemma2, soft caps", "none", 1),
        ("deepseek_v3, narrow values", "none", 1),
        ("llama4, blocks, temperature", "none", 1),
        ("gemma4, shared keys, head_dim by kind", "host", 1),
        ("qwen3_5", "host", 1),
        ("nemotron_h", "none", 1),
        ("jamba", "none", 1),
    ],
)
def test_a_step_makes_no_tensor_elsewhere(tiny_model: Callable[..., Any], name: str, state: str, stages: int) -> None:
    """An operator that mixes tensors of the host and of the device raises an error here, as CUDA's do."""
    known = {**MODELS, **BEYOND, **SHAPES}
    model = tiny_model(known[name][0], **known[name][1]) if name in known else recurrent_model(name)
    backend = choose_backend(Attention.auto, model.config, HOST, torch.float32).backend
    chunks = build_chunks(LENGTHS, SIZE)
    batch = StepBatch(chunks, random_sequences(LENGTHS, 60), np.full(len(LENGTHS), 0.01), by_sequence=True)
    memories = TwoMemories()
    with use_implementation(model, "chunkflow"), memories.counting():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.to(DEVICE)
        module: Any = ChunkModel(model, backend)
        if stages > 1:
            layers = cut_layers(int(model.config.num_hidden_layers), stages)
            module = StageChain([StageModel(copy.deepcopy(model), backend, part) for part in layers])
        home = state_home(OffloadState(state), DEVICE, BLOCK)
        result = Runner(DirectEngine(module), RunnerSettings(DEVICE, state_home=home)).run((plan(chunks, 2),), batch)
        assert {str(memories.where(p.grad)) for p in model.parameters() if p.grad is not None} == {str(DEVICE)}
    assert result.loss > 0
    assert memories.most[DEVICE] > sum(p.nbytes for p in model.parameters())
