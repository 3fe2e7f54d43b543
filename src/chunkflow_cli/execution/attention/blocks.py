"""Attention to blocks of keys that a model picks or sums up, over the segments of a chunk.

Such a model counts the borders of its blocks from the first key that it has. So its attention runs once for each
segment, which then is a forward of that sequence alone. The piece of a long sequence gets a cache with what earlier
chunks have left. Part of that grows with the sequence: keys and values, keys by which an indexer picks blocks, and
entries that sum up one block each. They are in the state store like keys and values, entries under their own numbers.
The rest has a fixed size and goes from chunk to chunk, as the state of recurrent layers does: the tokens of a block
that is not complete yet, and a part of the last complete one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.execution.attention.function import flat
from chunkflow_cli.execution.attention.own import Past, behind_past, with_past
from chunkflow_cli.execution.recurrent.mixers import joined, of_tokens
from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.model.language_part import decoder_of
from chunkflow_cli.model.mixers import Forward, arguments_of, has_gradient
from chunkflow_cli.model.own_attention import attention_modules, rotates_blocks

_EXCHANGED = "_runs_in_chunks"
KEYS, INDEX, ENTRIES, INDEX_ENTRIES = range(4)
"""What grows in a layer. The store keeps each as if it were a layer of its own."""


def prepare_attention_to_blocks(model: nn.Module) -> tuple[str, ...]:
    """Make the attention of a model run once for each segment; return the names of modules that leave edges."""
    modules = attention_modules(model)
    for cls in {type(module) for _, module in modules}:
        if not hasattr(cls.forward, _EXCHANGED):
            cls.forward = _by_segment(cls.forward)
            setattr(cls.forward, _EXCHANGED, True)
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    if any(rotates_blocks(module) for _, module in modules) and not hasattr(type(rotary).forward, _EXCHANGED):
        type(rotary).forward = _with_past_positions(type(rotary).forward)
        setattr(type(rotary).forward, _EXCHANGED, True)
    return tuple(name for name, module in modules if getattr(module, "compressor", None) is not None)


def _by_segment(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def attend(module: nn.Module, *args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return forward(module, *args, **options)
        arguments = arguments_of(forward, module, args, options)
        outputs = []
        for index, span in enumerate(chunk.spans):
            own = {name: of_tokens(lambda t, s=span: t[:, s], each, chunk.tokens) for name, each in arguments.items()}
            cache = None
            if index == 0 and chunk.has_piece:
                cache = PieceCache(chunk, module, needs_gradient=has_gradient(module, arguments))
            if rotates_blocks(module):
                own["position_embeddings"] = _positions(
                    arguments["position_embeddings"], chunk.context.past, index, span
                )
            past = 0 if cache is None else cache.seen
            own |= {"past_key_values": cache, "attention_mask": _mask(module, own["hidden_states"], past)}
            output, _, *others = forward(module, **own)
            outputs.append((output if cache is None else cache.leave(output), None, *others))
        return joined(outputs)

    return attend


def _positions(rotations: tuple[Tensor, ...], past: int, segment: int, span: slice) -> tuple[Tensor, ...]:
    """Return the rotations of a segment, and those of the past in front of the first one, each (1, keys, channels)."""
    start = past + span.start if segment else 0
    return tuple(each[:, start : past + span.stop] for each in rotations)


def _with_past_positions(rotate: Forward) -> Forward:
    """Let a rotary embedding rotate the positions of the past as well, in front of a chunk's own."""

    @functools.wraps(rotate)
    def rotate_all(module: nn.Module, hidden: Tensor, position_ids: Tensor) -> Any:
        chunk = running_chunk()
        if chunk is not None and chunk.context.past:
            past = torch.arange(chunk.context.past, device=position_ids.device)
            position_ids = torch.cat([past.expand(*position_ids.shape[:-1], -1), position_ids], dim=-1)
        return rotate(module, hidden, position_ids)

    return rotate_all


def _mask(module: Any, hidden: Tensor, past: int) -> Tensor:
    """Return the mask of a segment's queries over the keys that it has, as transformers makes it.

    Args:
        past: keys before those of the segment.
    """
    tokens = hidden.shape[1]
    if hasattr(module, "build_attention_mask_from_topk"):  # its indexer knows what is causal
        return torch.ones(1, tokens, dtype=torch.bool, device=hidden.device)
    keys = torch.arange(past + tokens, device=hidden.device)
    distance = keys[past:, None] - keys
    is_seen = distance >= 0
    if (window := getattr(module, "sliding_window", None)) is not None:
        is_seen &= distance < window
    if module.config._attn_implementation == "eager":
        mask = hidden.new_zeros(1, 1, *is_seen.shape)
        return mask.masked_fill_(~is_seen, torch.finfo(mask.dtype).min)
    return is_seen[None, None]


