"""Tokenised data on disk, found again by what it was made from.

An entry is a folder `tokens/<key>/` of memory-mapped arrays:

    input_ids.npy      (tokens,) int32       all samples, one after the other
    targets.npy        (tokens,) int32       what each position has to predict, or -100; already shifted
    offsets.npy        (samples + 1,) int64  sample i is [offsets[i], offsets[i + 1])
    target_counts.npy  (samples,) int64
    digests.npy        (samples,) uint64     equal where tokens and targets are
    files.npy          (samples,) int32      which file of the source
    lines.npy          (samples,) int64      which line or row of it, from 1
    rejected.jsonl     {"file", "line", "reason"} a bad row; files are numbers here too
    meta.json          what it was made from, for people

The key is a hash of the data's content and of all that decides what it becomes (`Ingredients`); names of files are no
part of it and are looked up when a location is asked for. Policies (`data.bad_rows`, `data.max_length`,
`data.overlong`) are none either: they are applied when an entry is read, so changing one tokenises nothing again.

An entry is written aside and renamed, so it is complete or absent. Of two processes that build the same one, the first
to rename wins and the other takes the winner's. What a killed process leaves (`.<key>.<pid>-*`) is never looked at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import DTypeLike, NDArray

from chunkflow_cli.config.schema import DataFormat, TrainOn
from chunkflow_cli.data.encoding import EncodedBatch, Encoder
from chunkflow_cli.data.source import RowBatch, Source
from chunkflow_cli.data.tokenizer import keep_torch_out
from chunkflow_cli.errors import RunError, UsageError

CACHE_VERSION = 2
"""Goes up whenever the same ingredients would give other tokens or other files."""
BYTES_PER_WORKER = 4_000_000
"""Less data than this is not worth starting a process for: importing and loading a tokenizer takes seconds."""
ARRAYS: dict[str, DTypeLike] = {
    "input_ids": np.int32,
    "targets": np.int32,
    "offsets": np.int64,
    "target_counts": np.int64,
    "digests": np.uint64,
    "files": np.int32,
    "lines": np.int64,
}


@dataclass(frozen=True)
class Ingredients:
    """All that decides what an entry holds."""

    source: str
    """Fingerprint of the data."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None where ids are taken as they are."""
    format: DataFormat
    train_on: TrainOn
    vocab_size: int | None
    """Of the model, where ids are checked against it (`data.format=tokens`)."""
    version: int = CACHE_VERSION

    def key(self) -> str:
        """Name of the entry."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class RejectedRow:
    file: int
    line: int
    reason: str


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
    rejected: tuple[RejectedRow, ...]
    largest_id: int

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(samples,) tokens."""
        return np.diff(self.offsets)


