"""Models that compute attention themselves, and do not leave all of it to transformers' attention interface.

In chunks, they get the keys of earlier chunks through their cache (`execution.attention.own`). Nothing here imports
torch.
"""

from __future__ import annotations

from typing import Any

OWN_ATTENTION = {
    **dict.fromkeys(
        ("bloom", "codegen", "falcon", "git", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "xglm"),
        "it computes scores and their softmax in code of its own",
    ),
    "diffllama": "each layer attends twice with the same keys",
    "doge": "each layer makes a mask from its values",
    "hrm_text": "its layers run several times in a forward, each time with other keys",
}
"""Type of the decoder -> why the attention interface does not do for it."""


def computes_own_attention(hf_config: Any) -> bool:
    """Return whether a model takes its keys in chunks from its cache, and computes attention itself."""
    return hf_config.get_text_config().model_type in OWN_ATTENTION


def implementation_for(hf_config: Any, attention: str | None) -> str | None:
    """Return the name of the attention in transformers to make a model with, or None for its default.

    Args:
        attention: the name for models that leave attention to the interface.
    """
    return None if computes_own_attention(hf_config) else attention