class PieceCache:
    """What an attention module gets as its cache for the piece of a long sequence; also as the layer of that cache."""

    def __init__(self, chunk: RunningChunk, module: Any, *, needs_gradient: bool) -> None:
        piece = chunk.context.piece
        assert piece is not None
        self._chunk, self._piece, self._layer = chunk, piece, int(module.layer_idx)
        self._needs_gradient = needs_gradient
        self._window: int | None = getattr(module, "sliding_window", None)
        self._compressor: Any = getattr(module, "compressor", None)
        self._leaving: dict[str, Tensor] = {}
        self.layers = {self._layer: self}
        chunk.begin_layer(f"attention of layer {self._layer}")

    @property
    def seen(self) -> int:
        """Keys of the past that a query of the piece may see."""
        return self._piece.past - self._first_visible(self._piece.past)

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a piece; return those that it sees, all (1, heads, keys, channels)."""
        own = {"keys": flat(keys)} if values is keys else {"keys": flat(keys), "values": flat(values)}
        past = Past(self._piece, self._layer, self._piece.past, keys.shape[2], None, self._first_visible)
        whole = {name: tensor.transpose(0, 1)[None] for name, tensor in with_past(past, own).items()}
        self.keys = whole["keys"]
        return whole["keys"], whole.get("values", whole["keys"])

    def get_seq_length(self) -> int:
        """Return the number of keys with those of the piece."""
        return self.keys.shape[2]

    def update_index(self, keys: Tensor) -> Tensor:
        """Take the keys by which an indexer picks blocks; return all, (1, 1, keys, channels)."""
        past = Past(self._piece, self._number(INDEX), self._piece.past, keys.shape[2])
        return behind_past(past, {"keys": flat(keys)})["keys"].transpose(0, 1)[None]

    def update_indexer(self, keys: Tensor, *_: Any) -> Tensor:
        """Do the same with (1, keys, channels)."""
        return self.update_index(keys[:, None])[:, 0]

    def store_compression_weights(self, name: str, values: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take what is to be summed up, (1, tokens, channels); return that of complete blocks, and where they begin."""
        block, past = self._compressor.compress_rate, self._piece.past
        both = torch.stack([values, gate])
        both = both.detach() if name == "indexer" else both
        if past % block:
            both = torch.cat([self._enter(name, "tokens"), both], dim=2)
        complete = both.shape[2] // block * block
        if complete < both.shape[2]:
            self._leaving[f"{name} tokens"] = both[:, :, complete:]
        if complete == 0 and past >= block and hasattr(self._compressor, "indexer"):
            self._leaving[f"{name} overlap"] = self._enter(name, "overlap")  # the next complete block needs it
        return both[0, :, :complete], both[1, :, :complete], past // block * block

    def update_overlap_state(
        self, name: str, values: Tensor, gate: Tensor, channels: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Take complete blocks, (1, blocks, tokens, channels); return what the first one needs of the one before it."""
        self._leaving[f"{name} overlap"] = torch.stack([values[:, -1, :, :channels], gate[:, -1, :, :channels]])
        if self._piece.past < self._compressor.compress_rate:
            return None, None
        before = self._enter(name, "overlap")
        return before[0], before[1]

    def update_compressor_states(self, name: str, entries: Tensor) -> Tensor:
        """Take an entry for each complete block; return those of all blocks, (1, blocks, channels)."""
        block, state = self._compressor.compress_rate, self._piece.state
        is_index = name == "indexer"
        past = Past(
            self._piece, self._number(INDEX_ENTRIES if is_index else ENTRIES), self._piece.past // block,
            entries.shape[1], state.stored_tokens // block,
        )  # fmt: skip
        if self._needs_gradient and not entries.requires_grad:
            entries.requires_grad_()  # there is none, and yet those of the past get a gradient
        whole = (behind_past if is_index else with_past)(past, {"keys": entries[0].unsqueeze(1)})
        return whole["keys"].transpose(0, 1)

    def leave(self, output: Tensor) -> Tensor:
        """Leave to the next chunk what has a fixed size; return the output, through which that gets its gradient."""
        if self._piece.continues:
            for part, value in self._leaving.items():
                output = self._chunk.leave(part, value, output)
        return output

    def _enter(self, name: str, what: str) -> Tensor:
        found = self._chunk.enter(f"{name} {what}", needs_gradient=self._needs_gradient and name != "indexer")
        assert found is not None
        return found

    def _number(self, what: int) -> int:
        return -(3 * self._layer + what)

    def _first_visible(self, past: int) -> int:
        return 0 if self._window is None else max(0, past - self._window + 1)
