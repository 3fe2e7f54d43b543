"""What attention to blocks of keys keeps and hands on, found on torch's meta device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.model.exchange import arguments_of
from chunkflow_cli.model.key_blocks import (
    BlockCache,
    Growing,
    attention_modules,
    mask_of_segment,
    rotary_of_all_keys,
    rotate_all,
)
from chunkflow_cli.planning.attention_layers import AttentionLayers


@dataclass
class BlockTally:
    """What the attention of all layers hands on."""

    layers: list[AttentionLayers] = field(default_factory=list)
    edges: dict[tuple[int, str], int] = field(default_factory=dict)
    """Bytes between two chunks by layer and part."""
    tokens: dict[tuple[int, str], tuple[int, float]] = field(default_factory=dict)
    """Tokens of a block by layer and part, and bytes of each token of one that is not complete."""

    @property
    def edge_bytes(self) -> int:
        return sum(self.edges.values())

    @property
    def incomplete(self) -> tuple[tuple[int, float], ...]:
        """As in `RecurrentLayers`, by the tokens of a block."""
        of_blocks: dict[int, float] = {}
        for block, of_token in self.tokens.values():
            of_blocks[block] = of_blocks.get(block, 0.0) + of_token
        return tuple(of_blocks.items())


@contextmanager
def attention_to_blocks_on_meta(model: nn.Module, past: int) -> Iterator[BlockTally]:
    """Run the attention of a model within the block as in a chunk of one segment.

    Args:
        past: tokens before it in its sequence.
    """
    tally = BlockTally()
    changes = [(cls, _attend(past, tally)) for cls in {type(module) for _, module in attention_modules(model)}]
    names = {type(module).__name__: type(module) for module in model.modules()}
    changes += [(names[name], lambda _, pick=pick: pick) for name, pick in PICKS.items() if name in names]
    if (rotary := rotary_of_all_keys(model)) is not None:
        changes.append((type(rotary), _rotate(past)))
    before = [(cls, cls.forward) for cls, _ in changes]
    for cls, wrap in changes:
        cls.forward = wrap(cls.forward)
    try:
        yield tally
    finally:
        for cls, forward in before:
            cls.forward = forward


def _attend(past: int, tally: BlockTally) -> Any:
    def wrap(forward: Any) -> Any:
        @functools.wraps(forward)
        def attend(module: nn.Module, *args: Any, **options: Any) -> Any:
            own = arguments_of(forward, module, args, options)
            cache = _Cache(module, past, tally)
            seen = cache.past - cache.first_visible(cache.past)
            own |= {"past_key_values": cache, "attention_mask": mask_of_segment(module, own["hidden_states"], seen)}
            return forward(module, **own)

        return attend

    return wrap


def _rotate(past: int) -> Any:
    return lambda rotate: (
        lambda module, hidden, positions: rotate_all(functools.partial(rotate, module), past, hidden, positions)
    )


class _Cache(BlockCache):
    """A cache that notes the sizes of what it is given."""

    def __init__(self, module: Any, past: int, tally: BlockTally) -> None:
        super().__init__(module, past)
        self._tally = tally
        self._heads = int(module.config.num_attention_heads)

    def grow(self, what: Growing, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys, values = own["keys"], own.get("values")
        is_index, stride = what.is_of_index, self.block if what.is_of_blocks else 1
        before = self.past - self.first_visible(self.past) if what is Growing.keys else self.past // stride
        value_dim = 0 if is_index else (keys if values is None else values).shape[2]
        sizes = AttentionLayers(
            1, 1 if is_index else self._heads, keys.shape[1], keys.shape[2], value_dim,
            window=self._window if what is Growing.keys else None, stride=stride,
            keys_are_values=values is None and not is_index, has_gradients=not is_index,
        )  # fmt: skip
        self._tally.layers.append(sizes)
        return {name: torch.cat([t.new_empty(before, *t.shape[1:]), t]) for name, t in own.items()}

    def store_compression_weights(self, name: str, values: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        of_token = (values.nbytes + gate.nbytes) / values.shape[1]
        self._tally.tokens[self.layer, name] = self.block, of_token
        return super().store_compression_weights(name, values, gate)

    def update_overlap_state(
        self, name: str, values: Tensor, gate: Tensor, channels: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        found = super().update_overlap_state(name, values, gate, channels)
        self._tally.edges[self.layer, f"{name} overlap"] = self.leaving[f"{name} overlap"].nbytes
        return found

    def enter(self, part: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape)


def _pick_tokens(
    indexer: Any, hidden_states: Tensor, q_resid: Tensor, attention_mask: Tensor, past_key_values: BlockCache
) -> Tensor:
    """Return the numbers of the keys that each query sees, (1, tokens, picked)."""
    tokens, tail = hidden_states.shape[1], indexer.index_kpool - 1 if indexer.index_kpool_always_select_tail else 0
    past_key_values.update_indexer(hidden_states.new_empty(1, tokens, 2 * indexer.head_dim + 1))
    return hidden_states.new_empty(1, tokens, indexer.index_topk + tail, dtype=torch.int32)


def _pick_blocks(
    indexer: Any, hidden_states: Tensor, rotations: Any, attention_mask: Tensor, past_key_values: BlockCache
) -> Tensor:
    """Return whether each query sees each key, (1, 1, tokens, keys)."""
    past_key_values.update_indexer(hidden_states.new_empty(1, hidden_states.shape[1], indexer.index_head_dim))
    return torch.empty_like(attention_mask, dtype=torch.bool)


PICKS = {"Glm5NextTextIndexer": _pick_tokens, "Qwen4ExpTextQSAIndexer": _pick_blocks}
"""Class of an indexer that needs numbers -> what stands in for its forward. Indexers keep nothing for backward."""
