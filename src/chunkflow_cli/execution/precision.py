"""The data types in which sums and products are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
