"""Reasons why some architectures cannot be trained exactly in chunks, as read from their modeling code."""

from __future__ import annotations

from typing import Any

_BLOCKS = (
    "it attends to blocks of keys that it picks or sums up, and counts their borders from the first token of a "
    "forward: in a packed chunk, they cross samples"
)

REASONS = {
    **dict.fromkeys(("deepseek_v4", "glm5_next_text", "minimax_m3_vl_text"), _BLOCKS),
    "blt": "its layers attend to patches of bytes, whose borders a second model draws, and not to tokens",
    "cpmant": "its tokens see later ones: all of them count as context",
    "diffusion_gemma": "it restores blocks of tokens that see each other (diffusion), and predicts no next token",
    "doge": "of the keys that a query sees, it keeps those with the largest gates. Equal tokens have equal ones in the "
    "first layer, and which of them it keeps depends on how many keys are compared at once",
    "kosmos-2.5": "it numbers positions by the ids of its tokens, and from 2 on, whatever positions it is given",
    "qwen4_exp_text": "its indexer averages keys in blocks, and rotates them by positions that only its own cache "
    "knows",
    "xlnet": "its tokens see later ones, and its scores have a term for the distance of two tokens",
}
"""Model type -> reason. They explain a refusal and never cause one: the guard finds out by training."""


def why_not(hf_config: Any) -> str | None:
    """Return the reason why an architecture that the guard refuses is not exact in chunks; None if it is unknown."""
    return REASONS.get(hf_config.model_type) or REASONS.get(hf_config.get_text_config().model_type)
