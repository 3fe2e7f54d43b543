"""`model.rope_scaling`: the model is the one that transformers makes of the same setting, in training and when saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences
from chunkflow_cli.model.adapter_saving import adapter_card, save_adapters
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config, position_limit
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.saving import loading_code, save_model
from chunkflow_cli.training.inputs import far_positions_warning

YARN = {"rope_type": "yarn", "factor": 4}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
IDS = torch.arange(3, 90)[None]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "yarn": ("qwen2", {}, YARN, {**YARN, "original_max_position_embeddings": 32}),
    "linear": ("llama", {"rope_theta": 5e5}, LINEAR, LINEAR),
    "llama3, half of the head": (
        "glm4", {"head_dim": 16}, LLAMA3, {**LLAMA3, "original_max_position_embeddings": 32},
    ),
    "one kind of layer": (
        "gemma3_text", {"head_dim": 16, "sliding_window": 11}, {"type": "yarn", "factor": 4},
        {**YARN, "original_max_position_embeddings": 32},
    ),
    "another scaling replaced": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 8}},
        {**YARN, "original_max_position_embeddings": 16}, {**YARN, "original_max_position_embeddings": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_that_of_transformers(tiny_model: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """The truth is a configuration written by hand, as transformers reads it: its outputs, and its whole-sequence training."""
    kind, settings, scaling, by_hand = CASES[name]
    tiny_model(kind, max_position_embeddings=32, **settings).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), rope_scaling=scaling)
    hf_config = load_config(config)
    model = load_model(config, hf_config, dtype=torch.float64, attention="eager", seed=0).eval()
    limit = int(by_hand["factor"] * by_hand.get("original_max_position_embeddings", 32))
    assert position_limit(hf_config) == limit

    values = json.loads((tmp_path / "base" / "config.json").read_text())
    rope = values["rope_parameters"]
    far = rope.get("full_attention", rope)
    theta = {key: far[key] for key in ("rope_theta", "partial_rotary_factor") if key in far}
    far.clear()
    far |= theta | by_hand
    values["max_position_embeddings"] = limit
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    truth = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64, attn_implementation="eager")
    assert torch.equal(model(IDS).logits, truth(IDS).logits)
    plain = tiny_model(kind, max_position_embeddings=32, dtype=torch.float64, **settings)
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-6)

    parity = compare(
        model.train(), random_sequences((150, 9), 96, 3), InChunks(ReferenceBackend(), chunk_size=17, k=2, stages=2)
    )
    assert parity.grad_rel_error < 1e-12
    (tmp_path / "final").mkdir()
    save_model(tmp_path / "final", model, model.state_dict())
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert saved["max_position_embeddings"] == limit
    assert saved["rope_scaling"]["factor"] == by_hand["factor"], "as transformers 4 reads it"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation="eager")
    assert torch.allclose(again(IDS).logits, truth(IDS).logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "settings", "scaling", "said"),
    [
        ("llama", {}, {"rope_type": "yarn"}, "has no factor of 1 or more"),
        ("llama", {}, {"rope_type": "yarn", "factor": 0.5}, "has no factor of 1 or more"),
        ("llama", {}, {"factor": 4}, "rope_type is not set\n  set it to yarn"),
        ("llama", {}, {"rope_type": "yarm", "factor": 4}, "rope_type is yarm"),
        ("llama", {}, {**YARN, "type": "linear"}, "rope_type is yarn and linear"),
        ("llama", {}, {**YARN, "beta_fats": 3}, "there is no setting 'beta_fats'\n  did you mean beta_fast?"),
        ("llama", {}, {"rope_type": "llama3", "factor": 4}, "low_freq_factor"),
        ("llama", {}, {"rope_type": "dynamic", "factor": 4}, "depends on the longest position seen"),
        ("gpt2", {}, YARN, "has no rotary embedding"),
        ("gemma4_text", {"head_dim": 16}, YARN, "of the kind 'proportional'"),
        (
            "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, YARN,
            "config.json scales already (linear)\n  add original_max_position_embeddings",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_refused(
    tiny_config: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    scaling: dict[str, Any],
    said: str,
) -> None:
    """transformers warns of a misspelled setting where nobody sees it, and trains without."""
    tiny_config(kind, **settings).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=re.escape(said)):
        load_config(ModelConfig(path=str(tmp_path), rope_scaling=scaling))


def test_samples_beyond_the_model_are_named_with_the_words_that_scale_it(
    tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    def warning(kind: str, *lengths: int, scaling: dict[str, Any] | None = None, **settings: Any) -> str | None:
        tiny_config(kind, max_position_embeddings=100, **settings).save_pretrained(tmp_path)
        hf_config = load_config(ModelConfig(path=str(tmp_path), rope_scaling=scaling or {}))
        return far_positions_warning(hf_config, np.array(lengths))

    assert warning("llama", 100, 7) is None
    assert warning("llama", 101, 7, 1300) == (
        "2 of 3 samples are longer than the 100 tokens that the model was made for, up to 1,300; to scale its "
        "positions: model.rope_scaling={rope_type: yarn, factor: 13}"
    )
    assert warning("llama", 400, scaling=YARN) is None
    more = warning("llama", 401, scaling=YARN)
    assert more is not None
    assert more.endswith("={rope_type: yarn, factor: 5, original_max_position_embeddings: 100}")
    words = warning("llama", 401, rope_parameters={**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 50})
    assert words is not None
    assert "factor: 9" in words
    assert "low_freq_factor: 1" in words
    none = warning("gpt2", 401, n_positions=100)
    assert none is not None
    assert none.endswith("up to 401")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_says_how_to_load_its_scaled_base(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=32).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), rope_scaling=YARN, lora=LoraConfig(enabled=True, r=4))
    model = load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)
    adapted = add_lora(model, config.lora).eval()
    (tmp_path / "final").mkdir()
    weights = {name: t.detach() for name, t in adapted.state_dict(keep_vars=True).items() if t.requires_grad}
    card = adapter_card(config, adapted)
    save_adapters(adapted, tmp_path / "final", weights, card)
    _, code = loading_code(tmp_path / "final")
    names: dict[str, Any] = {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM}
    exec(code, names)
    assert torch.equal(names["model"](IDS).logits, adapted(IDS).logits)
    assert AutoConfig.from_pretrained(tmp_path / "base").max_position_embeddings == 32
