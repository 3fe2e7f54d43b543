"""Sizes of a small copy of an architecture: each kind is reduced together with the sizes that depend on it.

Configurations have many names for the same size, and sizes that depend on each other. A size whose name is missing here
stays as it is. Where sizes no longer fit together, no model can be built, and `small_copy.py` leaves a kind out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkflow_cli.execution.layer_kinds import give_overrides, take_overrides

VOCABULARY, UNPADDED_VOCABULARY = 512, 500
HIDDEN = 256
FEED_FORWARD_WIDTH = 256
REACH = 37
"""Tokens that windows, attention chunks and the like reach: fewer than in a chunk of the guard's test."""
PICKED = 16
"""Keys that sparse attention picks, or sums up."""
PICKED_BLOCKS = 3
SCAN_BLOCK = 16
"""Tokens that the scan of a recurrent layer takes at once."""
STATE = 32
"""Numbers of a Mamba layer's state for each channel."""
FEW_HEADS, MORE_HEADS = 2, 4
"""Heads of keys; some models run on several at once."""


@dataclass(frozen=True)
class Before:
    """The configuration before any size was reduced."""

    config: Any
    few_heads: int
    """Heads of keys to keep."""

    def number(self, name: str) -> int:
        """Return a size that holds for all layers; 0 if there is none."""
        return number(self.config, name)


def number(config: Any, name: str) -> int:
    """Return a size of a configuration, by its own or its common name; 0 if it has none that holds for all layers."""
    value = vars(config).get(getattr(config, "attribute_map", {}).get(name, name))
    return value if type(value) is int else 0


def _lower(config: Any, names: Sequence[str], most: int) -> None:
    """Limit sizes, each a number or a list of numbers, in the configuration and in what it keeps for single layers."""
    overrides = take_overrides(config)
    parts = [getattr(config, name, None) for name in ("attn_config", "ffn_config")]  # dbrx, mpt
    holders = [vars(config), *overrides.values(), *(vars(part) for part in parts if hasattr(part, "to_dict"))]
    for holder in holders:
        for name in names:
            value = holder.get(name)
            if type(value) is int:
                holder[name] = min(value, most)
            elif isinstance(value, list) and all(type(each) is int for each in value):
                holder[name] = [min(each, most) for each in value]
    give_overrides(config, overrides)


