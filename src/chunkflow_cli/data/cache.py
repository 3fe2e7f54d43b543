"""Tokenized data on disk, found again by a hash of its ingredients.

An entry is a folder `tokens/<key>/` of memory-mapped arrays:

    input_ids.npy      (tokens,) int32       all samples, one after the other
    targets.npy        (tokens,) int32       the id that each position has to predict, or -100; already shifted
    offsets.npy        (samples + 1,) int64  sample i is [offsets[i], offsets[i + 1])
    target_counts.npy  (samples,) int64
    digests.npy        (samples,) uint64     equal if tokens and targets are equal
    files.npy          (samples,) int32      index of the file in the source
    lines.npy          (samples,) int64      line or row in that file, from 1; all samples of a row have the same
    marks.npy          (samples,) int64      what a sample of preferences is, as in `EncodedBatch`; otherwise -1
    rejected.jsonl     {"file", "line", "reason"} per bad row; files are indices here too
    notes.jsonl        what there is to say of the rows, as in `Note`
    meta.json          the ingredients, for people; `largest_id` and `ends` as in `EncodedBatch`; checksums of the rest

The key is a hash of the data's content and of everything that decides which tokens it becomes (`Ingredients`). File
names are not part of it: they are looked up when a location is needed. Policies (`data.bad_rows`, `data.max_length`,
`data.overlong`) are not part of it either: they are applied when an entry is read, so changing one does not tokenize
again.

An entry is written to a temporary folder and renamed, so it is complete or absent. If two processes build the same one,
the first to rename wins and the other uses the winner's. If the data changes while it is read, no entry is made. What a
killed process leaves is never read, and removed by the next one that looks for an entry (`building.py`).

Whenever a run opens an entry, its files are compared with their checksums, so that damage is found before it is trained
on. One rank of those that see the same disk does it for all. A core checks 4 GB/s of what is in memory, a thousand
times faster than it tokenizes. The rest has to be read once, which training does anyway: 50 GB take 25 s at 2 GB/s. To
compare sizes and time stamps would cost nothing, and would miss what a failing disk or a lost block does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from chunkflow_cli.config.schema import DataFormat, TrainOn, Turns
from chunkflow_cli.data.building import folder_to_build_in
from chunkflow_cli.data.encoded_batch import EncodedBatch
from chunkflow_cli.data.notes import Note, merged
from chunkflow_cli.data.sample import RejectedRow
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import bytes_moved, checksum, moving

CACHE_VERSION = 7
"""Increases whenever the same ingredients would give other tokens or other files."""
ARRAYS: dict[str, DTypeLike] = {
    "input_ids": np.int32,
    "targets": np.int32,
    "offsets": np.int64,
    "target_counts": np.int64,
    "digests": np.uint64,
    "files": np.int32,
    "lines": np.int64,
    "marks": np.int64,
}


@dataclass(frozen=True)
class Ingredients:
    """Everything that determines the content of an entry."""

    source: str
    """Fingerprint of the data."""
    tokenizer: str | None
    """Fingerprint of the tokenizer and its chat template; None if the data already holds ids."""
    format: DataFormat
    train_on: TrainOn
    turns: Turns
    train_on_reasoning: bool
    vocab_size: int | None
    """Ids of the model, if the data's ids are checked against it (`data.format=tokens`)."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    version: int = CACHE_VERSION

    def key(self) -> str:
        """Return the name of the entry."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """A complete entry, memory-mapped. The module's docstring has shapes and meanings."""

    folder: Path
    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    offsets: NDArray[np.int64]
    target_counts: NDArray[np.int64]
    digests: NDArray[np.uint64]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]
    marks: NDArray[np.int64]
    rejected: tuple[RejectedRow, ...]
    notes: tuple[Note, ...]
    ends: dict[int, int]
    largest_id: int

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(samples,) tokens."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(samples,) number of each sample's row, from 0: the samples of a row follow each other."""
        begins = (np.diff(self.lines, prepend=-1) != 0) | (np.diff(self.files, prepend=-1) != 0)
        return np.cumsum(begins) - 1


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of all entries: below `data.cache_dir`, or below the user's cache folder.

    Raises:
        UsageError: `data.cache_dir` is not set, and the user has no home folder.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser() / "tokens"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~") or (os.environ.get("HOME") == "" and "XDG_CACHE_HOME" not in os.environ):
        raise UsageError(
            "there is no folder for tokenized data: HOME is not set, and this user has no home folder\n"
            "  set data.cache_dir=DIR, or HOME"
        )
    return Path(home) / "chunkflow" / "tokens"


