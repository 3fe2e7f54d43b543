"""Making a Hugging Face causal LM: with its weights, or without numbers on torch's meta device."""

from __future__ import annotations

import copy
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch

from chunkflow_cli.config.schema import Init, ModelConfig
from chunkflow_cli.model.adapters import AdapterSummary, add_lora, summarize
from chunkflow_cli.model.hf_config import model_not_found, pretrained_arguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(
    config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str, seed: int
) -> PreTrainedModel:
    """Return the model in train mode, on the CPU, without adapters.

    `attention` is the name of an implementation in transformers. With model.init=random, `seed` decides the weights.

    Raises:
        UsageError: the weights cannot be found.
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
        # Loading has dequantized the weights: from here on, a float model is trained and saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.use_cache = False
    model.train()
    return model


def on_meta_device(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """Return the model without adapters on torch's meta device: every module and shape, but no numbers."""
    from transformers import AutoModelForCausalLM

    _quiet_peft()
    own_config = copy.deepcopy(hf_config)  # setting a model's attention changes its configuration
    dtype, trusts = getattr(torch, config.dtype.value), config.trust_remote_code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own_config, dtype=dtype, trust_remote_code=trusts)


def check_adapters(config: ModelConfig, hf_config: PretrainedConfig) -> AdapterSummary:
    """Return what the configured adapters train, read off the whole model without its weights.

    Raises:
        UsageError: as `add_lora`.
    """
    return summarize(skeleton(config, hf_config))


def skeleton(config: ModelConfig, hf_config: PretrainedConfig) -> Any:
    """Return the model with its adapters, if any, on the meta device.

    A process that holds one stage of the model needs it to save the whole one.
    """
    model = on_meta_device(config, hf_config)
    if not config.lora.enabled:
        return model
    with torch.device("meta"):
        return add_lora(model, config.lora)


def _quiet_peft() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft uses its old names
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports deepspeed, which prints that it found no GPU
