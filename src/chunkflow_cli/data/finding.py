"""Find the data files at a path. Every other file is listed with the reason why it is not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from itertools import groupby
from pathlib import Path

from chunkflow_cli.console import counted
from chunkflow_cli.data.names import (
    COMPRESSIONS,
    SUFFIXES,
    form_of_name,
    is_no_data,
    kind_of_name,
    plain_name,
    printable,
)
from chunkflow_cli.data.streams import explain_read_errors, open_stream
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import checksum

NAMED = 5
"""Maximum number of files that a line names."""
END_BYTES = 1 << 16
UNSEARCHED = frozenset({".git", ".cache", ".venv", ".ipynb_checkpoints", "__MACOSX", "__pycache__", "node_modules"})
"""Folders that other programs keep next to data, and that are not searched."""
RUN_FILES = frozenset({"metrics.jsonl", "report.json", "rejected.jsonl", "trace.json", "checkpoints", "final"})
"""Files that a run writes into its folder."""
OUTPUT = "a run's output"
MODEL_FILES = frozenset({"tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
                         "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors"})  # fmt: skip


@dataclass
class Found:
    """The data files below one place, and what is left out."""

    base: Path
    """The folder that names of splits are looked for below."""
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a file or folder is not read, by its path below `base`."""

    def leave_out(self, path: Path, why: str) -> None:
        self.left_out[printable(self.below(path))] = why

    def no_data(self, what: str) -> UsageError:
        """Return the error for a place without data files, with what is there instead."""
        instead = f"\n  not read: {listed(self.left_out.items())}" if self.left_out else ""
        return UsageError(f"{what}{instead}\n  data files are {SUFFIXES}")

    def names(self, files: Sequence[Path]) -> str:
        """Return the paths of some files below the base, for messages; not of all if they are many."""
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        return ", ".join(printable(self.below(file)) for file in files[:NAMED]) + more

    def below(self, path: Path) -> Path:
        """Return a path relative to the base."""
        return path.relative_to(self.base)


def find_in_folder(folder: Path) -> Found:
    """Return the data files in a folder and its subfolders, those behind links included, in sorted order."""
    found, seen = Found(folder), dict[tuple[int, int], Path]()
    _search(folder, found, seen)
    return _settled(found)


def find_by_pattern(pattern: Path, named: str) -> Found | None:
    """Return the data files that a glob names, or None if it has no wildcard. A folder that matches is searched.

    Args:
        named: key and path, for messages.

    Raises:
        UsageError: nothing matches, or nothing that is data.
    """
    base, rest = _existing_part(pattern)
    if not has_magic(str(rest)):
        return None
    found, seen = Found(base), dict[tuple[int, int], Path]()
    matches = [base / match for match in sorted(glob(str(rest), root_dir=base, recursive=True))]
    matches = [match for match in matches if os.path.lexists(match)]  # glob yields the `a/` of `a/**` in any case
    for match in matches:
        if match.is_dir() and rest.name != "**":  # `**` names the folder's files one by one
            _search(match, found, seen)
        elif not match.is_dir():
            _take(match, found, is_named=True)
    found.files = sorted(set(found.files))
    if not found.files:
        what = f"{counted(len(matches), 'file')} match, but none is a data file" if matches else "no file matches"
        raise found.no_data(f"{named}: {what}")
    return _settled(found)


def listed(reasons: Iterable[tuple[str, str]]) -> str:
    """Return paths and reasons as text of bounded length: `a.foo, b.foo (unknown suffix), .c.jsonl (hidden)`."""
    pairs = sorted(reasons, key=lambda pair: (pair[1], pair[0]))
    groups = []
    for why, group in groupby(pairs, lambda pair: pair[1]):
        names = [name for name, _ in group]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        groups.append(f"{', '.join(names[:NAMED])}{more} ({why})")
    return ", ".join(groups)


def doubles(found: Found, paths: list[Path]) -> list[str]:
    """Return a note about each group of files that hold the same bytes, and one if there are files in several forms.

    The same rows often lie next to each other as JSON lines and as a table, or compressed and not.
    """
    notes = [f"{found.names(group)} hold the same bytes" for group in _equal_files(paths)]
    forms: dict[str, list[Path]] = {}
    for path in paths:
        forms.setdefault(form_of_name(path), []).append(path)
    if len(forms) > 1:
        notes.append(f"files in {len(forms)} forms are read: {'; '.join(map(found.names, forms.values()))}")
    return notes


