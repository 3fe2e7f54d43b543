"""The attention layers of a model: what they store of each token, and how much they compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionLayers:
    """Attention layers of equal sizes. A recurrent layer is no attention layer."""

    layers: int
    heads: int
    """Query heads of a layer."""
    kv_heads: int
    """Heads of keys and values of a layer, as the attention function receives them."""
    key_dim: int
    """Channels of a query or key head."""
    value_dim: int
    window: int | None = None
    """Most keys that a query attends to; None if it attends to all of its past."""
    block: int | None = None
    """Tokens of the blocks, counted from the start of a sequence, that attention stays within (Llama 4)."""
    owns_keys: bool = True
    """False if the layers attend to the keys and values of earlier layers (Gemma 3n, Gemma 4)."""
    stride: int = 1
    """Tokens that one key stands for (DeepSeek-V4 sums up blocks of them)."""
    keys_are_values: bool = False
    """True if they are stored once, as both (DeepSeek-V4)."""
    has_gradients: bool = True
    """False for the keys of an indexer."""

    @property
    def widest(self) -> int:
        """Channels of a query, key or value head, whichever is widest: what an attention kernel must support."""
        return max(self.key_dim, self.value_dim)

    @property
    def kv_elements_per_token(self) -> float:
        """Numbers in the keys and values of one token, over these layers, stored or not."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim * (not self.keys_are_values)) / self.stride

    @property
    def query_elements_per_token(self) -> int:
        """Numbers in the queries and the outputs of one token, over these layers."""
        return self.layers * self.heads * (self.key_dim + self.value_dim)

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of a forward for one query-key pair: a score and its share of the weighted sum."""
        return 2 * self.query_elements_per_token

    def attended_pairs(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of the first `tokens` positions of a sequence, in one layer.

        Causal: tokens^2 / 2. With a window w, a query past position w has w keys: w^2 / 2 + w (tokens - w). Blocks of w
        tokens have w^2 / 2 pairs each.
        """
        pairs = tokens**2 / 2
        if self.block is not None:
            block = float(self.block)
            last = tokens % block
            pairs = (tokens - last) * block / 2 + last**2 / 2
        if self.window is not None:
            window = float(self.window)
            pairs = np.where(tokens <= window, pairs, window**2 / 2 + window * (tokens - window))
        return np.asarray(pairs / self.stride)

    def scored_pairs(self, past: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the query-key pairs of pieces of a sequence in one layer that scores all of them, seen or not.

        Args:
            past: tokens before each piece, of which a window hides all but the last ones.
        """
        seen = past if self.window is None else np.minimum(past, self.window - 1)
        return np.asarray(tokens * (seen + tokens) / self.stride)
