"""Weights are what the checkpoint holds: every tensor is loaded, used and finite, or the model is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chunkflow_cli.config.schema import Init, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model, on_meta_device

Weights = dict[str, torch.Tensor]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def published(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`published(kind, **settings)`: a folder with that model, as save_pretrained writes it; made once."""
    root = tmp_path_factory.mktemp("published")

    def make(kind: str, **settings: Any) -> Path:
        folder = root / "-".join([kind, *settings])
        if not folder.exists():
            tiny_model(kind, **settings).save_pretrained(folder)
        return folder

    return make


def changed(source: Path, target: Path, change: Callable[[Weights], Weights | None]) -> Path:
    """Copy a model's folder with its weights changed."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    save_file(change(weights) or weights, target / "model.safetensors", {"format": "pt"})
    return target


def load(folder: Path, **settings: Any) -> Any:
    config = ModelConfig(path=str(folder), **settings)
    return load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in names)}


def also(**tensors: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name.replace("__", "."): value for name, value in tensors.items()}


def set_to(name: str, number: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].view(-1)[-1] = number

    return change


EXPERT = "layers.1.block_sparse_moe.experts.2"
REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights | None], str]] = {
    "a hole": ("llama", {}, without(DOWN), f"1 of the model's 21 tensors are not in its files: {DOWN}"),
    "no head": ("llama", {}, without("lm_head"), r"lm_head\.weight(.|\n)*tie_word_embeddings=true"),
    "no embedding": ("llama", {}, without("embed_tokens"), r"not in its files: model\.embed_tokens\.weight"),
    "neither of two tied": (
        "qwen2", {"tie_word_embeddings": True}, without("embed_tokens"), r"not in its files: (.*)model\.embed_tokens",
    ),
    "a wrapper's prefix": (
        "llama", {}, lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
        "with the prefix '_orig_mod.'",
    ),
    "another vocabulary": (
        "llama", {}, also(model__embed_tokens__weight=torch.zeros(97, 64)),
        r"1 tensor with another shape .*model\.embed_tokens\.weight \(97, 64\), not \(96, 64\)",
    ),
    "a bias": (
        "llama", {}, also(model__layers__0__self_attn__q_proj__bias=torch.zeros(64)), r"no place .*q_proj\.bias",
    ),
    "more layers": (
        "llama", {},
        lambda weights: weights | {name.replace("s.1.", "s.2."): value.clone() for name, value in weights.items()},
        r"no place for 9 tensors of its files: model\.layers\.2\.",
    ),
    "another norm": ("llama", {}, also(model__embed_norm__weight=torch.ones(64)), r"no place .*model\.embed_norm\.weight"),
    "scales": (
        "llama", {}, also(model__layers__0__mlp__up_proj__weight_scale_inv=torch.ones(1)), "the weights are quantized",
    ),
    "part of an expert": ("mixtral", MIXTRAL, without(f"{EXPERT}.w1"), r"parts of model\.layers\.1\.mlp\.experts"),
    "an expert": ("mixtral", MIXTRAL, without(EXPERT), r"experts\.down_proj \(3, 64, 96\), not \(4, 64, 96\)"),
    "untied": (
        "qwen2", {"tie_word_embeddings": True}, also(lm_head__weight=torch.ones(96, 64)),
        r"ties lm_head\.weight to model\.embed_tokens\.weight(.|\n)*tie_word_embeddings=false",
    ),
    "nan": ("llama", {}, set_to(DOWN, float("nan")), rf"1 tensor with numbers that are not finite .*: {DOWN}"),
    "inf": ("llama", {}, set_to("model.norm.weight", float("-inf")), r"not finite .*model\.norm\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_the_models_are_refused_by_name(
    case: str, published: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would draw missing tensors at random and leave out unknown ones, with a line in a log."""
    kind, settings, change, message = REFUSED[case]
    folder = changed(published(kind, **settings), tmp_path / "m", change)
    with pytest.raises(UsageError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_new_rows_are_drawn_only_if_asked_for(published: Callable[..., Path]) -> None:
    """`model.vocab_size` adds rows to embedding and head, tied or not, and leaves the others as they are."""
    for settings in ({}, {"tie_word_embeddings": True}):
        folder = published("qwen2", **settings)
        before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        one, two = (load(folder, vocab_size=101) for _ in range(2))
        for rows in (one.model.embed_tokens.weight, one.lm_head.weight):
            assert rows.shape == (101, 64)
        assert torch.equal(one.model.embed_tokens.weight[:96], before)
        assert torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight), "drawn with the seed"
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == bool(settings)
        assert one.config.vocab_size == 101
        config = ModelConfig(path=str(folder), vocab_size=101)
        assert on_meta_device(config, load_config(config)).lm_head.weight.shape == (101, 64), "what plan counts"
    with pytest.raises(UsageError, match=r"model\.vocab_size=95: the model has 96 tokens already"):
        load(folder, vocab_size=95)
    unused = ModelConfig(path=str(published("qwen2", unpadded_vocab_size=90)), vocab_size=101)
    with pytest.raises(UsageError, match=r"model\.vocab_size=101: the model predicts its first 90 tokens only"):
        load_config(unused)


