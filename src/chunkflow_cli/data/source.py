"""Rows from a file, a folder, a glob or a Hugging Face data set, read in batches of bounded size.

`open_source` finds the files and checks the head of each, so that a file that cannot be data (binary, empty, another
compression than its name says) is rejected before anything else starts. JSON lines, compressed or not, and parquet are
streamed. A `.json` file that holds one array is read whole, because JSON cannot be parsed in parts: use `.jsonl` for
large data.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

import orjson

from chunkflow_cli.data.rows import check_keys, drop_filled_nulls
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.streams import explain_read_errors, open_stream
from chunkflow_cli.data.tokenizer import let_torch_in
from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable

BATCH_ROWS = 256
"""Maximum rows of a batch. A batch of JSON lines also ends at `BATCH_BYTES`."""
BATCH_BYTES = 1 << 20
SNIFF_BYTES = 1 << 16

UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
SUFFIXES = ".jsonl, .ndjson, .json (each also with .gz or .zst), .parquet"


@dataclass(frozen=True, slots=True)
class Location:
    """A row's place in the user's data: a line of a file, or a row in it. Both count from 1."""

    file: str
    line: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file} row {self.line}"


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Consecutive rows of one file, not yet parsed."""

    file: int
    """Index into `Source.names`."""
    lines: list[int]
    """Line or row number of each row, counted from 1."""
    rows: list[object]
    """`bytes` are a line of JSON that is not parsed yet. Other values were parsed with the file."""
    position: int
    """How much of `Source.size` has been read after this batch."""


class FileKind(str, Enum):
    lines = "lines"
    """One JSON object per line."""
    array = "array"
    """One JSON array of objects."""
    parquet = "parquet"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file and how to read it."""

    path: Path
    kind: FileKind
    size: int
    """Bytes on disk."""


@dataclass(frozen=True)
class LocalFiles:
    """Data files on this machine, in the order in which they are read."""

    files: tuple[SourceFile, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(file.path) for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files on disk."""
        return sum(file.size for file in self.files)

    @property
    def nbytes(self) -> int:
        return self.size

    def location(self, file: int, line: int) -> Location:
        found = self.files[file]
        return Location(str(found.path), line, "line" if found.kind is FileKind.lines else "row")

    def fingerprint(self) -> str:
        """Return a hash of the contents in order, and of nothing else: a renamed or copied file is the same data."""
        digest = hashlib.blake2b(digest_size=20)
        for file in self.files:
            digest.update(f"{file.kind.value} {file.size}\n".encode())
            with explain_read_errors(file.path), file.path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def batches(self) -> Iterator[RowBatch]:
        """Yield all rows in order.

        Raises:
            UsageError: a file cannot be decompressed or parsed as a whole, or has no rows.
        """
        start = 0
        for index, file in enumerate(self.files):
            rows = 0
            with explain_read_errors(file.path):
                for batch in _READERS[file.kind](index, file, start):
                    rows += len(batch.rows)
                    yield batch
            if rows == 0:
                raise UsageError(_no_rows(file.path))
            start += file.size


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set, loaded by the `datasets` library."""

    name: str
    dataset: Any
    """A `datasets.Dataset`."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.dataset)

    @property
    def nbytes(self) -> int:
        return int(self.dataset.data.nbytes)

    def location(self, file: int, line: int) -> Location:
        return Location(self.names[file], line, "row")

    def fingerprint(self) -> str:
        """Return the fingerprint that `datasets` keeps. It changes with the data and with every transformation."""
        return f"datasets {self.dataset._fingerprint}"

    def batches(self) -> Iterator[RowBatch]:
        """Yield all rows in order."""
        line = 1
        for columns in self.dataset.iter(batch_size=BATCH_ROWS):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            filled = [drop_filled_nulls(row, self.dataset.features) for row in rows]
            yield RowBatch(0, list(range(line, line + len(rows))), list(filled), line + len(rows) - 1)
            line += len(rows)


Source = LocalFiles | HubDataset


