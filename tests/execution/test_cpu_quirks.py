"""bfloat16 products through float32: at least as accurate, and invisible to the rest of the code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.execution import cpu_quirks
from chunkflow_cli.execution.cpu_quirks import (
    LinearThroughFloat32,
    convert_linear_layers,
    matrix_dtype,
    settle_vector_math,
)

ROUNDING = 2.0**-8
"""Half the relative distance of neighboring bfloat16 numbers: the largest error of a single rounding."""


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layers(request: pytest.FixtureRequest) -> tuple[nn.Linear, LinearThroughFloat32]:
    """The same bfloat16 weights as an ordinary layer and as ours."""
    torch.manual_seed(0)
    plain = nn.Linear(96, 40, bias=request.param).bfloat16()
    ours = copy.deepcopy(plain)
    ours.__class__ = LinearThroughFloat32
    assert isinstance(ours, LinearThroughFloat32)
    return plain, ours


def results(layer: nn.Linear, input: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    layer = copy.deepcopy(layer)
    input = input.clone().requires_grad_()
    out = layer(input)
    out.backward(grad_out)
    found = {"out": out.detach(), "input": input.grad, "weight": layer.weight.grad}
    if layer.bias is not None:
        found["bias"] = layer.bias.grad
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 96), (1, 300, 96)], ids=str)
def test_through_float32_is_the_float32_product_rounded_once(
    layers: tuple[nn.Linear, LinearThroughFloat32], shape: tuple[int, ...]
) -> None:
    """Forward and all gradients are the exact product, rounded once: a second rounding on the way would show."""
    plain, ours = layers
    input, grad_out = draw(*shape, seed=1), draw(*shape[:-1], 40, seed=2)
    mine = results(ours, input, grad_out)
    true = results(plain.double(), input.double(), grad_out.double())
    assert mine.keys() == true.keys()
    for name, truth in true.items():
        assert mine[name].dtype is torch.bfloat16
        assert mine[name].shape == truth.shape
        slack = 1e-5 * truth.abs().max()  # sums in float32
        assert ((mine[name].double() - truth).abs() <= truth.abs() * ROUNDING + slack).all(), name


def test_at_least_as_close_as_the_ordinary_layer(layers: tuple[nn.Linear, LinearThroughFloat32]) -> None:
    """The speed must not cost accuracy: the error is at most that of torch's own bfloat16 product."""
    plain, ours = layers
    input, grad_out = draw(200, 96, seed=1), draw(200, 40, seed=2)
    true = results(copy.deepcopy(plain).double(), input.double(), grad_out.double())
    theirs, mine = (results(layer, input, grad_out) for layer in (plain, ours))
    for name, truth in true.items():
        their_error, my_error = (float((found[name].double() - truth).norm()) for found in (theirs, mine))
        assert my_error <= 1.001 * their_error, name


def test_the_product_is_taken_in_float32(
    layers: tuple[nn.Linear, LinearThroughFloat32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 product gives the same numbers, five times slower: only the operands' dtype shows the difference."""
    seen: list[torch.dtype] = []
    linear = nn.functional.linear

    def recorded(*args: Any) -> Tensor:
        seen.extend(arg.dtype for arg in args if arg is not None)
        return linear(*args)

    monkeypatch.setattr(nn.functional, "linear", recorded)
    layers[1](draw(7, 96, seed=1))
    assert set(seen) == {torch.float32}


def test_mixed_dtypes_fail_as_they_do_in_the_ordinary_layer(layers: tuple[nn.Linear, LinearThroughFloat32]) -> None:
    """A float32 input of a bfloat16 layer is a mistake in the model: it must not be rounded silently."""
    for layer in layers:
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.ones(2, 96))


def test_frozen_weights_get_no_gradient() -> None:
    """With LoRA the base weights are frozen: only the gradient of the input must be computed."""
    layer = LinearThroughFloat32(8, 4).bfloat16().requires_grad_(False)
    input = draw(3, 8, seed=1).requires_grad_()
    layer(input).float().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert input.grad is not None
    assert torch.equal(input.grad, layer.weight.float().sum(0).expand(3, 8).bfloat16())


def test_input_without_gradient() -> None:
    """The first layer's input needs none: only the weights get gradient."""
    layer = LinearThroughFloat32(8, 4).bfloat16()
    layer(draw(3, 8, seed=1)).float().sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    """A float64 layer that went through float32 would ruin the proof of exactness."""
    layer = LinearThroughFloat32(8, 4).to(dtype)
    input = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(layer(input), nn.functional.linear(input, layer.weight, layer.bias))


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to run on a processor without instructions for bfloat16."""
    monkeypatch.setattr(cpu_quirks, "cpu_has_bfloat16", lambda: False)


class OtherLinear(nn.Linear):
    """Some library's own linear layer: it may do more than a product."""


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), OtherLinear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2)))


