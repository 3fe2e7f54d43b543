"""Describe what the attention of one layer computes, and refuse what chunks cannot reproduce.

transformers hands an attention function tensors and keyword arguments. Some of what a layer does is in neither, but in
attributes of its module and in the mask that transformers would have made: this module reads it there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import AttentionRule
from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.model.attention_heads import block_of, window_of

UNSUPPORTED = {
    "attention_mask": "a mask of its own",
    "position_bias": "a bias on its scores that depends on positions",
    "indices": "sparse attention to the keys that an indexer picks (DSA)",
    "block_indices": "sparse attention to blocks of keys that it picks (MSA)",
    "sinks": "sinks in a form that is not known",
    "encoder_hidden_states": "cross-attention",
}
"""Keyword arguments of transformers 5.23 that change what attention computes -> their meaning."""
HARMLESS = frozenset(
    (
        "position_ids", "cache_position", "position_embeddings", "past_key_values", "use_cache", "output_attentions",
        "output_hidden_states", "output_router_logits", "return_dict", "is_causal", "num_items_in_batch",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic",
    )
)  # fmt: skip
"""Keyword arguments that change nothing: queries and keys are rotated already, and the chunk knows its segments."""

WINDOW_MASK = "create_sliding_window_causal_mask"
"""A modeling file that has this function may tell a window to its mask alone, and not to attention (phimoe)."""


@dataclass(frozen=True)
class LayerAttention:
    """What the attention of one layer computes."""

    index: int
    """The layer whose state it reads."""
    rule: AttentionRule
    block: int | None = None
    """Positions of a sequence are divided into blocks of this many, and a query sees only keys of its own block."""
    owns_keys: bool = True
    """False if an earlier layer's keys and values are used: they are that layer's to store and to release."""

    def first_visible(self, past: int) -> int:
        """Return the first position that a chunk with `past` tokens before it sees; `past` if it sees none of them."""
        start = 0 if self.rule.window is None else max(0, past - self.rule.window + 1)
        return start if self.block is None else max(start, past - past % self.block)

    def queries_that_see(self, stop: int, past: int, queries: int) -> int:
        """Return how many of the first queries of a chunk see the position before `stop`, the last one of a block.

        Args:
            past: tokens before the chunk.
            queries: tokens of the chunk.
        """
        if self.rule.window is not None:
            queries = min(queries, self.rule.window - 1 - (past - stop))
        return queries if self.block is None else min(queries, self.block - past % self.block)


def describe_layer(module: nn.Module, rule: AttentionRule) -> LayerAttention:
    """Return what the attention of a Hugging Face module computes, beyond what it was called with.

    Raises:
        UsageError: the module does not know which layer it is.
    """
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise UsageError(
            f"{type(module).__name__} does not know its layer, so the state of its layers cannot be kept apart"
        )
    config: Any = getattr(module, "config", None)
    block = block_of(config, index)
    if rule.window is None and hasattr(sys.modules[type(module).__module__], WINDOW_MASK):
        rule = replace(rule, window=window_of(config, index))
    if not getattr(module, "is_kv_shared_layer", False):
        return LayerAttention(index, rule, block)
    kinds = config.layer_types
    sharing = zip(kinds, config.kv_sharing_modes, strict=True)
    owner = next(layer for layer, (kind, mode) in enumerate(sharing) if mode == "store" and kind == kinds[index])
    return LayerAttention(owner, rule, block, owns_keys=False)


def check_call(module: nn.Module, keywords: Mapping[str, Any]) -> None:
    """Check the keyword arguments of an attention call that nothing here computes with.

    Raises:
        UsageError: one of them changes what attention computes, or might do so.
    """
    name = type(module).__name__
    for keyword, value in keywords.items():
        if value is None:
            continue
        if keyword in UNSUPPORTED:
            raise UsageError(f"{name} uses {UNSUPPORTED[keyword]} ({keyword}): it cannot be trained in chunks")
        if keyword not in HARMLESS:
            raise UsageError(
                f"{name} passes {keyword!r} to its attention, which chunkflow does not know: it could not be exact"
            )
    if keywords.get("is_causal") is False:
        raise UsageError(f"{name} attends to later tokens (is_causal=False): it cannot be trained in chunks")


def counts_positions(module: Any) -> bool:
    """Return whether a layer of Llama 4 scales its queries by positions that it counts itself."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def correct_temperature(module: Any, queries: Tensor, positions: Tensor) -> Tensor:
    """Replace the scale of queries at counted positions by that at true ones, in a layer that `counts_positions`.

    The model multiplies the query at position p by 1 + attn_scale * log(1 + floor((p + 1) / floor_scale))
    (arXiv 2501.19399). It counts p from 0 in each forward, which is right only in the first segment of a first chunk.

    Args:
        queries: (1, heads, tokens, head_dim), scaled by the model.
        positions: (tokens,), the true ones.
    """
    counted = torch.arange(queries.shape[2], device=queries.device)

    def scale(at: Tensor) -> Tensor:
        in_float32: Tensor = torch.log1p(torch.floor((at.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        return in_float32.double()

    correction = (scale(positions) / scale(counted)).to(accumulation_dtype(queries.dtype))
    corrected: Tensor = (queries * correction[:, None]).to(queries.dtype)
    return corrected
