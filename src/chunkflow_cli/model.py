"""Loading a Hugging Face causal LM: configuration, weights, adapters, and its shape."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config import ActivationCheckpointing, Init, LoraConfig, ModelConfig
from chunkflow_cli.costs import ModelShape
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def pretrained_arguments(path: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` wants for a model id, a folder or a GGUF file."""
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise UsageError(f"model.path={path}: there is no such file")
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return path, {}


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The Hugging Face configuration.

    Raises:
        UsageError: the model is not to be found, or uses what chunked training cannot do exactly.
    """
    from transformers import AutoConfig

    _quiet_libraries()
    if not Path(config.path).exists():
        go_offline_if_unreachable()
    name, extra = pretrained_arguments(config.path)
    try:
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(config, error) from error
    text = hf_config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise UsageError(
            "the model's configuration has output_router_logits=true: the auxiliary loss of a router is not supported\n"
            "  set it to false in the model's config.json to train without that loss"
        )
    refuse_length_dependent_rope(text)
    return hf_config


def _quiet_libraries() -> None:
    """Silence advice about calls that the user did not make; errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls its old names
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports deepspeed, which prints that it found no GPU


def refuse_length_dependent_rope(hf_config: Any) -> None:
    """Rotary embeddings that change with the longest position of a forward would differ from chunk to chunk.

    Raises:
        UsageError: names the kind.
    """
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    for kind in sorted({str(part.get("rope_type")) for part in parts} & {"dynamic", "longrope"}):
        raise UsageError(
            f"the model's rotary embedding is of the kind {kind!r}, which depends on the longest position seen\n"
            "  chunks of one sequence would disagree: use a fixed kind (default, linear, yarn, llama3) in config.json"
        )


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
            raise _not_found(config, error) from error
    if config.path.endswith(".gguf"):
        # Its weights are dequantised on loading: what is trained and saved from here on is a float model.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.use_cache = False
    model.train()
    return model


def _not_found(config: ModelConfig, error: Exception) -> UsageError:
    looks_local = Path(config.path).exists() or config.path.startswith((".", "/", "~"))
    if looks_local:
        what = "weights (*.safetensors)" if Path(config.path, "config.json").is_file() else "config.json"
        if not Path(config.path).exists():
            return UsageError(f"model.path={config.path}: there is no such folder or file")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "\n  to train it from random weights: model.init=random" if what.startswith("weights") else ""
        return UsageError(f"model.path={config.path}: no usable {what} there\n  {reason}{remedy}")
    return UsageError(
        f"model.path={config.path}: neither a local folder nor in the local cache, and the Hugging Face hub "
        f"{'cannot be reached' if go_offline_if_unreachable() else 'did not give it'}\n"
        "  with network: check the name, and `hf auth login` for a gated model\n"
        "  without: copy the model's folder here and give model.path=FOLDER"
    )


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


def position_limit(hf_config: Any) -> int | None:
    """The longest sequence that the model was made for; None if its configuration does not say."""
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def model_shape(model: Any) -> ModelShape:
    """Sizes of a loaded model, read from its configuration and its linear layers."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        attention_heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        vocab_size=int(config.vocab_size),
        matmul_parameters=_active_matmul_parameters(model, config),
    )


def _active_matmul_parameters(model: Any, config: Any) -> int:
    """Weights that each token is multiplied with; of stacked experts (experts, out, in), the share that it visits."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    total = 0 if head is None else head.weight.numel()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    for name, parameter in model.named_parameters():
        if parameter is embedding or (head is not None and parameter is head.weight) or "lora_" in name:
            continue
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim == 3 and experts and active and parameter.shape[0] == experts:
            total += parameter.numel() * int(active) // int(experts)
    return int(total)
