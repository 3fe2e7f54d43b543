"""The files of a model's folder: find what is broken or missing in them before anything reads them.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.files import change_of, describe_file, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (SINGLE, INDEX, PICKLED, PICKLED_INDEX)
"""Names of files that hold or list the weights, in the order in which transformers looks for them."""
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
"""JSON files that are read with a model."""
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.jinja")
"""Patterns of the files of a tokenizer."""
CHECKSUMS = "checksums.json"
"""What chunkflow writes next to a model: size and checksum of each file whose damage nothing else would show."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of the text that git-lfs writes in place of a large file that was not fetched."""
LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors library reads."""
AGAIN = "the download was interrupted, or the file is damaged: download it again"
REPAIR = "repair it, or download it again"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of numbers, as safetensors names them, that are the weights themselves. Others need scales."""
QUANTISATIONS = ("quantization_config", "compression_config")
"""Keys of config.json that describe quantized weights."""
SHOWN = 3
"""Maximum number of names that a message lists."""


def listed(names: Iterable[str]) -> str:
    """Return names for a message: `a, b, c and 4 more`."""
    names = sorted(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_settings(path: Path, named: str) -> None:
    """Check that `path` is the folder of a model whose JSON files can be read, or a GGUF file.

    Args:
        named: the key and its value, for messages.

    Raises:
        UsageError: it is a file, another kind of folder, or one of its JSON files is broken.
    """
    if path.suffix == ".gguf":
        _refuse_pointers([path], named)
        if _beginning(path, named, 4) != b"GGUF":
            raise UsageError(f"{named} is not a GGUF file\n  {AGAIN}")
        return
    if not path.is_dir():
        raise UsageError(
            f"{named} is a file, and not the folder of a model or a GGUF file\n"
            f"  name the folder that holds config.json and the weights: model.path={path.parent}"
        )
    _refuse_pointers([file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()], named)
    for name in SETTINGS:
        if (path / name).exists():
            _read_json(path / name, named)
    if not (path / "config.json").exists():
        _explain_missing_config(path, named)


def check_weights(path: Path, named: str) -> None:
    """Check that the files of the weights are all there, complete and in floating point, by their sizes and headers.

    Raises:
        UsageError: names the file and what to do.
    """
    if path.is_file():
        return
    files = weight_files(path, named)
    _refuse_pointers(files, named)
    is_quantised = any(name in (path / "config.json").read_text(encoding="utf-8") for name in QUANTISATIONS)
    for file in files:
        if file.suffix == ".safetensors":
            coded = {name: tensor.get("dtype") for name, tensor in tensors_of(file, named).items()}
            coded = {name: kind for name, kind in coded.items() if name.endswith("weight") and kind not in FLOATS}
            if coded and not is_quantised:
                raise UsageError(
                    f"{named}: {file.name} holds weights in {', '.join(sorted(set(coded.values())))}: {listed(coded)}\n"
                    "  config.json does not say what the numbers mean (quantization_config): take the model that they "
                    "were made from"
                )


def weight_files(path: Path, named: str) -> list[Path]:
    """Return the files that hold the weights of a model's folder.

    Raises:
        UsageError: there are none, or some of them are missing.
    """
    named_in_config = _read_json(path / "config.json", named).get("transformers_weights")
    names = WEIGHTS if named_in_config is None else (str(named_in_config),)
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"name the GGUF file: model.path={ggufs[0]}" if ggufs else "download them, or set model.init=random"
        raise UsageError(f"{named} has no weights: neither {SINGLE} nor {INDEX} nor a {PICKLED}\n  {hint}")
    return _shards(found, named) if found.name in (INDEX, PICKLED_INDEX) else [found]


def tensors_of(file: Path, named: str) -> dict[str, Any]:
    """Return the header of a safetensors file: the name of each tensor -> its dtype, shape and data_offsets.

    The format is 8 bytes with the length of the header, the header in JSON, and the numbers, without gaps
    (https://github.com/huggingface/safetensors#format).

    Raises:
        UsageError: the file is not in this format, or its size is another one than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = data.read(length) if length <= LONGEST_HEADER else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        tensors.pop("__metadata__", None)
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{named}: {file.name} is not a complete safetensors file\n  {AGAIN}") from error
    if size != expected:
        raise UsageError(f"{named}: {file.name} has {size:,} bytes, and its header announces {expected:,}\n  {AGAIN}")
    return tensors


def write_checksums(folder: Path) -> None:
    """Write down sizes and checksums of the weights and the tokenizer in the folder of a saved model or adapter."""
    files = (
        file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name == "tokenizer.json"
    )
    write_json(folder / CHECKSUMS, {file.name: describe_file(file) for file in files})


def check_checksums(folder: Path, named: str) -> None:
    """Compare the files of a model or adapter with what was written, where chunkflow has written it.

    Reads all of the weights. A flipped bit in them would show nowhere else.

    Raises:
        UsageError: names the file that differs.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    for name, written in _read_json(folder / CHECKSUMS, named).items():
        try:
            change = change_of(folder / name, written) if (folder / name).exists() else None
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{named}: {name} cannot be compared with {CHECKSUMS}: {error}\n  {REPAIR}") from error
        if change is not None:
            raise UsageError(
                f"{named}: {name} is damaged: {change}\n"
                f"  take it from a copy; if you have changed it yourself, delete {folder / CHECKSUMS}"
            )


def damage_of(saved: Path) -> str | None:
    """Return what is missing or damaged in the folder of a saved model or adapter; None if nothing is."""
    adapter, tokenizer, named = saved / "adapter_model.safetensors", saved / "tokenizer.json", str(saved)
    try:
        check_settings(saved, named)
        if (saved / "adapter_config.json").exists():
            tensors_of(adapter, named)
        else:
            check_weights(saved, named)
        if tokenizer.exists():
            _read_json(tokenizer, named)
        check_checksums(saved, named)
    except FileNotFoundError:
        return f"{adapter} is missing"
    except UsageError as error:
        return first_line(error)
    return None


def _shards(index: Path, named: str) -> list[Path]:
    """Return the files that an index names."""
    content = _read_json(index, named)
    mapped = content.get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
        raise UsageError(f"{named}: {index.name} has no weight_map\n  download it again")
    shards = [index.parent / name for name in sorted(set(mapped.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UsageError(
            f"{named}: {len(missing)} of the {len(shards)} files that {index.name} names are missing: "
            f"{listed(missing)}\n  download the model again; an interrupted download continues where it stopped"
        )
    return shards


def _refuse_pointers(files: Sequence[Path], named: str) -> None:
    pointers = [file.name for file in files if _beginning(file, named, len(LFS_POINTER)) == LFS_POINTER]
    if pointers:
        raise UsageError(
            f"{named}: git-lfs pointers are in the place of {listed(pointers)}\n"
            f"  fetch the files themselves: `git lfs pull` in that folder, or `hf download`"
        )


def _beginning(file: Path, named: str, count: int) -> bytes:
    try:
        with file.open("rb") as data:
            return data.read(count)
    except OSError as error:
        raise UsageError(f"{named}: {file.name} cannot be read: {error.strerror}\n  {REPAIR}") from error


def _read_json(file: Path, named: str) -> dict[str, Any]:
    _refuse_pointers([file], named)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{named}: {file.name} cannot be read as JSON: {reason}\n  {REPAIR}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{named}: {file.name} is not a JSON object\n  {REPAIR}")
    return content


def _explain_missing_config(path: Path, named: str) -> None:
    """Raise an error if a folder without config.json is one of a few that people give in a model's place."""
    if (path / "adapter_config.json").exists():
        return
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise UsageError(f"{named} has no config.json\n  name the GGUF file: model.path={ggufs[0]}")
    inside = _models_inside(path)
    if inside:
        others = "" if len(inside) == 1 else f" (or {listed(str(folder) for folder in inside[1:])})"
        raise UsageError(f"{named} has no config.json\n  did you mean model.path={inside[0]}{others}?")
    if (path / ".hydra" / "config.yaml").exists():
        raise UsageError(
            f"{named} is the folder of a run that has not finished: it has no final/\n"
            f"  finish the run first: repeat its command, with train.output_dir={path}"
        )


def _models_inside(path: Path) -> list[Path]:
    """Return the folders of models in a folder: `final` of a run, a trainer's checkpoints, a snapshot of the hub."""
    names = ("config.json", "adapter_config.json")
    found = {
        file.parent for pattern in ("*", "snapshots/*") for name in names for file in path.glob(f"{pattern}/{name}")
    }
    return sorted(found, key=lambda folder: (folder.name != "final", folder))
