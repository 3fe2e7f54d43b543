"""Reasons why some architectures cannot be trained exactly in chunks, as read from their modeling code."""

from __future__ import annotations

from typing import Any

REASONS = {
    "blt": "its layers attend to patches of bytes, whose borders a second model draws, and not to tokens",
    "cpmant": "its tokens see later ones: all of them count as context",
    "diffusion_gemma": "it restores blocks of tokens that see each other (diffusion), and predicts no next token",
    "doge": "it keeps only the keys with the largest gates. In the first layer, equal tokens have equal gates, and "
    "which of them it keeps depends on how many keys are compared at once",
    "kosmos-2.5": "it numbers positions by the ids of its tokens, and from 2 on, whatever positions it is given",
    "xlnet": "its tokens see later ones, and its scores have a term for the distance of two tokens",
}
"""Model type -> reason. They explain a refusal and never cause one: the guard finds out by training."""


def why_not(hf_config: Any) -> str | None:
    """Return the reason why an architecture that the guard refuses is not exact in chunks; None if it is unknown."""
    return REASONS.get(hf_config.model_type) or REASONS.get(hf_config.get_text_config().model_type)
