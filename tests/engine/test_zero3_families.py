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

from support.models import BEYOND, BLOCKS, MODELS, RECURRENT, TINY, recurrent_model
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
EXPERTS_ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "longcat_flash": {
        "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 8, "ffn_hidden_size": 32,
        "n_routed_experts": 3, "zero_expert_num": 3, "moe_topk": 2, "expert_ffn_hidden_size": 16,
    },
}  # fmt: skip
ONE_OF_EACH = list({model_type: name for name, (model_type, _) in reversed(ARCHITECTURES.items())}.values())
HYBRIDS = ["lfm2", "nemotron_h", "jamba", "inkling2"]
"""Of `RECURRENT`. The weight of a convolution is used without a call of its module, and chunks have several segments."""
UNEVEN = ["rwkv", "zaya", "deepseek_v4", "longcat_flash"]
"""With modules that run once for each segment, and not at all for a segment without a complete block; or for each
expert that a token takes. Here no weight stays gathered between two calls, and few gradients fit a bucket."""
UNEVEN_KS = (2,)
UNEVEN_SHARES = ((100, 13), (31, 70, 9, 2, 5, 1, 4))
UNEVEN_ZERO = {"stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 2000}
ROUNDING = {"zaya": 1e-3}
"""Its routers change much for a small change of their input."""


NAMES = ONE_OF_EACH + HYBRIDS + UNEVEN


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    (errors, _) = run_ranks(2, "test_zero3_families:train_all", NAMES, serial=True)
    return errors


@pytest.mark.parametrize("name", NAMES)
def test_three_steps(errors: dict[str, list[float]], name: str) -> None:
    """The update of each step equals that of plain SGD on whole sequences, up to float32 rounding."""
    assert len(errors[name]) == len(UNEVEN_KS if name in UNEVEN else KS)
    assert max(errors[name]) < ROUNDING.get(name, 2e-5)


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
    from chunkflow_cli.model.trained_weights import freeze
    from chunkflow_cli.model.uneven_calls import modules_with_uneven_calls
    from chunkflow_cli.planning.chunks import build_chunks
    from chunkflow_cli.planning.schedule import plan_in_lockstep, tasks_of

    model: Any
    attention.register()
    if name in RECURRENT or name in BLOCKS:
        model = recurrent_model(name)
        own = computes_own_attention(model.config)
        model.set_attn_implementation("eager" if own else attention.NAME)
    else:
        torch.manual_seed(0)
        if name in EXPERTS_ONE_BY_ONE:
            config = AutoConfig.for_model(name, vocab_size=96, **EXPERTS_ONE_BY_ONE[name])
        else:
            model_type, changes = ARCHITECTURES[name]
            config = AutoConfig.for_model(model_type, **{**TINY, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    truth = copy.deepcopy(model)
    freeze(model, ())  # indexers
    device = torch.device("cpu")
    learning_rate = SMALL_RATE if name in RECURRENT or name in BLOCKS else LEARNING_RATE
    optim = OptimConfig(
        name=OptimizerName.sgd,
        lr=learning_rate,
        grad_clip=0.0,
        schedule=LearningRateSchedule.constant,
        warmup_ratio=0.0,
    )
    zero = EngineConfig(zero_stage=3, deepspeed={"zero_optimization": UNEVEN_ZERO} if name in UNEVEN else {})
    gathered = frozenset(modules_with_uneven_calls(model))
    assert bool(gathered) == (name in UNEVEN)
    settings = EngineSettings(zero, optim, Dtype.float32, device, gathered_modules=gathered)
    backend = choose_backend(Attention.auto, model.config, device, torch.float32).backend
    engine = Engine(ChunkModel(model, backend), settings)
    runner = Runner(engine, RunnerSettings(device, lockstep=engine.needs_lockstep))
    rank = torch.distributed.get_rank()
    of_ranks = UNEVEN_SHARES if name in UNEVEN else SHARES
    for step, k in enumerate(UNEVEN_KS if name in UNEVEN else KS):
        shares = [
            random_sequences(lengths, known_ids(model.config), seed=10 * step + i) for i, lengths in enumerate(of_ranks)
        ]
        chunks = [build_chunks(lengths, CHUNK_SIZE) for lengths in of_ranks]
        weight = 1 / sum(int((sequence.targets != -100).sum()) for share in shares for sequence in share)
        schedule = plan_in_lockstep([tasks_of(own, k) for own in chunks])[rank]
        batch = StepBatch(chunks[rank], shares[rank], np.full(len(shares[rank]), weight))
        runner.run((schedule,), batch)
        engine.step()
        weights = engine.whole_weights(model, trained_only=False)
        if weights is None:
            yield 0.0
            continue
        before = {key: value.detach().clone() for key, value in truth.state_dict().items()}
        plain_step(truth, [sequence for share in shares for sequence in share], weight, learning_rate)
        yield update_error(before, truth.state_dict(), weights)
        truth.load_state_dict(weights)


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
