"""Reading rows from every kind of file, and errors for every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.data import source
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import (
    BadRowError,
)
from chunkflow_cli.data.source import HubDataset, LocalFiles, Location, open_source
from chunkflow_cli.errors import UsageError

ROWS: list[dict[str, Any]] = [{"text": "one"}, {"text": "zwei\nüber"}, {"text": "三"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the location and the content of every row at a path."""
    opened = open_source(path)
    return [
        (str(opened.location(batch.file, line)), decode_row(row))
        for batch in opened.batches()
        for line, row in zip(batch.lines, batch.rows, strict=True)
    ]


def rows_of(path: str) -> list[dict[str, Any]]:
    return [row for _, row in read(path)]


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", JSONL),
        ("A.JSONL", JSONL),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("a.jsonl.gz", gzip.compress(JSONL[:9]) + gzip.compress(JSONL[9:])),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.jsonl.zst", zstandard.compress(JSONL)),
        ("a.jsonl.zst", zstandard.compress(JSONL[:9]) + zstandard.compress(JSONL[9:])),
        ("a.json.zst", zstandard.compress(json.dumps(ROWS).encode())),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("a.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\n  \n" + JSONL.replace(b"\n", b"\n\n\r\n")),
        ("a.jsonl", JSONL.rstrip(b"\n")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_encoding_of_the_same_rows_reads_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    """A second gzip member, a BOM or CRLF must not lose a row or leave a stray character in a row."""
    assert rows_of(write(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(600)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert rows_of(path) == rows
    assert [str(where) for where, _ in read(path)][299] == f"{path} row 300"


def test_line_numbers_count_blank_lines_and_rows_count_from_one(tmp_path: Path) -> None:
    """A line number that skips blank lines points the user at the wrong row."""
    lines = write(tmp_path / "a.jsonl", b'\n{"text": "a"}\n\n\n{"text": "b"}\n')
    assert [where for where, _ in read(lines)] == [f"{lines}:2", f"{lines}:5"]
    array = write(tmp_path / "b.json", json.dumps(ROWS, indent=4).encode())
    assert [where for where, _ in read(array)] == [f"{array} row {row}" for row in (1, 2, 3)]
    assert str(Location("x.jsonl", 12)) == "x.jsonl:12"


def test_a_folder_is_read_sorted_with_subfolders_and_without_hidden_files(tmp_path: Path) -> None:
    """The order must not depend on the disk: sample i has to be the same on every machine."""
    for name in ("b.jsonl", "a/z.jsonl", "a/b.jsonl", ".cache/x.jsonl", "a/.hidden.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}).encode())
    write(tmp_path / "README.md", b"no data")
    assert [row["text"] for row in rows_of(str(tmp_path))] == ["a/b.jsonl", "a/z.jsonl", "b.jsonl"]


def test_glob_and_a_name_that_looks_like_one(tmp_path: Path) -> None:
    for name in ("part-2.jsonl", "part-1.jsonl", "part-3.txt", "odd[1].jsonl"):
        write(tmp_path / name, json.dumps({"text": name}).encode())
    assert [row["text"] for row in rows_of(str(tmp_path / "part-*"))] == ["part-1.jsonl", "part-2.jsonl"]
    assert [row["text"] for row in rows_of(str(tmp_path / "odd[1].jsonl"))] == ["odd[1].jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n\r\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", b"\x7fELF\0\0\1\2" * 40, "is a binary file"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16, but must be UTF-8"),
        ("a.jsonl", gzip.compress(JSONL), "holds .gz data, but its name says otherwise"),
        ("a.json", zstandard.compress(JSONL), "holds .zst data, but its name says otherwise"),
        ("a.jsonl.gz", JSONL, "cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", JSONL, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-12], "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-6], "Truncated compressed stream"),
        ("a.parquet", JSONL, "is not a parquet file"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "cannot be read"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', "a.json:2: invalid JSON in the array"),
        ("a.json", json.dumps({"data": ROWS}, indent=2).encode(), "is one JSON object, not rows"),
        ("a.txt", JSONL, "unknown file type"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ""
    ),  # compressed bytes contain the time, so they cannot be part of a test name
)
def test_a_file_that_is_not_data_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Some trainer has silently trained on each of these as noise or as nothing, above all on a cut-off file."""
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError) as error:
        rows_of(path)
    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" in str(error.value), "the message has a remedy"


def test_an_empty_file_in_a_folder_is_an_error(tmp_path: Path) -> None:
    """A shard whose download failed must not silently shrink the data set."""
    write(tmp_path / "1.jsonl", JSONL)
    write(tmp_path / "2.jsonl", b"")
    with pytest.raises(UsageError, match=r"2\.jsonl is empty"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["./x", "/no/such/folder", "~/no-such", "data/train.jsonl", "a b", "a/b/c", "x.parquet"]
)
def test_the_hub_is_not_asked_for_a_path_that_does_not_exist(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in a file name must not cause half a minute of network retries."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UsageError, match="there is no such file or folder"):
        open_source(path)


def test_folder_and_glob_without_data(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"x")
    with pytest.raises(UsageError, match="a folder without data files"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="no file matches"):
        open_source(str(tmp_path / "*.jsonl"))
    with pytest.raises(UsageError, match="1 files match, but none is a data file"):
        open_source(str(tmp_path / "*"))
    with pytest.raises(UsageError, match=r"^data\.eval_path="):
        open_source(str(tmp_path), key="data.eval_path")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "\xff\xfe"}', "not valid UTF-8 at byte 11"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b"[1, 2]", "a list, not an object (a file that holds one JSON array must be named .json)"),
        (b'"text"', "a string, not an object"),
        (b"null", "null, not an object"),
    ],
)
def test_a_bad_line_is_a_bad_row_and_reading_goes_on(tmp_path: Path, line: bytes, reason: str) -> None:
    """One broken line of a million is reported with its number, and the next one is read."""
    opened = open_source(write(tmp_path / "a.jsonl", JSONL + line + b"\n" + JSONL))
    (batch,) = opened.batches()
    assert batch.lines == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(BadRowError) as error:
        decode_row(batch.rows[3])
    assert reason in str(error.value)
    assert decode_row(batch.rows[4]) == ROWS[0]


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"", b"  ", b'{"text": "a"}', b'{"text": "bb"}', b"{oops", b"\xff"]), min_size=1),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    batch_bytes=st.integers(1, 40),
)
def test_every_line_that_is_not_blank_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bytes, bom: bool, batch_bytes: int
) -> None:
    """Lines that are lost or repeated at the edge of a batch would go unnoticed, so compare with the lines themselves."""
    expected = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    path = write(tmp_path_factory.mktemp("d") / "a.jsonl", (b"\xef\xbb\xbf" if bom else b"") + newline.join(lines))
    if not expected:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BATCH_BYTES", batch_bytes)
        batches = list(open_source(path).batches())
    assert [pair for batch in batches for pair in zip(batch.lines, batch.rows, strict=True)] == expected
    assert [batch.position for batch in batches] == sorted(batch.position for batch in batches)
    assert batches[-1].position == Path(path).stat().st_size


def test_the_fingerprint_depends_on_the_content_only(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a" / "x.jsonl", JSONL), write(tmp_path / "b" / "y.ndjson", JSONL)
    other = write(tmp_path / "c.jsonl", JSONL.replace(b"one", b"two"))
    assert open_source(first).fingerprint() == open_source(same).fingerprint() != open_source(other).fingerprint()
    write(tmp_path / "two" / "1.jsonl", JSONL[:14])
    write(tmp_path / "two" / "2.jsonl", JSONL[14:])
    assert open_source(str(tmp_path / "two")).fingerprint() != open_source(first).fingerprint()


# Hugging Face data sets


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    monkeypatch.setattr("datasets.load_dataset", load)


@pytest.mark.torch
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(300)]
    one, two = Dataset.from_list(rows), Dataset.from_list(rows[:5])
    for splits, expected in (({"test": two, "train": one}, 300), ({"validation": two}, 5)):
        hub(monkeypatch, lambda _, splits=splits: DatasetDict(splits))
        opened = open_source("someone/chats")
        assert isinstance(opened, HubDataset)
        assert rows_of("someone/chats") == rows[:expected]
    assert read("someone/chats")[3][0] == "someone/chats (validation) row 4"
    hub(monkeypatch, lambda _: DatasetDict({"a": one, "b": two}))
    with pytest.raises(UsageError, match="has no split named train; its splits are a, b"):
        open_source("someone/chats")


def test_datasets_may_import_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`chunkflow analyze` keeps torch out, by an entry in `sys.modules` that `datasets` takes for the module."""
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda _: pytest.fail("torch is kept out") if "torch" in sys.modules else {"train": [1]})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_source("someone/chats").size == 1


def test_a_local_path_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "someone" / "chats" / "a.jsonl", JSONL)
    hub(monkeypatch, lambda _: pytest.fail("the hub was asked"))
    assert isinstance(open_source("someone/chats"), LocalFiles)


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> Any:
        raise ConnectionError("Couldn't reach 'someone/chats' on the Hub\nand a page of details")

    hub(monkeypatch, load)
    with pytest.raises(UsageError) as error:
        open_source("someone/chats")
    assert "Couldn't reach" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
