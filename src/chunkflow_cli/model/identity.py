"""Identify the files of a model, so that a run never resumes with another model or merges adapters into it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from chunkflow_cli.config.schema import Init, ModelConfig
from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG

BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""Of each file, so many blocks of this size are hashed: weights that were trained on differ in almost every block, and
gigabytes need not be read."""
WEIGHTS = (".safetensors", ".bin", ".gguf")


def model_files(config: ModelConfig) -> dict[str, str]:
    """Return size and hash of each file that the model is made from: its config.json, and its weights unless drawn.

    Of a model of the Hugging Face hub, these are the files in the local cache; without them, the result is empty.
    """
    folder = local_folder(config.path)
    if folder is None:
        return {}
    if folder.is_file():
        return {folder.name: _sampled(folder)}
    suffixes = () if config.init is Init.random else WEIGHTS
    files = (path for path in folder.iterdir() if path.name == "config.json" or path.suffix in suffixes)
    return {path.name: _sampled(path) for path in sorted(files) if path.is_file()}


def adapter_files(config: ModelConfig) -> dict[str, str]:
    """Return size and hash of each file of the adapter that training goes on from; empty without `model.lora.path`."""
    if config.lora.path is None:
        return {}
    folder = Path(config.lora.path)
    files = (folder / name for name in (ADAPTER_CONFIG, "adapter_model.safetensors"))
    return {path.name: _sampled(path) for path in files if path.is_file()}


def changed_files(was: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a line for each file that differs, with its size and hash before and after."""
    names = sorted(was.keys() | now.keys())
    values = ((name, was.get(name, "not there"), now.get(name, "not there")) for name in names)
    return [f"{name} was {before} and is {after}" for name, before, after in values if before != after]


def local_folder(path: str) -> Path | None:
    """Return the folder (or GGUF file) of a model on this machine; of the hub's, that in the local cache, or None."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as stream:
        for block in range(BLOCKS):
            stream.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return f"{size:,} bytes ({digest.hexdigest()[:8]})"
