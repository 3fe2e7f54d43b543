"""Say what the adapters of a run train, at which rate, and on which base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkflow_cli.config.schema import LORA_LEARNING_RATE, Config, Offload, OptimizerName, Quantization
from chunkflow_cli.console import human_bytes
from chunkflow_cli.model.adapter_folder import read_adapter_config
from chunkflow_cli.model.loading import check_adapters, on_meta_device
from chunkflow_cli.model.quantised import quantised_layers, stored_bytes

SMALL = LORA_LEARNING_RATE / 4
"""Learning rates of AdamW below this one are named as small for adapters."""


def describe_adapters(config: Config, hf_config: Any) -> list[str]:
    """Check the adapters, and return what to say of them at the start of a run, a line each.

    Raises:
        UsageError: as `check_adapters`.
    """
    summary = check_adapters(config.model, hf_config)
    rate, is_adamw = config.optim.lr, config.optim.name is OptimizerName.adamw
    usual = ", the default for LoRA" if is_adamw and rate == LORA_LEARNING_RATE else ""
    lines = [f"{summary}; learning rate {rate:g}{usual}"]
    if config.model.quantization is not Quantization.none:
        lines.append(_describe_quantisation(config, hf_config))
    if config.model.lora.path is not None:
        lines.append(f"Training continues from the adapter in {config.model.lora.path}")
    warnings = [summary.warning, _other_base(config)]
    if is_adamw and rate < SMALL:
        warnings.append(f"optim.lr={rate:g} suits a full fine-tune: adapters usually need about {LORA_LEARNING_RATE:g}")
    if config.engine.offload is Offload.optimizer:
        warnings.append("engine.offload=optimizer suits a full fine-tune: the optimizer state of adapters is small")
    return lines + [f"warning: {warning}" for warning in warnings if warning is not None]


def _describe_quantisation(config: Config, hf_config: Any) -> str:
    """Return a line that says which part of the base is quantized, and how many bytes that saves."""
    kind, model = config.model.quantization, on_meta_device(config.model, hf_config)
    layers = quantised_layers(model)
    whole, stored = (
        sum(p.nbytes for p in model.parameters()),
        sum(stored_bytes(kind, layer) for layer in layers.values()),
    )
    kept = whole - sum(layer.weight.nbytes for layer in layers.values())
    share = sum(layer.weight.numel() for layer in layers.values()) / sum(p.numel() for p in model.parameters())
    return (
        f"{100 * share:.0f} % of the base's weights are stored in {kind.value}, the others in "
        f"{config.model.dtype.value}: {human_bytes(stored + kept)} instead of {human_bytes(whole)}"
    )


def _other_base(config: Config) -> str | None:
    """Return a warning if the adapter that training goes on from names another base."""
    saved = config.model.lora.path
    if saved is None:
        return None
    base = read_adapter_config(Path(saved)).get("base_model_name_or_path")
    own = config.model.path
    folder = str(Path(own).resolve().parent if own.endswith(".gguf") else Path(own).resolve())
    if base is None or base in (own, folder):
        return None
    return f"the adapter in {saved} was trained on {base}, and model.path is {own}"
