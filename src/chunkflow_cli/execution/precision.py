"""The dtype in which sums are taken."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
