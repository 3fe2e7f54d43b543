"""What a model must consist of to be cut into the stages of a pipeline, read off its modules, on any device."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.language_part import decoder_of, module_before_head

READ_FROM_OTHERS = {
    "original_hidden_states": "its layers read the embeddings, which only the first stage has",  # zamba, zamba2
    "prev_router_hidden_states": "each router reads what the one of the layer before has computed",  # zaya
}
"""Name of a layer's argument -> why the model cannot be cut."""


def layers_and_norm(model: Any, stages: int, key: str = "parallel.pipeline") -> tuple[nn.ModuleList, str]:
    """Return the layers of a Hugging Face causal LM without adapters, and the name of its final norm.

    Args:
        stages: how many stages are asked for.
        key: the setting that asks for them.

    Raises:
        UsageError: the model cannot be cut. Its decoder holds weights besides embedding, layers and final norm, for
            example, and a stage would not know when to use them.
    """
    decoder = decoder_of(model)
    layers, embedding = getattr(decoder, "layers", None), model.get_input_embeddings()
    others = [
        child
        for child, module in decoder.named_children()
        if module is not layers and module is not embedding and any(True for _ in module.parameters())
    ]
    is_plain_head = model.get_output_embeddings() is not None and module_before_head(model) is None
    if isinstance(layers, nn.ModuleList) and is_plain_head and len(others) == 1 and "norm" in others[0]:
        reason = _why_not(model, layers)
        if reason is None:
            return layers, others[0]
    else:
        others += [] if module_before_head(model) is None else ["lm_head"]
        found = ", ".join(sorted(others)) or "layers"
        reason = f"it is not an embedding, a list of layers, a norm and a head ({found})"
    raise UsageError(f"{key}={stages}: {type(model).__name__} cannot be cut into stages: {reason}\n  use {key}=1")


def _why_not(model: Any, layers: nn.ModuleList) -> str | None:
    """Return why a list of layers cannot be cut; None if it can."""
    if len(layers) != model.config.get_text_config().num_hidden_layers:  # longcat_flash counts two for each
        return f"it has {len(layers)} layers, and its configuration counts others"
    arguments = {name for layer in layers for name in inspect.signature(layer.forward).parameters}
    return next((reason for name, reason in READ_FROM_OTHERS.items() if name in arguments), None)