def open_source(path: str, *, key: str = "data.path") -> Source:
    """Return the data at a path. Local files come before the Hugging Face hub.

    A folder is searched with its subfolders, in sorted order. Names that start with a dot are skipped.

    Args:
        path: a file, a folder, a glob or a data set id.
        key: the configuration key that the path comes from, for messages.

    Raises:
        UsageError: nothing exists at the path, or it is not data.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = _walk(local)
        if not found:
            raise UsageError(f"{key}={path} is a folder without data files\n  data files are {SUFFIXES}")
    elif local.exists():
        if _kind_of_name(local) is None:
            raise UsageError(f"{key}={path}: unknown file type\n  data files are {SUFFIXES}")
        found = [local]
    elif has_magic(path):
        matches = [Path(match) for match in sorted(glob(str(local), recursive=True))]
        found = [match for match in matches if match.is_file() and _kind_of_name(match) is not None]
        if not found:
            what = f"{len(matches)} files match, but none is a data file" if matches else "no file matches"
            raise UsageError(f"{key}={path}: {what}\n  data files are {SUFFIXES}")
    elif path.startswith((".", "/", "~")) or _kind_of_name(local) is not None or not _is_hub_id(path):
        raise UsageError(f"{key}={path}: there is no such file or folder (looked from {Path.cwd()})")
    else:
        return _load_from_hub(path, key)
    return LocalFiles(tuple(_look_at(file) for file in found))


def _walk(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if _kind_of_name(path) is not None)


def _kind_of_name(path: Path) -> str | None:
    """Return `jsonl`, `json` or `parquet`, or None if no reader handles this name."""
    match = re.search(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$|\.(parquet)$", path.name.lower())
    if match is None:
        return None
    return match.group(3) or match.group(1).replace("ndjson", "jsonl")


def _look_at(path: Path) -> SourceFile:
    """Check the head of a file and return how to read it.

    Raises:
        UsageError: the content is not what the name says.
    """
    name_kind = _kind_of_name(path)
    with explain_read_errors(path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            raw_head = stream.read(SNIFF_BYTES)
        if size == 0:
            raise UsageError(f"{path} is empty\n  delete it, or download it again if it should hold data")
        suffix = next((suffix for magic, suffix in MAGIC.items() if raw_head.startswith(magic)), None)
        if suffix is not None and path.suffix.lower() != suffix:
            raise UsageError(
                f"{path} holds {suffix} data, but its name says otherwise\n  rename it so that it ends in {suffix}"
            )
        if name_kind == "parquet":
            if suffix is None:
                raise UsageError(f"{path} is not a parquet file\n  download it again, or give it the right suffix")
            return SourceFile(path, FileKind.parquet, size)
        with open_stream(path) as (text, _):
            head = text.read(SNIFF_BYTES)
    is_whole = len(head) < SNIFF_BYTES
    for bom, encoding in OTHER_BOMS.items():
        if head.startswith(bom):
            raise UsageError(
                f"{path} is {encoding}, but must be UTF-8\n  convert it: iconv -f {encoding} -t UTF-8 {path}"
            )
    if b"\0" in head:
        raise UsageError(f"{path} is a binary file\n  data files are {SUFFIXES}")
    head = head.removeprefix(UTF8_BOM).lstrip()
    if not head and is_whole:
        raise UsageError(_no_rows(path))
    if name_kind == "json" and head.startswith(b"["):
        return SourceFile(path, FileKind.array, size)
    if name_kind == "json" and head.startswith(b"{"):
        _reject_single_object(path)
    return SourceFile(path, FileKind.lines, size)


def _reject_single_object(path: Path) -> None:
    """Raise if a `.json` file is one object over many lines. JSON lines under that name are accepted."""
    with explain_read_errors(path), open_stream(path) as (stream, _):
        line = stream.readline().removeprefix(UTF8_BOM)
        while not line.strip():
            line = stream.readline()
        if _is_json(line) or not _is_json(line + stream.read()):
            return
    raise UsageError(
        f"{path} is one JSON object, not rows\n  write an array of objects, or one object per line (.jsonl)"
    )


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _no_rows(path: Path) -> str:
    return f"{path} has no rows\n  delete it, or download it again if it should hold data"


def _read_lines(index: int, file: SourceFile, start: int) -> Iterator[RowBatch]:
    lines: list[int] = []
    rows: list[object] = []
    size = 0
    with open_stream(file.path) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(UTF8_BOM)
            line = line.strip()
            if not line:
                continue
            lines.append(number)
            rows.append(line)
            size += len(line)
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                yield RowBatch(index, lines, rows, start + raw.tell())
                lines, rows, size = [], [], 0
    if rows:
        yield RowBatch(index, lines, rows, start + file.size)


def _read_array(index: int, file: SourceFile, start: int) -> Iterator[RowBatch]:
    with open_stream(file.path) as (stream, _):
        text = stream.read().removeprefix(UTF8_BOM)
    try:
        rows: list[object] = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(
            f"{file.path}:{error.lineno}: invalid JSON in the array: {error.msg}\n"
            "  fix it, or write one object per line (.jsonl), where data.bad_rows=skip can skip bad rows"
        ) from error
    try:
        check_keys(text, rows)
    except BadRowError as error:
        raise UsageError(f"{file.path}: {error}") from error
    del text
    yield from _slices(index, rows, 1, start, file.size, len(rows))


def _read_parquet(index: int, file: SourceFile, start: int) -> Iterator[RowBatch]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            first, total = 1, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                rows = [drop_filled_nulls(row) for row in batch.to_pylist()]
                yield from _slices(index, rows, first, start, file.size, total)
                first += len(rows)
    except ArrowException as error:
        raise OSError(str(error)) from error


def _slices(index: int, rows: Sequence[object], first: int, start: int, size: int, total: int) -> Iterator[RowBatch]:
    """Yield batches of parsed rows, numbered from `first`. The file has `total` rows and `size` bytes."""
    for begin in range(0, len(rows), BATCH_ROWS):
        part = list(rows[begin : begin + BATCH_ROWS])
        line = first + begin
        after = line + len(part)
        yield RowBatch(index, list(range(line, after)), part, start + size * (after - 1) // total)


_READERS = {FileKind.lines: _read_lines, FileKind.array: _read_array, FileKind.parquet: _read_parquet}


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None


def _load_from_hub(path: str, key: str) -> HubDataset:
    let_torch_in()
    go_offline_if_unreachable()  # before the import of datasets, which reads this setting only once
    import datasets

    try:
        splits = datasets.load_dataset(path)
    except (OSError, ValueError) as error:  # unreachable, unknown, gated, or a subset has to be named
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{key}={path} is not a local file or folder, and could not be loaded from the Hugging Face hub\n"
            f"  {reason}\n"
            f"  check the spelling and the network, or download the files and set {key} to their folder"
        ) from error
    if "train" in splits:
        split = "train"
    elif len(splits) == 1:
        split = next(iter(splits))
    else:
        raise UsageError(
            f"{key}={path} has no split named train; its splits are {', '.join(sorted(map(str, splits)))}\n"
            f"  download the files of one of them and set {key} to their folder"
        )
    if len(splits[split]) == 0:
        raise UsageError(f"{key}={path}: its split {split} has no rows")
    return HubDataset(f"{path} ({split})", splits[split])
