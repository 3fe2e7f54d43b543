"""The attention of each layer, read from a Hugging Face configuration.

Configurations say it in several ways. `head_dim` can differ between layers (Gemma 4), and in multi-head latent
attention (DeepSeek, GLM-4.7-Flash, Kimi) it is only the part of a key that is rotated. Read sizes of heads, windows and
blocks here alone. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from chunkflow_cli.planning.attention_layers import AttentionLayers


def attention_heads(hf_config: Any) -> tuple[AttentionLayers, ...]:
    """Return the attention of each layer, by its index; an empty tuple if the model has no attention at all.

    In a hybrid model, layers without attention are listed as if they had it.
    """
    config = hf_config.get_text_config()
    layers = int(config.num_hidden_layers)
    by_layer = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * layers
    if not getattr(by_layer[0], "num_attention_heads", None):
        return ()
    modes = getattr(config, "kv_sharing_modes", None) or [None] * layers
    return tuple(
        replace(
            _heads_of(by_layer[i], i),
            window=window_of(by_layer[i], i),
            block=block_of(by_layer[i], i),
            owns_keys=modes[i] != "reuse",
        )
        for i in range(layers)
    )


def by_size(layers: Iterable[AttentionLayers]) -> tuple[AttentionLayers, ...]:
    """Return single layers, those of equal sizes together."""
    return tuple(replace(sizes, layers=count) for sizes, count in Counter(layers).items())


def block_of(config: Any, layer: int) -> int | None:
    """Return the tokens of the blocks that a layer's attention stays within (Llama 4), or None.

    Args:
        config: the configuration of the decoder.
    """
    kinds = getattr(config, "layer_types", None) or ()
    if layer >= len(kinds) or kinds[layer] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)


def window_of(config: Any, layer: int) -> int | None:
    """Return the tokens that a layer's attention reaches back, its own included, or None for all.

    Args:
        config: the configuration of the decoder.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window) if kinds is None or kinds[layer] == "sliding_attention" else None


def _heads_of(config: Any, layer: int) -> AttentionLayers:
    per_layer = getattr(config, "num_attention_heads_per_layer", None)  # laguna
    queries = int(per_layer[layer] if per_layer else config.num_attention_heads)
    value_dim = getattr(config, "v_head_dim", None)
    rotated, rest = getattr(config, "qk_rope_head_dim", None), getattr(config, "qk_nope_head_dim", None)
    if value_dim and rotated is not None and rest is not None:  # latent attention: one key per query head
        return AttentionLayers(1, queries, queries, int(rotated) + int(rest), int(value_dim))
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    key_dim = int(getattr(config, "head_dim", None) or config.hidden_size // int(config.num_attention_heads))
    return AttentionLayers(1, queries, keys, key_dim, int(value_dim or key_dim))
