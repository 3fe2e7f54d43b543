"""A checkpoint as a folder: its name, the state.json in it, its checksums, and its neighbors.

state.json is written last. It lists every other file with its size and CRC-32, and ends with a hash of itself. So
whatever changes in a checkpoint after it was written is found before anything is loaded: a flipped bit, a hole of
zeros after a power cut, a file that is cut, missing, renamed or of another checkpoint. CRC-32 is for accidents, not for
attackers; it costs a tenth of the time that the disk takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import change_of, write_json
from chunkflow_cli.training.identity import RunIdentity
from chunkflow_cli.training.progress import Progress

FORMAT = 3
"""The format of the folder. Format 1, which had no number, held DeepSpeed's own files, and only the layout that wrote
them could read them. Format 2 had no checksums and no identity."""
STATE = "state.json"
REPLACED = ".replaced"
"""Suffix of a checkpoint that another one of the same step is about to replace."""
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class SavedState:
    """The content of state.json."""

    progress: Progress
    layout: str
    """The layout that saved the checkpoint, in words."""
    processes: int
    identity: RunIdentity
    files: Mapping[str, str]
    """Name of each other file -> its size and checksum."""


def write_state(checkpoint: Path, state: SavedState) -> None:
    """Write state.json, whole or not at all."""
    value = {
        "format": FORMAT,
        "layout": state.layout,
        "processes": state.processes,
        "progress": vars(state.progress),
        "identity": state.identity.to_json(),
        "files": dict(state.files),
    }
    write_json(checkpoint / STATE, {**value, "hash": _hash(value)})


def read_state(checkpoint: Path) -> SavedState:
    """Return the content of state.json.

    Raises:
        RunError: it is missing or damaged.
        UsageError: it has an earlier format.
    """
    path = checkpoint / STATE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(checkpoint, f"{STATE} is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, f"{STATE} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise damaged(checkpoint, f"{STATE} is not an object")
    version, own_hash = value.get("format", 1), value.pop("hash", None)
    if own_hash != _hash(value) and (own_hash is not None or version not in (1, 2)):
        raise damaged(checkpoint, f"the content of {STATE} does not fit its own hash")
    if version != FORMAT:
        raise UsageError(
            f"{checkpoint} has format {version}, and this version reads format {FORMAT}\n"
            "  finish that run with the version that started it, or start a new one with checkpoint.resume=never"
        )
    return SavedState(
        progress=Progress(**value["progress"]),
        layout=value["layout"],
        processes=value["processes"],
        identity=RunIdentity.from_json(value["identity"], path),
        files=value["files"],
    )


def check_files(checkpoint: Path, files: Mapping[str, str], *, share: slice = slice(None)) -> None:
    """Compare the files of a checkpoint with what its state.json lists.

    Args:
        share: the files whose content this process compares; the names are always compared.

    Raises:
        RunError: names the first file that is not as it was written.
    """
    there = {path.name for path in checkpoint.iterdir()} - {STATE}
    for name in sorted(files.keys() ^ there):
        if name in files:
            raise damaged(checkpoint, f"{name} is missing")
        if name.endswith((".safetensors", ".pt")):
            raise damaged(checkpoint, f"{name} does not belong to it")
    for name in sorted(files)[share]:
        try:
            change = change_of(checkpoint / name, files[name])
        except OSError as error:
            raise damaged(checkpoint, f"{name} cannot be read: {error.strerror}") from error
        if change is not None:
            raise damaged(checkpoint, f"{name}: {change}")


def damaged(checkpoint: Path, reason: str) -> RunError:
    """Return the error about a damaged checkpoint. It names the one before, from which the run can go on."""
    before = [path for path in steps_of(checkpoint.parent) if path.name < checkpoint.name]
    remedy = "there is no earlier one: restore it from a copy, or start over with checkpoint.resume=never"
    if before and NAME.fullmatch(checkpoint.name):
        remedy = f"resume from the one before it: checkpoint.resume={before[-1]}"
    return RunError(f"the checkpoint {checkpoint} is damaged: {reason}\n  {remedy}")


def steps_of(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, by step."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None. Incomplete ones have another name.

    If a process died after it moved a checkpoint aside and before its replacement was in place, the old one is found.
    """
    folder = run_folder / "checkpoints"
    found = {path.name: path for path in steps_of(folder)}
    for path in folder.glob(f".step-*{REPLACED}"):
        found.setdefault(path.name[1:].removesuffix(REPLACED), path)
    return found[max(found, key=lambda name: int(name[5:]))] if found else None


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a checkpoint its name. An earlier one of the same step keeps a findable name until then."""
    _sync_folder(temporary)
    aside = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    _sync_folder(target.parent)


def delete_old(folder: Path, just_saved: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and never the one that was just saved.

    Each is renamed first, so that one half deleted is never taken for a complete one.
    """
    others = [path for path in steps_of(folder) if path != just_saved]
    for old in others[: max(0, len(others) + 1 - keep)]:
        old.rename(old.with_name(f".{old.name}.deleting"))
    delete_leftovers(folder)


def delete_leftovers(folder: Path) -> None:
    """Delete what killed processes have left half written or half deleted."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def set_aside(folder: Path, abandoned: Sequence[Path], metrics: Path) -> Path | None:
    """Move checkpoints of steps that are about to be trained again, with a copy of the metrics, into a folder.

    Returns:
        That folder; None if there are no such checkpoints.
    """
    if not abandoned:
        return None
    aside = folder / f"abandoned-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    aside.mkdir(parents=True, exist_ok=True)
    if metrics.exists():
        shutil.copyfile(metrics, aside / metrics.name)
    for path in abandoned:
        path.rename(aside / path.name)
    return aside


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
