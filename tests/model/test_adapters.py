"""Adapters: what gets one, what is refused, and that merged weights are base and adapter, as peft itself computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.cli import export
from chunkflow_cli.config.schema import ActivationCheckpointing, Init, LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences
from chunkflow_cli.execution.precision import use_float64_parts
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapter_merge import merge_adapters
from chunkflow_cli.model.adapter_saving import adapter_card, save_adapters
from chunkflow_cli.model.adapter_summary import summarize
from chunkflow_cli.model.adapter_targets import linear_layers
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.identity import BLOCK_BYTES, BLOCKS, changed_files, model_files
from chunkflow_cli.model.loading import check_adapters
from chunkflow_cli.training.identity import RunIdentity
from support.models import recurrent_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = ("qwen3_moe", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 2})
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def lora(*modules: str, **settings: Any) -> LoraConfig:
    return LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=list(modules), **settings)


def spread(peft_model: Any) -> Any:
    """Give adapters weights that change every output."""
    for index, parameter in enumerate(p for p in peft_model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(index))
    return peft_model


def trained(peft_model: Any) -> set[str]:
    return {name.split(".lora_")[0] for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def saved(peft_model: Any, folder: Path) -> Path:
    weights = {name: t.detach() for name, t in peft_model.state_dict(keep_vars=True).items() if t.requires_grad}
    save_adapters(peft_model, folder, weights, adapter_card(ModelConfig(path="base"), peft_model))
    return folder


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("phi3", ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj, k_proj or v_proj", "did you mean qkv_proj?"]),
        ("llama", ["q_proj", "v_porj"], ["no module v_porj", "did you mean v_proj?", "down_proj, gate_proj, k_proj"]),
        ("llama", ["self_attn.q_prj"], ["did you mean self_attn.q_proj?"]),
        ("llama", [r".*layers\.7\..*"], ["no module .*layers"]),
        ("llama", ["*proj"], ["*proj is not a regular expression"]),
        ("llama", ["mlp"], ["matches model.layers.0.mlp, a LlamaMLP, which cannot have an adapter"]),
        ("llama", ["Q_proj"], ["no module Q_proj"]),
        ("llama", [], ["names nothing to train"]),
        ("mixtral", ["w1", "w2"], ["w1 or w2", "target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"]),
    ],
)
def test_a_name_that_matches_nothing_is_refused(
    tiny_model: Callable[..., Any], kind: str, targets: list[str], said: list[str]
) -> None:
    """peft trains what does match and drops the rest: a typing error would train a part of what was asked."""
    with pytest.raises(UsageError) as error:
        add_lora(tiny_model(kind), lora(*targets))
    assert all(text in str(error.value) for text in said), str(error.value)


@pytest.mark.parametrize(
    ("targets", "parameters", "said"),
    [
        ([], ["experts.gate_up_prj"], "did you mean mlp.experts.gate_up_proj?"),
        ([], ["norm.weight"], "has one axis"),
        (["q_proj"], ["q_proj.weight"], "leave it out of one of them"),
        ([], ["lm_head.weight"], "name lm_head in model.lora.target_modules"),
    ],
)
def test_a_parameter_that_cannot_have_an_adapter_is_refused(
    tiny_model: Callable[..., Any], targets: list[str], parameters: list[str], said: str
) -> None:
    kind, settings = MIXED
    with pytest.raises(UsageError, match=re.escape(said)):
        add_lora(tiny_model(kind, **settings), lora(*targets, target_parameters=parameters))


@pytest.mark.parametrize("word", ["conv1d.weight", "x_proj_weight"])
def test_a_parameter_of_a_recurrent_layer_is_refused_as_target(word: str) -> None:
    """Nor does the warning about weights without an adapter name it: zamba stacks matrices there, too."""
    model = recurrent_model("zamba")
    with pytest.raises(UsageError, match=f"{word} belongs to a recurrent layer"):
        add_lora(model, lora(target_parameters=[word]))
    assert summarize(add_lora(model, lora("q_proj"))).warning is None


@pytest.mark.parametrize(
    ("targets", "settings", "said"),
    [
        (["q_proj"], {"modules_to_save": ["embed"]}, "no module with weights embed\n  did you mean embed_tokens?"),
        (["q_proj"], {"modules_to_save": ["mlp"]}, "a LlamaMLP, which has no weights of its own"),
        (["q_proj"], {"modules_to_save": ["q_proj"]}, "q_proj is in model.lora.target_modules, too"),
        (["lm_head"], {"modules_to_save": ["embed_tokens"]}, "names lm_head, which has the same weight"),
        ([], {"modules_to_save": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "modules_to_save names, too"),
        ([], {"use_dora": True, "target_parameters": ["o_proj.weight"]}, "there is no DoRA"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(
    tiny_model: Callable[..., Any], targets: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        add_lora(tiny_model("llama", tie_word_embeddings=True), lora(*targets, **settings))


def test_peft_computes_the_same_from_settings_written_by_hand(tiny_model: Callable[..., Any]) -> None:
    """`norm` finds every norm in peft, which looks for endings, not for names."""
    ours = spread(add_lora(tiny_model("qwen3", head_dim=16), lora("q_proj", use_rslora=True, use_dora=True,
                                                                 modules_to_save=["norm", "lm_head"])))  # fmt: skip
    by_hand = PeftLoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True, use_dora=True,
        modules_to_save=["model.norm", "lm_head"],
    )  # fmt: skip
    theirs = get_peft_model(tiny_model("qwen3", head_dim=16), by_hand)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    summary = summarize(ours)
    assert summary.saved_weights == 64 + 96 * 64
    assert "DoRA trains" in str(summary)
    assert str(summary).endswith(f"on q_proj, and all {summary.saved_weights:,} of model.norm, lm_head")


def test_names_are_those_of_the_whole_model_and_of_patterns(tiny_model: Callable[..., Any]) -> None:
    one_layer = add_lora(tiny_model("llama"), lora(r".*layers\.1\..*mlp.*", "layers.0.self_attn.o_proj"))
    assert {name.removeprefix("base_model.model.model.layers.") for name in trained(one_layer)} == {
        "0.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj",
    }  # fmt: skip
    everything = trained(add_lora(tiny_model("gpt2", n_layer=2), lora("all-linear", "lm_head")))
    assert len(everything) == 2 * 4 + 1


def test_all_linear_reaches_dense_layers_beside_experts(tiny_model: Callable[..., Any]) -> None:
    """peft takes gate_proj for the experts' fused weights in this family, and would leave the dense layer out."""
    kind, settings = MIXED
    model = add_lora(tiny_model(kind, **settings), lora("all-linear"))
    linear = {name for name, module in tiny_model(kind, **settings).named_modules() if isinstance(module, nn.Linear)}
    assert trained(model) == {f"base_model.model.{name}" for name in linear - {"lm_head"}}
    summary = summarize(model)
    experts = 3 * 4 * 64 * 32  # gate, up and down of four experts in one layer
    total = sum(p.numel() for p in tiny_model(kind, **settings).parameters())
    assert summary.unreached_share == pytest.approx(experts / total)
    assert summary.base == total
    assert "model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]" in str(summary.warning)
    assert summarize(add_lora(tiny_model(kind, **settings), lora(target_parameters=BOTH))).warning is None
    with pytest.raises(UsageError, match=r"set model\.lora\.dropout=0"):
        add_lora(tiny_model(kind, **settings), lora("all-linear", dropout=0.1))


