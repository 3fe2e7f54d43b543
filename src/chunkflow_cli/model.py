"""Loading a Hugging Face causal LM: weights, adapters, and its shape."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config import ActivationCheckpointing, Init, LoraConfig, ModelConfig
from chunkflow_cli.costs import ModelShape
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hf_config import model_not_found, pretrained_arguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(
    config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str, seed: int
) -> PreTrainedModel:
    """The model in train mode, on the CPU.

    Args:
        config: where it is, and whether its weights are read or drawn.
        hf_config: its configuration.
        dtype: of the weights.
        attention: attention implementation, as transformers names it.
        seed: for random weights.
    """
    from transformers import AutoModelForCausalLM

    _quiet_peft()
    if config.init is Init.random:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=config.trust_remote_code
        )
    else:
        name, extra = pretrained_arguments(config.path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, config=None if extra else hf_config, dtype=dtype, attn_implementation=attention,
                trust_remote_code=config.trust_remote_code, **extra,
            )  # fmt: skip
        except OSError as error:
            raise model_not_found(config, error) from error
    if config.path.endswith(".gguf"):
        # Its weights are dequantised on loading: what is trained and saved from here on is a float model.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.use_cache = False
    model.train()
    return model


def _quiet_peft() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls its old names
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports deepspeed, which prints that it found no GPU


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """The model with low-rank adapters, everything else frozen.

    Raises:
        UsageError: `model.lora.target_modules` names nothing that the model has.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType, get_peft_model

    targets: str | list[str] = list(lora.target_modules)
    if targets == ["all-linear"]:
        targets = "all-linear"
    settings = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type=TaskType.CAUSAL_LM
    )  # type: ignore[arg-type]
    try:
        peft_model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UsageError(f"model.lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}") from error
    peft_model.train()
    return peft_model  # type: ignore[no-any-return]


def enable_activation_checkpointing(model: Any, mode: ActivationCheckpointing) -> None:
    """Recompute layers, or all but their products and attention, in backward; not reentrant, so state passes."""
    if mode is ActivationCheckpointing.none:
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _operations_to_keep())
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise UsageError(f"model.activation_checkpointing={mode.value}: {error}") from error


def _operations_to_keep() -> list[Any]:
    """The costly operations of a layer: their results are small beside the work of getting them again."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._flash_attention_forward.default,
        aten._efficient_attention_forward.default,
    ]


def shape_without_weights(config: ModelConfig, hf_config: PretrainedConfig) -> ModelShape:
    """Sizes of a model that is not loaded."""
    model = _on_meta_device(config, hf_config)
    with torch.device("meta"):
        shape = replace(model_shape(model), layer_activation_bytes=layer_activation_bytes(model))
        if not config.lora.enabled:
            return shape
        return with_adapters(shape, add_lora(model, config.lora))


def skeleton(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """The whole model with its adapters, without numbers: where a process holds a part of it, but must name it all."""
    model = _on_meta_device(config, hf_config)
    if not config.lora.enabled:
        return model
    with torch.device("meta"):
        return add_lora(model, config.lora)


def _on_meta_device(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """The modules of a model on torch's meta device, which holds no numbers."""
    from transformers import AutoModelForCausalLM

    _quiet_peft()
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config),  # a model's attention is set in its configuration: this one's is its own
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )


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
