"""Save adapters as a folder that peft loads, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chunkflow_cli.config.schema import Init, ModelConfig, Quantization
from chunkflow_cli.model.adapter_folder import without_peft_warnings
from chunkflow_cli.model.rope_scaling import loading_arguments


def save_adapters(peft_model: Any, folder: Path, weights: Mapping[str, torch.Tensor], card: str) -> None:
    """Save adapters as a peft folder with `card` as its README.md.

    Args:
        weights: by their names in the model; of a shared one, one name is enough.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    by_every_name = {alias: weights[name] for group in names.values() for name in group if name in weights
                     for alias in group}  # fmt: skip
    with without_peft_warnings():
        # The base's embeddings are as they were. Unless told so, peft asks the hub for their size.
        peft_model.save_pretrained(str(folder), state_dict=by_every_name, save_embedding_layers=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def adapter_card(config: ModelConfig, peft_model: Any) -> str:
    """Return the README.md of saved adapters: what they are, and how to load them."""
    settings = peft_model.peft_config["default"]
    base = settings.base_model_name_or_path or config.path
    is_local = Path(base).is_absolute()
    loader = "AutoPeftModelForCausalLM" if settings.task_type else "AutoPeftModel"
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- chunkflow"]
    lines += [] if is_local else [f"base_model: {base}"]
    note = ""
    arguments = loading_arguments(config, peft_model.get_base_model().config)
    if config.path.endswith(".gguf"):
        arguments["gguf_file"] = Path(config.path).name
    extra = "".join(f", {name}={value!r}" for name, value in arguments.items())
    if config.quantization is not Quantization.none:
        note += (
            f"\nIts base was stored in {config.quantization.value} (bitsandbytes) in training. "
            "`chunkflow export --merge` merges it into these weights.\n"
        )
    if config.rope_scaling:
        note += (
            f"\nIt was trained with the base's rotary embedding scaled, by `{dict(config.rope_scaling)}`, and is of no "
            "use without it. An adapter does not hold this setting"
            + (": load it as below.\n" if extra else ": use `chunkflow export --merge`.\n")
        )
    if config.init is Init.random:
        note += (
            "\nThe base model was initialized at random (`model.init=random`). Only `chunkflow export --merge` makes "
            "the same base again.\n"
        )
    targets = f"- modules: {', '.join(sorted(settings.target_modules or ())) or 'none'}\n"
    if settings.target_parameters:
        targets += f"- parameters: {', '.join(sorted(settings.target_parameters))}\n"
    if settings.modules_to_save:
        targets += f"- trained whole: {', '.join(sorted(settings.modules_to_save))}\n"
    return "\n".join(lines) + (
        f"\n---\n\n# LoRA adapter\n\nAn adapter for `{base}`, trained with chunkflow: rank {settings.r}, alpha "
        f"{settings.lora_alpha:g}.\n\n{targets}{note}\n"
        f"```python\nfrom peft import {loader}\n\n"
        f'model = {loader}.from_pretrained("FOLDER"{extra})\n```\n\n'
        "`FOLDER` is the folder of this file. `chunkflow export RUN --merge` makes a whole model of it.\n"
    )
