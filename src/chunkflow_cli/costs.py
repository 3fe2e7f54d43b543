"""The shape of a model as far as cost depends on it, and the operations that training it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    matmul_parameters: int
    """Weights that every token is multiplied with: all linear layers and the head; of experts, the active ones."""

    @property
    def state_elements_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def training_flops(lengths: Sequence[int] | NDArray[np.int64], shape: ModelShape) -> float:
    """Floating-point operations of forward and backward over whole sequences, recompute not counted.

    6 per weight and token (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), and for causal
    attention 6 x layers x heads x head_dim x length^2: scores and their weighted sum are 4 x length^2 / 2 forward, for
    half of the square is masked, and backward is twice the forward. Norms, softmax and activation functions are left
    out, about 1 % at ordinary sizes; windows are counted as full attention.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    per_token = 6.0 * shape.matmul_parameters
    per_square = 6.0 * shape.layers * shape.attention_heads * shape.head_dim
    return float((per_token * sizes + per_square * sizes * sizes).sum())
