"""ZeRO-3 on two ranks trains every architecture of the parity tests exactly, for K of 1, 2 and 3.

With K above 1, one backward passes through several chunks. DeepSpeed reduces gradients within backwards, so anything
that it does once per call of a module, and not once per backward, would lose a part of them.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.models import BEYOND, MODELS, RECURRENT, TINY, recurrent_model
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

KS = (1, 2, 3)
SHARES = ((100, 13), (31, 70, 9))
"""Lengths of the sequences of each rank. With chunks of 25 tokens, the ranks run different numbers of them."""
CHUNK_SIZE, LEARNING_RATE = 25, 0.5
SMALL_RATE = 0.02
"""For models with large weights: a larger step lifts their rounding to what a mistake in the next one looks like."""
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    **BEYOND,
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 16}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
ONE_OF_EACH = list({model_type: name for name, (model_type, _) in reversed(ARCHITECTURES.items())}.values())
HYBRIDS = ["lfm2", "nemotron_h", "jamba", "inkling2"]
"""Of `RECURRENT`. The weight of a convolution is used without a call of its module, and chunks have several segments."""


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    (errors, _) = run_ranks(2, "test_zero3_families:train_all", ONE_OF_EACH + HYBRIDS, serial=True)
    return errors


@pytest.mark.parametrize("name", ONE_OF_EACH + HYBRIDS)
def test_three_steps(errors: dict[str, list[float]], name: str) -> None:
    """The update of each step equals that of plain SGD on whole sequences, up to float32 rounding."""
    assert len(errors[name]) == len(KS)
    assert max(errors[name]) < 2e-5


def train_all(names: list[str]) -> dict[str, list[float]]:
    """Return the error of the update of each step, by architecture."""
    gc.freeze()  # each engine collects garbage when it starts, which takes as long as its steps
    return {name: list(train(name)) for name in names}


def train(name: str) -> Iterator[float]:
    """Train one step with each K, and yield the difference to whole sequences, as a share of the step's update."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from chunkflow_cli.config.schema import (
        Attention,
        Dtype,
        EngineConfig,
        LearningRateSchedule,
        OptimConfig,
        OptimizerName,
    )
    from chunkflow_cli.engine import Engine, EngineSettings
    from chunkflow_cli.execution.attention import function as attention
    from chunkflow_cli.execution.attention.choice import choose_backend
    from chunkflow_cli.execution.chunk_model import ChunkModel
    from chunkflow_cli.execution.parity import random_sequences
    from chunkflow_cli.execution.runner import Runner
    from chunkflow_cli.execution.step import RunnerSettings, StepBatch
    from chunkflow_cli.model.hf_config import known_ids
    from chunkflow_cli.model.special_types import computes_own_attention
    from chunkflow_cli.planning.chunks import build_chunks
    from chunkflow_cli.planning.schedule import plan_in_lockstep, tasks_of

    model: Any
    attention.register()
    if name in RECURRENT:
        model = recurrent_model(name)
        own = computes_own_attention(model.config)
        model.set_attn_implementation("eager" if own else attention.NAME)
    else:
        model_type, changes = ARCHITECTURES[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**TINY, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    truth = copy.deepcopy(model)
    device = torch.device("cpu")
    learning_rate = SMALL_RATE if name in RECURRENT else LEARNING_RATE
    optim = OptimConfig(
        name=OptimizerName.sgd,
        lr=learning_rate,
        grad_clip=0.0,
        schedule=LearningRateSchedule.constant,
        warmup_ratio=0.0,
    )
    settings = EngineSettings(EngineConfig(zero_stage=3), optim, Dtype.float32, device)
    backend = choose_backend(Attention.auto, model.config, device, torch.float32).backend
    engine = Engine(ChunkModel(model, backend), settings)
    runner = Runner(engine, RunnerSettings(device, lockstep=engine.needs_lockstep))
    rank = torch.distributed.get_rank()
    for step, k in enumerate(KS):
        shares = [
            random_sequences(lengths, known_ids(model.config), seed=10 * step + i) for i, lengths in enumerate(SHARES)
        ]
        chunks = [build_chunks(lengths, CHUNK_SIZE) for lengths in SHARES]
        weight = 1 / sum(int((sequence.targets != -100).sum()) for share in shares for sequence in share)
        schedule = plan_in_lockstep([tasks_of(own, k) for own in chunks])[rank]
        batch = StepBatch(chunks[rank], shares[rank], np.full(len(shares[rank]), weight))
        runner.run((schedule,), batch)
        engine.step()
        before = {key: value.detach().clone() for key, value in truth.state_dict().items()}
        plain_step(truth, [sequence for share in shares for sequence in share], weight, learning_rate)
        weights = engine.whole_weights(model, trained_only=False)
        yield 0.0 if weights is None else update_error(before, truth.state_dict(), weights)


def plain_step(model: Any, sequences: list[Any], weight: float, learning_rate: float) -> None:
    """Train one step of SGD as transformers would, a whole sequence at a time."""
    from chunkflow_cli.execution.parity import whole_implementation

    model.set_attn_implementation(whole_implementation(model))
    model.zero_grad()
    for sequence in sequences:
        ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
        (nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") * weight).backward()
    torch.optim.SGD(model.parameters(), lr=learning_rate).step()


def update_error(before: dict[str, Tensor], truth: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    update = sum(float((truth[name] - before[name]).square().sum()) for name in truth)
    difference = sum(float((truth[name] - weights[name]).square().sum()) for name in truth)
    return float((difference / update) ** 0.5)
