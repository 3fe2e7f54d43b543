"""Subsets of a data set's repository, as the head of its README lists them for the Hugging Face hub.

---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
---
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from chunkflow_cli.data.names import kind_of_name, printable
from chunkflow_cli.data.splits import TRAIN
from chunkflow_cli.errors import UsageError

HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Subsets:
    """The data files of each split of each subset, by their names."""

    files: dict[str, dict[str, list[Path]]]
    default: str | None = None
    """The subset to take where none is named: the only one, or the one that the list marks or calls `default`."""


def read_subsets(folder: Path) -> Subsets:
    """Return the subsets that a folder's README lists, without those of which no file is here.

    Raises:
        UsageError: the list cannot be understood.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return Subsets({})
    with readme.open("rb") as stream:
        head = re.match(rb"---\s*\n(.*?)\n---\s*(\n|$)", stream.read(HEAD_BYTES), re.DOTALL)
    if head is None or b"configs:" not in head[1]:
        return Subsets({})
    import yaml

    try:
        listed = yaml.safe_load(head[1].decode())
        configs = (listed.get("configs") or []) if isinstance(listed, dict) else []
        subsets, default = {}, "default"
        for config in configs:
            name = str(config.get("config_name", "default"))
            subsets[name] = _files_by_split(folder / config.get("data_dir", ""), config.get("data_files") or [])
            default = name if config.get("default") else default
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{printable(readme)}: its list of subsets (configs) cannot be read: {type(error).__name__}\n"
            "  correct it, or set data.path to a glob"
        ) from error
    found = {name: splits for name, splits in subsets.items() if splits}
    return Subsets(found, default if default in found else next(iter(found)) if len(found) == 1 else None)


def _files_by_split(folder: Path, data_files: Any) -> dict[str, list[Path]]:
    """Return the files of each split from a pattern, a list of them, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        split, patterns = (str(entry["split"]), entry["path"]) if isinstance(entry, dict) else (TRAIN, entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            matches = sorted(glob(str(pattern), root_dir=folder, recursive=True))
            files = [folder / match for match in matches if kind_of_name(Path(match)) is not None]
            if files and ".." not in Path(pattern).parts:
                splits.setdefault(split, []).extend(files)
    return splits
