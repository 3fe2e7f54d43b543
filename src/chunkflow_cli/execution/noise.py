"""Noise in the embeddings (NEFTune, https://arxiv.org/abs/2310.05914).

An embedding gets noise that is uniform in [-1, 1], times alpha / sqrt(L d), with L the tokens of its own sequence and d
the width. Its numbers are a hash of seed, step, sample, position and channel, so they are the same in the recompute of
a chunk, on every layout, and for every chunk size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ELEMENTS_AT_ONCE = 1 << 22
"""Elements whose noise is made at once: hashes take 8 bytes each."""
HALF = (1 << 32) - 1
"""Mask of the lower half of an int64."""


@dataclass(frozen=True)
class SequenceNoise:
    """The noise of the sequences of a step."""

    alpha: float
    keys: NDArray[np.uint64]
    """(sequences,)"""

    @classmethod
    def of_step(cls, alpha: float, seed: int, step: int, samples: Sequence[int]) -> SequenceNoise:
        """Return the noise of samples, which are named by their index in the data, in a step."""
        keys = [np.random.SeedSequence((seed, step, sample)).generate_state(1, np.uint64)[0] for sample in samples]
        return cls(alpha, np.array(keys, dtype=np.uint64))

    def keys_of(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the key of each token (tokens,), given its sequence and its position there: splitmix64."""
        key: NDArray[np.uint64] = self.keys[sequences] + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.int64] = (key ^ (key >> np.uint64(31))).view(np.int64)
        return mixed


@dataclass(frozen=True)
class TokenNoise:
    """The noise of the tokens of a chunk."""

    keys: Tensor  # (tokens,)
    scales: Tensor  # (tokens,) alpha / sqrt(L)

    def of(self, embeddings: Tensor) -> Tensor:
        """Return the noise of embeddings, (1, tokens, channels)."""
        width = embeddings.shape[-1]
        channels = torch.arange(width, device=embeddings.device) * 0x9E3779B9
        rows = max(1, ELEMENTS_AT_ONCE // width)
        parts = zip(self.keys.split(rows), self.scales.split(rows), strict=True)
        noise = [(_uniform(keys, channels) * (scales / width**0.5)[:, None]).to(embeddings) for keys, scales in parts]
        return torch.cat(noise)[None]


def _uniform(keys: Tensor, channels: Tensor) -> Tensor:
    """Return numbers in [-1, 1], (tokens, channels): both halves of each key, mixed with the channel."""
    low, high = keys[:, None] & HALF, (keys[:, None] >> 32) & HALF
    return _mix(_mix((channels + low) & HALF) ^ high).double().mul_(2 / HALF).sub_(1).float()


def _mix(x: Tensor) -> Tensor:
    """Return a bijection of numbers of 32 bits that looks random: lowbias32 (https://nullprogram.com/blog/2018/07/31)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & HALF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & HALF
    return x ^ (x >> 16)


@contextmanager
def noisy(embedding: nn.Module, noise: TokenNoise | None) -> Iterator[None]:
    """Add noise to what the embedding returns within the block."""
    if noise is None:
        yield
        return

    def add(module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        return embeddings + noise.of(embeddings)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
