"""openai-gpt with its attention in transformers' interface, as later models have it.

Its own attention takes no keys but those of the tokens in a forward. It gives later tokens a score of -10000, so that
their weight is zero: the same as causal attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def use_attention_interface(hf_config: Any) -> None:
    """Let models of this type that are made from now on take any attention by name. Without one, theirs stays.

    Models of another type stay as they are.
    """
    if hf_config.model_type != "openai-gpt":
        return
    from transformers.models.openai import modeling_openai as home

    model, layer = home.OpenAIGPTModel, home.Attention
    if not model._can_set_attn_implementation():
        model._can_set_attn_implementation_cached_value = True
        home.OpenAIGPTLMHeadModel._can_set_attn_implementation_cached_value = True
        model.__init__ = _numbered(model.__init__)  # type: ignore[method-assign]
        layer._attn = _by_name(layer._attn)


def _numbered(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def make_numbered(model: Any, config: Any) -> None:
        make(model, config)
        for index, block in enumerate(model.h):
            block.attn.layer_idx, block.attn.config = index, config

    return make_numbered


def _by_name(attend: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    @functools.wraps(attend)
    def attend_by_name(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> list[Tensor]:
        """Take queries and values, (1, heads, tokens, channels), and keys, (1, heads, channels, tokens)."""
        config = getattr(module, "config", None)  # models that were made before have none
        attention = config and ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)
        if attention is None:
            return attend(module, query, key, value, *others)
        dropout = module.attn_dropout.p if module.training else 0.0
        output, _ = attention(module, query, key.transpose(2, 3), value, None, dropout=dropout)
        return [output.transpose(1, 2)]

    return attend_by_name
