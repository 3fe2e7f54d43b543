"""Find the untrained parts of a multimodal model in its files, and copy them into a saved model.

The copies are bit for bit, and have the names that the files have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.model.folder import INDEX, tensors_of, weight_files

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Settings with which images, videos and sound are prepared for the towers."""
OLD_TEMPLATE, TEMPLATE = "chat_template.json", "chat_template.jinja"
"""A processor's chat template in old and in new folders; transformers refuses a folder that has both."""


@dataclass(frozen=True)
class Original:
    """The folder of a multimodal model, and which of its tensors are not in the part that is trained."""

    folder: Path
    tensors: Mapping[str, tuple[str, ...]]
    """File name -> names of its tensors to copy."""


def copyable_files(folder: Path, named: str) -> list[Path]:
    """Return the files of a multimodal model's weights.

    Raises:
        UsageError: they are no safetensors files.
    """
    files = weight_files(folder, named)
    for file in files:
        if file.suffix != ".safetensors":
            raise UsageError(
                f"{named}: {file.name} is not a safetensors file, so the untrained parts of the model cannot be "
                "copied from it\n  load the model with transformers, and save it again with save_pretrained"
            )
    return files


def find_original(model: Any, folder: Path, named: str) -> Original:
    """Return which tensors of a folder were not loaded into `model`, the language part with its weights.

    Args:
        named: the key and its value, for messages.

    Raises:
        UsageError: as `copyable_files`.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    loaded = model.state_dict()

    def is_loaded(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, loaded)
        return renamed in loaded or name in loaded

    tensors = {}
    for file in copyable_files(folder, named):
        if others := tuple(name for name in tensors_of(file, named) if not is_loaded(name)):
            tensors[file.name] = others
    return Original(folder, tensors)


def copy_tensors(original: Original, folder: Path) -> None:
    """Add the tensors that were not trained to the weights saved in `folder`.

    Raises:
        RunError: a saved tensor has the name of one of them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not original.tensors:
        return
    files = weight_files(folder, str(folder))
    for number, (name, tensors) in enumerate(sorted(original.tensors.items())):
        files.append(folder / f"copied-{number}.safetensors")
        with safe_open(original.folder / name, framework="pt") as source:
            save_file({tensor: source.get_tensor(tensor) for tensor in tensors}, files[-1], {"format": "pt"})
    places: dict[str, str] = {}
    total_bytes = 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for tensor, entry in tensors_of(file, str(folder)).items():
            if tensor in places:
                raise RunError(f"{tensor} is among the trained weights and among those to copy from {original.folder}")
            places[tensor] = name
            total_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
        file.rename(folder / name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_processor(original: Original, folder: Path) -> None:
    """Copy the settings of the processor into a saved model."""
    for name in (*PROCESSOR_FILES, OLD_TEMPLATE):
        if (original.folder / name).is_file():
            shutil.copyfile(original.folder / name, folder / name)


def drop_old_template(folder: Path) -> None:
    """Delete a copied chat template of the old kind from a folder that has one of the new kind, its tokenizer's."""
    if (folder / TEMPLATE).exists():
        (folder / OLD_TEMPLATE).unlink(missing_ok=True)
