"""The shape of a model, which all costs are counted from, against torch's own counts and the model's real weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chunkflow_cli.config.schema import Init, LoraConfig, ModelConfig
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.shape import model_shape, shape_without_weights, with_adapters
from chunkflow_cli.planning.costs import training_flops


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}),
    ],
)
@pytest.mark.parametrize("length", [32, 200])
def test_operations_against_torchs_own_count(
    kind: str, settings: dict[str, Any], length: int, tiny_model: Callable[..., Any]
) -> None:
    """MFU is a claim: a head counted twice, an embedding taken for a product or idle experts would flatter it.

    torch counts whole squares of attention; ours leaves out the half of the square that is masked.
    """
    model = tiny_model(kind, **settings)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = torch.randint(3, 96, (1, length))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids).logits.sum().backward()
    shape = model_shape(model)
    masked = shape.attention_flops_per_pair * length**2 / 2
    ours = training_flops([length], shape)
    assert forward.get_total_flops() - masked == pytest.approx(ours / 3)
    assert both.get_total_flops() - 3 * masked == pytest.approx(ours)


SHAPES = [
    ("llama", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "settings"), SHAPES, ids=[kind for kind, _ in SHAPES])
def test_shape_without_weights_is_that_of_the_model(
    kind: str, settings: dict[str, Any], lora: bool, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """`plan` must count what `train` will hold, tied heads once and adapters too."""
    tiny_config(kind, **settings).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), init=Init.random, lora=LoraConfig(enabled=lora, r=4))
    hf_config = load_config(config)
    dtype = getattr(torch, config.dtype.value)
    model: Any = load_model(config, hf_config, dtype=dtype, attention="sdpa", seed=0)
    expected = model_shape(model)
    if lora:
        expected = with_adapters(expected, add_lora(model, config.lora))
        assert 0 < expected.trainable_parameters < expected.parameters
    found = shape_without_weights(config, hf_config)
    assert found == expected
    assert expected.parameters == sum(parameter.numel() for parameter in model.parameters())
