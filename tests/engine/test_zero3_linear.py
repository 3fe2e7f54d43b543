"""ZeRO-3's own linear layer under selective activation checkpointing, in one process and float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from deepspeed.runtime.zero import linear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import ActivationCheckpointing
from chunkflow_cli.engine import internals
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences
from chunkflow_cli.execution.precision import use_float64_parts
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from support.models import MODELS, SHAPES, TINY


@pytest.mark.parametrize(
    ("name", "is_mended"),
    [("qwen2", True), ("starcoder2", True), ("llama4, blocks, temperature", True), ("qwen2", False)],
)
def test_biases_are_added_once(name: str, is_mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's layer adds the bias to the kept product in place; as it is, gradients would be 5 % off."""
    monkeypatch.setattr(nn.functional, "linear", linear.zero3_linear_wrap)
    if is_mended:
        internals.add_bias_within_products()
    model_type, changes = {**MODELS, **SHAPES}[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**TINY, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    use_float64_parts(model, torch.float64)
    enable_activation_checkpointing(model.train(), ActivationCheckpointing.selective)
    with nullcontext() if is_mended else pytest.raises(UsageError, match="in place"):
        sequences = random_sequences((53, 9, 20), TINY["vocab_size"])
        parity = compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=16, k=2))
        assert parity.passed, parity
