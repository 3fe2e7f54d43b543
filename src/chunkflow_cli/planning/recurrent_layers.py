"""The recurrent layers of a model: what they keep, and how much they compute."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RecurrentLayers:
    """What all convolutions and scans of a model do together.

    The ranks of a sequence-parallel group divide them by heads where heads divide evenly among the ranks
    (`execution.recurrent.sharing`). Predictions do not count on that: they take each rank to run all heads, for the
    tokens of all ranks, as it does otherwise.
    """

    edge_bytes: int = 0
    """Bytes of the state between two chunks: the last inputs of convolutions in the model's dtype, and the states of
    scans in float32. They do not depend on the length of the chunks."""
    incomplete: tuple[tuple[int, float], ...] = ()
    """Blocks of keys that are summed up (DeepSeek-V4): tokens of a block, and bytes of each token of one that a chunk
    leaves incomplete."""
    flops_per_token: int = 0
    """Floating-point operations of a forward."""
    input_elements_per_token: int = 0
    """Numbers that go in."""
    activation_bytes_per_token: float = 0.0
    """Bytes that are kept for backward."""
    block: int | None = None
    """Tokens that scans compute at once; None if they do not compute in blocks."""
    weights: int = 0
    """Weights of modules that let tokens meet in code of their own (`model.mixers`): each rank of a group runs them for
    the tokens of all ranks. They are among the model's."""
    launches_per_token: float = 0.0
    """Kernels that a forward launches for each token: some modules go through tokens, or short blocks of them, in
    Python. On a GPU, that takes longer than what the kernels compute."""

    @property
    def has_edges(self) -> bool:
        """True if anything but keys and values goes from chunk to chunk."""
        return self.edge_bytes > 0 or bool(self.incomplete)

    def bytes_between(self, chunk_size: int) -> int:
        """Return the bytes of the state between two chunks of so many tokens, incomplete blocks included.

        Chunks of a multiple of the block leave none. Others leave the multiples of the greatest common divisor, all
        equally often, and their mean is returned.
        """
        waiting = sum((block - math.gcd(block, chunk_size)) / 2 * each for block, each in self.incomplete)
        return self.edge_bytes + round(waiting)
