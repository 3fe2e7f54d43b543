"""Attention that picks or sums up blocks of keys: what its modules ask of a cache, for one sequence.

Such a module counts the borders of its blocks from the first key that it has, so it can only run for one sequence at a
time. What it asks are the methods of transformers' caches. Here they keep apart what grows with the sequence, and what
has a fixed size: the tokens of a block that is not complete yet, and a part of the last complete one.

`execution.attention.key_blocks` runs such modules in chunks; `key_block_shapes` counts what they keep.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.model.language_part import decoder_of

NO_MASKS = {"indexed_attention": None, "linear_attention": None}
"""The masks of a decoder whose segments make their own. It looks one up by the kind of a layer, or takes the first."""
INDEX = "indexer"
"""The name under which a module hands over what belongs to its indexer, which gets no gradient."""


class Growing(IntEnum):
    """What grows in a layer."""

    keys = 0
    index = 1
    """Keys by which an indexer picks blocks."""
    entries = 2
    """Sums of complete blocks."""
    index_entries = 3

    @property
    def is_of_index(self) -> bool:
        """Whether it is compared by an indexer, and so gets no gradient."""
        return self in (Growing.index, Growing.index_entries)

    @property
    def is_of_blocks(self) -> bool:
        """Whether it has a row for each block; otherwise, for each token."""
        return self >= Growing.entries


def _first_visible(window: int | None, past: int) -> int:
    return 0 if window is None else max(0, past - window + 1)


class BlockCache(ABC):
    """What an attention module gets as its cache for a piece of a sequence; also as the layer of that cache."""

    def __init__(self, module: Any, past: int) -> None:
        """
        Args:
            past: tokens of the sequence before the piece.
        """
        self.past, self.layer = past, int(module.layer_idx)
        self._window: int | None = getattr(module, "sliding_window", None)
        self._compressor: Any = getattr(module, "compressor", None)
        self.leaving: dict[str, Tensor] = {}
        """What has a fixed size, behind the piece."""
        self.first_visible = functools.partial(_first_visible, self._window)  # the store keeps it, and not the cache
        """Gives the first position whose key a piece sees, from the tokens before it."""

    @abstractmethod
    def grow(self, what: Growing, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take rows of the piece, each (rows, heads, channels); return those that it sees, with those of the past."""

    @abstractmethod
    def enter(self, part: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return what has a fixed size, as the piece before has left it."""

    @property
    def block(self) -> int:
        """Tokens of a block whose sum is an entry."""
        return int(self._compressor.compress_rate)

    @property
    def layers(self) -> dict[int, BlockCache]:
        """The layers of transformers' caches. Made anew, for a cycle would keep the graph of a forward in memory."""
        return {self.layer: self}

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a piece; return those that it sees, all (1, heads, keys, channels)."""
        own = {"keys": keys} if values is keys else {"keys": keys, "values": values}  # deepseek_v4 has one for both
        found = self.grow(Growing.keys, {name: tensor[0].transpose(0, 1) for name, tensor in own.items()})
        whole = {name: tensor.transpose(0, 1)[None] for name, tensor in found.items()}
        self.keys = whole["keys"].detach()  # only their number is asked for
        return whole["keys"], whole.get("values", whole["keys"])

    def get_seq_length(self) -> int:
        """Return the number of keys with those of the piece."""
        return self.keys.shape[2]

    def update_index(self, keys: Tensor) -> Tensor:
        """Take the keys by which an indexer picks blocks; return all, (1, 1, keys, channels)."""
        return self.grow(Growing.index, {"keys": keys[0].transpose(0, 1)})["keys"].transpose(0, 1)[None]

    def update_indexer(self, keys: Tensor, *_: Any) -> Tensor:
        """Do the same with (1, keys, channels)."""
        return self.update_index(keys[:, None])[:, 0]

    def store_compression_weights(self, name: str, values: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take what is to be summed up, (1, tokens, channels); return that of complete blocks, and where they begin."""
        both = torch.stack([values, gate])
        both = both.detach() if name == INDEX else both
        if waiting := self.past % self.block:
            shape = (*both.shape[:2], waiting, both.shape[3])
            both = torch.cat([self.enter(f"{name} tokens", shape, both), both], dim=2)
        complete = both.shape[2] // self.block * self.block
        if complete < both.shape[2]:
            self.leaving[f"{name} tokens"] = both[:, :, complete:]
        if not complete and self.past >= self.block and hasattr(self._compressor, INDEX):
            shape = (2, 1, self.block, both.shape[3] // 2)
            self.leaving[f"{name} overlap"] = self.enter(f"{name} overlap", shape, both)  # the next entry needs it
        return both[0, :, :complete], both[1, :, :complete], self.past // self.block * self.block

    def update_overlap_state(
        self, name: str, values: Tensor, gate: Tensor, channels: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Take complete blocks, (1, blocks, tokens, channels); return what the first one needs of the one before it."""
        last = torch.stack([values[:, -1, :, :channels], gate[:, -1, :, :channels]])
        self.leaving[f"{name} overlap"] = last
        if self.past < self.block:
            return None, None
        before = self.enter(f"{name} overlap", tuple(last.shape), last)
        return before[0], before[1]

    def update_compressor_states(self, name: str, entries: Tensor) -> Tensor:
        """Take an entry for each complete block; return those of all blocks, (1, blocks, channels)."""
        what = Growing.index_entries if name == INDEX else Growing.entries
        return self.grow(what, {"keys": entries[0].unsqueeze(1)})["keys"].transpose(0, 1)


def attention_modules(model: Any) -> list[tuple[str, Any]]:
    """Return the attention modules of a model, with their names."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]


def rotary_of_all_keys(model: nn.Module) -> Any | None:
    """Return the rotary embedding that must rotate all keys of a sequence, for an indexer that rotates sums of them."""
    is_one = any(type(module).__name__ == "Qwen4ExpTextAttention" for _, module in attention_modules(model))
    return decoder_of(model).rotary_emb if is_one else None


def rotate_all(rotate: Callable[..., Any], past: int, hidden: Tensor, position_ids: Tensor) -> Any:
    """Rotate the positions of the past, and behind them those given, (..., tokens)."""
    before = torch.arange(past, device=position_ids.device).expand(*position_ids.shape[:-1], -1)
    return rotate(hidden, torch.cat([before, position_ids], dim=-1))


def mask_of_segment(module: Any, hidden: Tensor, past: int) -> Tensor:
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
