"""The language part of a multimodal model trains as the original computes, and comes back within the original."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModel, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from chunkflow_cli.cli import export
from chunkflow_cli.config.schema import Init, LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences
from chunkflow_cli.execution.stages import StageModel
from chunkflow_cli.model.adapter_saving import adapter_card, save_adapters
from chunkflow_cli.model.adapter_summary import summarize
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.language_part import left_out
from chunkflow_cli.model.loading import load_model, on_meta_device, skeleton
from chunkflow_cli.model.saving import save_model
from chunkflow_cli.model.shape import shape_without_weights
from chunkflow_cli.planning.stage_cut import cut_layers
from support.wrappers import WRAPPERS

IDS = torch.arange(3, 43)[None]
ADAPTER = "adapter_model.safetensors"
MTP = "mtp.layers.0.mlp.up_proj.weight"
"""A tensor that no class of transformers loads: it predicts a token more."""
LLAVA = [
    ("^model.language_model", "language_model.model"), ("^lm_head", "language_model.lm_head"),
    ("^model.vision_tower", "vision_tower"), ("^model.multi_modal_projector", "multi_modal_projector"),
]  # fmt: skip
OLD_NAMES = {
    "gemma3": LLAVA,
    "mistral3": LLAVA,
    "qwen2_5_vl": [("^model.language_model", "model"), ("^model.visual", "visual")],
}
"""How the files on the hub name the tensors of families that transformers has renamed since."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`published(kind)`: a multimodal model as its makers publish it, in several files; made once."""
    root = tmp_path_factory.mktemp("published")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = AutoConfig.for_model(kind, **WRAPPERS[kind])
                model = transformers.AutoModelForImageTextToText.from_config(config)
            model.save_pretrained(folder, max_shard_size="24KB")
            rename(folder, OLD_NAMES.get(kind, []))
            (folder / "preprocessor_config.json").write_text('{"size": 28}')
        return folder

    return make


