"""Few rows, padded so that a product rounds each of them as it would among many.

MKL multiplies blocks of four rows, and sums the one to three rows left over in another order. One to three rows alone
are always left over. More threads leave more rows over, but few if there are 32 rows or more. In float32, a chunk of
three tokens would lie up to 1.5 times as far from whole-sequence training as that lies from its own float64 gradient
(benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

BLOCK_ROWS, FEW_ROWS = 4, 32


def rows_in_blocks(rows: int) -> int:
    """Return the number of rows, or what few rows are padded to."""
    return rows + (-rows % BLOCK_ROWS if rows < FEW_ROWS else 0)


def linear_layers_in_blocks(tokens: int) -> AbstractContextManager[Any]:
    """Return a context within which linear layers pad few rows: those of a piece that a module runs by itself.

    It does nothing for more tokens, for it makes every call of torch slower.
    """
    return _LinearLayersInBlocks() if rows_in_blocks(tokens) > tokens else nullcontext()


class _LinearLayersInBlocks(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear:
            inputs, *weights = args
            rows = inputs.shape[:-1].numel()
            if (padding := rows_in_blocks(rows) - rows) > 0:
                padded = nn.functional.pad(inputs.reshape(rows, -1), (0, 0, 0, padding))
                return function(padded, *weights, **(options or {}))[:rows].unflatten(0, inputs.shape[:-1])
        return function(*args, **(options or {}))
