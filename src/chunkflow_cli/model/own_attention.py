"""Models that compute attention themselves, and do not leave all of it to transformers' attention interface.

In chunks, they get the keys of earlier chunks through their cache (`execution.attention.own`). Nothing here imports
torch.
"""

from __future__ import annotations

from typing import Any

from chunkflow_cli.config.schema import ActivationCheckpointing, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.special_types import computes_own_attention


def implementation_for(hf_config: Any, attention: str | None) -> str | None:
    """Return the name of the attention in transformers to make a model with, or None for its default.

    Args:
        attention: the name for models that leave attention to the interface.
    """
    return None if computes_own_attention(hf_config) or not attention_heads(hf_config) else attention


class KeyCache:
    """What such a model asks of its cache. This one holds no keys."""

    is_compileable = False
    is_initialized = False

    def __init__(self, past: int = 0) -> None:
        """
        Args:
            past: keys before those of the forward.
        """
        self._past = past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of keys before the forward."""
        return self._past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the place of the first query among the keys."""
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, and the place of the first one."""
        return self._past + query_length, 0

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """Return no inputs before those of the forward: a convolution gets them elsewhere (`execution.recurrent`)."""

    def update_conv_state(self, inputs: Any, *_: Any, **__: Any) -> Any:
        """Return the inputs of a convolution, (1, channels, tokens)."""
        return inputs

    def update(self, keys: Any, values: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Take the keys and values of a layer; return all keys and values, each (1, heads, keys, channels)."""
        return keys, values

    def update_indexer(self, keys: Any, layer_idx: int) -> Any:
        """Do the same for the keys by which an indexer picks others, (1, keys, channels)."""
        return keys


def check_own_attention(config: ModelConfig, hf_config: Any) -> None:
    """Refuse settings under which a model cannot compute attention itself.

    Raises:
        UsageError: names the key and what to set instead.
    """
    if not computes_own_attention(hf_config):
        return
    itself = f"models of type {hf_config.model_type!r} compute their attention themselves"
    if config.compile:
        raise UsageError(
            f"model.compile=true: {itself}, with keys from a cache that compiled code cannot read\n"
            "  set model.compile=false"
        )
    if config.activation_checkpointing is ActivationCheckpointing.selective:
        raise UsageError(
            f"model.activation_checkpointing=selective: {itself}, and selective checkpointing would keep all scores\n"
            "  set model.activation_checkpointing=full"
        )