def test_a_product_of_groups_has_no_adapter() -> None:
    """peft would multiply all channels with each other, where deepseek_v4 multiplies each group with a part."""
    model = recurrent_model("deepseek_v4")
    with_weight = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[2] for name in with_weight - {*linear_layers(model)}} == {"o_a_proj", "lm_head"}


MERGES: dict[str, tuple[str, dict[str, Any], LoraConfig]] = {
    "head, tied": ("llama", {"tie_word_embeddings": True}, lora("q_proj", "lm_head")),
    "embedding, tied and scaled": (
        "gemma3_text", {"tie_word_embeddings": True, "head_dim": 16}, lora("q_proj", "embed_tokens"),
    ),
    "head and embedding": ("llama", {}, lora("lm_head", "embed_tokens")),
    "dense layers and experts": (*MIXED, lora("all-linear", target_parameters=BOTH)),
    "transposed experts": (
        "gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 11}, lora(target_parameters=BOTH),
    ),
    "DoRA": ("llama", {}, lora("all-linear", "embed_tokens", use_dora=True, use_rslora=True)),
    "one weight, trained whole": (
        "gemma3_text", {"tie_word_embeddings": True, "head_dim": 16},
        lora("q_proj", use_dora=True, modules_to_save=["lm_head", ".*norm"]),
    ),
    "two weights, trained whole": ("qwen2", {}, lora("q_proj", modules_to_save=["embed_tokens", "lm_head", "v_proj"])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MERGES)
def test_merged_weights_compute_what_base_and_adapter_compute(
    tiny_model: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    """The truth is peft's own forward over the saved folder, in float64; and chunks train what whole sequences train."""
    kind, settings, config = MERGES[name]
    base, ids = tiny_model(kind, dtype=torch.float64, **settings), torch.arange(3, 40)[None]
    base.save_pretrained(tmp_path / "base")

    def load(folder: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        use_float64_parts(model, torch.float64)
        return model.eval()

    use_float64_parts(base, torch.float64)
    adapted = spread(add_lora(base, config))
    parity = compare(
        adapted, random_sequences((60, 9), 96, 3), InChunks(ReferenceBackend(), chunk_size=17, k=2, stages=2)
    )
    assert parity.grad_rel_error < 1e-12
    final = saved(adapted, tmp_path / "final")
    merged, is_separated = merge_adapters(load(tmp_path / "base"), final)
    merged.save_pretrained(tmp_path / "merged")
    assert is_separated == ("tied" in name)
    plain = load(tmp_path / "base")(ids).logits.detach()
    truth = PeftModel.from_pretrained(load(tmp_path / "base"), str(final)).eval()(ids).logits.detach()
    got = load(tmp_path / "merged")(ids).logits.detach()
    assert float((got - truth).norm() / truth.norm()) < 1e-12
    assert float((plain - truth).norm() / truth.norm()) > 1e-2


def test_a_merge_rounds_once(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """The sum of experts' weights and adapter is taken in float32. peft rounds what it adds first."""
    kind, settings = MIXED
    adapted = spread(add_lora(tiny_model(kind, dtype=torch.bfloat16, **settings), lora(target_parameters=BOTH)))
    final = saved(adapted, tmp_path / "final")
    name = "model.layers.1.mlp.experts.down_proj"
    base = tiny_model(kind, dtype=torch.bfloat16, **settings)
    before = base.get_parameter(name).detach().clone().float()
    layer = adapted.get_base_model().get_submodule(name.rpartition(".")[0])
    while layer.parameter_name != "down_proj":
        layer = layer.base_layer
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    # (experts, out x, in): of each expert, its columns of B times its rows of A, by alpha / r
    delta = 2 * torch.einsum("xre,eri->exi", b.reshape(len(b), -1, 4), a.reshape(4, -1, a.shape[-1]))
    merged, _ = merge_adapters(base, final)
    assert torch.equal(merged.get_parameter(name), (before + delta).bfloat16())


def test_training_goes_on_from_a_saved_adapter(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    saving = lora("v_proj", use_dora=True, modules_to_save=["embed_tokens", "norm"])
    kinds = [(tiny_model("llama", tie_word_embeddings=True), saving), (tiny_model("llama"), lora("q_proj", "lm_head"))]
    for model, config in kinds:
        first = spread(add_lora(model, config))
        folder = saved(first, tmp_path / "final")
        same = tiny_model("llama", tie_word_embeddings=model.config.tie_word_embeddings)
        again = add_lora(same, LoraConfig(enabled=True, path=str(folder)))
        theirs = {name: parameter for name, parameter in again.named_parameters() if parameter.requires_grad}
        ours = {name: parameter for name, parameter in first.named_parameters() if parameter.requires_grad}
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert again.peft_config["default"].lora_alpha == 8

    def refused(**changes: Any) -> str:
        with pytest.raises(UsageError) as error:
            add_lora(tiny_model(changes.pop("kind", "llama")), LoraConfig(enabled=True, path=str(folder), **changes))
        return str(error.value)

    assert "model.lora.r=8 contradicts the adapter" in refused(r=8)
    assert "model.lora.target_modules" in refused(target_modules=["v_proj"])
    assert "do not fit this model" in refused(kind="qwen3")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({**weights, "base_model.model.lm_head.weight": torch.zeros(96, 64)}, folder / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight, a weight of the base" in refused()
    assert "model.lora.use_dora=True contradicts" in refused(use_dora=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj", "v_proj"]}))
    assert "is not an adapter of this model" in refused()
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_bias": True}))
    assert "lora_bias=True" in refused()
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused()


def test_an_adapter_as_the_model_is_explained(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(add_lora(tiny_model("llama"), lora("q_proj")), tmp_path / "run" / "final")
    AutoConfig.for_model("llama").save_pretrained(folder)  # with it, transformers would load base and adapter as one
    with pytest.raises(UsageError, match="is an adapter") as error:
        load_config(ModelConfig(path=str(folder)))
    assert f"model.lora.path={folder}" in str(error.value)
    assert f"chunkflow export {tmp_path / 'run'} --merge" in str(error.value)


def test_the_base_is_named_for_any_folder(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("base")
    adapted = add_lora(AutoModelForCausalLM.from_pretrained("base"), lora("q_proj"))
    folder = saved(adapted, tmp_path / "final")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    card = (folder / "README.md").read_text()
    assert str(tmp_path / "base") in card
    assert "AutoPeftModelForCausalLM" in card
    assert "More Information Needed" not in card
    config = ModelConfig(path="base", lora=lora("q_proj"))
    assert check_adapters(config, load_config(config)).trained == 2 * 2 * 4 * 64  # layers, matrices, rank, width


def test_a_model_with_other_weights_is_told_from_the_recorded_one(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3 * BLOCK_BYTES * BLOCKS))
    recorded = model_files(ModelConfig(path=str(folder)))
    moved = folder.rename(tmp_path / "moved")
    assert changed_files(recorded, model_files(ModelConfig(path=str(moved)))) == []
    for change in (b"\x01" * (3 * BLOCK_BYTES * BLOCKS), bytes(3 * BLOCK_BYTES * BLOCKS + 1)):
        (moved / "model.safetensors").write_bytes(change)
        (line,) = changed_files(recorded, model_files(ModelConfig(path=str(moved))))
        assert line.startswith("model.safetensors was 12,582,912 bytes (")
    (moved / "model.safetensors").rename(moved / "other.safetensors")
    assert len(changed_files(recorded, model_files(ModelConfig(path=str(moved))))) == 2
    assert set(model_files(ModelConfig(path=str(moved), init=Init.random))) == {"config.json"}


@pytest.mark.filterwarnings("ignore")
def test_a_merge_finds_its_base_from_anywhere(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base of a run with relative paths is looked for where `train` ran, and refused if its weights have changed.

    This base does not run with torch's scaled_dot_product_attention.
    """
    project, run = tmp_path / "project", tmp_path / "project" / "runs" / "one"
    tiny_model("granite_swa").save_pretrained(project / "base")
    saved(add_lora(AutoModelForCausalLM.from_pretrained(project / "base"), lora("q_proj")), run / "final")
    settings = run / "final" / "adapter_config.json"
    text = settings.read_text()
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text(
        "model: {path: base, dtype: float32, init: pretrained, rope_scaling: {rope_type: yarn, factor: 4}}\n"
        "train: {seed: 0, output_dir: runs/one}\n"
    )
    identity = RunIdentity((), (), {}, {}, model_files(ModelConfig(path=str(project / "base"))))
    (run / "identity.json").write_text(json.dumps(identity.to_json()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export.run(str(run), output="merged", merge=True)
    told = capsys.readouterr()
    assert told.out == "merged\n"
    assert "A whole model. Load it" in told.err
    assert "no tokenizer" in told.err
    merged = json.loads((tmp_path / "elsewhere" / "merged" / "config.json").read_text())
    assert merged["rope_parameters"]["factor"] == 4
    assert merged["max_position_embeddings"] == 4 * 1024
    export.run(str(run), output="copied", merge=False)
    assert 'AutoPeftModelForCausalLM.from_pretrained("copied")' in capsys.readouterr().err
    # Earlier versions recorded the relative path. A folder of that name here is another model.
    settings.write_text(text.replace(str(project / "base"), "base"))
    tiny_model("granite_swa", seed=1).save_pretrained("base")
    export.run(str(run), output="merged-2", merge=True)
    one, two = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("merged", "merged-2"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    tiny_model("granite_swa", seed=1).save_pretrained(project / "base")
    with pytest.raises(UsageError, match=r"not the base model of this run any more: model\.safetensors was "):
        export.run(str(run), output="merged-3", merge=True)
    settings.write_text(text)
    (project / "base").rename(project / "away")
    with pytest.raises(UsageError, match="the base model of this run is gone"):
        export.run(str(run), output="merged-3", merge=True)
    assert not Path("merged-3").exists()


def test_checkpointing_leaves_frozen_embeddings_without_gradient(tiny_model: Callable[..., Any]) -> None:
    """git adds positions to its embeddings in place, which torch refuses for a leaf that requires a gradient."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
    }
    model = tiny_model("git", vision_config={**vision, "patch_size": 8})
    enable_activation_checkpointing(model, ActivationCheckpointing.full)
    adapted = add_lora(model, LoraConfig(enabled=True, r=2))
    adapted(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert all(
        p.grad is not None
        for name, p in adapted.named_parameters()
        if "encoder" in name and "lora_B" in name and "image" not in name
    )