def _search(folder: Path, found: Found, seen: dict[tuple[int, int], Path]) -> None:
    def cannot_search(error: OSError) -> None:
        found.leave_out(Path(error.filename), "cannot be searched")

    for name, folders, names in os.walk(folder, onerror=cannot_search, followlinks=True):
        place, here = Path(name), {*folders, *names}
        status = place.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), place)
        why = f"the same folder as {printable(found.below(first))}" if first != place else _why_no_data(place, here)
        if why and (first != place or place != folder):
            found.leave_out(place, why)
            folders.clear()
            continue
        written = RUN_FILES & here if _is_run(place) else frozenset[str]()  # the folder that the user named is a run's
        for ours in written:
            found.leave_out(place / ours, OUTPUT)
        folders[:] = sorted(set(folders) - UNSEARCHED - written)
        saved = {"state.json"} if "dataset_info.json" in here else set[str]()  # of `Dataset.save_to_disk`
        for file in set(names) - written - saved:
            _take(place / file, found)


def _why_no_data(place: Path, here: set[str]) -> str | None:
    if _is_run(place) and here & (RUN_FILES | {".lock"}):
        return OUTPUT
    if {"meta.json", "input_ids.npy"} <= here:
        return "tokenized data"
    if here & {"config.json", "adapter_config.json"} and here & MODEL_FILES:
        return "a model"
    return None


def _is_run(folder: Path) -> bool:
    return (folder / ".hydra" / "config.yaml").is_file()


def _take(path: Path, found: Found, *, is_named: bool = False) -> None:
    is_data, below = kind_of_name(path) is not None, found.below(path)
    if is_no_data(path.name) or path.name.startswith("._"):  # macOS writes `._a` next to `a` on other file systems
        return
    if not is_named and any(part.startswith(".") for part in below.parts):
        if is_data:
            found.leave_out(path, "hidden")
    elif not is_data:
        found.leave_out(path, "unknown suffix")
    elif path.exists() and not path.is_file():
        found.leave_out(path, "not a file")
    else:
        found.files.append(path)


def _settled(found: Found) -> Found:
    """Return what was found without texts next to rows, and without second names of a file."""
    kinds = {path: kind_of_name(path) for path in sorted(found.files)}
    texts = [path for path, kind in kinds.items() if kind == "txt"] if set(kinds.values()) != {"txt"} else []
    for path in texts:
        found.leave_out(path, "a text next to rows")
        del kinds[path]
    for find in (_second_names, _compressed_copies):
        for path, first in list(find(list(kinds))):
            found.leave_out(path, f"the same rows as {printable(found.below(first))}")
            del kinds[path]
    found.files = list(kinds)
    return found


def _second_names(files: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield links to files that are read already, with the first name of each."""
    seen: dict[tuple[int, int], Path] = {}
    for path in files:
        with explain_read_errors(path):
            status = path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            yield path, first


def _compressed_copies(files: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield files next to which the same bytes lie, not compressed or in another compression."""
    by_name: dict[Path, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.with_name(plain_name(path.name)), []).append(path)
    for first, *others in by_name.values():
        for path in others:
            if path.suffix.lower() in COMPRESSIONS and _same_content(first, path):
                yield path, first


def _same_content(one: Path, other: Path) -> bool:
    with explain_read_errors(other), open_stream(one) as (first, _), open_stream(other) as (second, _):
        while (block := first.read(1 << 20)) == second.read(1 << 20):
            if not block:
                return True
    return False


def _equal_files(paths: list[Path]) -> list[list[Path]]:
    """Return the groups of files that are equal. Only files of one size with equal ends are read as a whole."""
    groups: dict[object, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.stat().st_size, []).append(path)
    for key in (_ends, checksum):
        refined: dict[object, list[Path]] = {}
        for found, group in groups.items():
            if len(group) > 1:
                for path in group:
                    with explain_read_errors(path):
                        refined.setdefault((found, key(path)), []).append(path)
        groups = refined
    return [group for group in groups.values() if len(group) > 1]


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(END_BYTES)
        file.seek(max(0, path.stat().st_size - END_BYTES))
        return start + file.read(END_BYTES)


def _existing_part(pattern: Path) -> tuple[Path, Path]:
    """Return the folders of a pattern that exist as they are written, brackets included, and the rest."""
    parts = pattern.parts
    base = Path(parts[0]) if pattern.is_absolute() else Path()
    start = 1 if pattern.is_absolute() else 0
    while start < len(parts) - 1 and (base / parts[start]).is_dir():
        base, start = base / parts[start], start + 1
    return base, Path(*parts[start:])
