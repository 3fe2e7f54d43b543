"""Dropout under recompute: the second forward of a chunk must drop what its state pass dropped.

Otherwise its keys and values are not the ones that later chunks have read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_dropout(model: nn.Module) -> bool:
    """Return true if a forward of the model in training mode may draw random numbers.

    Some models (seed_oss, starcoder2, opt) have no dropout modules: they keep the rate as a number, for the function.
    """
    return any(
        (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


class RandomReplay:
    """The states of the random number generator before the state passes of a step, by chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[int, Tensor] = {}

    def remember(self, chunk: int) -> None:
        """Keep the present state for the recompute of a chunk."""
        self._states[chunk] = self._state()

    @contextmanager
    def replay(self, chunk: int) -> Iterator[None]:
        """Draw the random numbers of the chunk's state pass once more; do nothing if its state was not kept."""
        before = self._states.pop(chunk, None)
        if before is None:
            yield
            return
        after = self._state()
        self._set_state(before)
        yield
        self._set_state(after)

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set_state(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


def remove_dropout(config: Any) -> None:
    """Set every rate of dropout or noise of a configuration to zero, because under them no two forwards agree."""
    for name, value in vars(config).copy().items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter", "router_noise")):
            setattr(config, name, 0.0)
