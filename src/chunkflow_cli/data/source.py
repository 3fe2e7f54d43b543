"""Where rows come from: a file, a folder, a glob or a Hugging Face data set, read in batches of bounded size.

`open_source` finds the files and looks at the head of each, so that a file that cannot be data (binary, empty, another
compression than its name says) is refused before anything else starts. JSON lines, compressed or not, and parquet are
streamed; a `.json` file that holds one array is read whole, for JSON has no way to skip: where it is large, use
`.jsonl`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import orjson

from chunkflow_cli.errors import UsageError
from chunkflow_cli.hub import go_offline_if_unreachable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BATCH_ROWS = 256
"""Most rows of a batch; a batch of JSON lines also ends at `BATCH_BYTES`."""
BATCH_BYTES = 1 << 20
SNIFF_BYTES = 1 << 16

UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
SUFFIXES = ".jsonl, .ndjson, .json (each also with .gz or .zst), .parquet"


class BadRowError(ValueError):
    """One row cannot be trained on; the message is the reason, without the location."""


Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row stands. `line` counts from 1; `unit` says whether it is a line of the file or a row in it."""

    file: str
    line: int
    unit: Unit = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file} row {self.line}"


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Consecutive rows of one file, not yet looked at."""

    file: int
    """Index into `Source.names`."""
    lines: list[int]
    """Of each row, counted from 1."""
    rows: list[object]
    """`bytes` are a line of JSON that is not parsed yet; anything else is a value that the file's format gave."""
    position: int
    """How much of `Source.size` is read when this batch is."""


class FileKind(str, Enum):
    lines = "lines"
    """An object a line."""
    array = "array"
    """One JSON array of objects."""
    parquet = "parquet"


