"""Attention that picks or sums up blocks of keys, over the segments of a chunk.

It runs once for each segment, which is then a forward of that sequence alone. The piece of a long sequence gets a cache
with what earlier chunks have left. What grows with the sequence is in the state store like keys and values; sums of
blocks are counted by blocks there. What has a fixed size goes from chunk to chunk, as the state of recurrent layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from chunkflow_cli.execution.attention.own import Past, behind_past, with_past
from chunkflow_cli.execution.few_rows import linear_layers_in_blocks
from chunkflow_cli.execution.recurrent.mixers import joined
from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.model.exchange import Forward, arguments_of, exchanged, has_gradient
from chunkflow_cli.model.key_blocks import (
    INDEX,
    BlockCache,
    Growing,
    attention_modules,
    mask_of_segment,
    rotary_of_all_keys,
    rotate_all,
)


def prepare_attention_to_blocks(model: nn.Module) -> tuple[str, ...]:
    """Make the attention of a model run once for each segment; return the names of modules that leave edges."""
    modules = attention_modules(model)
    for cls in {type(module) for _, module in modules}:
        cls.forward = exchanged(cls.forward, _by_segment)
    if (rotary := rotary_of_all_keys(model)) is not None:
        type(rotary).forward = exchanged(type(rotary).forward, _with_past_positions)
    return tuple(name for name, module in modules if getattr(module, "compressor", None) is not None)


def _by_segment(forward: Forward) -> Forward:
    def attend(module: nn.Module, *args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return forward(module, *args, **options)
        arguments = arguments_of(forward, module, args, options)
        outputs = []
        for index, span in enumerate(chunk.spans):
            cache, past = None, 0
            if index == 0 and chunk.has_piece:
                cache = PieceCache(chunk, module, needs_gradient=has_gradient(module, arguments))
                past = cache.past - cache.first_visible(cache.past)
            own = {name: _of_segment(value, chunk, index, span) for name, value in arguments.items()}
            own |= {"past_key_values": cache, "attention_mask": mask_of_segment(module, own["hidden_states"], past)}
            with nullcontext() if cache is None else linear_layers_in_blocks(span.stop - span.start):
                output, _, *others = forward(module, **own)
            outputs.append((output if cache is None else cache.leave(output), None, *others))
        return joined(outputs)

    return attend


def _of_segment(value: Any, chunk: RunningChunk, index: int, span: slice) -> Any:
    """Return the part of an argument, (1, tokens, ...), that belongs to a segment; of tuples and dictionaries, too."""
    if isinstance(value, dict):
        return {name: _of_segment(each, chunk, index, span) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_of_segment(each, chunk, index, span) for each in value)
    if not isinstance(value, Tensor):
        return value
    past = value.shape[1] - chunk.tokens  # some rotations are those of the past, too
    return value[:, past + span.start if index else 0 : past + span.stop]


def _with_past_positions(rotate: Forward) -> Forward:
    """Let a rotary embedding rotate the positions of the past as well, in front of a chunk's own."""

    def rotate_chunk(module: nn.Module, hidden: Tensor, position_ids: Tensor) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return rotate(module, hidden, position_ids)
        return rotate_all(functools.partial(rotate, module), chunk.context.past, hidden, position_ids)

    return rotate_chunk


class PieceCache(BlockCache):
    """The cache of the piece of a long sequence, in the state store."""

    def __init__(self, chunk: RunningChunk, module: Any, *, needs_gradient: bool) -> None:
        super().__init__(module, chunk.context.past)
        self._chunk, self._needs_gradient = chunk, needs_gradient
        chunk.begin_layer(f"attention of layer {self.layer}")

    def grow(self, what: Growing, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        piece = self._chunk.context.piece
        assert piece is not None
        rows, number = len(own["keys"]), -(3 * self.layer + what)  # what else a layer has is a layer of its own
        if what is Growing.keys:
            past = Past(piece, self.layer, self.past, rows, None, self.first_visible)
        elif what.is_of_blocks:
            past = Past(piece, number, self.past // self.block, rows, piece.state.stored_tokens // self.block)
        else:
            past = Past(piece, number, self.past, rows)
        if what.is_of_index:
            return behind_past(past, own)
        if what.is_of_blocks and self._needs_gradient and not own["keys"].requires_grad:
            own = {"keys": own["keys"].detach().requires_grad_()}  # no rows, and yet those of the past get a gradient
        return with_past(past, own)

    def enter(self, part: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        needs_gradient = self._needs_gradient and not part.startswith(INDEX)
        found = self._chunk.enter(part, needs_gradient=needs_gradient)
        assert found is not None
        return found

    def leave(self, output: Tensor) -> Tensor:
        """Leave to the next chunk what has a fixed size; return the output, through which that gets its gradient."""
        if self._chunk.continues:
            for part, value in self.leaving.items():
                output = self._chunk.leave(part, value, output)
        return output
