"""Stages chained in one process equal the whole model: loss and every gradient, for each architecture."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from chunkflow_cli.config.schema import LoraConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel, check_stages
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers, layer_shares

CPU = torch.device("cpu")
LENGTHS = (70, 13, 9, 31)
WINDOW = 11

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("gemma", {"head_dim": 16}),
    # A cut that took its layers' kinds from the front of the list would give each stage the wrong windows.
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    ),
    "glm4": ("glm4", {"head_dim": 16}),
    "exaone4": (
        "exaone4",
        {
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "use_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
}  # fmt: skip


def gradients(module: nn.Module, k: int) -> float:
    """Run one step on LENGTHS in chunks and return its loss; gradients stay in the parameters."""
    sequences = random_sequences(LENGTHS, 96, seed=3)
    chunks = build_chunks(LENGTHS, 24)
    batch = StepBatch(chunks, sequences, np.full(len(LENGTHS), 0.01))
    return Runner(DirectEngine(module), RunnerSettings(CPU)).run((plan(chunks, k),), batch).loss


def staged(model: Any, bounds: list[int]) -> list[StageModel]:
    stages = len(bounds) - 1
    cut = [StageLayers(stage, stages, bounds[stage], bounds[stage + 1]) for stage in range(stages)]
    return [StageModel(copy.deepcopy(model), CpuBackend(), layers) for layers in cut]


def prepared(tiny_model: Callable[..., Any], name: str, *, lora: bool = False) -> Any:
    model_type, settings = MODELS[name]
    attention.register()
    model = tiny_model(model_type, num_hidden_layers=4, initializer_range=0.2, **settings)
    model.set_attn_implementation(attention.NAME)
    if lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4, alpha=8.0))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zeros at first, which would leave half of the gradients zero
                torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("bounds", "k", "lora"), [([0, 1, 4], 1, False), ([0, 1, 2, 3, 4], 2, False), ([0, 2, 3, 4], 1, True)]
)
def test_chained_stages_are_the_whole_model(
    tiny_model: Callable[..., Any], name: str, bounds: list[int], k: int, lora: bool
) -> None:
    """Finds windows on the wrong layers (up to 0.35 off), multipliers on every stage, a tied weight counted once."""
    model = prepared(tiny_model, name, lora=lora)
    stages = staged(model, bounds)
    loss = gradients(ChunkModel(model, CpuBackend()), k)
    whole = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    chain = StageChain(stages)
    chained = gradients(chain, k)
    cut = chain.gradients()
    assert chained == pytest.approx(loss, rel=1e-6)
    assert set(cut) == set(whole)
    for parameter, gradient in whole.items():
        assert gradient is not None
        assert (cut[parameter] - gradient).norm() <= 2e-6 * max(gradient.norm(), 1e-3), parameter


def test_a_stage_holds_its_own_weights_and_no_others(tiny_model: Callable[..., Any]) -> None:
    """A stage that kept the whole model would save no memory; a lost weight would be missing from what is saved."""
    model = prepared(tiny_model, "qwen3")
    first, middle, last = staged(model, [0, 1, 2, 4])
    whole = set(dict(model.named_parameters()))
    names = [set(stage.hf_parameter_names.values()) for stage in (first, middle, last)]
    assert set().union(*names) == whole
    embedding = "model.embed_tokens.weight"
    assert [embedding in held for held in names] == [True, False, True]
    assert all(name.startswith("model.layers.1.") for name in names[1])
    assert names[0] & names[2] == {embedding}
    assert [stage.tied_weight is not None for stage in (first, middle, last)] == [True, False, True]
    for stage in (first, middle, last):
        assert set(stage.hf_parameter_names) == set(dict(stage.named_parameters()))


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_models_of_another_structure_are_refused_by_name(tiny_model: Callable[..., Any], model_type: str) -> None:
    """Learned positions are not an embedding, a layer or a norm: without them, a stage would train something else."""
    with pytest.raises(UsageError, match=r"parallel\.pipeline=2: \w+ cannot be cut"):
        StageModel(tiny_model(model_type), CpuBackend(), StageLayers(0, 2, 0, 1))


def test_a_stage_without_anything_to_train_is_refused(tiny_model: Callable[..., Any]) -> None:
    """DeepSpeed would fail on an empty optimizer with a message about lists."""
    model = add_lora(tiny_model("llama"), LoraConfig(enabled=True, r=2, target_modules=["layers.0.mlp.up_proj"]))
    with pytest.raises(UsageError, match=r"stage 1 .* nothing to train"):
        check_stages(model, [StageLayers(0, 2, 0, 1), StageLayers(1, 2, 1, 2)])


# The cut


def test_the_cut_is_the_best_of_all() -> None:
    """No other cut of a small model has a faster slowest stage."""

    def cuts(layers: int, stages: int) -> list[list[int]]:
        if stages == 1:
            return [[layers]]
        return [[n, *rest] for n in range(1, layers - stages + 2) for rest in cuts(layers - n, stages - 1)]

    for layers in range(1, 9):
        for stages in range(1, layers + 1):
            for head in (0.0, 0.4, 1.0, 2.3, 9.0):
                found = cut_layers(layers, stages, head_in_layers=head)
                assert [stage.stage for stage in found] == list(range(stages))
                assert found[0].first == 0
                assert found[-1].stop == layers
                assert all(one.stop == other.first for one, other in itertools.pairwise(found))
                sizes = [stage.layers for stage in found]
                assert min(sizes) >= 1
                assert layer_shares(found).sum() == pytest.approx(1)

                def slowest(sizes: list[int], head: float = head) -> float:
                    return max(*sizes[:-1], sizes[-1] + head) if len(sizes) > 1 else sizes[0] + head

                assert slowest(sizes) == min(slowest(other) for other in cuts(layers, stages))


def test_qwen_7b_gives_its_head_room() -> None:
    """28 layers, and a head that costs as much as 2.3 of them: 7, 7, 7, 7 would make three stages wait for the last."""
    assert [stage.layers for stage in cut_layers(28, 4, head_in_layers=2.3)] == [7, 8, 8, 5]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages"):
        cut_layers(3, 4)
