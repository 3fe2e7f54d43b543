"""The state of an answer that continues from the prompt of another: two continuations read one state.

The prompt's keys and values are in the state of the answer that runs the prompt, the other answer's own in a state of
its own. The gradients of both are added into the prompt's, whose chunks go backward after both answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkflow_cli.execution.state import SequenceState


class BranchState(SequenceState):
    """The state of a sequence whose first positions are those of another one's state.

    Attention is all that may read it: recurrent layers have edges, which pass from one chunk to one other.
    """

    def __init__(self, trunk: SequenceState, shared_tokens: int, stored_tokens: int) -> None:
        """
        Args:
            trunk: the state that holds positions before `shared_tokens`.
            stored_tokens: tokens of the sequence whose state later chunks read, shared ones included.
        """
        super().__init__(stored_tokens)
        self._trunk, self._shared = trunk, shared_tokens
        self._own = SequenceState(max(0, stored_tokens - shared_tokens))

    def write(self, layer: int, start: int, pieces: dict[str, Tensor]) -> None:
        self._own.write(layer, start - self._shared, pieces)

    def read(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        shared = self._shared
        if stop <= shared:
            return self._trunk.read(layer, name, start, stop)
        own = self._own.read(layer, name, max(0, start - shared), stop - shared)
        return own if start >= shared else torch.cat([self._trunk.read(layer, name, start, shared), own])

    def add_gradient(self, layer: int, name: str, start: int, gradient: Tensor) -> None:
        before = max(0, min(len(gradient), self._shared - start))
        if before:
            self._trunk.add_gradient(layer, name, start, gradient[:before])
        if before < len(gradient):
            self._own.add_gradient(layer, name, start + before - self._shared, gradient[before:])

    def gradient(self, layer: int, name: str, start: int, stop: int) -> Tensor | None:
        return self._own.gradient(layer, name, start - self._shared, stop - self._shared)

    def release(self, layer: int, start: int) -> None:
        self._own.release(layer, start - self._shared)

    @property
    def nbytes(self) -> int:
        return self._own.nbytes
