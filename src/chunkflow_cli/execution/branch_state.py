"""The state of an answer that continues from the prompt of another: two continuations read one state.

The prompt's keys and values are in the state of the answer that runs the prompt, the other answer's own in a state of
its own. The gradients of both are added into the prompt's, whose chunks go backward after both answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from chunkflow_cli.execution.state import FirstVisible, PastBlock, SequenceState


class BranchState(SequenceState):
    """The state of a sequence whose first positions are those of another one's state.

    Attention is all that may read it: recurrent layers have edges, which pass from one chunk to one other.
    """

    def __init__(self, trunk: SequenceState, shared_tokens: int, stored_tokens: int) -> None:
        """
        Args:
            trunk: the state that holds positions before `shared_tokens`. It `is_shared`.
            stored_tokens: tokens of the sequence whose state later chunks read, shared ones included.
        """
        assert trunk.is_shared
        super().__init__(stored_tokens, trunk.home)
        self._trunk, self._shared = trunk, shared_tokens
        self._own = SequenceState(max(0, stored_tokens - shared_tokens), trunk.home)

    def write(
        self,
        layer: int,
        start: int,
        pieces: Mapping[str, Tensor],
        first_visible: FirstVisible = lambda past: 0,
        in_all: int | None = None,
    ) -> None:
        assert in_all is None, "a layer with fewer rows than tokens has edges"
        shared = self._shared
        self._own.write(layer, start - shared, pieces, lambda past: max(0, first_visible(past + shared) - shared))

    def past(self, layer: int, past: int, *, with_gradients: bool = False) -> Iterator[PastBlock]:
        yield from self._trunk.shared_past(layer, past, self._shared, with_gradients=with_gradients)
        if past > self._shared:
            for block in self._own.past(layer, past - self._shared, with_gradients=with_gradients):
                yield replace(block, start=block.start + self._shared, stop=block.stop + self._shared)

    def look_ahead(self, past: int) -> None:
        """Bring nothing ahead: the first block that is read may be in either state."""

    def own_gradients(self, layer: int, start: int, stop: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        yield from self._own.own_gradients(layer, start - self._shared, stop - self._shared)

    def release(self, layer: int, start: int) -> None:
        self._own.release(layer, start - self._shared)

    @property
    def nbytes(self) -> int:
        return self._own.nbytes
