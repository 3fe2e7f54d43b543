"""A small copy of an architecture: a configuration that trains in a second, and in which no mistake can hide.

Its sizes are reduced one kind after the other, each with all that a configuration insists on. Where no model can be made of
the result, the sizes of one kind are left as they are, and so on. What a copy needs to show a mistake is never left out:
windows shorter than the test's sequences, one layer of each kind, no dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chunkflow_cli.execution.layer_kinds import give_overrides, keep_layer_kinds, take_overrides
from chunkflow_cli.execution.parity import whole_implementation, remove_dropout, use_implementation

VOCABULARY = 512
HIDDEN = 256
WIDTH = 256
"""Of a feed-forward layer or an expert."""
FEW_HEADS, MORE_HEADS = 2, 8
"""Heads of keys; some models run on several at once."""
REACH = 37
"""Tokens that windows, attention chunks and the like reach at most: fewer than in a chunk of the guard's test."""
PICKED = 16
"""Keys or blocks that sparse attention picks."""
SCAN_BLOCK = 16
"""Tokens that the scan of a recurrent layer takes at once."""
MOST_PARAMETERS = 400_000_000
"""A copy with more could take all memory, and minutes."""
PROJECTION_STD = 1.6
"""Spread of a projection of a normalised input: weights are drawn with this over sqrt(hidden_size), 0.2 at 64. Scores
are far from zero then, so a missing soft cap or multiplier shows, but not so large that rounding drowns everything."""


class CannotBuild(Exception):
    """No small model can be made of a configuration. The text is the library's reason, one line."""


def small_config(hf_config: Any) -> Any:
    """Return a configuration of the same architecture, of which a model was made that runs.

    Kept: head_dim, whether several queries share keys, every multiplier and flag. Changed: few layers, one or more of
    each kind; a small vocabulary; windows and attention chunks shorter than the test sequences; initial weights large
    enough for scores to matter; no dropout, because two forwards could not agree under it.

    Raises:
        CannotBuild: transformers makes no model of it, whatever sizes are left as they are, or only a very large one.
        ImportError: its modeling file needs a package that is not installed.
    """
    errors: list[Exception] = []
    for left_out, key_heads in _attempts():
        try:
            small = _shrunk(hf_config, left_out, key_heads)
            _try_out(small)
            return small
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a modeling file raises at sizes that it was not made for
            errors.append(error)
    reason = errors[-1]
    first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else "no message"
    text = first_line if isinstance(reason, CannotBuild) else f"{type(reason).__name__}: {first_line}"
    raise CannotBuild(text) from reason