def cache_root(cache_dir: str | None) -> Path:
    """The folder that holds all entries: below `data.cache_dir`, or below the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser() / "tokens"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "chunkflow" / "tokens"


def open_entry(folder: Path) -> CacheEntry | None:
    """The entry in a folder, or None if there is none.

    Raises:
        UsageError: the folder is there, and damaged.
    """
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows = [orjson.loads(line) for line in (folder / "rejected.jsonl").read_bytes().splitlines()]
        # As plain arrays: slices of np.memmap are slower to make, by a lot.
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in ARRAYS
        }
        entry = CacheEntry(
            folder=folder,
            rejected=tuple(RejectedRow(row["file"], row["line"], row["reason"]) for row in rows),
            largest_id=meta["largest_id"],
            **arrays,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, str(error)) from error
    if not (len(entry.offsets) - 1 == len(entry.lines) == len(entry.files) == len(entry.target_counts)):
        raise _damaged(folder, "its arrays are of different lengths")
    if not (len(entry.input_ids) == len(entry.targets) == entry.offsets[-1]):
        raise _damaged(folder, "tokens are missing")
    return entry


def build_entry(
    folder: Path,
    source: Source,
    encoder: Encoder,
    ingredients: Ingredients,
    *,
    num_workers: int | None,
    progress: Callable[[int], None],
) -> CacheEntry:
    """Tokenise a source into a folder; or take what another process has put there in the meantime.

    Args:
        num_workers: processes; None is one a core. The result is the same for any number.
        progress: called with how much of `source.size` is done.

    Raises:
        UsageError: the source cannot be read, or the cache not written.
        RunError: a process that tokenises was killed.
    """
    building = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        building.mkdir(parents=True)
        try:
            _write_entry(building, source, encoder, ingredients, num_workers=num_workers, progress=progress)
            _rename_unless_taken(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"tokenised data cannot be written to {folder.parent}: {error}\n"
            "  set data.cache_dir to a folder that has room"
        ) from error
    entry = open_entry(folder)
    assert entry is not None
    return entry


def _write_entry(
    folder: Path,
    source: Source,
    encoder: Encoder,
    ingredients: Ingredients,
    *,
    num_workers: int | None,
    progress: Callable[[int], None],
) -> None:
    samples = rejected = tokens = targets = 0
    largest_id = -1
    with (
        _ArrayFiles(folder) as arrays,
        (folder / "rejected.jsonl").open("wb") as rejected_file,
    ):
        arrays.append("offsets", np.zeros(1, np.int64))
        for batch in encode_source(source, encoder, num_workers=num_workers):
            arrays.append("input_ids", batch.input_ids)
            arrays.append("targets", batch.targets)
            arrays.append("offsets", tokens + np.cumsum(batch.lengths))
            arrays.append("target_counts", batch.target_counts)
            arrays.append("digests", batch.digests)
            arrays.append("files", np.full(len(batch.lengths), batch.file, np.int32))
            arrays.append("lines", batch.lines)
            for line, reason in batch.rejected:
                row = {"file": batch.file, "line": line, "reason": reason}
                rejected_file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            samples += len(batch.lengths)
            rejected += len(batch.rejected)
            tokens += len(batch.input_ids)
            targets += int(batch.target_counts.sum())
            largest_id = max(largest_id, int(batch.input_ids.max(initial=-1)))
            progress(batch.position)
        _to_disk(rejected_file.fileno(), rejected_file.flush)
    meta = {
        **asdict(ingredients),
        "files": list(source.names),
        "samples": samples,
        "rejected": rejected,
        "tokens": tokens,
        "targets": targets,
        "largest_id": largest_id,
    }
    with (folder / "meta.json").open("w", encoding="utf-8") as meta_file:
        json.dump(meta, meta_file, indent=2, ensure_ascii=False)
        _to_disk(meta_file.fileno(), meta_file.flush)


def encode_source(source: Source, encoder: Encoder, *, num_workers: int | None) -> Iterator[EncodedBatch]:
    """All batches of a source, encoded, in order; by other processes where the data is worth it.

    Raises:
        RunError: a process that tokenises was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(num_workers or cores, 1 + source.nbytes // BYTES_PER_WORKER)
    if workers == 1:
        yield from map(encoder.encode, source.batches())
        return
    # Spawned, not forked: the threads of torch and of the tokenizer do not survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in source.batches():
            with _without_main_module():  # a process is started when there is work for it
                pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 2 * workers:  # enough to keep all busy; more would only fill memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that tokenises was killed (out of memory?)\n  run with fewer of them: data.num_workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that start within this do not run the program's main file again.

    Nothing of it is needed there. A program without `if __name__ == "__main__"` would otherwise start itself anew in
    every one of them, and one that came from standard input could not be read a second time.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_worker_encoder: Encoder
"""Of a worker process: what it encodes with."""


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers an interrupt, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    keep_torch_out()  # rendering a chat template imports transformers
    _worker_encoder = encoder


def _encode_in_worker(batch: RowBatch) -> EncodedBatch:
    return _worker_encoder.encode(batch)


class _ArrayFiles:
    """The `.npy` files of an entry, which grow batch by batch.

    A header of the final length is written over the first one at the end; NumPy leaves room in it for just that.
    """

    def __init__(self, folder: Path) -> None:
        self._streams = {name: (folder / f"{name}.npy").open("wb") for name in ARRAYS}
        self._counts = dict.fromkeys(ARRAYS, 0)
        self._header_sizes = {name: self._write_header(name) for name in ARRAYS}

    def append(self, name: str, values: NDArray[Any]) -> None:
        self._streams[name].write(np.ascontiguousarray(values, ARRAYS[name]).data)
        self._counts[name] += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, stream in self._streams.items():
            with stream:
                if error is None:
                    stream.seek(0)
                    assert self._write_header(name) == self._header_sizes[name]
                    _to_disk(stream.fileno(), stream.flush)

    def _write_header(self, name: str) -> int:
        stream = self._streams[name]
        description = np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name]))
        header = {"descr": description, "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.tell()


def _to_disk(file: int, flush: Callable[[], None]) -> None:
    """Before the rename: it must not survive a power cut that the content does not."""
    flush()
    os.fsync(file)


def _rename_unless_taken(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _damaged(folder: Path, reason: str) -> UsageError:
    return UsageError(f"the tokenised data in {folder} is damaged: {reason}\n  delete that folder; it is made again")
