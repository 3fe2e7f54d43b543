"""Check the first bytes of a file: whether its content matches its name, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import orjson

from chunkflow_cli.data.names import SUFFIXES, kind_of_name, printable
from chunkflow_cli.data.rows import UTF8_BOM
from chunkflow_cli.data.streams import explain_read_errors, open_stream
from chunkflow_cli.errors import UsageError

SNIFF_BYTES = 1 << 16
OBJECT_BYTES = 1 << 26
"""How much of a `.json` file that begins with an object is read to tell one object from JSON lines."""

OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
ARROW_STREAM = b"\xff\xff\xff\xff"
LFS_POINTER = b"version https://git-lfs"
WEB_PAGES = {b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<?xml": "an XML document"}
"""Beginnings of web pages, which a server sends instead of data: a login page, or an error."""


class FileKind(str, Enum):
    lines = "lines"
    """One JSON object per line."""
    array = "array"
    """One JSON array of objects."""
    csv = "csv"
    """A table whose first line names the columns."""
    tsv = "tsv"
    """The same with tabs."""
    document = "document"
    """One text."""
    parquet = "parquet"
    arrow = "arrow"
    """Arrow's stream or file format, as `Dataset.save_to_disk` writes it."""

    @property
    def has_lines(self) -> bool:
        """Whether a place in the file is a line, not a row."""
        return self in (FileKind.lines, FileKind.csv, FileKind.tsv)


_KINDS = {"csv": FileKind.csv, "tsv": FileKind.tsv, "parquet": FileKind.parquet, "arrow": FileKind.arrow}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A data file and how to read it."""

    path: Path
    kind: FileKind
    size: int
    """Bytes on disk."""

    @property
    def shown(self) -> str:
        """The path, for messages."""
        return printable(self.path)


def look_at(path: Path) -> SourceFile:
    """Check the head of a file and return how to read it.

    Raises:
        UsageError: the content is not what the name says.
    """
    name_kind, shown = kind_of_name(path), printable(path)
    with explain_read_errors(path):
        size = path.stat().st_size
        with path.open("rb") as stream:
            raw_head = stream.read(SNIFF_BYTES)
    if size == 0:
        raise UsageError(f"{shown} is empty\n  delete it, or download it again if it should hold data")
    suffix = next((suffix for magic, suffix in MAGIC.items() if raw_head.startswith(magic)), None)
    if suffix is not None and path.suffix.lower() != suffix:
        raise UsageError(
            f"{shown} holds {suffix} data, but its name says otherwise\n  rename it so that it ends in {suffix}"
        )
    if raw_head.startswith(LFS_POINTER):
        raise UsageError(f"{shown} is a git-lfs pointer, not the data\n  fetch the data: git lfs pull")
    if name_kind == "parquet":
        if suffix is None:
            raise UsageError(f"{shown} is not a parquet file\n  download it again, or give it the right suffix")
        return SourceFile(path, FileKind.parquet, size)
    if name_kind == "arrow":
        if suffix is None and not raw_head.startswith(ARROW_STREAM):
            raise UsageError(f"{shown} is not an Arrow file\n  download it again, or give it the right suffix")
        return SourceFile(path, FileKind.arrow, size)
    with explain_read_errors(path), open_stream(path) as (text, _):
        head = text.read(SNIFF_BYTES)
    if name_kind != "txt":
        _reject_web_page(shown, head)
    for bom, encoding in OTHER_BOMS.items():
        if head.startswith(bom):
            raise UsageError(
                f"{shown} is {encoding}, but must be UTF-8\n  convert it: iconv -f {encoding} -t UTF-8 {shown}"
            )
    if b"\0" in head:
        raise UsageError(f"{shown} is a binary file\n  data files are {SUFFIXES}")
    is_whole = len(head) < SNIFF_BYTES
    head = head.removeprefix(UTF8_BOM).lstrip()
    if not head and is_whole:
        raise no_rows(path)
    if name_kind == "txt":
        return SourceFile(path, FileKind.document, size)
    if name_kind == "json" and head.startswith(b"["):
        return SourceFile(path, FileKind.array, size)
    if name_kind == "json" and head.startswith(b"{"):
        _reject_single_object(path)
    return SourceFile(path, _KINDS.get(name_kind or "", FileKind.lines), size)


def no_rows(path: Path) -> UsageError:
    """Return the error for a file without rows."""
    return UsageError(f"{printable(path)} has no rows\n  delete it, or download it again if it should hold data")


def _reject_web_page(shown: str, head: bytes) -> None:
    start = head[:100].lstrip().lower()
    for beginning, what in WEB_PAGES.items():
        if start.startswith(beginning):
            raise UsageError(f"{shown} is {what}, not data\n  download it again; does the server ask you to log in?")


def _reject_single_object(path: Path) -> None:
    """Raise if a `.json` file is one object over many lines. JSON lines under that name are accepted."""
    with explain_read_errors(path), open_stream(path) as (stream, _):
        line = stream.readline(OBJECT_BYTES).removeprefix(UTF8_BOM)
        while line and not line.strip():
            line = stream.readline(OBJECT_BYTES)
        if _is_json(line) or not _is_json(line + stream.read(OBJECT_BYTES)):
            return
    raise UsageError(
        f"{printable(path)} is one JSON object, not rows\n  write an array of objects, or one object per line (.jsonl)"
    )


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
