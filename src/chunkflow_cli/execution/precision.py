"""The data types in which models compute, and in which sums are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def float32_products() -> Iterator[None]:
    """Multiply float32 as float32 within the block, not as TensorFloat-32, which has ten bits of fraction.

    cuDNN takes TensorFloat-32 by default, and NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for products.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def arithmetic_of(dtype: torch.dtype) -> Iterator[None]:
    """Make a model compute in its own dtype within the block, if that is float32 or float64."""
    with ExitStack() as stack:
        if dtype is torch.float64:
            stack.enter_context(float64_throughout())
        if dtype in (torch.float32, torch.float64):
            stack.enter_context(without_kernel_packages())
            stack.enter_context(float32_products())
        yield


@contextmanager
def in_any_order() -> Iterator[None]:
    """Let operations sum in any order within the block, also under `train.deterministic`.

    torch has no deterministic cumulative sum on CUDA, and so none of its scans of recurrent layers. A comparison runs
    them even where training takes the kernels of a package.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let `torch.float32` and `Tensor.float` mean float64 within the block.

    Norms, routers and the scans of recurrent layers compute in float32 whatever the model's dtype is.
    """
    before = torch.float32, torch.float, Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = before  # type: ignore[misc, method-assign]


@contextmanager
def without_kernel_packages() -> Iterator[None]:
    """Let transformers run recurrent layers by its own functions within the block, not by a package's kernels.

    Kernels such as those of flash-linear-attention take no float32, let alone float64.
    """
    from transformers.integrations import hub_kernels

    before = hub_kernels.is_torchdynamo_exporting  # an export takes transformers' own functions, too
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = before


def use_float64_parts(model: Any, dtype: torch.dtype) -> None:
    """Switch a float64 model with experts to transformers' plain product: the grouped one has no float64.

    States of xlstm become float64. Their dtype is chosen when the model is made.
    """
    if dtype is not torch.float64:
        return
    for part in model.modules():
        if hasattr(part, "mlstm_backend"):
            with float64_throughout():
                part.mlstm_backend = type(part.mlstm_backend)(part.config)
    for part in model.modules():  # the decoder of a multimodal model may have experts where the model's class has none
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")
