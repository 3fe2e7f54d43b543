"""Ranks of a node that load one model share its pages: 70B in bfloat16 are 140 GB, and eight copies fit nowhere."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chunkflow_cli.config.schema import Dtype, EngineConfig, ModelConfig, OptimConfig
from chunkflow_cli.engine import Engine, EngineSettings, import_deepspeed
from chunkflow_cli.model import shared_weights
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model, model_of_weights

RANKS = 4
SHARE_OF_ONE = (1.3 - 1) / RANKS
"""Most that a rank may hold on its own, as a share of the model: four ranks then take at most 1.3 times the model."""


@pytest.fixture(scope="module")
def saved(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model on the disk, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=4096)
    model.save_pretrained(folder)
    return folder, sum(weight.nbytes for weight in model.parameters())


def loaded(folder: Path) -> Any:
    config = ModelConfig(path=str(folder))
    return load_model(config, load_config(config), dtype=torch.float32, attention="eager", seed=0)


def own_bytes() -> int:
    """Return the bytes that belong to this process alone, as Linux counts them: pages of files are not among them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def test_a_loaded_model_is_in_pages_that_ranks_share(saved: tuple[Path, int]) -> None:
    """Weights are mapped from their files, and nothing before training (checks, settings) may copy or change them."""
    folder, model_bytes = saved
    loaded(folder)  # what imports and first calls keep is not of the weights
    gc.collect()
    before = own_bytes()
    model = loaded(folder)
    assert own_bytes() - before < SHARE_OF_ONE * model_bytes
    assert sum(weight.nbytes for weight in model.parameters()) == model_bytes


@pytest.mark.parametrize(
    ("kind", "settings", "saved", "dtype"),
    [
        ("llama", {}, "float32", "float32"),
        ("llama", {"tie_word_embeddings": True}, "float32", "bfloat16"),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "bfloat16", "bfloat16"),
    ],
    ids=["files in the dtype of the run", "another dtype, and a tied head", "experts that are stacked"],
)
def test_weights_that_loading_changes_are_shared_too(
    kind: str, settings: dict[str, Any], saved: str, dtype: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """What the first rank has loaded moves to a file, and another rank makes the same model around its pages."""
    tiny_model(kind, dtype=getattr(torch, saved), **settings).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "attention": "eager"}
    first = load_model(config, load_config(config), seed=0, **arguments)
    before = {name: weight.clone() for name, weight in first.state_dict().items()}
    is_mapped = shared_weights.own_bytes(first) == 0
    shared = shared_weights.share(first)
    assert is_mapped is (shared is None) is (saved == dtype and kind != "mixtral")
    if shared is None:
        assert_a_write_is_seen_in_one_weight_only(first)
        return
    other = model_of_weights(config, load_config(config), shared.map(), **arguments)
    os.close(shared.descriptor)
    for model in (first, other):
        assert shared_weights.own_bytes(model) == 0
        state = model.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(weight, before[name]) and weight.dtype == before[name].dtype
                   for name, weight in state.items())  # fmt: skip
    assert (type(other), other.training, other.dtype) == (type(first), True, getattr(torch, dtype))
    ids = torch.arange(9)[None]
    assert torch.equal(other(input_ids=ids).logits, first(input_ids=ids).logits), "buffers are those of the model, too"
    assert_a_write_is_seen_in_one_weight_only(other)
    assert torch.equal(next(first.parameters()), next(iter(before.values()))), "a rank's changes are its own"


def assert_a_write_is_seen_in_one_weight_only(model: Any) -> None:
    """Write to the first weight. Autograd would refuse gradients that need another one if that counted as changed, too.

    peft writes to adapted experts in each forward.
    """
    written, *others = model.parameters()
    versions = [weight._version for weight in others]
    with torch.no_grad():
        written.zero_()
    assert [weight._version for weight in others] == versions


def mapped_from(folder: Path, weights: list[nn.Parameter]) -> list[bool]:
    """Return of each weight whether its numbers are where a file of the folder is mapped."""
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line
    ]
    return [any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in spans) for weight in weights]


def test_zero3_copies_one_weight_at_a_time(saved: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sends each weight. Written into the mapping of the file, each rank got a copy of all (521 of 419 MiB)."""
    folder, _ = saved
    model = loaded(folder)
    weights = list(model.parameters())
    assert all(mapped_from(folder, weights))
    seen: list[tuple[bool, int]] = []
    init = import_deepspeed().zero.Init
    plain = init._zero_init_param

    def divide(self: Any, weight: nn.Parameter) -> None:
        seen.append((mapped_from(folder, [weight])[0], sum(mapped_from(folder, weights))))
        plain(self, weight)

    monkeypatch.setattr(init, "_zero_init_param", divide)
    Engine(model, EngineSettings(EngineConfig(zero_stage=3), OptimConfig(), Dtype.float32, torch.device("cpu")))
    assert seen == [(False, len(weights) - number) for number in range(1, len(weights) + 1)]
