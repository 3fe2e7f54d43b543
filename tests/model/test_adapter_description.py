"""What a run with adapters says at its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import load
from chunkflow_cli.model.adapter_description import describe_adapters
from chunkflow_cli.model.hf_config import load_config

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def begin(*words: str) -> list[str]:
    """Return the lines that a run says at its start."""
    config = load(["data.path=x", "model.lora.enabled=true", *words]).config
    return describe_adapters(config, load_config(config.model))


def test_the_start_says_what_is_trained_and_at_which_rate(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    dense, experts = tmp_path / "dense", tmp_path / "experts"
    tiny_model("llama").save_pretrained(dense)
    tiny_model("qwen3_moe", **EXPERTS).save_pretrained(experts)
    base = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    width = 2 * 2 * (64 + 64)  # layers, rank, and the input and output of q_proj
    words = (f"model.path={dense}", "model.lora.r=2", "model.lora.target_modules=[q_proj]")
    (line,) = begin(*words)
    assert line == (
        f"LoRA trains {100 * width / base:.2g} % of the weights: {width} in adapters of rank 2 on q_proj; learning rate 0.0002, "
        "the default for LoRA"
    )
    told = begin(*words, "optim.lr=1e-5", "engine.offload=optimizer")
    assert told[1].startswith("warning: optim.lr=1e-05 suits a full fine-tune")
    assert told[2].startswith("warning: engine.offload=optimizer suits a full fine-tune")
    assert len(begin(*words, "optim=sgd")) == 1
    told = begin(*words, "model.quantization=int8")
    linear = 2 * 2 * 2 * 64 * (64 + 32) / 2 + 2 * 3 * 64 * 96
    assert told[1].startswith(f"{100 * linear / base:.0f} % of the base's weights are stored in int8, the others in bf")
    told = begin(f"model.path={experts}")
    assert "57 % of the weights" in told[1]
    assert told[1].endswith("model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]")
