"""What a run with adapters says and records at its start."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.training.adapters import begin_with_adapters
from chunkflow_cli.training.run_folder import RunFolder

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def begin(folder: RunFolder, *words: str) -> list[str]:
    """Return the lines that a run says at its start."""
    config = load(["data.path=x", "model.lora.enabled=true", *words]).config
    text = io.StringIO()
    begin_with_adapters(config, load_config(config.model), folder, Console(file=text))
    return text.getvalue().splitlines()


def test_the_start_says_what_is_trained_and_at_which_rate(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    dense, experts, folder = tmp_path / "dense", tmp_path / "experts", RunFolder(tmp_path, None, None)
    tiny_model("llama").save_pretrained(dense)
    tiny_model("qwen3_moe", **EXPERTS).save_pretrained(experts)
    base = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    width = 2 * 2 * (64 + 64)  # layers, rank, and the input and output of q_proj
    words = (f"model.path={dense}", "model.lora.r=2", "model.lora.target_modules=[q_proj]")
    (line,) = begin(folder, *words)
    assert line == (
        f"LoRA trains {100 * width / base:.2g} % of the weights: {width} of rank 2 on q_proj; learning rate 0.0002, "
        "the default for LoRA"
    )
    told = begin(folder, *words, "optim.lr=1e-5", "engine.offload=optimizer")
    assert told[1].startswith("warning: optim.lr=1e-05 suits a full fine-tune")
    assert told[2].startswith("warning: engine.offload=optimizer suits a full fine-tune")
    assert len(begin(folder, *words, "optim=sgd")) == 1
    told = begin(folder, f"model.path={experts}")
    assert "57 % of the weights" in told[1]
    assert told[1].endswith("model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]")


def test_a_run_does_not_continue_on_other_base_weights(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """The checkpoint holds only adapters, so the run would go on with another model, and nothing would show it."""
    base, run = tmp_path / "base", tmp_path / "run"
    run.mkdir()
    tiny_model("llama").save_pretrained(base)
    begin(RunFolder(run, None, None), f"model.path={base}")
    assert json.loads((run / "base.json").read_text())["path"] == str(base)
    continued = RunFolder(run, run / "checkpoints" / "step-00000001", None)
    begin(continued, f"model.path={base}")
    tiny_model("llama", seed=1).save_pretrained(base)
    with pytest.raises(UsageError, match=r"has changed since this run began: model\.safetensors holds other weights"):
        begin(continued, f"model.path={base}")
    begin(RunFolder(run, None, None), f"model.path={base}")  # from the beginning, it is the base
