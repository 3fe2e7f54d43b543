"""Sizes of heads are read as the model's own modules have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.hf_config import refuse_unsupported_attention
from support.models import MLA, MODELS, SHAPES, SHARED_KEYS

APART = ("by kind", "in the mask alone")
CASES = {name: case for name, case in {**MODELS, **SHAPES}.items() if not any(words in name for words in APART)}
CASES["gemma4, head_dim by kind"] = ("gemma4_text", {**SHARED_KEYS, "num_kv_shared_layers": 3, "global_head_dim": 24})
CASES["laguna, heads by layer"] = ("laguna", {"head_dim": 16, "num_attention_heads_per_layer": [4, 2]})


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_heads_are_those_that_attention_is_called_with(
    tiny_config: Callable[..., Any], kind: str, settings: dict[str, Any]
) -> None:
    seen: list[tuple[int, int, int, int, int | None]] = []

    def look(_: Any, queries: Any, keys: Any, values: Any, *__: Any, **options: Any) -> tuple[torch.Tensor, None]:
        window = options.get("sliding_window")
        seen.append((queries.shape[1], keys.shape[1], keys.shape[3], values.shape[3], window))
        return queries.new_zeros(1, queries.shape[2], queries.shape[1], values.shape[3]), None

    AttentionInterface.register("look", look)
    AttentionMaskInterface.register("look", lambda *_, **__: None)
    config = tiny_config(kind, **settings)
    heads = attention_heads(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="look")
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert [(layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim, layer.window) for layer in heads] == seen
    assert all(layer.owns_keys for layer in heads) == ("num_kv_shared_layers" not in settings)


def test_state_counts_both_widths_and_shared_keys_once(tiny_config: Callable[..., Any]) -> None:
    (layer, _) = attention_heads(tiny_config("deepseek_v3", **MLA, v_head_dim=16))
    assert layer.kv_elements_per_token == 4 * (24 + 16)
    shared = attention_heads(tiny_config("gemma4_text", **SHARED_KEYS, num_kv_shared_layers=3, global_head_dim=24))
    assert [layer.kv_elements_per_token * layer.owns_keys for layer in shared] == [64, 96, 64, 0, 0, 0]
    assert attention_heads(tiny_config("mamba", num_attention_heads=None)) == ()


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("llama", {"index_topk": 512}, r"keys that an indexer picks \(index_topk=512 in config.json\), .* 'llama'"),
    ("minimax_m3_vl_text", {"index_local_blocks": 2, "index_topk_blocks": 1}, "is more than index_topk_blocks=1"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "attends to later tokens"),
])  # fmt: skip
def test_what_a_short_test_cannot_see_is_refused_by_its_setting(
    tiny_config: Callable[..., Any], kind: str, settings: dict[str, Any], message: str
) -> None:
    """An indexer that picks 2,048 keys picks all of a guard's 150: the small model would pass."""
    with pytest.raises(UsageError, match=message):
        refuse_unsupported_attention(tiny_config(kind, **settings))
    refuse_unsupported_attention(tiny_config("llama"))