def shorten_reach(config: Any) -> None:
    """Shorten windows and other limits on what a token sees or counts, which a shorter test would not reach."""
    _lower(config, [name for name in vars(config) if _is_reach(name)], REACH)
    _lower(config, ("index_topk", "index_block_size"), PICKED)
    _lower(config, ("index_topk_blocks",), PICKED_BLOCKS)
    if ratio := number(config, "indexer_compress_ratio"):  # qwen4_exp picks tokens in blocks of these
        config.indexer_budget = min(config.indexer_budget, max(1, PICKED // ratio) * ratio)
    for kind, ratio in (vars(config).get("compress_rates") or {}).items():  # deepseek_v4
        config.compress_rates[kind] = min(ratio, PICKED)
    rope = vars(config).get("rope_parameters") or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and "llama_4_scaling_beta" in part and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = REACH  # from there on queries are scaled by position


def _is_reach(name: str) -> bool:
    is_window = "window" in name and "layers" not in name and "pattern" not in name
    return is_window or name in ("attention_chunk_size", "floor_scale", "log_scaling_n_floor", "rel_extent")


def _shrink_vocabulary(config: Any, before: Before) -> None:
    """Keep few tokens; those with a meaning become token 0, which random text has, too."""
    values = vars(config)
    for name, value in list(values.items()):
        if "vocab_size" in name and type(value) is int:
            values[name] = min(value, UNPADDED_VOCABULARY if name == "unpadded_vocab_size" else VOCABULARY)
        elif name.endswith(("token_id", "token_ids", "token_index")) and value is not None:
            values[name] = [0] * len(value) if isinstance(value, (list, tuple)) else 0
    for name, value in list(values.items()):
        if ("nextn" in name or "mtp" in name) and type(value) is int:
            values[name] = 0  # layers that predict further tokens: training leaves them out


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
GROUPS = ("n_group", "num_expert_group")
"""Names of the number of experts, of those that a token visits, and of the groups that experts are in."""


def _shrink_experts(config: Any, before: Before) -> None:
    """Keep four experts, of which a token visits two at most; in groups, four in each of two."""
    is_grouped = any(number(config, name) > 1 for name in GROUPS)
    _lower(config, CHOSEN, 2)
    _lower(config, EXPERTS, 8 if is_grouped else 4)
    _lower(config, ("zero_expert_num",), 2)
    if is_grouped:
        _lower(config, GROUPS, 2)
        _lower(config, ("topk_group",), 1)


FEED_FORWARD = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "dense_intermediate_size",
    "intermediate_size_mlp", "ffn_hidden_size", "expert_ffn_hidden_size", "ffn_dim", "n_inner", "dff", "dim_ff",
)  # fmt: skip
"""Names of the widths of feed-forward layers."""


def _shrink_feed_forward(config: Any, before: Before) -> None:
    _lower(config, FEED_FORWARD, FEED_FORWARD_WIDTH)
    width_of_mixer = before.number("expand") * before.number("hidden_size")  # Mamba
    if not width_of_mixer or before.number("intermediate_size") != width_of_mixer:
        _lower(config, ("intermediate_size",), FEED_FORWARD_WIDTH)


HEADS = ("num_attention_heads", "num_key_value_heads")
OTHER_HEADS = (("num_attention_heads", "num_kv_heads"), ("swa_num_attention_heads", "swa_num_key_value_heads"))
"""Names of the numbers of query heads and of key heads."""


def _shrink_heads(config: Any, before: Before) -> None:
    """Keep a few heads of keys, each with one query or two, and the width of a model that comes with them."""
    heads, hidden = before.number(HEADS[0]), before.number("hidden_size")
    if not heads or hidden <= HIDDEN:
        return
    for names in (HEADS, *OTHER_HEADS):
        pair = before.number(names[0]), before.number(names[1])
        if names == HEADS or all(pair):
            for name, old, few in zip(names, pair, _few_heads(pair, before.few_heads), strict=True):
                if old:
                    setattr(config, name, few)
    key_heads = before.number(HEADS[1])
    if per_layer := vars(config).get("num_attention_heads_per_layer"):
        config.num_attention_heads_per_layer = [
            _few_heads((each, key_heads), before.few_heads)[0] for each in per_layer
        ]
    overrides = take_overrides(config)
    for each in overrides.values():
        own = each.get(HEADS[0], heads), each.get(HEADS[1], key_heads)
        kept = dict(zip(HEADS, _few_heads(own, before.few_heads), strict=True))
        each |= {name: value for name, value in kept.items() if name in each}
    give_overrides(config, overrides)
    _set_hidden(config, before, number(config, HEADS[0]) * (hidden // heads))


def _few_heads(pair: tuple[int, int], most: int) -> tuple[int, int]:
    """Return numbers of heads and of heads of keys, in which a head of keys still has several queries if it had."""
    heads, key_heads = pair[0], pair[1] or pair[0]
    few = min(key_heads, most)
    return few * min(heads // key_heads, 2), few


def _shrink_hidden(config: Any, before: Before) -> None:
    """Narrow a model further if its heads have a size of their own, or if it has none."""
    is_free = before.number("head_dim") or not before.number("num_attention_heads")
    if is_free and number(config, "hidden_size") > HIDDEN:
        _set_hidden(config, before, HIDDEN)


def _set_hidden(config: Any, before: Before, hidden: int) -> None:
    """Set the width of a model, and of what is as wide, or a few times as wide."""
    config.hidden_size = hidden
    for name in ("attention_hidden_size", "lru_width", "embedding_dim", "word_embed_proj_dim", "intermediate_size"):
        times, rest = divmod(before.number(name), before.number("hidden_size"))
        if times and not rest and (name != "intermediate_size" or times == before.number("expand")):
            setattr(config, name, times * hidden)


MAMBA_2 = (
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_expand"),
    ("num_heads", "head_dim", "n_groups", "expand"),
)
"""Names of the number of heads, their size, the number of groups and the width in times of the model's."""


def _shrink_recurrent(config: Any, before: Before) -> None:
    """Keep few heads and small states, and scan in blocks so short that a sequence has several."""
    if heads := before.number("linear_num_key_heads"):
        config.linear_num_value_heads = min(heads, 2) * (before.number("linear_num_value_heads") // heads)
    _lower(config, ("linear_num_key_heads", "linear_num_heads"), 2)
    _lower(config, ("mamba_chunk_size", "chunk_size", "block_size"), SCAN_BLOCK)
    _lower(config, ("mamba_d_state", "ssm_state_size", "state_size"), STATE)
    for names in MAMBA_2:
        heads, size, groups, expand = (before.number(name) for name in names)
        if heads and size and groups:
            _shrink_mamba_2(config, names, heads, size, groups, expand * before.number("hidden_size"))


def _shrink_mamba_2(config: Any, names: Sequence[str], heads: int, size: int, groups: int, width: int) -> None:
    few_groups = min(groups, 2)
    few = few_groups * min(heads // groups, 2)
    if width == heads * size:  # many models insist on it
        width = number(config, names[3]) * number(config, "hidden_size")
        few = width // size if width % (size * few_groups) == 0 else few
        size = width // few
    for name, value in zip(names, (few, size, few_groups), strict=False):
        setattr(config, name, value)
    if number(config, "mamba_d_ssm"):
        config.mamba_d_ssm = few * size


SHRINKINGS: dict[str, Callable[[Any, Before], None]] = {
    "vocabulary": _shrink_vocabulary,
    "experts": _shrink_experts,
    "feed_forward": _shrink_feed_forward,
    "heads": _shrink_heads,
    "hidden": _shrink_hidden,
    "recurrent": _shrink_recurrent,
}
"""What each kind of size is reduced by: a function of the small configuration, and of the one before any of them."""
