"""Random models of real shapes as folders on disk, and data of token ids: nothing is downloaded."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "max_position_embeddings": 524288,
}  # fmt: skip
"""Llama-3.1-8B (its config.json), with more positions."""
LLAMA_1B = {
    **LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
"""Llama-3.2-1B, likewise."""
SMALL = {
    **LLAMA_8B, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
TINY = {
    **LLAMA_8B, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 256,
}  # fmt: skip
POOL = 2**26
"""Random numbers that are drawn once, and repeated: eight billion would take minutes."""


def model_folder(work: Path, name: str, *, dry: bool, layers: int | None = None) -> Path:
    """Return the folder of a random bfloat16 model, made at the first call: "8B", "1B" or "small"; tiny in a dry run.

    Args:
        work: folder for all models.
        layers: the first layers only; their files are those of the whole model.
    """
    config: dict[str, Any] = {**(TINY if dry else {"8B": LLAMA_8B, "1B": LLAMA_1B, "small": SMALL}[name])}
    whole = int(config["num_hidden_layers"])
    folder = work / f"model-{name}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the whole model may just be written in the background
        if not folder.exists():
            _write_model(folder, config)
        if layers is None or layers == whole:
            return folder
        cut = work / f"model-{name}-{layers}"
        if not cut.exists():
            _link_layers(folder, cut, {**config, "num_hidden_layers": layers})
    return cut


def _write_model(folder: Path, config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    from chunkflow_cli.model.loading import empty_model

    making = folder.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    model_type = config["model_type"]
    settings = {name: value for name, value in config.items() if name != "model_type"}
    model = empty_model(AutoConfig.for_model(model_type, **settings), dtype=torch.bfloat16)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        layer = name.partition(".layers.")[2].partition(".")[0]
        files.setdefault(f"layer-{layer or 'none'}.safetensors", {})[name] = tuple(parameter.shape)
    most = max(np.prod(shape) for tensors in files.values() for shape in tensors.values())
    pool = (torch.randn(min(POOL, int(most)), generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for file, tensors in files.items():
        save_file({name: _drawn(pool, shape) for name, shape in tensors.items()}, str(making / file), {"format": "pt"})
    _write_settings(making, config, {name: file for file, tensors in files.items() for name in tensors})
    making.rename(folder)


def _drawn(pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)  # a norm
    count = int(np.prod(shape))
    return pool.repeat(-(-count // len(pool)))[:count].reshape(shape)


def _link_layers(whole: Path, cut: Path, config: dict[str, Any]) -> None:
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    kept = {"layer-none.safetensors", *(f"layer-{layer}.safetensors" for layer in range(config["num_hidden_layers"]))}
    cut.mkdir()
    for file in kept:
        os.link(whole / file, cut / file)
    _write_settings(cut, config, {name: file for name, file in index["weight_map"].items() if file in kept})


def _write_settings(folder: Path, config: dict[str, Any], places: dict[str, str]) -> None:
    settings = {**config, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_samples(path: Path, lengths: list[int], vocab_size: int, target_share: float = 1.0) -> None:
    """Write a row of random token ids for each length; the loss counts its last part."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            ids = generator.integers(3, vocab_size, length)
            labels = np.where(np.arange(length) >= (1 - target_share) * length, ids, -100)
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")
