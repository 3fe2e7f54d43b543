"""Merge adapters into their model: the sum in float32, rounded once to the model's data type."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.model.adapter_summary import adapted_layers, trained_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def merge_adapters(base: PreTrainedModel, folder: Path) -> tuple[Any, bool]:
    """Return `base` with the adapters saved in `folder` merged into its weights.

    If embedding and head share a weight and one of them has an adapter or is trained whole without the other, each gets
    a weight of its own: as one, they could not be what base and adapter compute.

    Returns:
        The merged model, and whether embedding and head were separated.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        is_tied = _is_tied(base)
        model = PeftModel.from_pretrained(base, str(folder))
        is_separated = is_tied and _separate_tied(model)
        dtypes = {id(tensor): tensor.dtype for tensor in _weights(model)}
        for _, layer, _ in adapted_layers(model):
            for tensor in layer.parameters():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        merged = model.merge_and_unload(safe_merge=True)
        for tensor in _weights(merged):
            tensor.data = tensor.data.to(dtypes[id(tensor)])
    return merged, is_separated


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" not in name]


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _separate_tied(peft_model: Any) -> bool:
    """Give the head a weight of its own if it shared the embedding's, and they are not one any more."""
    from peft.tuners.lora import LoraLayer

    model = peft_model.get_base_model()
    head, embedding = trained_copy(model.get_output_embeddings()), trained_copy(model.get_input_embeddings())
    if head.weight is embedding.weight:
        if not isinstance(head, LoraLayer) and not isinstance(embedding, LoraLayer):
            return False
        layer = head.get_base_layer() if isinstance(head, LoraLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True
