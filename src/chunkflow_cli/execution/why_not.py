"""Reasons why some architectures cannot be trained exactly in chunks, as read from their modeling code."""

from __future__ import annotations

from typing import Any

_STATE_IN_MODULE = (
    "its recurrent layers keep their state in the model itself, where no chunk can hand it to the next one"
)

REASONS = {
    "blt": "its layers attend to patches of bytes, whose borders a second model draws, and not to tokens",
    "cpmant": "its tokens see later ones: all of them count as context",
    "diffusion_gemma": "it restores blocks of tokens that see each other (diffusion), and predicts no next token",
    "doge": "of the keys that a query sees, it keeps those with the largest gates. Equal tokens have equal ones in the "
    "first layer, and which of them it keeps depends on how many keys are compared at once",
    "inkling_text": "it adds a learned function of the distance of two tokens to their score, scales queries by "
    "positions that it counts itself, and its head has rows that no logit uses",
    "kosmos-2.5": "it numbers positions by the ids of its tokens, and from 2 on, whatever positions it is given",
    "openai-gpt": "its attention takes no keys but those of the tokens in a forward (it has no cache); it knows 512 "
    "positions, so each of its samples fits into one forward",
    "rwkv": _STATE_IN_MODULE,
    "xlnet": "its tokens see later ones, and its scores have a term for the distance of two tokens",
    "xlstm": "its recurrent layers run in code of their own, whose state cannot be handed on",
}
"""Model type -> reason. They explain a refusal and never cause one: the guard finds out by training."""


def why_not(hf_config: Any) -> str | None:
    """Return the reason why an architecture that the guard refuses is not exact in chunks; None if it is unknown."""
    return REASONS.get(hf_config.model_type) or REASONS.get(hf_config.get_text_config().model_type)
