"""Reasons why some architectures cannot be trained exactly in chunks, as read from their modeling code."""

from __future__ import annotations

from typing import Any

_STATE_IN_MODULE = (
    "its recurrent layers keep their state in the model itself, where no chunk can hand it to the next one"
)

REASONS = {
    "blt": "its layers attend to patches of bytes, whose borders a second model draws, and not to tokens",
    "diffllama": "each layer attends twice with the same keys, and a layer's keys and values are kept once",
    "hrm_text": "its layers run several times in a forward, and a layer's keys and values are kept once",
    "minimax": "its linear attention steps through tokens in code of its own, whose state cannot be handed on",
    "modernbert-decoder": "a dense layer and a norm stand between its decoder and the weights of its head",
    "recurrent_gemma": _STATE_IN_MODULE,
    "rwkv": _STATE_IN_MODULE,
    "xlstm": "its recurrent layers run in code of their own, whose state cannot be handed on",
    "zaya": "its attention mixes neighbouring tokens in code of its own, whose state cannot be handed on",
}
"""Model type -> reason. They explain a refusal and never cause one: the guard finds out by training."""


def why_not(hf_config: Any) -> str | None:
    """Return the reason why an architecture that the guard refuses is not exact in chunks; None if it is unknown."""
    return REASONS.get(hf_config.model_type) or REASONS.get(hf_config.get_text_config().model_type)
