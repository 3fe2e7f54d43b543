"""A tokenised sample, as the cache stores it and as chunks are built from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Target of a position that the loss does not count, as in Hugging Face labels."""


@dataclass(frozen=True)
class TokenizedSample:
    """One sequence. The arrays may be read-only views of the cache."""

    input_ids: NDArray[np.int32]  # (length,)
    targets: NDArray[np.int32]  # (length,) the id that each position has to predict (labels shifted once), or IGNORED
