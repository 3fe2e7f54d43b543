"""Quantized bases under adapters, and checkpoints that are stored in few bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Dtype, LoraConfig, ModelConfig, Quantization
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.adapter_merge import merge_adapters
from chunkflow_cli.model.adapter_saving import save_adapters
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import check_adapters, load_model, on_meta_device
from chunkflow_cli.model.quantised import dequantise, quantised_layers, stored_bytes
from chunkflow_cli.model.shape import shape_without_weights
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan

CPU = torch.device("cpu")
WIDE = {"hidden_size": 128, "intermediate_size": 384}
KINDS = [Quantization.nf4, Quantization.int8]
SEQUENCES = random_sequences((150, 9, 30), 96, seed=3)
TOTAL = sum(int((sequence.targets != -100).sum()) for sequence in SEQUENCES)


def quantised(folder: Path, kind: Quantization, **settings: Any) -> tuple[Any, ModelConfig]:
    """Return the model with adapters that are not zero, and its configuration."""
    config = ModelConfig(
        path=str(folder), dtype=Dtype.float32, quantization=kind, lora=LoraConfig(enabled=True, r=4, **settings)
    )
    attention.register()
    model = load_model(config, load_config(config), dtype=torch.float32, attention=attention.NAME, seed=0)
    adapted = add_lora(model, config.lora)
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(index))
    return adapted, config


def transformers_own(folder: Path, kind: Quantization) -> Any:
    """Return the base as transformers makes it; in int8 with plain layers of the weights that bitsandbytes stores."""
    if kind is Quantization.nf4:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in quantised_layers(model).values():
        stored, scales, _ = int8_vectorwise_quant(layer.weight.detach().half())
        layer.weight.data = int8_vectorwise_dequant(stored, scales)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_train_what_peft_trains_over_the_same_base(
    tiny_model: Callable[..., Any], tmp_path: Path, kind: Quantization, use_dora: bool
) -> None:
    """The truth is peft's whole-sequence training over the base of transformers, with bitsandbytes' own 4-bit products."""
    tiny_model("llama", **WIDE).save_pretrained(tmp_path)
    ours, _ = quantised(tmp_path, kind, use_dora=use_dora)
    by_hand = PeftLoraConfig(r=4, lora_alpha=32, target_modules="all-linear", use_dora=use_dora)
    theirs = get_peft_model(transformers_own(tmp_path, kind), by_hand, autocast_adapter_dtype=False).train()
    adapters = {name: p.data for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data = adapters[name].clone()
    whole = 0.0
    for sequence in SEQUENCES:
        logits = theirs(torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]).logits[0]
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / TOTAL
        loss.backward()
        whole += float(loss.detach())
    ours.eval()  # as before an evaluation; on some CPUs bitsandbytes packs its weights anew then
    with torch.no_grad():
        ours.get_base_model().model.layers[0].mlp(torch.zeros(1, 3, 128))
    ours.train()
    chunks = build_chunks([len(sequence.input_ids) for sequence in SEQUENCES], 17)
    runner = Runner(DirectEngine(ChunkModel(ours, ReferenceBackend())), RunnerSettings(CPU))
    result = runner.run((plan(chunks, 2),), StepBatch(chunks, SEQUENCES, np.full(3, 1 / TOTAL)))
    truth, found = gradients(theirs), gradients(ours)
    assert truth.keys() == found.keys()
    error = sum(float((truth[name] - found[name]).square().sum()) for name in truth) ** 0.5
    assert error / sum(float(t.square().sum()) for t in truth.values()) ** 0.5 < 5e-6
    assert result.loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_without_the_model(
    tiny_model: Callable[..., Any], tmp_path: Path, kind: Quantization
) -> None:
    tiny_model("llama", tie_word_embeddings=True, **WIDE).save_pretrained(tmp_path)
    adapted, config = quantised(tmp_path, kind)
    hf_config = load_config(config)
    layers = {
        name.replace(".base_layer", ""): layer
        for name, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    }

    def held(weight: Any) -> int:
        parts = [weight.data]
        if kind is Quantization.nf4:
            state = weight.quant_state
            parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        else:
            parts.append(weight.SCB)
        return sum(part.nbytes for part in parts)

    empty = quantised_layers(on_meta_device(config, hf_config))
    assert empty.keys() == layers.keys()
    assert len(layers) == 2 * 7
    assert {name: stored_bytes(kind, layer) for name, layer in empty.items()} == {
        name: held(layer.weight) for name, layer in layers.items()
    }
    shape = shape_without_weights(config, hf_config)
    elements = sum(layer.weight.numel() for layer in empty.values())
    assert shape.spared_bytes == 4 * elements - sum(held(layer.weight) for layer in layers.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_base_and_adapter(tiny_model: Callable[..., Any], tmp_path: Path, kind: Quantization) -> None:
    tiny_model("qwen2", **WIDE).save_pretrained(tmp_path / "base")
    adapted, config = quantised(tmp_path / "base", kind)
    (tmp_path / "final").mkdir()
    weights = {name: t.detach() for name, t in adapted.state_dict(keep_vars=True).items() if t.requires_grad}
    save_adapters(adapted, tmp_path / "final", weights, "")
    base = load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)
    dequantise(base, torch.float32)
    merged, _ = merge_adapters(base, tmp_path / "final")
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    adapted.get_base_model().set_attn_implementation("sdpa")
    ids = torch.arange(3, 40)[None]
    truth, plain = adapted.eval()(ids).logits, tiny_model("qwen2", **WIDE)(ids).logits
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert float((got - truth).norm() / truth.norm()) < 1e-5
    assert float((plain - truth).norm() / truth.norm()) > 1e-2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model.lora.enabled=false: quantized weights cannot be trained"),
        (["model.lora.enabled=true", "model.init=random"], "model.init=random"),
        (["model.lora.enabled=true", "model.path=a.gguf"], "a GGUF file"),
        (["model.lora.enabled=true", "model.dtype=float64"], "bitsandbytes has no float64"),
        (["model.lora.enabled=true", "engine.zero_stage=3"], "set engine.zero_stage=1 or 2"),
    ],
)
def test_what_cannot_be_quantised_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        load(["model.path=x", "data.path=y", "model.quantization=nf4", *words])


def test_targets_that_need_the_numbers_of_a_layer_are_refused(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)

    def begin(config: ModelConfig) -> None:
        check_adapters(config, load_config(config))
        load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)

    def refused(**settings: Any) -> str:
        config = ModelConfig(
            path=str(tmp_path), quantization=Quantization.int8, lora=LoraConfig(enabled=True, **settings)
        )
        with pytest.raises(UsageError) as error:
            begin(config)
        return str(error.value)

    assert "v_proj is stored in few bits, and as one of model.lora.modules_to_save" in refused(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "v_proj"]
    )
    assert "one of model.lora.target_parameters" in refused(target_modules=[], target_parameters=["q_proj.weight"])
    monkeypatch.setattr("chunkflow_cli.model.quantised.find_spec", lambda name: None)
    assert "needs the package bitsandbytes" in refused()


# Checkpoints that are stored in few bits


def in_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return tensors as DeepSeek stores them, in blocks of 128 x 128 with a scale each, and what they stand for."""
    stored, truth = {}, {}
    for name, tensor in tensors.items():
        stored[name] = truth[name] = tensor
        if "proj" not in name:
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = torch.zeros(rows, columns)
        stored[name], truth[name] = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn), torch.zeros(tensor.shape)
        for row in range(rows):
            for column in range(columns):
                block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                scales[row, column] = tensor[block].abs().max() / 448
                stored[name][block] = (tensor[block] / scales[row, column]).to(torch.float8_e4m3fn)
                truth[name][block] = stored[name][block].float() * scales[row, column]
        stored[f"{name}_scale_inv"] = scales
    return stored, truth, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def in_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return tensors as gpt-oss stores its experts, in blocks of 32 with a power of two each, and what they stand for."""
    positive = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([positive, -positive])
    stored, truth = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = truth[name] = tensor
            continue
        blocks = tensor.transpose(1, 2).unflatten(-1, (-1, 32))  # (experts, out, blocks, 32)
        powers = blocks.abs().amax(-1).log2().floor() - 2
        nearest = (blocks[..., None] / 2 ** powers[..., None, None] - values).abs().argmin(-1)
        stored[f"{name}_blocks"] = (nearest[..., 0::2] | nearest[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        truth[name] = (values[nearest] * 2 ** powers[..., None]).flatten(-2).transpose(1, 2)
    return stored, truth, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens"]}


EXPERTS = {"head_dim": 16, "num_local_experts": 4, "sliding_window": 11}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings", "convert"), [("llama", WIDE, in_fp8), ("gpt_oss", EXPERTS, in_mxfp4)], ids=["fp8", "mxfp4"]
)
def test_a_checkpoint_in_few_bits_is_converted_on_load(
    tiny_model: Callable[..., Any], tmp_path: Path, kind: str, settings: dict[str, Any], convert: Any, dtype: Dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What is trained and saved are plain weights with the numbers that the files stand for."""
    tiny_model(kind, **settings).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored, truth, how = convert(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": how}))
    config = ModelConfig(path=str(tmp_path), dtype=dtype)
    own_dtype: torch.dtype = getattr(torch, dtype.value)
    model = load_model(config, load_config(config), dtype=own_dtype, attention="eager", seed=0)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor.to(own_dtype)) for name, tensor in truth.items())
    assert f"stored in {how['quant_method']}, and converted to {dtype.value}" in capsys.readouterr().err
    assert not hasattr(model.config, "quantization_config")
    if convert is in_fp8:  # of which transformers would make two blocks of 96
        tiny_model(kind, **settings | {"intermediate_size": 192}).save_pretrained(tmp_path / "uneven")
        stored, _, _ = convert(load_file(tmp_path / "uneven" / "model.safetensors"))
        save_file(stored, tmp_path / "uneven" / "model.safetensors", metadata={"format": "pt"})
        values["intermediate_size"] = 192
        (tmp_path / "uneven" / "config.json").write_text(json.dumps(values | {"quantization_config": how}))
        uneven = ModelConfig(path=str(tmp_path / "uneven"), dtype=dtype)
        hf_config = load_config(uneven)
        with pytest.raises(UsageError, match=r"cannot convert .* whose sizes are not multiples of 128"):
            load_model(uneven, hf_config, dtype=own_dtype, attention="eager", seed=0)
    with pytest.raises(UsageError, match="cannot be converted and quantized at once"):
        load_config(ModelConfig(path=str(tmp_path), quantization=Quantization.nf4))
