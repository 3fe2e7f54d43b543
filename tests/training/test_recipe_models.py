"""Every recipe for a GPU fits its hardware by the formulas, and trains a small copy of its model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from chunkflow_cli.cli.recipes import describe
from chunkflow_cli.config.load import load
from chunkflow_cli.config.recipe_files import recipe_files
from chunkflow_cli.config.schema import Config, Dtype, Init, Offload
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.parity import random_sequences
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.memory_parts import memory_parts
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.training.assembly import assemble
from chunkflow_cli.training.setup import read_setup
from support.published_shapes import SHAPES
from support.wrappers import QWEN_VISION, TEXT, VISION

GIB = 2**30
OF_GPU_GIB = {24: 23.99, 48: 47.4, 80: DEVICES["h100"].memory_bytes / GIB, 141: DEVICES["h200"].memory_bytes / GIB}
"""Memory of a GPU by the gigabytes of its name."""
FOR_GPUS = {
    name: path for name, path in recipe_files().items() if load([f"recipe={name}"]).config.hardware.count("GPU")
}
SAME_SHAPE = {"unsloth/gpt-oss-20b-BF16": "openai/gpt-oss-20b"}


def recipe(name: str, folder: Path, settings: dict[str, Any]) -> Config:
    """Return what a recipe trains, with the model of this configuration."""
    config = load([f"recipe={name}"]).config
    (folder / "config.json").write_text(json.dumps(settings))
    return replace(config, model=replace(config.model, path=str(folder), init=Init.random))


def shape_of(name: str) -> dict[str, Any]:
    path = describe(name, FOR_GPUS[name]).model
    return SHAPES[SAME_SHAPE.get(path, path)]


@pytest.mark.parametrize("name", FOR_GPUS)
def test_the_memory_that_a_recipe_states_is_the_formulas(name: str, tmp_path: Path) -> None:
    """The fullest moment of any data: K full chunks hold activations, and all of the longest sample is stored."""
    config = recipe(name, tmp_path, shape_of(name))
    setup = read_setup(config, load_config(config.model), DEVICES["h100"])
    assert setup.shape is not None
    assert config.data.max_length is not None
    stored = (config.data.max_length - 1) // config.chunk.size * config.chunk.size
    live, edges = config.chunk.size * config.chunk.k, stored // config.chunk.size
    parts = memory_parts(setup.shape, setup.memory, live=live, stored=stored, edges=edges)
    words = re.search(r"(one|eight) GPUs? of (\d+) GB(?:, (\d+) GB of host memory)?", config.hardware)
    stated = re.search(r"not measured: (\d+) GiB", FOR_GPUS[name].read_text())
    assert words is not None
    assert stated is not None
    assert config.launch.processes == {"one": 1, "eight": 8}[words[1]]
    assert int(stated[1]) - 1 < parts.device_total / GIB < int(stated[1]) + 0.5
    assert int(stated[1]) < 0.96 * OF_GPU_GIB[int(words[2])]
    assert parts.host < 0.9e9 * int(words[3] or 0) or parts.host == 0


def small_copy(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the same architecture with a few narrow layers."""
    text = dict(settings.get("text_config", settings))
    layers = text.get("layer_types") or ["linear_attention"] * 3 + ["full_attention"]
    sizes: dict[str, Any] = {**TEXT, "num_hidden_layers": 4}
    match settings["model_type"]:
        case "qwen3_5":
            sizes |= {
                "layer_types": layers[:4], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                "rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
            }  # fmt: skip
        case "gemma4":
            sizes |= {"layer_types": layers[4:6] * 2, "global_head_dim": 16, "sliding_window": 11}
            sizes |= {"vocab_size_per_layer_input": 96}
            sizes |= {key: small for key, small in (("num_kv_shared_layers", 2), ("num_global_key_value_heads", 1),
                      ("hidden_size_per_layer_input", 4)) if text.get(key)}  # fmt: skip
        case "gpt_oss":
            sizes |= {
                "num_local_experts": 4,
                "sliding_window": 11,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            }
        case "smollm3":
            sizes |= {"no_rope_layers": [1, 1, 1, 0], "layer_types": None}
    small = {**text, **sizes}
    if "text_config" not in settings:
        return small
    return {**settings, "text_config": small, "vision_config": QWEN_VISION if settings["model_type"] == "qwen3_5" else {
        **VISION, "head_dim": 8, "num_key_value_heads": 2}}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_process_group() -> Any:
    """Keep the process group open: DeepSpeed reuses the groups of its first engine for every later one."""
    yield
    close_process_group()


@pytest.mark.parametrize("name", FOR_GPUS)
@pytest.mark.filterwarnings("ignore")
def test_a_small_copy_trains_a_step(name: str, tmp_path: Path) -> None:
    """The loss is that of whole sequences, and every trained weight changes. On a CPU nothing can be offloaded to it."""
    config = recipe(name, tmp_path, small_copy(shape_of(name)))
    config.model.dtype, config.engine.offload = Dtype.float32, Offload.none
    config.launch.processes = 1
    device, hf_config = torch.device("cpu"), load_config(config.model)
    backend = choose_backend(config.model.attention, hf_config, device, torch.float32).backend
    whole = load_model(config.model, hf_config, dtype=torch.float32, attention="eager", seed=config.train.seed)
    sequences = random_sequences((70, 9, 20), 96)
    targets = sum(int((sequence.targets >= 0).sum()) for sequence in sequences)
    expected = sum(whole_loss(whole, sequence) for sequence in sequences) / targets

    parts = assemble(config, hf_config, backend, device)
    before = {n: w.clone() for n, w in parts.engine.whole_weights(parts.model, trained_only=True).items()}
    chunks = build_chunks([len(sequence.input_ids) for sequence in sequences], 25)
    schedule = plan(chunks, config.chunk.k, join_retained=parts.engine.is_divided)
    result = parts.runner.run((schedule,), StepBatch(chunks, sequences, np.full(3, 1 / targets)))
    parts.engine.set_learning_rate(1e-2)
    assert parts.engine.step() > 0
    assert result.loss == pytest.approx(expected, rel=1e-5)
    after = parts.engine.whole_weights(parts.model, trained_only=True)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "lora_A" in name}  # their gradient is zero while B is


def whole_loss(model: Any, sequence: Any) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None], use_cache=False).logits[
            0
        ]
    targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
    return float(nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
