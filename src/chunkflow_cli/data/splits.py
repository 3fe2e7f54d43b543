"""Find splits by name: which files of a folder are for training, validation and tests.

The words are those of the `datasets` library (`datasets.data_files`): a word counts where it stands alone in the name
of a folder or a file, that is, between the name's ends, digits and `-._ `. So `train.jsonl`, `my-train.jsonl`,
`train-00000-of-00002.parquet` and `train/a.jsonl` belong to `train`, and `training_notes.jsonl` and `latest.jsonl` to
no split. Upper and lower case are the same.

Three rules differ from that library, so that no file disappears and none is trained on that is for tests. Files whose
names have no split are not left out where no file is named after `train`: they are the training data. The rules hold
for each file: one folder named after a split does not take away the splits of files next to it. And `trainset` and
`testset` are `train` and `test`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

Thing = TypeVar("Thing")

TRAIN = "train"
HELD_OUT = ("validation", "test")
"""Splits to evaluate on; the first that exists is used."""
ALL = "all"
"""The name of all splits together, as in `datasets`."""
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_SPLIT_OF_WORD)})(?:set)?(?=[-._ 0-9]|$)", re.IGNORECASE)
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5,}\..*", re.DOTALL)
"""Files as `datasets` writes them to the hub. In a folder `data`, what comes first is the split's name."""


def canonical(split: str) -> str:
    """Return the name of a split: `valid`, `dev` and `val` are `validation`."""
    return _SPLIT_OF_WORD.get(split.lower(), split)


def split_in(name: str) -> str | None:
    """Return the split that the name of a file or folder contains.

    A name that contains several is not training data: leaving out too much, with a warning, is better than training on
    tests.
    """
    found = {_SPLIT_OF_WORD[word.lower()] for word in _WORD.findall(name)}
    return next((split for split in ("test", "validation", "train") if split in found), None)


def split_of(file: PurePath, folder_name: str = "") -> str | None:
    """Return the split of a file, or None if its name has none.

    Args:
        file: path below the folder that the user named.
        folder_name: name of that folder.
    """
    shard = _SHARD.fullmatch(file.name)
    parent = file.parent.name or folder_name
    if shard and parent == "data" and split_in(file.name):
        return canonical(shard.group(1))
    for part in reversed(file.parent.parts):
        if split := split_in(part):
            return split
    return split_in(file.name)


def by_split(splits: Mapping[Thing, str | None]) -> dict[str, list[Thing]]:
    """Return the files of each split, in their order; those without one are `train` if no other file is.

    If there is a `train`, files without a split are listed under the empty name. Without any split all are `train`.
    """
    rest = "" if TRAIN in splits.values() else TRAIN
    found: dict[str, list[Thing]] = {}
    for thing, split in splits.items():
        found.setdefault(rest if split is None else split, []).append(thing)
    return found


def wanted_splits(split: str | None, known: Sequence[str]) -> list[str] | None:
    """Return the known splits that a value of `data.split` means, or None if one of them is not known.

    Args:
        split: a name, several joined by `+`, or `all`; None asks for data to evaluate on.
    """
    if split is None:
        return next(([name] for name in HELD_OUT if name in known), None)
    if split == ALL:
        return list(known)
    names = [name if name in known else canonical(name) for name in split.split("+")]
    return names if all(name in known for name in names) else None
