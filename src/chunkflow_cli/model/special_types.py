"""The types of models of which some part cannot run as in all others, by the type of the decoder.

Nothing here imports torch, so that a run is refused before it loads a model.
"""

from __future__ import annotations

from typing import Any

TO_BLOCKS = frozenset({"deepseek_v4", "glm5_next_text", "minimax_m3_vl_text", "qwen4_exp_text"})
"""Their attention picks or sums up blocks of keys, counted from the first key that it has. It runs once for each
segment of a chunk (`execution.attention.key_blocks`)."""
OWN_ATTENTION = TO_BLOCKS | {
    "bloom", "codegen", "falcon", "git", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "xglm",  # older code
    "diffllama",  # attends twice with the same keys
    "axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "mistral_large4_text",  # an indexer (DSA)
    "hrm_text",  # runs its layers several times in a forward
    "inkling2_text", "inkling_text",  # add a learned function of the distance between two tokens
}  # fmt: skip
"""They compute attention themselves, and do not leave it to transformers' attention interface."""
POSITIONS_FROM_CACHE = frozenset({"inkling_text"})
"""They ask their cache for positions, and compute with them."""


def computes_own_attention(hf_config: Any) -> bool:
    """Return whether a model takes its keys in chunks from its cache, and computes attention itself."""
    return hf_config.get_text_config().model_type in OWN_ATTENTION


def attends_to_blocks(hf_config: Any) -> bool:
    """Return whether a model picks or sums up blocks of keys."""
    return hf_config.get_text_config().model_type in TO_BLOCKS
