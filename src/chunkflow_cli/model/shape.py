"""The sizes of a model that time and memory follow from, read off its configuration and its modules."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ModelConfig, OptimConfig, Quantization
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapter_summary import adapted_layers, saved_modules, trained_copy
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.attention_heads import attention_heads, by_size
from chunkflow_cli.model.loading import on_meta_device
from chunkflow_cli.model.quantised import quantised_layers, stored_bytes
from chunkflow_cli.model.shape_probe import probe
from chunkflow_cli.model.special_types import attends_to_blocks
from chunkflow_cli.model.trained_weights import apply_to, indexers
from chunkflow_cli.model.uneven_calls import modules_with_uneven_calls
from chunkflow_cli.planning.model_shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_without_weights(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    kernels: frozenset[str] = frozenset(),
    optim: OptimConfig | None = None,
) -> ModelShape:
    """Return the sizes of a model that is not loaded, adapters included if they are configured.

    Args:
        kernels: as in `model_shape`.
        optim: says which weights are frozen; by default, none.

    Raises:
        UsageError: a name in `optim` means no weight, or the model has no activation checkpointing.
    """
    model = on_meta_device(config, hf_config)
    layers = {} if config.quantization is Quantization.none else quantised_layers(model)
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    shape = replace(
        model_shape(model, kernels),
        spared_bytes=sum(layer.weight.nbytes - stored_bytes(config.quantization, layer) for layer in layers.values()),
        # bitsandbytes dequantizes to float32 (int8), and a CPU multiplies in it (bfloat16).
        workspace_bytes=max((layer.weight.numel() * (dtype.itemsize + 4) for layer in layers.values()), default=0),
    )
    enable_activation_checkpointing(model, config.activation_checkpointing)  # refuses models that have none
    if config.lora.enabled:
        with torch.device("meta"):
            model = add_lora(model, config.lora)
        shape = with_adapters(shape, model)
    return shape if optim is None else with_frozen(shape, model, optim)


def with_frozen(shape: ModelShape, model: nn.Module, optim: OptimConfig) -> ModelShape:
    """Freeze what `optim.freeze` names, and indexers, and return the sizes of the model of that `shape` after it.

    Raises:
        UsageError: a name in `optim` means no weight.
    """
    share = apply_to(model, optim)
    return replace(shape, trainable_parameters=share.trained) if optim.freeze or indexers(model) else shape


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
        gathered_together=_most_gathered(model),
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
        score_bytes=probed.score_bytes,
        past_score_bytes=probed.past_score_bytes,
        past_key_bytes=probed.past_key_bytes,
        is_by_segment=attends_to_blocks(model.config),
    )


def _most_gathered(model: Any) -> int:
    """Return the most weights in such modules of a layer: a recompute of the layer gathers them all."""
    of_layer: Counter[str] = Counter()
    for name, module in modules_with_uneven_calls(model).items():
        of_layer[name.rpartition(".")[0]] += sum(weight.numel() for weight in module.parameters())
    return max(of_layer.values(), default=0)


def _on_meta(model: Any) -> Any:
    """Return the model itself if it is on the meta device, otherwise a copy there."""
    if model.device.type == "meta":
        return model
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def with_adapters(shape: ModelShape, peft_model: Any) -> ModelShape:
    """Return the sizes of a model of that `shape` after adapters were added.

    Only the adapters are trained, and what `model.lora.modules_to_save` names.
    """
    trainable, parameters = peft_model.get_nb_trainable_parameters()
    base = peft_model.get_base_model()
    copies = {id(module): sum(p.numel() for p in module.parameters()) for _, module in saved_modules(peft_model)}
    shape = replace(
        shape,
        parameters=parameters,
        trainable_parameters=trainable,
        largest_trained=max(weight.numel() for weight in peft_model.parameters() if weight.requires_grad),
        gathered_together=_most_gathered(peft_model),
        merged_bytes=merged_bytes(peft_model),
        embedding_copy=copies.get(id(trained_copy(base.get_input_embeddings())), 0),
        head_copy=copies.get(id(trained_copy(base.get_output_embeddings())), 0),
    )
    return _with_extra_activations(shape, peft_model)


def _with_extra_activations(shape: ModelShape, peft_model: Any) -> ModelShape:
    """Add what dropout and DoRA keep for backward besides what the layers keep without adapters.

    Dropout keeps its result and its mask. DoRA (peft's `DoraLinearLayer`) scales the outputs of the layer and of the
    adapter, and keeps both. For the lengths of the rows it makes a unit matrix (in, in), whose product with the adapter
    is the latter's whole weight, and two more tensors as large as that.
    """
    kept = products = workspace = 0
    for _, layer, parameter in adapted_layers(peft_model):
        width, out = layer.in_features, layer.out_features
        if parameter is not None or not isinstance(layer.get_base_layer(), nn.Linear):
            continue
        element_bytes = layer.lora_A["default"].weight.element_size()
        if not isinstance(layer.lora_dropout["default"], nn.Identity):
            kept += width * (element_bytes + 1)
        if layer.use_dora["default"]:
            kept += 2 * out * element_bytes
            products += out * element_bytes
            workspace = max(workspace, (width * width + 3 * width * out) * element_bytes)
    if not kept or shape.layer_activation_bytes is None:
        return replace(shape, workspace_bytes=shape.workspace_bytes + workspace)
    return replace(
        shape,
        layer_activation_bytes=shape.layer_activation_bytes + kept / shape.layers,
        largest_layer_activation_bytes=(shape.largest_layer_activation_bytes or 0) + kept / shape.layers,
        layer_product_bytes=(shape.layer_product_bytes or 0) + products / shape.layers,
        workspace_bytes=shape.workspace_bytes + workspace,
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
        elif parameter.ndim == 3 and ".shared_experts." in name:  # inkling stacks them
            total += parameter.numel()
    return int(total)
