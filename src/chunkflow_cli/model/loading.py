"""Loading a Hugging Face causal LM: weights, adapters, and its shape."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkflow_cli.config.schema import ActivationCheckpointing, Init, LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import model_not_found, pretrained_arguments

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


def skeleton(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """The whole model with its adapters, without numbers: where a process holds a part of it, but must name it all."""
    model = on_meta_device(config, hf_config)
    if not config.lora.enabled:
        return model
    with torch.device("meta"):
        return add_lora(model, config.lora)


def on_meta_device(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
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
