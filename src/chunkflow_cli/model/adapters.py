"""Low-rank adapters (LoRA), by peft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from chunkflow_cli.config.schema import LoraConfig
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Return the peft model in train mode: `model` with adapters, everything else frozen.

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
