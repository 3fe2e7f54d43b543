"""Rows from files, folders, globs or a Hugging Face data set, read in batches of bounded size.

`open_source` finds the files (`data.finding`), chooses those of the split (`data.splits`) and checks the head of each
(`data.heads`), so that a file that cannot be data (binary, empty, another compression than its name says) is rejected
before anything else starts. `data.readers` reads them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from chunkflow_cli.data.choosing import Chosen, Wish, choose_files
from chunkflow_cli.data.heads import SourceFile, look_at, no_rows
from chunkflow_cli.data.hub_dataset import is_hub_id, load_from_hub
from chunkflow_cli.data.names import printable
from chunkflow_cli.data.readers import BATCH_ROWS, read_rows
from chunkflow_cli.data.rows import drop_filled_nulls
from chunkflow_cli.data.splits import TRAIN
from chunkflow_cli.data.streams import HashedFile, explain_read_errors
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes.notices import warn_once


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
    """`bytes` are JSON that is not parsed yet. Other values were parsed with the file."""
    position: int
    """How much of `Source.size` has been read after this batch."""


class Source(Protocol):
    """Rows in a fixed order."""

    @property
    def names(self) -> tuple[str, ...]:
        """Files, as messages show them."""

    @property
    def size(self) -> int:
        """The final value of `RowBatch.position`."""

    @property
    def nbytes(self) -> int:
        """Approximate number of bytes of all rows."""

    def location(self, file: int, line: int) -> Location:
        """Return where a row is in the user's data."""

    def fingerprint(self) -> str:
        """Return a hash of the rows and their order."""

    def batches(self) -> Iterator[RowBatch]:
        """Yield all rows in order.

        Raises:
            UsageError: they cannot be read, or are not those that the fingerprint was taken of.
        """


@dataclass(frozen=True)
class LocalFiles:
    """Data files on this machine, in the order in which they are read."""

    files: tuple[SourceFile, ...]
    _hashes: dict[int, str] = field(default_factory=dict, compare=False)
    """Hash of each file's bytes, once the fingerprint was taken."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.shown for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files on disk."""
        return sum(file.size for file in self.files)

    @property
    def nbytes(self) -> int:
        return self.size

    def location(self, file: int, line: int) -> Location:
        found = self.files[file]
        return Location(found.shown, line, "line" if found.kind.has_lines else "row")

    def fingerprint(self) -> str:
        """Return a hash of the contents in order, and of nothing else: a renamed or copied file is the same data.

        From then on, `batches` checks that it reads the same bytes.
        """
        for index, file in enumerate(self.files):
            with explain_read_errors(file.path), HashedFile(file.path) as stream:
                self._hashes[index] = stream.finish()
        parts = (f"{file.kind.value} {self._hashes[index]}\n" for index, file in enumerate(self.files))
        return hashlib.blake2b("".join(parts).encode(), digest_size=20).hexdigest()

    def batches(self) -> Iterator[RowBatch]:
        """Yield all rows in order.

        Raises:
            UsageError: a file cannot be parsed, has no rows, or changed since the fingerprint was taken.
        """
        start = 0
        for index, file in enumerate(self.files):
            finished = partial(self._check_hash, index) if index in self._hashes else None
            count = 0
            with explain_read_errors(file.path):
                for found in read_rows(file, finished):
                    count += len(found.rows)
                    yield RowBatch(index, found.numbers, found.rows, start + min(found.position, file.size))
            if count == 0:
                raise no_rows(file.path)
            start += file.size

    def _check_hash(self, index: int, found: str) -> None:
        if found != self._hashes[index]:
            raise UsageError(
                f"{self.files[index].shown} changed while it was read\n"
                "  run the command again when nothing writes to the data any more"
            )


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
            filled: list[object] = [drop_filled_nulls(row, self.dataset.features) for row in rows]
            yield RowBatch(0, list(range(line, line + len(rows))), filled, line + len(rows) - 1)
            line += len(rows)


MADE_BY = {
    "data/stdlib_demo.jsonl": "python -m chunkflow_cli.cli.demo --data-only",
    "data/stdlib_preferences.jsonl": "python -m chunkflow_cli.cli.demo --preferences",
}
"""Commands that write the data of recipes."""


def open_source(
    path: str | Sequence[str],
    *,
    key: str = "data.path",
    split: str | None = TRAIN,
    split_key: str = "data.split",
    subset: str | None = None,
) -> Source:
    """Return the data at a path, or at several, one after the other. Local files come before the Hugging Face hub.

    What is left out, and what may be in there twice, is said on stderr, once.

    Args:
        path: a file, a folder, a glob or a data set id; or a list of files, folders and globs.
        key: the configuration key that the path comes from, for messages.
        split: the split to read; None is validation or else test, of data that has splits.
        split_key: the configuration key that the split comes from.
        subset: the subset of a data set that has several.

    Raises:
        UsageError: nothing exists at the path, it is not data, or it has no such split or subset.
    """
    if isinstance(path, str):
        wish = Wish(f"{key}={printable(path)}", split, split_key, subset)
        chosen = choose_files(path, wish)
        if chosen is None and is_hub_id(path):
            return HubDataset(*load_from_hub(path, wish))
        return _local_files([(wish, chosen)])
    wishes = [Wish(f"{key}={printable(each)}", split, split_key, subset) for each in path]
    source = _local_files([(wish, choose_files(each, wish)) for each, wish in zip(path, wishes, strict=True)])
    for repeated in [file for file, count in Counter(file.shown for file in source.files).items() if count > 1]:
        warn_once(f"{key} names {repeated} more than once")
    return source


def _local_files(parts: Sequence[tuple[Wish, Chosen | None]]) -> LocalFiles:
    files: list[SourceFile] = []
    for wish, chosen in parts:
        if chosen is None:
            hint = "\n  a data set of the hub cannot be part of a list" if len(parts) > 1 else ""
            hint = next((f"\n  to write it: {by}" for file, by in MADE_BY.items() if wish.named.endswith(file)), hint)
            raise UsageError(
                f"{wish.named}: there is no such file or folder (relative to {printable(Path.cwd())}){hint}"
            )
        for note in chosen.notes:
            warn_once(f"{wish.named}: {note}")
        files += map(look_at, chosen.files)
    return LocalFiles(tuple(files))
