"""The rows of one file, in batches of bounded size, whatever its form.

Nothing is held in memory but a batch: a line, a field or an element of an array that is larger than `ROW_BYTES` is
refused by its place, so that a small compressed file cannot fill the memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import orjson

from chunkflow_cli.data.heads import FileKind, SourceFile
from chunkflow_cli.data.json_array import JsonArrayError, json_elements
from chunkflow_cli.data.rows import UTF8_BOM, UnreadableRow, drop_filled_nulls
from chunkflow_cli.data.streams import HashedFile, open_stream
from chunkflow_cli.errors import UsageError

BATCH_ROWS = 256
"""Maximum rows of a batch. A batch also ends at `BATCH_BYTES` of text."""
BATCH_BYTES = 1 << 20
ROW_BYTES = 1 << 28
"""Maximum number of bytes in a row: about 60 million tokens of English."""
TABLE_BYTES = 1 << 26
"""About how many bytes of a parquet file are decoded at once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a file."""

    numbers: list[int]
    """Line or row number of each, counted from 1."""
    rows: list[object]
    position: int
    """Bytes of the file that have been read."""


Numbered = Iterable[tuple[int, object]]
"""Rows with their numbers."""


def read_rows(file: SourceFile, finished: Callable[[str], None] | None) -> Iterator[Rows]:
    """Yield the rows of a file in order.

    Args:
        finished: called at the end with the hash of all bytes that were read; None reads without one.

    Raises:
        UsageError: the file cannot be parsed.
        OSError: it cannot be read.
    """
    if file.kind in _TABLES:
        with file.path.open("rb") as stream, HashedFile(file.path) as again:
            yield from _TABLES[file.kind](file, stream)
            if finished is not None:
                finished(again.finish())  # a table is not read from its start to its end: hashed after its rows
        return
    with open_stream(file.path, is_hashed=finished is not None) as (stream, raw):
        yield from _batches(_TEXTS[file.kind](file, stream), raw)
        if finished is not None and isinstance(raw, HashedFile):
            finished(raw.finish())


def _batches(rows: Numbered, raw: io.FileIO) -> Iterator[Rows]:
    numbers: list[int] = []
    batch: list[object] = []
    size = 0
    for number, row in rows:
        numbers.append(number)
        batch.append(row)
        size += len(row) if isinstance(row, bytes) else _size(row)
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield Rows(numbers, batch, raw.tell())
            numbers, batch, size = [], [], 0
    if batch:
        yield Rows(numbers, batch, raw.tell())


def _size(row: object) -> int:
    return sum(len(value or "") for value in row.values()) if isinstance(row, dict) else 0


def _read_lines(file: SourceFile, stream: BinaryIO) -> Numbered:
    for number, line in _lines(file, stream):
        line = line.strip()
        if line:
            yield number, line


def _lines(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(partial(stream.readline, ROW_BYTES + 1), b""), start=1):
        if len(line) > ROW_BYTES:
            raise _too_large(file, number, "the line")
        # Files that were joined by `cat` have a byte order mark in the middle, too.
        yield number, line.removeprefix(UTF8_BOM) if line[:1] == b"\xef" else line


def _too_large(file: SourceFile, line: int, what: str) -> UsageError:
    return UsageError(
        f"{file.shown}:{line}: {what} is larger than {ROW_BYTES >> 20} MiB\n"
        "  is it one row? split it, or remove it from the file"
    )


def _read_array(file: SourceFile, stream: BinaryIO) -> Numbered:
    try:
        yield from enumerate(json_elements(stream, largest=ROW_BYTES), start=1)
    except JsonArrayError as error:
        raise UsageError(
            f"{file.shown}:{error.line}: invalid JSON in the array: {error}\n"
            "  fix it, or write one object per line (.jsonl), where data.bad_rows=skip can skip bad rows"
        ) from error


def _read_csv(file: SourceFile, stream: BinaryIO) -> Numbered:
    invalid: set[int] = set()

    def decoded() -> Iterator[str]:
        for number, line in _lines(file, stream):
            try:
                yield line.decode()
            except UnicodeDecodeError:
                invalid.add(number)
                yield line.decode(errors="replace")

    csv.field_size_limit(ROW_BYTES)
    table = csv.reader(decoded(), delimiter="\t" if file.kind is FileKind.tsv else ",", strict=True)
    first = 1
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise UsageError(f"{file.shown}:1: two columns have the same name\n  the first line must name the columns")
        first = table.line_num + 1
        for cells in table:
            if cells:
                bad = sorted(invalid.intersection(range(first, table.line_num + 1)))
                yield first, _csv_row(header, cells, bad)
            first = table.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{file.shown}:{first}: invalid {file.kind.value}: {error}\n"
            '  put fields with commas, quotes or newlines in quotes, and write a quote in them as ""'
        ) from error


def _csv_row(header: list[str], cells: list[str], invalid_lines: list[int]) -> object:
    """Return a row of strings. An empty cell is null, as it is for `datasets`."""
    if invalid_lines:
        return UnreadableRow("not valid UTF-8")
    if len(cells) != len(header):
        return UnreadableRow(f"the row has {len(cells)} fields, and the first line names {len(header)} columns")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _read_document(file: SourceFile, stream: BinaryIO) -> Numbered:
    text = stream.read(ROW_BYTES + 1)
    if len(text) > ROW_BYTES:
        raise _too_large(file, 1, "the text")
    try:
        yield 1, {"text": text.removeprefix(UTF8_BOM).decode()}
    except UnicodeDecodeError as error:
        yield 1, UnreadableRow(f"not valid UTF-8 at byte {error.start + 1} of the file")


def _read_parquet(file: SourceFile, stream: BinaryIO) -> Iterator[Rows]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(stream) as table:
            total, first = table.metadata.num_rows, 1
            groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
            largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
            for batch in table.iter_batches(batch_size=max(1, min(BATCH_ROWS, TABLE_BYTES // max(1, largest)))):
                for rows in _slices(batch, first):
                    yield Rows(*rows, file.size * rows[0][-1] // total)
                first += batch.num_rows
    except ArrowException as error:
        raise OSError(str(error)) from error


def _read_arrow(file: SourceFile, stream: BinaryIO) -> Iterator[Rows]:
    from pyarrow import ArrowException, ipc

    try:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            with ipc.open_file(stream) as table:
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
                yield from _table_rows(batches, stream)
        else:
            with ipc.open_stream(stream) as table:
                yield from _table_rows(table, stream)
    except ArrowException as error:
        raise OSError(str(error)) from error


def _table_rows(batches: Iterable[Any], stream: BinaryIO) -> Iterator[Rows]:
    first = 1
    for batch in batches:
        batch.validate(full=True)  # Arrow does not check offsets itself, which may point anywhere
        for rows in _slices(batch, first):
            yield Rows(*rows, stream.tell())
        first += batch.num_rows


def _slices(batch: Any, first: int) -> Iterator[tuple[list[int], list[object]]]:
    """Yield the rows of an Arrow batch with their numbers, which begin at `first`."""
    decoders = {field.name: decode for field in batch.schema if (decode := _json_decoder(field.type))}
    for begin in range(0, batch.num_rows, BATCH_ROWS):
        rows: list[Any] = [drop_filled_nulls(row) for row in batch.slice(begin, BATCH_ROWS).to_pylist()]
        for name, decode in decoders.items():
            for row in rows:
                row[name] = decode(row[name])
        yield list(range(first + begin, first + begin + len(rows))), rows


def _json_decoder(type: Any) -> Callable[[Any], Any] | None:
    """Return what makes JSON of a column's values, or None if none of them is text that holds JSON.

    `datasets` writes values of mixed types, such as the parameters of different tools, as text of Arrow's type json.
    """
    from pyarrow import types

    if str(type).startswith("extension<arrow.json"):
        return lambda value: None if value is None else orjson.loads(value)
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        element = _json_decoder(type.value_type)
        return element and (lambda values: None if values is None else [element(value) for value in values])
    if types.is_struct(type):
        fields = {field.name: decode for field in type if (decode := _json_decoder(field.type))}
        if fields:
            return lambda value: (
                None
                if value is None
                else value | {name: decode(value[name]) for name, decode in fields.items() if name in value}
            )
    return None


_TEXTS: dict[FileKind, Callable[[SourceFile, BinaryIO], Numbered]] = {
    FileKind.lines: _read_lines,
    FileKind.array: _read_array,
    FileKind.csv: _read_csv,
    FileKind.tsv: _read_csv,
    FileKind.document: _read_document,
}
_TABLES: dict[FileKind, Callable[[SourceFile, BinaryIO], Iterator[Rows]]] = {
    FileKind.parquet: _read_parquet,
    FileKind.arrow: _read_arrow,
}
