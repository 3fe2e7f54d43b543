"""The recurrent layers of a model: what they keep, and how much they compute."""

from __future__ import annotations

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
    scans in float32. They do not depend on the length of the chunks. Attention that sums up blocks of keys leaves
    tokens of a block that is not complete (DeepSeek-V4): their mean is part of it."""
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
