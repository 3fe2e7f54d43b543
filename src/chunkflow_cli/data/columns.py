"""Rename the columns of rows (`data.columns`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.source import Location, RowBatch, Source
from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class RenamedColumns:
    """A source with renamed columns. A column that already had one of the new names is replaced."""

    source: Source
    columns: Mapping[str, str]
    """New name of each column, by its name in the data."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.names

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def location(self, file: int, line: int) -> Location:
        return self.source.location(file, line)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {json.dumps(sorted(self.columns.items()))}"

    def batches(self) -> Iterator[RowBatch]:
        """Yield all rows in order. A row that is not an object stays as it is."""
        for batch in self.source.batches():
            yield replace(batch, rows=[self._renamed(row) for row in batch.rows])

    def _renamed(self, raw: object) -> object:
        try:
            row = decode_row(raw)
        except BadRowError:
            return raw  # found and reported where rows are parsed
        new = {self.columns[name]: value for name, value in row.items() if name in self.columns}
        return {name: value for name, value in row.items() if name not in self.columns and name not in new} | new


def rename_columns(source: Source, columns: Mapping[str, str], key: str) -> Source:
    """Return a source with new names for its columns.

    Raises:
        UsageError: no row has one of the columns.
    """
    missing, keys = set(columns), list[str]()
    for batch in source.batches():
        for raw in batch.rows:
            try:
                row = decode_row(raw)
            except BadRowError:
                continue
            keys = keys or list(row)
            missing -= row.keys()
            if not missing:
                return RenamedColumns(source, columns)
    if not missing:
        return source
    raise UsageError(
        f"data.columns: no row of {key} has a column {', '.join(sorted(missing))}\n"
        f"  the first row has {', '.join(keys) or 'no columns'}"
    )
