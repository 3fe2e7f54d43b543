"""Modules in which other modules are called more or less often, depending on the samples of a chunk or their tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from chunkflow_cli.model.key_blocks import attention_modules
from chunkflow_cli.model.mixers import mixer_of
from chunkflow_cli.model.special_types import attends_to_blocks

CALL_EXPERTS_ONE_BY_ONE = frozenset({"DbrxExperts", "LongcatFlashExperts"})
"""Classes of transformers that call a module for each expert that a token takes. Others multiply all in one call."""


def modules_with_uneven_calls(model: Any) -> dict[str, nn.Module]:
    """Return such modules of a Hugging Face or peft model, by name: what runs once for each segment, and experts."""
    found = dict(attention_modules(model)) if attends_to_blocks(model.config) else {}
    for name, module in model.named_modules():
        mixer = mixer_of(type(module))
        runs_by_segment = mixer is not None and mixer.reach is None
        if runs_by_segment or type(module).__name__ in CALL_EXPERTS_ONE_BY_ONE:
            found[name] = module
    return found
