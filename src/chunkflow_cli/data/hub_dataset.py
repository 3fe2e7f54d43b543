"""Load a data set from the Hugging Face hub, or from its local cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chunkflow_cli.data.choosing import Wish
from chunkflow_cli.data.names import kind_of_name
from chunkflow_cli.data.splits import HELD_OUT, canonical
from chunkflow_cli.data.tokenizer import let_torch_in
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.hub import go_offline_if_unreachable


def is_hub_id(path: str) -> bool:
    """Return whether a path that does not exist here can be a data set on the hub."""
    if kind_of_name(Path(path)) is not None:
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None


def load_from_hub(path: str, wish: Wish) -> tuple[str, Any]:
    """Return the name of a split, for messages, and the split: a `datasets.Dataset`.

    Raises:
        UsageError: the data set cannot be loaded, or has no such split or subset; the message lists those it has.
    """
    let_torch_in()
    go_offline_if_unreachable()  # before the import of datasets, which reads this setting only once
    import datasets

    try:
        splits = datasets.load_dataset(path, wish.subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # unreachable, unknown, gated, made by a program, damaged, or a subset has to be named
        subsets = _subsets_in(str(error))
        if subsets:
            raise wish.no_subset(subsets) from error
        reason = first_line(error)
        raise UsageError(
            f"{wish.named} is not a local file or folder, and could not be loaded from the Hugging Face hub\n"
            f"  {reason}\n"
            "  check the spelling and the network, or download the files and set the key to their folder"
        ) from error
    known = [str(name) for name in splits]
    parts = [*HELD_OUT] if wish.split is None else [wish.split, canonical(wish.split)]
    name = next((part for part in parts if part in known), None)
    if name is not None:
        chosen = splits[name]
    elif wish.split is not None and re.search(r"[+\[]|^all$", wish.split):
        name = wish.split  # the syntax of datasets for parts and sums of splits
        try:
            chosen = datasets.load_dataset(path, wish.subset, split=name)
        except ValueError as error:
            raise wish.no_split(known) from error
    else:
        raise wish.no_split(known)
    if len(chosen) == 0:
        raise UsageError(f"{wish.named}: its split {name} has no rows")
    described = name if wish.subset is None else f"{wish.subset}, {name}"
    return f"{path} ({described})", chosen


def _subsets_in(message: str) -> list[str]:
    """Return the subsets that an error of `datasets` lists, if it says that one must be named."""
    listed = re.search(r"(?:available configs|Available): \[(.*?)\]", message, re.DOTALL)
    return re.findall(r"'([^']*)'", listed[1]) if listed else []
