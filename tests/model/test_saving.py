"""What is saved: the same model for readers of transformers 5 and 4, and every setting that it came with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.saving import config_for_both, save_model, save_tokenizer
from support.tokenizers import make_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}

NAMES_OF_4: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}, {}),
    ("qwen3_moe", {"rope_theta": 2e6, "num_experts": 6, "moe_intermediate_size": 32}, {}),
    ("phi", {"rope_theta": 2e4, "partial_rotary_factor": 0.25}, {}),
    ("gpt_neox", {"rotary_emb_base": 3e4, "rotary_pct": 0.5}, {}),
    ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "head_dim": 16}, {}),
    ("olmo3", {"rope_theta": 3e5, "rope_scaling": YARN}, {}),
    ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
]
"""Architecture, settings as transformers 4 writes them, and names that must be added if these are others."""


@pytest.mark.parametrize(("kind", "settings", "expected"), NAMES_OF_4, ids=[kind for kind, *_ in NAMES_OF_4])
def test_both_versions_of_transformers_read_the_same_configuration(
    kind: str, settings: dict[str, Any], expected: dict[str, Any], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """Version 4 took 10,000 as the base of the rotary embedding: other logits, without a word."""
    names_of_5 = ("rope_parameters", "num_local_experts")
    sizes = {name: value for name, value in tiny_config(kind).to_diff_dict().items() if name not in names_of_5}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": kind, **settings}))
    config = AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    saved = config_for_both(json.loads((tmp_path / "config.json").read_text()), config)
    for name, value in (expected or settings).items():
        if isinstance(value, dict):
            assert value.items() <= saved[name].items(), name
        else:
            assert saved[name] == value, name
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {name: again[name] for name in before} == before


def test_the_configuration_says_what_it_said_before_training(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """A run needs no key-value cache and sampling settings are none of its business: neither may change in `final/`."""
    source, final = tmp_path / "m", tmp_path / "final"
    model = tiny_model("llama")
    model.config.use_cache = True
    model.save_pretrained(source)
    sampling = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    config = ModelConfig(path=str(source))
    loaded: Any = load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)
    loaded.generation_config.eos_token_id = [1, 2, 3]  # transformers refuses to save such settings once they changed
    final.mkdir()
    save_model(final, loaded, loaded.state_dict())
    assert json.loads((final / "config.json").read_text())["use_cache"] is True
    saved = json.loads((final / "generation_config.json").read_text())
    assert {name: saved[name] for name in sampling} == {**sampling, "eos_token_id": [1, 2, 3]}
    again = AutoModelForCausalLM.from_pretrained(final)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.generation_config.temperature == 0.6


def test_a_stage_saves_the_generation_settings_of_the_model(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """The whole model without weights, which a pipeline saves through, knows only the configuration."""
    model, skeleton = tiny_model("llama"), tiny_model("llama")
    model.generation_config.eos_token_id = [1, 2]
    save_model(tmp_path, model, model.state_dict(), skeleton=skeleton)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_both_versions_of_transformers_read_the_tokenizer(tmp_path: Path) -> None:
    """Version 4 knows no class TokenizersBackend, and fails on a list of extra_special_tokens."""
    source, final = make_tokenizer(tmp_path / "m", additional_special_tokens=["<s>"]), tmp_path / "final"
    tokenizer = AutoTokenizer.from_pretrained(source)
    final.mkdir()
    save_tokenizer(final, tokenizer)
    settings = json.loads((final / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<s>"]
    assert "extra_special_tokens" not in settings
    again = AutoTokenizer.from_pretrained(final)
    text = "Hi<s> there<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == tokenizer.decode(
        tokenizer(text)["input_ids"], skip_special_tokens=True
    )
    assert (again.chat_template, again.all_special_tokens) == (tokenizer.chat_template, tokenizer.all_special_tokens)
