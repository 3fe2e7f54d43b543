"""The sizes of a model that time and memory follow from, read off its configuration and its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.language_part import decoder_of
from chunkflow_cli.model.loading import on_meta_device
from chunkflow_cli.planning.costs import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_without_weights(config: ModelConfig, hf_config: PretrainedConfig) -> ModelShape:
    """Return the sizes of a model that is not loaded, adapters included if they are configured."""
    model = on_meta_device(config, hf_config)
    with torch.device("meta"):
        shape = replace(model_shape(model), layer_activation_bytes=layer_activation_bytes(model))
        if not config.lora.enabled:
            return shape
        return with_adapters(shape, add_lora(model, config.lora))


PROBE_TOKENS = 128
"""Length of the forward that counts activations. Except for a few small tables, bytes per token do not depend on it."""
PROBE_ATTENTION = "chunkflow_shape"
"""Name under which transformers knows `_shape_attention`."""


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count what autograd saves within the block: each storage once -> its bytes, without the weights of the model.

    Keep the block's results alive until you have read the counts, so that no two storages share an address.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def layer_activation_bytes(model: Any) -> float | None:
    """Return the bytes per token that a layer keeps for backward, counted in a forward of a model on the meta device.

    Attention keeps what a fused kernel keeps: queries, keys, values, output, and a float32 log-sum-exp per head and
    token.

    Returns:
        The mean over the layers, in the model's dtype. None if a forward needs numbers, as experts that are chosen by
        them do; `planning.memory_parts` then takes a formula.
    """
    from transformers import AttentionInterface

    # It has no mask function, so transformers makes no mask, for which it would look at the numbers of positions.
    AttentionInterface.register(PROBE_ATTENTION, _shape_attention)
    model.set_attn_implementation(PROBE_ATTENTION)
    model.train()
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(PROBE_TOKENS, device="meta")[None]
    try:
        with kept_for_backward(model) as kept:
            hidden = decoder_of(model)(input_ids=ids, position_ids=positions, use_cache=False)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    total = sum(kept.values())
    del hidden
    return total / PROBE_TOKENS / int(model.config.get_text_config().num_hidden_layers)


class _FusedAttention(torch.autograd.Function):
    """A fused attention kernel without numbers: it reads, writes and keeps tensors of the right shapes."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise AssertionError("a model on the meta device has no gradient")


def _shape_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2), None  # (batch, tokens, heads, head_dim), as transformers wants it


def model_shape(model: Any) -> ModelShape:
    """Return the sizes of a Hugging Face causal LM without adapters, on any device, the meta device included.

    `layer_activation_bytes` is left out.
    """
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters = int(model.num_parameters())
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
    """Return the keys that a query of a windowed layer attends to, or None, and the number of such layers."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None, 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return int(window), int(config.num_hidden_layers)
    return int(window), sum(kind == "sliding_attention" for kind in kinds)


def with_adapters(shape: ModelShape, peft_model: Any) -> ModelShape:
    """Return the sizes of a model of that `shape` after adapters were added: only the adapters are trained."""
    trainable, parameters = peft_model.get_nb_trainable_parameters()
    return replace(shape, parameters=parameters, trainable_parameters=trainable)


def _active_intermediate_size(config: Any) -> int:
    """Return the width of the feed-forward layer; of experts, of all that one token visits, together.

    Configurations name an expert's width `moe_intermediate_size` or `intermediate_size`.
    """
    active = getattr(config, "num_experts_per_tok", None)
    expert = getattr(config, "moe_intermediate_size", None)
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
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
