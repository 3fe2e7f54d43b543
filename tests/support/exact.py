"""Float64 throughout, for proofs that rounding must not blur."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let `torch.float32`, `Tensor.float` and `Tensor.type` mean float64.

    Models compute norms, routers and scans in float32 whatever their dtype, so two orders of the same sums differ by
    1e-8 to 1e-5. Within this context any larger difference is a mistake.
    """
    import torch
    import transformers.models.recurrent_gemma.modeling_recurrent_gemma  # noqa: F401  # its defaults name a dtype

    from chunkflow_cli.execution import precision

    float32, to_type = torch.float32, torch.Tensor.type

    def to_float64(self: torch.Tensor, dtype: Any = None, **options: Any) -> Any:
        return to_type(self, torch.float64 if dtype is float32 else dtype, **options)  # a default that was bound before

    with precision.float64_throughout(), mock.patch.object(torch.Tensor, "type", to_float64):
        yield