def build_small(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a small model in train mode, with random weights that keep recurrent states for many tokens."""
    model = _new_model(config, dtype)  # on the CPU: a small model has the same weights on every device
    model.config.use_cache = False
    _stir(model)
    return model.to(device).train()


def _attempts() -> Iterator[tuple[frozenset[str], int]]:
    """Yield which kinds of sizes to leave as they are, and the heads of keys to keep.

    First none; then one kind, and the kinds that hang together most; at last all but the number of layers, and all.
    """
    yield frozenset(), FEW_HEADS
    yield frozenset(), MORE_HEADS
    kinds = [*SHRINKINGS, "layers"]
    for name in reversed(kinds):
        yield frozenset({name}), FEW_HEADS
    yield frozenset({"heads", "hidden"}), FEW_HEADS
    yield frozenset({"heads", "hidden", "recurrent"}), FEW_HEADS
    yield frozenset(SHRINKINGS), FEW_HEADS
    yield frozenset(kinds), FEW_HEADS


def _shrunk(hf_config: Any, left_out: frozenset[str] = frozenset(), key_heads: int = FEW_HEADS) -> Any:
    small = copy.deepcopy(hf_config)
    for config in _parts(small):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    config = small.get_text_config()
    _shorten_reach(config)
    remove_dropout(config)
    before = Before(copy.deepcopy(config), key_heads)
    for name, shrink in SHRINKINGS.items():
        if name not in left_out:
            shrink(config, before)
    if "layers" not in left_out:
        kept = keep_layer_kinds(config, lambda changed: _skeleton(_with_text(small, changed)))
        small = _with_text(small, kept)
    config = small.get_text_config()
    for name in ("initializer_range", "init_std"):
        if isinstance(getattr(config, name, None), float):
            width = _number(config, "hidden_size") or HIDDEN
            setattr(config, name, max(float(getattr(config, name)), PROJECTION_STD / width**0.5))
    return small


def _with_text(whole: Any, text: Any) -> Any:
    """Return a configuration with another text part; the part itself if it is the whole."""
    part = whole.get_text_config()
    if part is whole:
        return text
    changed = copy.copy(whole)
    name = next(name for name, value in vars(whole).items() if value is part)
    setattr(changed, name, text)
    return changed


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if hasattr(part, "get_text_config"):
            yield from _parts(part)


def _skeleton(config: Any) -> Any:
    """Return the model without weights."""
    with torch.device("meta"):
        return _new_model(copy.deepcopy(config), torch.float32)


def _new_model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _try_out(config: Any) -> None:
    """Build the model and run it on a few tokens: many sizes that do not fit show in the forward only."""
    parameters = sum(parameter.numel() for parameter in _skeleton(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise CannotBuild(f"the smallest one that can be built has {parameters / 1e9:.1f} billion parameters")
    with torch.random.fork_rng([]), torch.no_grad():
        model = build_small(copy.deepcopy(config), torch.device("cpu"), torch.float32)
        with use_implementation(model, whole_implementation(model)):
            model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)


# --- Sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """The configuration before any size was reduced."""

    config: Any
    few_heads: int
    """Heads of keys to keep."""

    def number(self, name: str) -> int:
        return _number(self.config, name)


def _number(config: Any, name: str) -> int:
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


def _shorten_reach(config: Any) -> None:
    """Shorten whatever lets a token see, or count, only so many tokens: a test shorter than that would not notice it."""
    _lower(config, [name for name in vars(config) if _is_reach(name)], REACH)
    _lower(config, ("index_topk", "index_block_size", "index_topk_blocks"), PICKED)
    rope = vars(config).get("rope_parameters") or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and "llama_4_scaling_beta" in part and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = REACH  # from there on queries are scaled by position


def _is_reach(name: str) -> bool:
    is_window = "window" in name and "layers" not in name and "pattern" not in name
    return is_window or name in ("attention_chunk_size", "floor_scale", "log_scaling_n_floor", "rel_extent")


def _shrink_vocabulary(config: Any, before: Before) -> None:
    """Few tokens; those with a meaning become token 0, which random text has, too."""
    values = vars(config)
    for name, value in list(values.items()):
        if "vocab_size" in name and type(value) is int:
            values[name] = min(value, VOCABULARY)
        elif name.endswith(("token_id", "token_ids", "token_index")) and value is not None:
            values[name] = [0] * len(value) if isinstance(value, (list, tuple)) else 0
    for name, value in list(values.items()):
        if ("nextn" in name or "mtp" in name) and type(value) is int:
            values[name] = 0  # layers that predict further tokens: training leaves them out


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
GROUPS = ("n_group", "num_expert_group")


def _shrink_experts(config: Any, before: Before) -> None:
    """Four experts, of which a token visits two at most. Where they are in groups: four in each of two groups."""
    is_grouped = any(_number(config, name) > 1 for name in GROUPS)
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


def _shrink_feed_forward(config: Any, before: Before) -> None:
    _lower(config, FEED_FORWARD, WIDTH)
    width_of_mixer = before.number("expand") * before.number("hidden_size")  # Mamba
    if not width_of_mixer or before.number("intermediate_size") != width_of_mixer:
        _lower(config, ("intermediate_size",), WIDTH)


HEADS = ("num_attention_heads", "num_key_value_heads")
OTHER_HEADS = (("num_attention_heads", "num_kv_heads"), ("swa_num_attention_heads", "swa_num_key_value_heads"))


def _shrink_heads(config: Any, before: Before) -> None:
    """A few heads of keys, each with one query or two, and the width of a model that comes with them."""
    heads, hidden = before.number("num_attention_heads"), before.number("hidden_size")
    if not heads or hidden <= HIDDEN:
        return
    for names in (HEADS, *OTHER_HEADS):
        pair = [before.number(name) for name in names]
        if names == HEADS or all(pair):
            for name, before_, few in zip(names, pair, _few_heads(*pair, before.few_heads), strict=True):
                if before_:
                    setattr(config, name, few)
    if per_layer := vars(config).get("num_attention_heads_per_layer"):
        key_heads = before.number(HEADS[1])
        config.num_attention_heads_per_layer = [_few_heads(each, key_heads, before.few_heads)[0] for each in per_layer]
    overrides = take_overrides(config)
    for each in overrides.values():
        pair = [each.get(name, before.number(name)) for name in HEADS]
        few = dict(zip(HEADS, _few_heads(*pair, before.few_heads), strict=True))
        each |= {name: number for name, number in few.items() if name in each}
    give_overrides(config, overrides)
    _set_hidden(config, before, _number(config, HEADS[0]) * (hidden // heads))


def _few_heads(heads: int, key_heads: int, most: int) -> tuple[int, int]:
    """Return numbers of heads and of heads of keys, in which a head of keys still has several queries if it had."""
    few = min(key_heads or heads, most)
    return few * min(heads // (key_heads or heads), 2), few


def _shrink_hidden(config: Any, before: Before) -> None:
    """A model whose heads have a size of their own, or that has no heads, can be as narrow as we like."""
    is_free = before.number("head_dim") or not before.number("num_attention_heads")
    if is_free and _number(config, "hidden_size") > HIDDEN:
        _set_hidden(config, before, HIDDEN)


def _set_hidden(config: Any, before: Any, hidden: int) -> None:
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
    """Few heads and small states, and a scan in blocks so short that every sequence has several."""
    for names in (("linear_num_key_heads", "linear_num_value_heads"), ("linear_num_heads", "linear_num_heads")):
        heads, value_heads = (before.number(name) for name in names)
        if heads:
            setattr(config, names[1], min(heads, 2) * (value_heads // heads))
            setattr(config, names[0], min(heads, 2))
    _lower(config, ("mamba_chunk_size", "chunk_size", "block_size"), SCAN_BLOCK)
    _lower(config, ("mamba_d_state", "ssm_state_size", "state_size"), 32)
    for names in MAMBA_2:
        heads, size, groups, expand = (before.number(name) for name in names)
        if heads and size and groups:
            _shrink_mamba_2(config, names, heads, size, groups, expand * before.number("hidden_size"))


def _shrink_mamba_2(config: Any, names: Sequence[str], heads: int, size: int, groups: int, width: int) -> None:
    few_groups = min(groups, 2)
    few = few_groups * min(heads // groups, 2)
    if width == heads * size:  # many models insist on it
        width = _number(config, names[3]) * _number(config, "hidden_size")
        few = width // size if width % (size * few_groups) == 0 else few
        size = width // few
    for name, value in zip(names, (few, size, few_groups), strict=False):
        setattr(config, name, value)
    if _number(config, "mamba_d_ssm"):
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


# --- Weights ---------------------------------------------------------------------------------------------------------

DECAYS = ("A_log", "dt_bias", "dt_proj.bias", "dt_proj_bias")


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Move weights away from where models begin: there, norms, biases and sinks are neutral, and states fade at once."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=PROJECTION_STD / module.in_features**0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(DECAYS):
            parameter.uniform_(-1.5, 0.5)
        elif parameter.ndim <= 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif not parameter.any():
            parameter.normal_(std=PROJECTION_STD / parameter.shape[-1] ** 0.5)
