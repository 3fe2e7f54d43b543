"""Compiled layers and other kernels change only rounding, in the model they are for, and are refused where they fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import ActivationCheckpointing, Kernels
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution import acceleration, compilation
from chunkflow_cli.execution.acceleration import Acceleration, check_acceleration
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.parity import InChunks, Parity, compare, random_sequences
from chunkflow_cli.model import kernels
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from support.models import recurrent_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config_of(model_type: str = "qwen2") -> Any:
    return AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, initializer_range=0.2,
    )  # fmt: skip


def model_of() -> Any:
    attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(), attn_implementation=attention.NAME).train()


def parity_of(model: Any, how: Acceleration, stages: int = 1) -> Parity:
    sequences = random_sequences((70, 9, 1, 31, 13, 17, 19, 24), 61)
    return compare(model, sequences, InChunks(CpuBackend(), chunk_size=24, k=2, stages=stages, acceleration=how))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile without a C++ compiler: torch traces and differentiates, and runs its own operations."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    monkeypatch.setattr(attention, "_registered", attention.attend)
    compilation._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
    compilation._compiled.cache_clear()


@pytest.mark.parametrize(("checkpointing", "stages"), [("none", 2), ("full", 1)])
def test_compiled_layers_are_exact_in_chunks(traced: Any, checkpointing: str, stages: int) -> None:
    """Nothing but attention is left out, and chunks of many lengths share their code."""
    model = model_of()
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    assert parity_of(model, Acceleration(compiles=True), stages=stages).passed
    graphs = traced["stats"]["unique_graphs"]
    assert 4 <= graphs <= 16  # before and behind attention, with and without gradient, and of one token
    assert all("attend" in reason for reason in traced["graph_break"])


def test_layers_are_compiled_whatever_a_model_calls_them(traced: Any) -> None:
    model = recurrent_model("rwkv")
    compilation.compile_layers(model)
    assert all(block._compiled_call_impl is not None for block in model.rwkv.blocks)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["engine.zero_stage=3"], r"gathers weights within each layer"),
        (["model.activation_checkpointing=selective"], r"set model\.activation_checkpointing=full or none"),
        (["parallel.pipeline=2", "parallel.schedule=zero_bubble"], r"splits the backward"),
        (["model.lora.enabled=true", "model.lora.dropout=0.1"], r"or model\.lora\.dropout=0"),
        ([], r"needs a C\+\+ compiler on a CPU"),
    ],
)
def test_what_cannot_be_compiled_is_refused(words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    config = load(["model.path=x", "data.path=x", "model.compile=true", *words]).config
    with pytest.raises(UsageError, match=expected):
        check_acceleration(config, config_of(), CPU)


# Liger, by a stand-in: the package needs Triton


class Norm(torch.nn.Module):
    error = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        weight: Tensor = self.weight
        return hidden * scale * weight * (1 + Norm.error)


class Rotated(torch.autograd.Function):
    """Rotates as LigerRopeFunction does: in place, and with no word to torch."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        for given, rotated in zip((queries, keys), ORIGINAL(queries, keys, cos, sin), strict=True):
            given.data.copy_(rotated)
        return queries.view_as(queries), keys.view_as(keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *ORIGINAL(*gradients, cos, -sin), None, None


def rotary(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    rotary.calls += 1  # type: ignore[attr-defined]
    return Rotated.apply(queries, keys, cos, sin)


ORIGINAL = modeling_qwen2.apply_rotary_pos_emb


def apply_liger_kernel_to_qwen2(
    rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
    swiglu: bool = True, model: Any = None,
) -> None:  # fmt: skip
    """Do what liger_kernel 0.8.5 does: to the file, and to the instance."""
    assert rope
    assert rms_norm
    assert swiglu
    assert not cross_entropy
    assert not fused_linear_cross_entropy
    modeling_qwen2.apply_rotary_pos_emb = rotary
    modeling_qwen2.Qwen2RMSNorm = Norm  # type: ignore[misc]
    modeling_qwen2.Qwen2MLP = Norm  # type: ignore[misc]
    for layer in model.model.layers:
        layer.input_layernorm.forward = MethodType(Norm.forward, layer.input_layernorm)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    package, transformers, patch = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": apply_liger_kernel_to_qwen2}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: package)  # type: ignore[attr-defined]
    monkeypatch.setattr(Norm, "error", 0.0)
    rotary.calls = 0  # type: ignore[attr-defined]


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_kernels_are_those_of_one_model_and_compared_with_its_own(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' file and other models keep theirs, and a kernel that computes something else does not pass.

    What selective checkpointing keeps is not rotated in place, and then again in the recompute.
    """
    before = dict(vars(modeling_qwen2))
    model, other = model_of(), model_of()
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    assert parity_of(model, Acceleration(Kernels.liger)).passed
    assert rotary.calls > 0  # type: ignore[attr-defined]
    assert all(vars(modeling_qwen2)[name] is value for name, value in before.items())
    assert "forward" in vars(model.model.layers[1].input_layernorm)
    assert not any("forward" in vars(module) for module in other.modules())
    monkeypatch.setattr(Norm, "error", 1e-3)
    assert not parity_of(other, Acceleration(Kernels.liger)).passed


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(
    ("device", "model_type", "installed", "expected"),
    [
        (CPU, "qwen2", True, r"need a GPU\n  set model\.kernels=none"),
        (CUDA, "qwen2", False, r"pip install 'chunkflow-cli\[liger\]'"),
        (CUDA, "llama", True, r"Liger has no kernels for models of type 'llama'"),
    ],
)
def test_kernels_that_cannot_run_are_refused(
    device: torch.device, model_type: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    config = load(["model.path=x", "data.path=x", "model.kernels=liger"]).config
    with pytest.raises(UsageError, match=expected):
        check_acceleration(config, config_of(model_type), device)