def test_new_weights_are_drawn_only_if_named(published: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(published("llama"), tmp_path / "m", without("lm_head"))
    heads = [load(folder, new_weights=["lm_head"]).lm_head.weight for _ in range(2)]
    assert torch.equal(*heads), "drawn with the seed"
    assert float(heads[0].detach().std()) > 0
    with pytest.raises(UsageError, match=r"no weight that the checkpoint lacks has the name lm_haed"):
        load(folder, new_weights=["lm_head", "lm_haed"])
    with pytest.raises(UsageError, match=r"not in its files: lm_head\.weight"):
        load(folder)
    holed = changed(published("llama"), tmp_path / "n", without("lm_head", DOWN))
    with pytest.raises(UsageError, match=f"1 of the model's 21 tensors are not in its files: {DOWN}"):
        load(holed, new_weights=["lm_head.weight"])


TAKEN: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Weights | None]]] = {
    "as saved": ("llama", {}, lambda weights: None),
    "a tied head that is not in the file": ("qwen2", {"tie_word_embeddings": True}, without("lm_head")),
    "a tied head that is in the file": (
        "qwen2", {"tie_word_embeddings": True},
        lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    ),
    "rotary tables of old files": (
        "llama", {}, also(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)),
    ),
    "masks of old files": (
        "gpt2", {}, also(h__0__attn__bias=torch.ones(1, 1, 8, 8), h__0__attn__masked_bias=torch.tensor(-1e9)),
    ),
    "no prefix": (
        "llama", {}, lambda weights: {name.removeprefix("model."): value for name, value in weights.items()},
    ),
    "experts": ("mixtral", MIXTRAL, lambda weights: None),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_weights_that_people_have_are_taken_without_a_word(
    case: str, published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, settings, change = TAKEN[case]
    source = published(kind, **settings)
    model = load(changed(source, tmp_path / "m", change))
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr().err == ""


def test_whole_parts_that_the_model_lacks_are_left_out_with_a_warning(
    published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value head or layers that predict several tokens ahead change nothing of what the model computes."""
    parts = {"v_head__weight": torch.ones(1, 64), "model__layers__2__eh_proj__weight": torch.ones(64, 128)}
    folder = changed(published("llama"), tmp_path / "m", also(**parts))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    load(folder)
    load(folder)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert lines[0].endswith("has no such part: model.layers.2.eh_proj.weight, v_head.weight")


def test_adapters_in_a_models_file_are_refused(published: Callable[..., Path], tmp_path: Path) -> None:
    """The weights of a layer with an adapter have another name; without it they would be drawn at random."""
    rename = {DOWN: DOWN.replace(".weight", ".base_layer.weight")}
    folder = changed(
        published("llama"), tmp_path / "m",
        lambda weights: {rename.get(name, name): value for name, value in weights.items()},
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"hold others instead: .*base_layer"):
        load(folder)


def test_a_broken_pickle_is_the_users_to_replace(published: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(published("llama"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "m" / "pytorch_model.bin")
    weights.unlink()
    load(tmp_path / "m")
    os.truncate(tmp_path / "m" / "pytorch_model.bin", 5000)
    with pytest.raises(UsageError, match="no usable weights there"):
        load(tmp_path / "m")


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "none_such"},
]


@pytest.mark.parametrize("settings", QUANTISED, ids=lambda settings: settings.get("quant_method", "old"))
def test_quantised_weights_are_refused_by_their_method(
    settings: dict[str, Any], published: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_settings(published("llama"), tmp_path / "m", quantization_config=settings)
    method = settings.get("quant_method", "bitsandbytes")
    with pytest.raises(UsageError, match=rf"quantized \({method}; quantization_config(.|\n)*set model\.path"):
        load_config(ModelConfig(path=str(folder)))
    fresh = load_config(ModelConfig(path=str(folder), init=Init.random))
    assert not hasattr(fresh, "quantization_config")  # random weights are not quantized: `final/` must not say so


def with_settings(source: Path, target: Path, **settings: Any) -> Path:
    """Copy a model's folder with settings added to its config.json."""
    shutil.copytree(source, target)
    old = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(old | settings))
    return target


SWITCHES: list[dict[str, Any]] = [
    {"_attn_implementation": "evil/kernel:fn"},
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": {"": "evil/kernel", "text_config": "evil/kernel"}},
    {"_attn_implementation": 3},
    {"_experts_implementation": "evil/kernel"},
    {"output_attentions": True, "output_hidden_states": True},
    {"return_dict": False},
]


@pytest.mark.parametrize("settings", SWITCHES, ids=lambda settings: next(iter(settings)))
def test_a_config_json_does_not_decide_how_the_model_runs(
    settings: dict[str, Any], published: Callable[..., Path], tmp_path: Path
) -> None:
    """The name of a kernel on the hub would reach the kernel loader; `model.attention` alone decides."""
    folder = with_settings(published("llama"), tmp_path / "m", **settings)
    config = load_config(ModelConfig(path=str(folder)))
    assert (config._attn_implementation, config._experts_implementation) == (None, None)
    model = load(folder)
    assert model.config._attn_implementation == "sdpa"
    out = model.model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
    assert out.last_hidden_state.shape == (1, 3, 64)
    assert (out.attentions, out.hidden_states) == (None, None)


def test_attention_of_parts_is_reset_too(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import Gemma3Config

    text = tiny_config("gemma3_text", head_dim=16).to_dict() | {"_attn_implementation": "evil/kernel"}
    Gemma3Config().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(settings | {"text_config": text, "_attn_implementation": {"text_config": "evil/kernel"}})
    )
    config = load_config(ModelConfig(path=str(tmp_path)))
    assert config.text_config._attn_implementation is None
    assert config.vision_config._attn_implementation is None


OWN_CODE = """
from transformers import LlamaForCausalLM
from torch import nn

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.extra = nn.Linear(4, 4)
"""


def test_code_of_the_models_own_is_held_to_the_same(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto_map = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = with_settings(published("llama"), tmp_path / "m", auto_map=auto_map)
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(UsageError, match=r"not in its files: model\.extra\.bias, model\.extra\.weight"):
        load(folder, trust_remote_code=True)
