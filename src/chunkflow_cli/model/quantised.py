"""A frozen base in 4 or 8 bits under adapters (`model.quantization`), by bitsandbytes.

Which layers are stored so, and how, is transformers' and bitsandbytes' choice. How they are multiplied with is ours: a
layer's weight is dequantized to the model's data type for each product, in forward and backward. bitsandbytes' own
forward for 8 bits rounds activations too, and picks columns to spare by all tokens of a call, so that the loss would
depend on the chunks. Its forward for 4 bits takes other kernels for few tokens or without gradients, and on some CPUs
packs the weights of a model in evaluation mode in a way that has no backward.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Quantization
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.adapter_targets import MODULES_KEY, PARAMETERS_KEY, SAVED_KEY, Targets

KEY = "model.quantization"
BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights that share a scale in nf4, and scales that share one of their own (double quantization)."""
TABLES_BYTES = 4 * (16 + 256) + 4
"""Bytes of the tables of a layer in nf4: the 16 values of a weight, the 256 of a scale, and the mean of the scales."""


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """Return transformers' settings of `model.quantization`.

    Raises:
        UsageError: bitsandbytes is not installed, or has no such data type.
    """
    if dtype is torch.float64:
        raise UsageError(f"{KEY}={quantization.value}: bitsandbytes has no float64\n  set verify.dtype=float32")
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{KEY}={quantization.value} needs the package bitsandbytes\n"
            "  install it: pip install 'chunkflow-cli[quant]', or bitsandbytes itself, 0.46.1 or newer"
        )
    from transformers import BitsAndBytesConfig

    if quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


FP8_BLOCK = 128
"""Rows and columns that share a scale in checkpoints stored in FP8."""


def check_dequantised(model: Any, method: str, named: str) -> None:
    """Refuse sizes for which transformers would use wrong blocks of an FP8 checkpoint.

    It divides each weight into as many equal blocks as there are scales. In a checkpoint, the last block is smaller.

    Raises:
        UsageError: names a weight whose size is no multiple of a block.
    """
    for name, parameter in model.named_parameters() if method == "fp8" else ():
        is_of_layer = parameter.ndim == 3 or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        sizes = parameter.shape[-2:] if is_of_layer and parameter.ndim > 1 else ()
        if any(size > FP8_BLOCK and size % FP8_BLOCK for size in sizes):
            raise UsageError(
                f"{named}: its weights are stored in {method}, and transformers cannot convert {name} "
                f"{tuple(parameter.shape)}, whose sizes are not multiples of {FP8_BLOCK}\n"
                "  set model.path to the model that it was made from, which its model card names"
            )


def quantised_layers(model: Any) -> dict[str, Any]:
    """Return the layers of a whole model without adapters that are stored in few bits, by name.

    The model may be on the meta device. These are its linear layers without the head, as transformers chooses them.
    Experts that a model stacks in one tensor are not among them.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, spared)
    }


def check_quantised(model: Any, targets: Targets) -> None:
    """Refuse targets that a quantized layer cannot be.

    Args:
        model: the whole model without adapters; on the meta device, too.

    Raises:
        UsageError: a layer is trained whole, or its weight is adapted as a parameter.
    """
    layers = quantised_layers(model)
    owners = {f"{name}.weight": name for name in layers}
    for name in (*targets.saved, *targets.parameters):
        if name in layers or name in owners:
            key = SAVED_KEY if name in layers else PARAMETERS_KEY
            raise UsageError(
                f"{KEY}: {owners.get(name, name)} is stored in few bits, and as one of {key} it would need its numbers"
                f"\n  leave it out there and in {MODULES_KEY}, or set {KEY}=none"
            )


def stored_bytes(quantization: Quantization, layer: Any) -> int:
    """Return the bytes of a layer's weight with its scales.

    nf4 (Dettmers et al. 2023, arXiv 2305.14314): half a byte per weight, a byte per block of 64 for its scale, and 4
    bytes per 256 scales. int8: a byte per weight, and 4 bytes per row for its scale.
    """
    weights = int(layer.weight.numel())
    if quantization is Quantization.int8:
        rows = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        return weights + 4 * int(rows)
    scales = ceil(weights / BLOCK)
    return ceil(weights / 2) + scales + 4 * ceil(scales / BLOCK_OF_SCALES) + TABLES_BYTES


def multiply_dequantised(model: nn.Module) -> None:
    """Make the quantized layers of a loaded model multiply with their dequantized weights."""
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            own = type(layer)
            # The same name: peft and transformers look at it.
            layer.__class__ = type(own.__name__, (_Dequantised, own), {})


def dequantise(model: Any, dtype: torch.dtype) -> None:
    """Replace the quantized layers of a model by plain ones, whose weights are those that training multiplied with."""
    from transformers.pytorch_utils import Conv1D

    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        if isinstance(layer, _Dequantised):
            weight, is_transposed = dequantised_weight(layer, dtype), issubclass(layer.source_cls, Conv1D)
            with torch.device("meta"):
                plain: Any = (
                    Conv1D(layer.out_features, layer.in_features)
                    if is_transposed
                    else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                )
            plain.weight = nn.Parameter(weight.T.contiguous() if is_transposed else weight, requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    model.hf_quantizer = None
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    del model.config.quantization_config


def dequantised_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight of a quantized layer, (out, in)."""
    import bitsandbytes.functional as functional

    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[no-any-return]
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)  # type: ignore[no-any-return]


class _Dequantised(nn.Linear):
    """The forward of a layer of bitsandbytes, which it is mixed into."""

    source_cls: type
    """What transformers has replaced."""

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """The product with a dequantized weight, which is not kept for backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return _multiply(input, dequantised_weight(layer, input.dtype).T)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return _multiply(grad_out, dequantised_weight(ctx.layer, grad_out.dtype)), None


def _multiply(one: Tensor, other: Tensor) -> Tensor:
    """Return the matrix product; of bfloat16 on a CPU, through float32, because many CPUs lack instructions for it."""
    if one.device.type == "cpu" and one.dtype is torch.bfloat16:
        return (one.float() @ other.float()).to(one.dtype)
    return one @ other
