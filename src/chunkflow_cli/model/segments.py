"""Modules of a model that run once for each segment of a chunk."""

from __future__ import annotations

from torch import nn

from chunkflow_cli.model.attention_blocks import attention_modules
from chunkflow_cli.model.mixers import mixer_of
from chunkflow_cli.model.own_attention import attends_to_blocks


def run_by_segment(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules of a Hugging Face or peft model that call those inside them for each segment."""
    config = getattr(model, "config")
    names = {name for name, _ in attention_modules(model)} if attends_to_blocks(config) else set()
    for name, module in model.named_modules():
        mixer = mixer_of(type(module))
        if mixer is not None and mixer.reach is None:
            names.add(name)
    return frozenset(names)