@pytest.mark.usefixtures("without_bfloat16")
def test_conversion_keeps_what_others_see() -> None:
    """peft finds linear layers by isinstance, checkpoints by name: a wrapper would break both."""
    model = make_model().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    assert convert_linear_layers(model) == 3
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == [
        LinearThroughFloat32, OtherLinear, LinearThroughFloat32, LinearThroughFloat32,
    ]  # fmt: skip
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert convert_linear_layers(model) == 0, "a second conversion finds nothing"


@pytest.mark.usefixtures("without_bfloat16")
def test_conversion_changes_outputs_by_rounding_only() -> None:
    """The same function, before and after."""
    torch.manual_seed(0)
    model = make_model().bfloat16()
    truth = copy.deepcopy(model).float()(input := torch.randn(5, 8).bfloat16().float())
    convert_linear_layers(model)
    assert torch.allclose(model(input.bfloat16()).float(), truth, atol=0.02, rtol=0.02)


@pytest.mark.usefixtures("without_bfloat16")
def test_float32_models_are_not_converted() -> None:
    """Only bfloat16 is slow."""
    model = make_model()
    assert convert_linear_layers(model) == 0
    assert type(model[0]) is nn.Linear  # type: ignore[index]


def test_nothing_is_converted_where_the_processor_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a processor the ordinary layer is the fast one."""
    monkeypatch.setattr(cpu_quirks, "cpu_has_bfloat16", lambda: True)
    assert convert_linear_layers(make_model().bfloat16()) == 0
    assert matrix_dtype(torch.ones(1, dtype=torch.bfloat16)) is torch.bfloat16


@pytest.mark.usefixtures("without_bfloat16")
def test_converted_layers_pass_through_lora(tiny_model: Callable[..., Any]) -> None:
    """Adapters wrap the converted layers, and the head remains one that the fused loss accepts."""
    from chunkflow_cli.config.schema import LoraConfig
    from chunkflow_cli.execution.loss import FUSED_HEADS
    from chunkflow_cli.model.adapters import add_lora

    model = tiny_model("llama", dtype=torch.bfloat16)
    assert convert_linear_layers(model) == 2 * 7 + 1
    adapted: Any = add_lora(model, LoraConfig(enabled=True, r=4))
    wrapped = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 2 * 7
    assert all(type(module.base_layer) is LinearThroughFloat32 for module in wrapped)
    assert type(adapted.get_base_model().get_output_embeddings()) in FUSED_HEADS


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({}, True),
    ],
)
def test_what_the_processor_reports(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    """Either instruction set suffices; on a processor that reports neither name (ARM) nothing is converted."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu_quirks.cpu_has_bfloat16.cache_clear()
    try:
        assert cpu_quirks.cpu_has_bfloat16() is expected
    finally:
        cpu_quirks.cpu_has_bfloat16.cache_clear()


def test_settling_leaves_no_trace() -> None:
    """It runs at the start of every command: random numbers and gradients of the run must not depend on it."""
    before = torch.get_rng_state()
    settle_vector_math()
    assert torch.equal(torch.get_rng_state(), before)
