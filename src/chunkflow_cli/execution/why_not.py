"""Reasons why some architectures cannot be trained exactly in chunks, as read from their modeling code."""

from __future__ import annotations

from typing import Any

_STATE_IN_MODULE = (
    "its recurrent layers keep their state in the model itself, where no chunk can hand it to the next one"
)
_ALIBI = "it adds a bias that grows with the distance of two tokens to their score (ALiBi), which no kernel here does"
_OWN_SCORES = (
    "its modeling code computes, masks and normalizes the scores of one forward itself: keys of earlier chunks cannot "
    "be added there, nor packed samples kept apart"
)

REASONS = {
    "bloom": _ALIBI,
    "blt": "its layers attend to patches of bytes, whose borders a second model draws, and not to tokens",
    "codegen": _OWN_SCORES,
    "cpmant": "it adds a learned bias for the distance of two tokens to their score, in code of its own",
    "diffllama": "each layer attends twice with the same keys, and a layer's keys and values are kept once",
    "diffusion_gemma": "it restores blocks of tokens that see each other (diffusion), and predicts no next token",
    "falcon": _OWN_SCORES,
    "git": _OWN_SCORES,
    "gpt_neo": _OWN_SCORES,
    "gpt_neox_japanese": _OWN_SCORES,
    "gptj": _OWN_SCORES,
    "hrm_text": "its layers run several times in a forward, and a layer's keys and values are kept once",
    "kosmos-2.5": "it numbers positions by the ids of its tokens, and from 2 on, whatever positions it is given",
    "minimax": "its linear attention steps through tokens in code of its own, whose state cannot be handed on",
    "modernbert-decoder": "a dense layer and a norm stand between its decoder and the weights of its head",
    "mpt": _ALIBI,
    "openai-gpt": _OWN_SCORES,
    "recurrent_gemma": _STATE_IN_MODULE,
    "rwkv": _STATE_IN_MODULE,
    "xglm": _OWN_SCORES,
    "xlnet": "its tokens see later ones, and its scores have a term for the distance of two tokens",
    "xlstm": "its recurrent layers run in code of their own, whose state cannot be handed on",
    "zaya": "its attention mixes neighboring tokens in code of its own, whose state cannot be handed on",
}
"""Model type -> reason. They explain a refusal and never cause one: the guard finds out by training."""


def why_not(hf_config: Any) -> str | None:
    """Return the reason why an architecture that the guard refuses is not exact in chunks; None if it is unknown."""
    return REASONS.get(hf_config.model_type) or REASONS.get(hf_config.get_text_config().model_type)
