"""Parity on CUDA: the same proof as on the CPU, with the kernels that train there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.kernel_check import check_backend
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda", 0)
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
BFLOAT16_BACKENDS = ["torch_flash", *(["flash_attn"] if HAS_FLASH_ATTN else [])]

SMALL = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": 100},
    "gemma3_text": {"sliding_window": 60, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.1},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
}


def model(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **MODELS[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(CUDA).train()


def gradients_in_float32(kind: str, sequences: Any, like: Any) -> dict[str, torch.Tensor]:
    """Whole-sequence gradients of the same weights in float32: the truth that bfloat16 is measured against."""
    truth = model(kind, torch.float32)
    truth.load_state_dict({name: tensor.float() for name, tensor in like.state_dict().items()})
    weight = 1.0 / sum(int((s.targets != -100).sum()) for s in sequences)
    for sequence in sequences:
        ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64, device=CUDA)[None]
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64, device=CUDA)
        logits = truth(input_ids=ids, use_cache=False).logits[0]
        (torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") * weight).backward()
    return {name: parameter.grad for name, parameter in truth.named_parameters()}


@pytest.mark.parametrize("backend", ["torch_flash", "reference"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if "sliding_window" not in MODELS[kind]])
def test_float32_gradients_agree(kind: str, backend: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    made = model(kind, torch.float32)
    choice = choose_backend(Attention(backend), made.config, CUDA, torch.float32)
    parity = compare(made, random_sequences((700, 60, 90), 512), InChunks(choice.backend, chunk_size=128, k=2))
    assert parity.grad_rel_error <= 1e-5


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS)
@pytest.mark.parametrize("kind", list(MODELS))
def test_bfloat16_gradients_agree_as_well_as_bfloat16_can(kind: str, backend: str) -> None:
    """Chunked and whole round differently: what is asked is that neither lies much further from float32."""
    made = model(kind, torch.bfloat16)
    sequences = random_sequences((700, 60, 90), 512)
    choice = choose_backend(Attention(backend), made.config, CUDA, torch.bfloat16)
    parity = compare(made, sequences, InChunks(choice.backend, chunk_size=128, k=2))
    truth = gradients_in_float32(kind, sequences, made)
    norm = float(torch.stack([gradient.norm() for gradient in truth.values()]).norm())
    assert norm > 0
    assert parity.grad_rel_error <= 3e-2, "experts may choose otherwise at a tie; attention that is wrong shows as 1e-1"


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS)
def test_kernels_against_plain_products(backend: str) -> None:
    """Own, past and windowed attention of the real kernels, forward and backward."""
    config = AutoConfig.for_model("llama", **SMALL)
    choice = choose_backend(Attention(backend), config, CUDA, torch.bfloat16)
    check_backend(choice.backend, CUDA, torch.bfloat16)


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS)
def test_kernels_with_values_of_another_width(backend: str) -> None:
    """Heads of latent attention: 192 and 128 channels in DeepSeek, 256 and 256 in GLM-4.7-Flash."""
    config = AutoConfig.for_model("llama", **SMALL)
    choice = choose_backend(Attention(backend), config, CUDA, torch.bfloat16)
    check_backend(choice.backend, CUDA, torch.bfloat16, [(192, 128), (256, 256)])


def test_heads_too_wide_for_flash_kernels() -> None:
    """Global layers of Gemma 4 have heads of 512 channels: torch's memory-efficient kernel takes them."""
    config = AutoConfig.for_model("llama", **{**SMALL, "head_dim": 512})
    choice = choose_backend(Attention.torch_flash, config, CUDA, torch.bfloat16)
    check_backend(choice.backend, CUDA, torch.bfloat16, [(512, 512)])


def test_torch_flash_float32_kernels() -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    check_backend(choose_backend(Attention.torch_flash, config, CUDA, torch.float32).backend, CUDA, torch.float32)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm3", "mamba2"])
def test_guard_passes_recurrent_layers_on_cuda(model_type: str) -> None:
    """Also where packages with kernels for them are installed, which take no float32."""
    assert guard(AutoConfig.for_model(model_type), requested=Attention.auto, device=CUDA, dtype=torch.bfloat16).passed


@pytest.mark.parametrize("words", [("engine.zero_stage=1",), ("engine.zero_stage=1", "engine.offload=optimizer"),
                                   ("engine.zero_stage=3", "engine.offload=parameters")], ids=" ".join)  # fmt: skip
def test_train_on_cuda(words: tuple[str, ...], tmp_path: Path) -> None:
    """The whole run, on each engine setting that needs a GPU; the loss of step 1 does not depend on the chunk size."""
    losses = []
    for size in (64, 1024):
        command = [sys.executable, "-m", "chunkflow_cli", "train", "recipe=tiny_random", "train.steps=2",
                   f"chunk.size={size}", f"train.output_dir=run-{size}", *words]  # fmt: skip
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        rows = (tmp_path / f"run-{size}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert np.allclose(losses[0], losses[1], rtol=1e-4)