def open_entry(folder: Path, *, is_checked: bool = False) -> CacheEntry | None:
    """Return the entry in a folder, or None if the folder does not exist.

    Args:
        is_checked: another process of the run has just compared its files with their checksums.

    Raises:
        UsageError: the entry is damaged.
    """
    try:
        if not folder.is_dir():
            return None
    except OSError as error:
        raise UsageError(
            f"tokenized data in {folder.parent} cannot be read: {error.strerror}\n"
            "  set data.cache_dir to a folder of your own"
        ) from error
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        checksums = meta.pop("checksums")
        for name, expected in () if is_checked else checksums.items():
            found = _checksum_of(meta) if name == "meta.json" else checksum(folder / name)
            if found != expected:
                raise ValueError(f"{name} is not what was written")
        rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_bytes().splitlines()]
        notes = [json.loads(line) for line in (folder / "notes.jsonl").read_bytes().splitlines()]
        # As plain arrays: slicing an np.memmap is much slower.
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in ARRAYS
        }
        entry = CacheEntry(
            folder=folder,
            rejected=tuple(RejectedRow(row["file"], row["line"], row["reason"]) for row in rows),
            notes=tuple(Note(**note) for note in notes),
            ends={int(token): count for token, count in meta["ends"].items()},
            largest_id=meta["largest_id"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, str(error)) from error
    if not (len(entry.offsets) - 1 == len(entry.lines) == len(entry.files) == len(entry.target_counts)):
        raise _damaged(folder, "its arrays have different lengths")
    if not (len(entry.input_ids) == len(entry.targets) == entry.offsets[-1]):
        raise _damaged(folder, "tokens are missing")
    return entry


def stamp(folder: Path) -> str | None:
    """Return a stamp that differs between an entry and its copy on another disk; None if there is no entry.

    Nodes that share a file system see the same file, with the same number and the same time to the nanosecond.
    """
    try:
        found = (folder / "meta.json").stat()
    except OSError:
        return None
    return f"{found.st_ino}-{found.st_mtime_ns}"


def build_entry(
    folder: Path,
    batches: Iterable[EncodedBatch],
    ingredients: Ingredients,
    file_names: Sequence[str],
    progress: Callable[[int], None],
) -> CacheEntry:
    """Write the batches of a source to a folder, and return the entry, or the one that another process put there first.

    Args:
        file_names: `Source.names`, for people who look into the entry.
        progress: called with the position of each batch.

    Raises:
        UsageError: the cache cannot be written.
    """
    try:
        with folder_to_build_in(folder.parent, folder.name) as building:
            _write_entry(building, batches, ingredients, file_names, progress)
            # The rename must not survive a power cut that the content does not.
            for file in moving(building.iterdir()):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            _rename_unless_taken(building, folder)
    except OSError as error:
        raise UsageError(
            f"tokenized data cannot be written to {folder.parent}: {error.strerror or error}\n"
            "  set data.cache_dir to a writable folder with enough space"
        ) from error
    entry = open_entry(folder)
    assert entry is not None
    return entry


def _write_entry(
    folder: Path,
    batches: Iterable[EncodedBatch],
    ingredients: Ingredients,
    file_names: Sequence[str],
    progress: Callable[[int], None],
) -> None:
    rejected = targets = 0
    largest_id = -1
    notes: list[Note] = []
    ends: Counter[int] = Counter()
    with _ArrayFiles(folder) as arrays, (folder / "rejected.jsonl").open("wb") as rejected_file:
        arrays.append("offsets", np.zeros(1, np.int64))
        for batch in batches:
            arrays.append("offsets", arrays.counts["input_ids"] + np.cumsum(batch.lengths))
            for name in ("input_ids", "targets", "target_counts", "digests", "lines", "marks"):
                arrays.append(name, getattr(batch, name))
            arrays.append("files", np.full(len(batch.lengths), batch.file, np.int32))
            for row in batch.rejected:
                rejected_file.write(json.dumps(asdict(row)).encode() + b"\n")
            rejected += len(batch.rejected)
            notes = merged([*notes, *batch.notes])
            ends.update(batch.ends)
            targets += int(batch.target_counts.sum())
            largest_id = max(largest_id, int(batch.input_ids.max(initial=-1)))
            progress(batch.position)
            bytes_moved()
    (folder / "notes.jsonl").write_bytes(b"".join(json.dumps(asdict(note)).encode() + b"\n" for note in notes))
    meta = {
        **asdict(ingredients),
        "files": file_names,
        "samples": arrays.counts["lines"],
        "rejected": rejected,
        "tokens": arrays.counts["input_ids"],
        "targets": targets,
        "largest_id": largest_id,
        "ends": ends,
    }
    checksums = {file.name: checksum(file) for file in sorted(folder.iterdir())} | {"meta.json": _checksum_of(meta)}
    (folder / "meta.json").write_text(json.dumps(meta | {"checksums": checksums}, indent=2), encoding="utf-8")


def _checksum_of(meta: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


class _ArrayFiles:
    """The `.npy` files of an entry, which grow batch by batch.

    At the end, a header with the final length overwrites the first one. NumPy leaves room for that.
    """

    def __init__(self, folder: Path) -> None:
        self._streams = {name: (folder / f"{name}.npy").open("wb") for name in ARRAYS}
        self.counts = dict.fromkeys(ARRAYS, 0)
        self._header_sizes = {name: self._write_header(name) for name in ARRAYS}

    def append(self, name: str, values: NDArray[Any]) -> None:
        self._streams[name].write(np.ascontiguousarray(values, ARRAYS[name]).data)
        self.counts[name] += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for name, stream in self._streams.items():
            with stream:
                if error is None:
                    stream.seek(0)
                    assert self._write_header(name) == self._header_sizes[name]

    def _write_header(self, name: str) -> int:
        stream = self._streams[name]
        description = np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name]))
        header = {"descr": description, "fortran_order": False, "shape": (self.counts[name],)}
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.tell()


def _rename_unless_taken(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _damaged(folder: Path, reason: str) -> UsageError:
    return UsageError(f"the tokenized data in {folder} is damaged: {reason}\n  delete that folder to rebuild it")