@dataclass(frozen=True, slots=True)
class SourceFile:
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
        """Bytes of all files, as they lie on disk."""
        return sum(file.size for file in self.files)

    @property
    def nbytes(self) -> int:
        return self.size

    def location(self, file: int, line: int) -> Location:
        found = self.files[file]
        return Location(str(found.path), line, "line" if found.kind is FileKind.lines else "row")

    def fingerprint(self) -> str:
        """Hash of the contents in order, and of nothing else: a renamed or copied file is the same data."""
        digest = hashlib.blake2b(digest_size=20)
        for file in self.files:
            digest.update(f"{file.kind.value} {file.size}\n".encode())
            with _readable(file.path), file.path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def batches(self) -> Iterator[RowBatch]:
        """All rows, in order.

        Raises:
            UsageError: a file cannot be decompressed or parsed as a whole, or holds no rows.
        """
        start = 0
        for index, file in enumerate(self.files):
            rows = 0
            with _readable(file.path):
                for batch in _READERS[file.kind](index, file, start):
                    rows += len(batch.rows)
                    yield batch
            if rows == 0:
                raise UsageError(_no_rows(file.path))
            start += file.size


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set that the `datasets` library loaded."""

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
        """The one that `datasets` keeps: it changes with the data and with what was done to it."""
        return f"datasets {self.dataset._fingerprint}"

    def batches(self) -> Iterator[RowBatch]:
        """All rows, in order."""
        line = 1
        for columns in self.dataset.iter(batch_size=BATCH_ROWS):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield RowBatch(0, list(range(line, line + len(rows))), list(rows), line + len(rows) - 1)
            line += len(rows)


Source = LocalFiles | HubDataset


def open_source(path: str, *, key: str = "data.path") -> Source:
    """The data behind a path. What exists on this machine comes first, then the Hugging Face hub is asked.

    A folder is searched with its subfolders, in sorted order; names that start with a dot are left out.

    Args:
        path: a file, a folder, a glob or a data set id.
        key: the configuration key that it comes from, for messages.

    Raises:
        UsageError: nothing is there, or it is no data.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = _walk(local)
        if not found:
            raise UsageError(f"{key}={path} is a folder without data files\n  data files are {SUFFIXES}")
    elif local.exists():
        if _kind_of_name(local) is None:
            raise UsageError(f"{key}={path}: this kind of file is not known\n  data files are {SUFFIXES}")
        found = [local]
    elif has_magic(path):
        matches = [Path(match) for match in sorted(glob(str(local), recursive=True))]
        found = [match for match in matches if match.is_file() and _kind_of_name(match) is not None]
        if not found:
            what = f"{len(matches)} files match, and none is data" if matches else "no file matches"
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
    """`jsonl`, `json` or `parquet`; None for a name that no reader is for."""
    match = re.search(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$|\.(parquet)$", path.name.lower())
    if match is None:
        return None
    return match.group(3) or match.group(1).replace("ndjson", "jsonl")


def _look_at(path: Path) -> SourceFile:
    """Check a file by its head, and say how it is read.

    Raises:
        UsageError: the file is not what its name says, and what to do about it.
    """
    name_kind = _kind_of_name(path)
    with _readable(path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            raw_head = stream.read(SNIFF_BYTES)
        if size == 0:
            raise UsageError(f"{path} is empty\n  remove it, or fetch it again if it should hold data")
        suffix = next((suffix for magic, suffix in MAGIC.items() if raw_head.startswith(magic)), None)
        if suffix is not None and path.suffix.lower() != suffix:
            raise UsageError(f"{path} holds {suffix} data under another name\n  rename it so that it ends in {suffix}")
        if name_kind == "parquet":
            if suffix is None:
                raise UsageError(f"{path} is not a parquet file\n  fetch it again, or rename it to what it is")
            return SourceFile(path, FileKind.parquet, size)
        with _open_stream(path) as (text, _):
            head = text.read(SNIFF_BYTES)
    is_whole = len(head) < SNIFF_BYTES
    for bom, encoding in OTHER_BOMS.items():
        if head.startswith(bom):
            raise UsageError(
                f"{path} is {encoding}, and must be UTF-8\n  convert it: iconv -f {encoding} -t UTF-8 {path}"
            )
    if b"\0" in head:
        raise UsageError(f"{path} is a binary file\n  data files are {SUFFIXES}")
    head = head.removeprefix(UTF8_BOM).lstrip()
    if not head and is_whole:
        raise UsageError(_no_rows(path))
    if name_kind == "json" and head.startswith(b"["):
        return SourceFile(path, FileKind.array, size)
    if name_kind == "json" and head.startswith(b"{"):
        _refuse_single_object(path)
    return SourceFile(path, FileKind.lines, size)


def _refuse_single_object(path: Path) -> None:
    """A `.json` file may in truth be JSON lines. One object over many lines is neither those nor an array of rows."""
    with _readable(path), _open_stream(path) as (stream, _):
        line = stream.readline().removeprefix(UTF8_BOM)
        while not line.strip():
            line = stream.readline()
        if _is_json(line) or not _is_json(line + stream.read()):
            return
    raise UsageError(f"{path} is one JSON object, not rows\n  write an array of objects, or an object a line (.jsonl)")


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _no_rows(path: Path) -> str:
    return f"{path} holds no rows\n  remove it, or fetch it again if it should hold data"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong while reading `path` is told in the user's words."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}\n  is it complete? fetch or write it again") from error


@contextmanager
def _open_stream(path: Path) -> Iterator[tuple[BinaryIO, io.FileIO]]:
    """The decompressed bytes, and the file below them, whose position tells how far reading got."""
    with path.open("rb", buffering=0) as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 20)) as stream:
                yield cast("BinaryIO", stream), raw
        elif suffix == ".zst":
            with io.BufferedReader(_ZstdReader(raw), 1 << 20) as stream:
                yield cast("BinaryIO", stream), raw
        else:
            with io.BufferedReader(raw, 1 << 20) as stream:
                yield cast("BinaryIO", stream), raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames and raises at a file that was cut off: `zstandard.open` ends there without a word."""

    def __init__(self, raw: io.FileIO) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._text:
            if not self._compressed:
                self._compressed = self._raw.read(1 << 17)
                if not self._compressed:
                    if self._inside_frame:
                        raise EOFError("the file ends inside a zstd frame")
                    return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._text = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._inside_frame = not self._frame.eof
            self._compressed = self._frame.unused_data
        count = min(len(target), len(self._text))
        target[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def _read_lines(index: int, file: SourceFile, start: int) -> Iterator[RowBatch]:
    lines: list[int] = []
    rows: list[object] = []
    size = 0
    with _open_stream(file.path) as (stream, raw):
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
    with _open_stream(file.path) as (stream, _):
        text = stream.read().removeprefix(UTF8_BOM)
    try:
        rows: list[object] = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(
            f"{file.path}:{error.lineno}: the JSON array is broken here: {error.msg}\n"
            "  mend it, or write an object a line (.jsonl), where data.bad_rows=skip can leave out bad ones"
        ) from error
    del text
    yield from _slices(index, rows, 1, start, file.size, len(rows))


def _read_parquet(index: int, file: SourceFile, start: int) -> Iterator[RowBatch]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            first, total = 1, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                rows: list[object] = batch.to_pylist()
                yield from _slices(index, rows, first, start, file.size, total)
                first += len(rows)
    except ArrowException as error:
        raise OSError(str(error)) from error


def _slices(index: int, rows: Sequence[object], first: int, start: int, size: int, total: int) -> Iterator[RowBatch]:
    """Batches of parsed rows, numbered from `first` of the `total` that a file of `size` bytes holds."""
    for begin in range(0, len(rows), BATCH_ROWS):
        part = list(rows[begin : begin + BATCH_ROWS])
        line = first + begin
        after = line + len(part)
        yield RowBatch(index, list(range(line, after)), part, start + size * (after - 1) // total)


_READERS = {FileKind.lines: _read_lines, FileKind.array: _read_array, FileKind.parquet: _read_parquet}


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None


def _load_from_hub(path: str, key: str) -> HubDataset:
    go_offline_if_unreachable()  # before datasets is imported: it asks then, once and for all
    import datasets

    try:
        splits = datasets.load_dataset(path)
    except (OSError, ValueError) as error:  # unreachable, unknown, gated, or needs the name of one of its parts
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{key}={path} is no file or folder here, and the Hugging Face hub did not give such a data set\n"
            f"  {reason}\n"
            "  check the spelling and the network, or download its files and give their folder"
        ) from error
    if "train" in splits:
        split = "train"
    elif len(splits) == 1:
        split = next(iter(splits))
    else:
        raise UsageError(
            f"{key}={path} has no split named train, but {', '.join(sorted(map(str, splits)))}\n"
            "  download the files of one of them and give their folder"
        )
    if len(splits[split]) == 0:
        raise UsageError(f"{key}={path}: its split {split} holds no rows")
    return HubDataset(f"{path} ({split})", splits[split])
