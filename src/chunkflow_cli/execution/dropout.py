"""Dropout under recompute: the second forward of a chunk must drop what its state pass dropped.

Otherwise its keys and values are not the ones that later chunks have read. Dropout is not the only thing that draws:
routers add noise to their input, or sample experts. So the numbers of every chunk are drawn again, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.model.hf_config import with_parts


class RandomReplay:
    """The states of the random number generators before the state passes of a step, by chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[int, tuple[Tensor, ...]] = {}

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

    def _state(self) -> tuple[Tensor, ...]:
        """Return the states of the host's generator and of the device's, if it has one. Both are on the host."""
        own = (torch.cuda.get_rng_state(self._device),) if self._device.type == "cuda" else ()
        return torch.get_rng_state(), *own

    def _set_state(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)


def remove_dropout(config: Any) -> None:
    """Set every rate of dropout or noise of a configuration to zero, because under them no two forwards agree."""
    for part in with_parts(config):
        for name, value in vars(part).copy().items():
            if isinstance(value, float) and any(each in name for each in ("drop", "jitter", "router_noise")):
                setattr(part, name, 0.0)
