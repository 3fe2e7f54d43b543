"""The sizes of a model that costs and memory follow, read off its modules without its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.model.loading import add_lora, on_meta_device
from chunkflow_cli.planning.costs import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_without_weights(config: ModelConfig, hf_config: PretrainedConfig) -> ModelShape:
    """Sizes of a model that is not loaded."""
    model = on_meta_device(config, hf_config)
    with torch.device("meta"):
        shape = replace(model_shape(model), layer_activation_bytes=layer_activation_bytes(model))
        if not config.lora.enabled:
            return shape
        return with_adapters(shape, add_lora(model, config.lora))


PROBE_TOKENS = 128
"""Of the forward that counts activations; a count a token does not depend on it but for a few small tables."""
PROBE_ATTENTION = "chunkflow_shape"


def layer_activation_bytes(model: Any) -> float | None:
    """Bytes that a layer keeps for backward, for each token: counted in a forward of a model on the meta device.

    Each storage that autograd saves counts once, weights do not. Attention is taken to keep what a fused kernel keeps:
    queries, keys, values, output, and a float32 log-sum-exp for each head and token. None where a forward needs numbers
    (experts are chosen by them): then only a formula is left.
    """
    from transformers import AttentionInterface

    # No mask function goes with it, so transformers makes no mask, for which it would look at positions.
    AttentionInterface.register(PROBE_ATTENTION, _shape_attention)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    model.set_attn_implementation(PROBE_ATTENTION)
    model.train()
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(PROBE_TOKENS, device="meta")[None]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    total = sum(kept.values())
    del hidden  # kept alive until here, so that no storage is counted for two
    return total / PROBE_TOKENS / int(model.config.get_text_config().num_hidden_layers)


class _FusedAttention(torch.autograd.Function):
    """The shapes that a fused attention kernel reads, writes and keeps; no numbers."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise AssertionError("a model without numbers has no gradient")


def _shape_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2), None  # (batch, tokens, heads, head_dim), as transformers wants it


def model_shape(model: Any) -> ModelShape:
    """Sizes of a model without adapters, read from its configuration and its linear layers."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters = sum(parameter.numel() for parameter in model.parameters())
    window, windowed = _windows(config)
    head = model.get_output_embeddings()
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=_active_intermediate_size(config),
        attention_heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        vocab_size=int(config.vocab_size),
        matmul_parameters=_active_matmul_parameters(model, config),
        parameters=parameters,
        trainable_parameters=parameters,
        window=window,
        windowed_layers=windowed,
        is_head_tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )


def _windows(config: Any) -> tuple[int | None, int]:
    """Keys that a windowed layer sees, and how many layers have that window."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None, 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return int(window), int(config.num_hidden_layers)
    return int(window), sum(kind == "sliding_attention" for kind in kinds)


def with_adapters(shape: ModelShape, peft_model: nn.Module) -> ModelShape:
    """The same model with its adapters: only they are trained."""
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in peft_model.parameters()]
    return replace(
        shape,
        parameters=sum(count for count, _ in parameters),
        trainable_parameters=sum(count for count, is_trained in parameters if is_trained),
    )


def _active_intermediate_size(config: Any) -> int:
    """Of experts: the width of those that a token visits, together; transformers names it in two ways."""
    active = getattr(config, "num_experts_per_tok", None)
    expert = getattr(config, "moe_intermediate_size", None)
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if active is None:
        return int(dense)
    return int(active) * int(expert or dense) + int(getattr(config, "shared_expert_intermediate_size", None) or 0)


def _active_matmul_parameters(model: Any, config: Any) -> int:
    """Weights that each token is multiplied with; of stacked experts (experts, out, in), the share that it visits."""
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
