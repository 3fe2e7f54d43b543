"""Choose the files of a split and a subset among those that are found, and say which are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from chunkflow_cli.data.finding import Found, doubles, find_by_pattern, find_in_folder, listed
from chunkflow_cli.data.names import SUFFIXES, kind_of_name, printable
from chunkflow_cli.data.splits import ALL, HELD_OUT, TRAIN, by_split, split_in, split_of, wanted_splits
from chunkflow_cli.data.streams import explain_read_errors
from chunkflow_cli.data.subsets import Subsets, read_subsets
from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class Wish:
    """The part of the data that the user wants, with the names for messages."""

    named: str
    """Key and path, for messages: `data.path=chats`."""
    split: str | None = TRAIN
    """The split; None is validation or else test, of data that has splits."""
    split_key: str = "data.split"
    """The key that the split comes from."""
    subset: str | None = None
    """The subset; None is the only one, or the default."""

    def no_split(self, known: Iterable[str]) -> UsageError:
        """Return the error for data that has other splits."""
        wanted = " or ".join(HELD_OUT) if self.split is None else self.split
        every = "" if self.split is None else f", or all of them with {self.split_key}={ALL}"
        return UsageError(
            f"{self.named} has no split {wanted}; its splits are {', '.join(known)}\n"
            f"  choose one with {self.split_key}=NAME{every}"
        )

    def no_subset(self, known: Iterable[str]) -> UsageError:
        """Return the error for data that has several subsets, or others than the one that is named."""
        names = ", ".join(known)
        if self.subset is None:
            return UsageError(f"{self.named} has several subsets: {names}\n  choose one with data.subset=NAME")
        what = f"its subsets are {names}" if names else "it has no subsets"
        return UsageError(f"{self.named} has no subset {self.subset}; {what}\n  correct or remove data.subset")


@dataclass(frozen=True)
class Chosen:
    """Files to read, and notes about the others."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def choose_files(path: str, wish: Wish) -> Chosen | None:
    """Return the wanted files at a local path, or None if nothing is there.

    Raises:
        UsageError: what is there is not data, or has no such split or subset.
    """
    local = Path(path).expanduser()
    with explain_read_errors(local):
        if local.is_dir():
            return _choose_in_folder(local, wish)
        if local.exists():
            return _choose_file(local, wish)
    found = find_by_pattern(local, wish.named)
    if found is None:
        return None
    if wish.subset is not None:
        raise wish.no_subset(())
    pattern = re.sub(r"[*?\[\]]", "-", str(local.relative_to(found.base)))
    asks_for_split = any(split_in(part) for part in Path(pattern).parts)
    splits = {} if asks_for_split else {file: split_of(found.below(file)) for file in found.files}
    return _choose(found, splits, wish)


def _choose_file(path: Path, wish: Wish) -> Chosen:
    if not path.is_file():
        raise UsageError(f"{wish.named} is neither a file nor a folder\n  write the rows to a file, and name that")
    if kind_of_name(path) is None:
        raise UsageError(f"{wish.named}: unknown file type\n  data files are {SUFFIXES}")
    if wish.subset is not None:
        raise wish.no_subset(())
    if wish.split not in (None, TRAIN, ALL):
        raise UsageError(f"{wish.named} is one file, without a split {wish.split}\n  remove {wish.split_key}")
    return Chosen((path,))


def _choose_in_folder(folder: Path, wish: Wish) -> Chosen:
    subsets = read_subsets(folder)
    if wish.subset is not None and wish.subset not in subsets.files:
        inside = folder / wish.subset
        if subsets.files or "/" in wish.subset or not inside.is_dir():
            folders = sorted(
                printable(each.name) for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
            )
            raise wish.no_subset(subsets.files or folders)
        return _choose_in_folder(inside, replace(wish, subset=None))
    found = find_in_folder(folder)
    if not found.files:
        raise found.no_data(f"{wish.named} is a folder without data files")
    if subsets.files:
        return _choose_subset(found, subsets, wish)
    return _choose(found, _splits_in_folder(found), wish)


def _splits_in_folder(found: Found) -> dict[Path, str | None]:
    """Return the split of each file of a folder; one that `DatasetDict.save_to_disk` wrote names them itself."""
    below = {file: found.below(file) for file in found.files}
    index = found.base / "dataset_dict.json"
    if index.is_file():
        with explain_read_errors(index):
            try:
                names = orjson.loads(index.read_bytes())["splits"]
            except (ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{printable(index)} does not list splits\n  save the data set again") from error
        return {file: path.parts[0] if path.parts[0] in names else None for file, path in below.items()}
    folder_name = found.base.resolve().name
    return {file: split_of(path, folder_name) for file, path in below.items()}


def _choose_subset(found: Found, subsets: Subsets, wish: Wish) -> Chosen:
    """Return the files of a split of a subset, as the README of a data set's repository lists them."""
    name = wish.subset or subsets.default
    if name is None:
        raise wish.no_subset(subsets.files)
    splits = {file: split for split, files in subsets.files[name].items() for file in files}
    others = {file for parts in subsets.files.values() for files in parts.values() for file in files}
    for file in found.files:
        if file not in splits and file not in others:
            found.leave_out(file, "not in the README's list")
    found.files = [file for file in found.files if file in splits]
    if not found.files:
        raise found.no_data(f"{wish.named}: no file of the subset {name} is here")
    chosen = _choose(found, {file: splits[file] for file in found.files}, wish)
    apart = [other for other in subsets.files if other != name]
    if wish.subset is None and apart:
        note = f"only the subset {name} is read, not: {', '.join(apart)}"
        return replace(chosen, notes=(note, *chosen.notes))
    return chosen


def _choose(found: Found, splits: Mapping[Path, str | None], wish: Wish) -> Chosen:
    """Return the files of the wanted split. If the files have no splits, return all of them."""
    files, notes = found.files, []
    if any(splits.values()):
        parts = by_split(splits)
        known = sorted((name for name in parts if name), key=_by_use)
        wanted = wanted_splits(wish.split, known)
        if wanted is None:
            raise wish.no_split(known)
        chosen = {file for name in wanted for file in parts[name]}
        if wish.split == ALL:
            chosen = set(files)
        files = [file for file in files if file in chosen]
        others = [name for name in [*known, *parts] if name not in wanted]
        apart = [f"{name or 'no split'} ({found.names(parts[name])})" for name in dict.fromkeys(others)]
        if apart and wish.split not in (None, ALL) and wish.split_key != "data.eval_split":
            notes.append(f"only the split {wish.split} is read, not: {', '.join(apart)}")
    elif wish.split not in (None, TRAIN, ALL):
        raise UsageError(
            f"{wish.named} has no split {wish.split}: no name of a file or folder in it is that of a split\n"
            f"  remove {wish.split_key}, or name the files train.jsonl, validation.jsonl and test.jsonl"
        )
    if found.left_out:
        notes.append(f"not read: {listed(found.left_out.items())}")
    notes += [f"{what}; are rows in there twice?" for what in doubles(found, files)]
    return Chosen(tuple(files), tuple(notes))


def _by_use(split: str) -> tuple[int, str]:
    usual = (TRAIN, *HELD_OUT)
    return (usual.index(split) if split in usual else len(usual)), split
