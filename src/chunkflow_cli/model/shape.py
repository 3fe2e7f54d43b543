"""The sizes of a model that time and memory follow from, read off its configuration and its modules."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.loading import on_meta_device
from chunkflow_cli.model.shape_probe import probe
from chunkflow_cli.planning.attention_layers import by_size
from chunkflow_cli.planning.costs import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_without_weights(
    config: ModelConfig, hf_config: PretrainedConfig, kernels: frozenset[str] = frozenset()
) -> ModelShape:
    """Return the sizes of a model that is not loaded, adapters included if they are configured.

    Args:
        kernels: as in `model_shape`.
    """
    model = on_meta_device(config, hf_config)
    shape = model_shape(model, kernels)
    if not config.lora.enabled:
        return shape
    with torch.device("meta"):
        return with_adapters(shape, add_lora(model, config.lora))


def model_shape(model: Any, kernels: frozenset[str] = frozenset()) -> ModelShape:
    """Return the sizes of a Hugging Face causal LM without adapters, on any device, the meta device included.

    Args:
        kernels: packages whose kernels run the recurrent layers (`recurrent_functions.installed_kernels`).
    """
    config = model.config.get_text_config()
    layers, parameters, head = int(config.num_hidden_layers), int(model.num_parameters()), model.get_output_embeddings()
    shape = ModelShape(
        layers=layers,
        hidden_size=int(config.hidden_size),
        intermediate_size=_active_intermediate_size(config),
        attention=(),
        vocab_size=int(config.vocab_size),
        matmul_parameters=_active_matmul_parameters(model, config),
        parameters=parameters,
        trainable_parameters=parameters,
        largest_trained=max(weight.numel() for weight in model.parameters()),
        is_head_tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )
    probed = probe(_on_meta(model), kernels)
    if probed is None:
        return replace(shape, attention=by_size(attention_heads(model.config)))  # its forward cannot show it
    return replace(
        shape,
        attention=probed.attention,
        layer_activation_bytes=probed.activation_bytes_per_token / layers,
        largest_layer_activation_bytes=probed.largest_layer_bytes_per_token,
        layer_product_bytes=probed.product_bytes_per_token / layers,
        recurrent=probed.recurrent,
    )


def _on_meta(model: Any) -> Any:
    """Return the model itself if it is on the meta device, otherwise a copy there."""
    if model.device.type == "meta":
        return model
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def with_adapters(shape: ModelShape, peft_model: Any) -> ModelShape:
    """Return the sizes of a model of that `shape` after adapters were added: only the adapters are trained."""
    trainable, parameters = peft_model.get_nb_trainable_parameters()
    return replace(
        shape,
        parameters=parameters,
        trainable_parameters=trainable,
        largest_trained=max(weight.numel() for weight in peft_model.parameters() if weight.requires_grad),
        merged_bytes=merged_bytes(peft_model),
    )


def merged_bytes(model: nn.Module) -> int:
    """Return the bytes of the expert tensors that have adapters: peft makes a merged copy of each in every forward."""
    from peft.tuners.lora.layer import ParamWrapper

    adapted = (module.get_param() for module in model.modules() if isinstance(module, ParamWrapper))
    return sum(parameter.nbytes for parameter in adapted)


def _active_intermediate_size(config: Any) -> int:
    """Return the width of the feed-forward layer; of experts, of all that one token visits, together.

    Configurations name an expert's width `moe_intermediate_size` or `intermediate_size`.
    """
    active = getattr(config, "num_experts_per_tok", None)
    expert = getattr(config, "moe_intermediate_size", None)
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if isinstance(dense, list):  # gemma3n: one per layer
        dense = max(dense)
    if active is None:
        return int(dense)
    return int(active) * int(expert or dense) + int(getattr(config, "shared_expert_intermediate_size", None) or 0)


def _active_matmul_parameters(model: Any, config: Any) -> int:
    """Return the number of weights that a token is multiplied with; of stacked experts (experts, out, in), its part."""
    head = model.get_output_embeddings()
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}  # tokens, positions
    total = 0 if head is None else head.weight.numel()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    for name, parameter in model.named_parameters():
        if parameter in looked_up or (head is not None and parameter is head.weight) or "lora_" in name:
            continue
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim == 3 and experts and active and parameter.shape[0] == experts:
            total += parameter.numel() * int(active) // int(experts)
    return int(total)