def rename(folder: Path, changes: list[tuple[str, str]]) -> None:
    """Rename the tensors of a saved model, and add one that belongs to no class."""
    index = folder / "model.safetensors.index.json"
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights = {}
        for name, tensor in load_file(file).items():
            for pattern, target in changes:
                name = re.sub(pattern, target, name)
            weights[name] = tensor
        if not places:
            weights[MTP] = torch.rand(3, 4).half()
        save_file(weights, file, {"format": "pt"})
        places |= dict.fromkeys(weights, file.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def config_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


def load(folder: Path, *, implementation: str = "sdpa", **settings: Any) -> Any:
    config = config_of(folder, **settings)
    return load_model(config, load_config(config), dtype=torch.float32, attention=implementation, seed=0)


def original(folder: Path) -> Any:
    """Load a folder with the class that its config.json names, which must find every weight."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        folder, attn_implementation={"": "sdpa", "text_config": "sdpa"}, output_loading_info=True
    )
    assert set().union(*report.values()) <= {MTP}, report
    return model.train()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder as its files hold it."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.detach()  # type: ignore[no-any-return]


def train_a_step(model: Any) -> None:
    out = model(input_ids=IDS).logits[0]
    nn.functional.cross_entropy(out[:-1], IDS[0, 1:]).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_trained_language_part_comes_back_within_the_original(
    kind: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    source = published(kind)
    whole, model = original(source), load(source)
    towers = left_out(model).tensors
    assert towers
    assert not towers & set(model.state_dict())
    assert torch.equal(logits(model), logits(whole))  # positions of mRoPE, masks and multipliers included
    train_a_step(model)
    save_model(tmp_path, model, model.state_dict())

    before, after = tensors(source), tensors(tmp_path)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert len(before) - len(same) == len(
        list(model.named_parameters())
    )  # every weight of the language part, and MTP not
    assert all(after[name].dtype == before[name].dtype for name in same)
    again, trained = original(tmp_path), model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name] if name in towers else trained[name]), name
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(whole))
    assert (tmp_path / "preprocessor_config.json").read_text() == '{"size": 28}'
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    assert (was["architectures"], was["model_type"]) == (now["architectures"], now["model_type"])
    for part in ("text_config", "vision_config"):
        assert was[part].items() <= now[part].items()
    sections = was["text_config"].get("rope_parameters", {}).get("mrope_section")
    if sections is not None:  # transformers 4 reads them here
        assert now["text_config"]["rope_scaling"]["mrope_section"] == sections


CUT_INTO_STAGES = dict.fromkeys(WRAPPERS, 2) | {"gemma4": 1}  # its embeddings for each layer belong to no stage


@pytest.mark.parametrize("kind", WRAPPERS)
def test_chunks_and_stages_train_as_the_wrapper_does(kind: str, published: Callable[[str], Path]) -> None:
    """The whole side is the wrapper's own forward of text, with the positions that it makes."""
    attention.register()
    model = load(published(kind), implementation=attention.NAME)
    stages = CUT_INTO_STAGES[kind]
    parity = compare(
        model, random_sequences((90, 9, 40), 96), InChunks(ReferenceBackend(), chunk_size=33, k=2, stages=stages)
    )
    assert parity.grad_rel_error < 1e-5, parity


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama4"])
def test_a_stage_saves_the_whole_original(kind: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    source, config = published(kind), config_of(published(kind))
    stages = [StageModel(load(source), ReferenceBackend(), part) for part in cut_layers(2, 2)]
    weights = {
        stage.hf_parameter_names[own]: parameter.detach()
        for stage in stages
        for own, parameter in stage.named_parameters()
    }
    save_model(tmp_path, stages[0].causal_lm, weights, skeleton=skeleton(config, load_config(config)))
    before, after = tensors(source), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "muse_glimmer"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_fits_the_original(
    kind: str, published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The towers of gemma3 have layers of the same names. None of them gets an adapter, here or there."""
    source, final = published(kind), tmp_path / "run" / "final"
    lora = LoraConfig(enabled=True, r=4, alpha=8.0)
    config = config_of(source, lora=lora)
    adapted = add_lora(load(source), lora)
    for index, parameter in enumerate(p for p in adapted.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(index))
    weights = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    save_adapters(adapted, final, weights, adapter_card(config, adapted))
    assert summarize(skeleton(config, load_config(config))).trained == sum(w.numel() for w in weights.values())

    plain = logits(load(source))
    for again in (PeftModel.from_pretrained(original(source), str(final)), AutoPeftModel.from_pretrained(final)):
        assert {name for name in again.state_dict() if "lora_" in name} == weights.keys()
        assert torch.allclose(logits(again), logits(adapted), atol=1e-5)
        assert not torch.allclose(logits(again), plain, atol=1e-3)
    assert "AutoPeftModel.from_pretrained" in (final / "README.md").read_text()
    on = add_lora(load(source), LoraConfig(enabled=True, path=str(final)))
    assert torch.equal(logits(on), logits(adapted))

    of_text_class = {name.replace("language_model.", ""): tensor for name, tensor in weights.items()}
    shutil.copytree(final, tmp_path / "other")
    save_file({name.replace(".default", ""): w for name, w in of_text_class.items()}, tmp_path / "other" / ADAPTER)
    with pytest.raises(UsageError, match="is not an adapter of this model"):
        add_lora(load(source), LoraConfig(enabled=True, path=str(tmp_path / "other")))

    (final.parent / ".hydra").mkdir()
    (final.parent / ".hydra" / "config.yaml").write_text(
        f"model: {{path: {source}, dtype: float32, init: pretrained}}\ntrain: {{seed: 0, output_dir: x}}\n"
    )
    export.run(str(final.parent), output=str(tmp_path / "copy"), merge=False)
    assert "from peft import AutoPeftModel\n" in capsys.readouterr().err
    export.run(str(final.parent), output=str(tmp_path / "merged"), merge=True)
    merged = original(tmp_path / "merged")
    assert f"from transformers import {type(merged).__name__}\n" in capsys.readouterr().err
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()


def test_random_weights_are_those_of_the_language_part(
    published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration is enough, and the towers are never made: with this size they would not fit."""
    settings = json.loads((published("qwen3_vl") / "config.json").read_text())
    settings["vision_config"] |= {"intermediate_size": 10**11, "depth": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = config_of(tmp_path, init=Init.random)
    model = load(tmp_path, init=Init.random)
    assert "model.init=random draws the language part alone: no weights of model.visual" in capsys.readouterr().err
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    plan = on_meta_device(config, load_config(config))
    assert sizes == {name: parameter.shape for name, parameter in plan.named_parameters()}
    assert shape_without_weights(config, load_config(config)).parameters == sum(s.numel() for s in sizes.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(logits(load(tmp_path, init=Init.random)), logits(model))


LAYER = "model.language_model.layers."
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a hole": (
        lambda weights: {name: w for name, w in weights.items() if name != f"{LAYER}1.mlp.up_proj.weight"},
        r"1 of the model's \d+ tensors are not in its files: model\.language_model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a layer too many": (
        lambda weights: weights | {f"{LAYER}2.mlp.up_proj.weight": torch.zeros(48, 32)},
        r"has no place for 1 tensor of its files: model\.language_model\.layers\.2",
    ),
    "not finite": (
        lambda weights: weights | {"lm_head.weight": torch.full((96, 32), torch.nan)},
        r"numbers that are not finite .*lm_head\.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_language_part_is_checked_as_any_model(name: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    change, said = REFUSED[name]
    (tmp_path / "config.json").write_text((published("qwen3_vl") / "config.json").read_text())
    save_file(change(tensors(published("qwen3_vl"))), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=said):
        load(tmp_path)


def test_what_has_no_language_part_is_refused_by_name(published: Callable[[str], Path], tmp_path: Path) -> None:
    settings = json.loads((published("qwen3_vl") / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is not a safetensors file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen3VLModel"]}))
    with pytest.raises(UsageError, match=rf"model.path={tmp_path}: Qwen3VLModel has no head over a vocabulary"):
        load(tmp_path, init=Init.random)
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"model.path={tmp_path}: CLIP is not a causal language model"):
        on_meta_device(config_of(tmp_path), load_config(config_of(tmp_path)))
