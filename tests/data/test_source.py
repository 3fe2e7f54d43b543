"""Reading rows from every kind of file, and errors for every way in which a file can be wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.data import json_array, readers
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
        ("a.jsonl.xz", lzma.compress(JSONL[:9]) + lzma.compress(JSONL[9:]) + bytes(8)),
        ("a.jsonl.bz2", bz2.compress(JSONL[:9]) + bz2.compress(JSONL[9:])),
        ("a.csv", '\ufefftext\r\none\r\n"zwei\nüber"\r\n\r\n三\r\n'.encode()),
        ("a.tsv.gz", gzip.compress('text\none\n"zwei\nüber"\n三'.encode())),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", JSONL.replace(b"\n", b"\n\xef\xbb\xbf", 1)),
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
        ("a.foo", JSONL, "unknown file type"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-9], "cannot be read"),
        ("a.jsonl.xz", lzma.compress(JSONL) + b"more", "cannot be read"),
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-9], "Truncated compressed stream"),
        ("a.jsonl.bz2", bz2.compress(JSONL) + b"more", "cannot be read"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "invalid JSON in the array: Expecting value"),
        ("a.json", b'[{"text": "a"}]\n{}', "a.json:2: invalid JSON in the array: something follows"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>log in</html>", "is an HTML page"),
        ("a.arrow", JSONL, "is not an Arrow file"),
        ("a.csv", b'text\n"a\nb\n', "a.csv:2: invalid csv"),
        ("a.csv", b"text,text\na,b\n", "two columns have the same name"),
        ("a.csv", b"text\n", "has no rows"),
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
    write(tmp_path / "notes.foo", b"x")
    with pytest.raises(UsageError, match="a folder without data files"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="no file matches"):
        open_source(str(tmp_path / "*.jsonl"))
    with pytest.raises(
        UsageError, match=r"1 file match, but none is a data file\n  not read: notes.foo \(unknown suffix\)"
    ):
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
        patch.setattr(readers, "BATCH_BYTES", batch_bytes)
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


# Every file counts, or is named


def files_of(path: str | list[str], **wish: Any) -> list[str]:
    source = open_source(path, **wish)
    assert isinstance(source, LocalFiles)
    return [file.path.name for file in source.files]


def make(folder: Path, *names: str) -> str:
    for name in names:
        write(folder / name, json.dumps({"text": name}).encode())
    return str(folder)


@pytest.mark.torch
def test_splits_by_name_are_those_of_datasets(tmp_path: Path) -> None:
    """A test set that is trained on makes every later measurement worthless, and nothing would show it."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    for number, names in enumerate([
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("my-train-1.jsonl", "my_dev_1.jsonl", "x.eval.jsonl"),
        ("train/a.jsonl", "valid/a.jsonl", "testing/b/a.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
        ("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
        ("training2.jsonl", "evaluation 3.jsonl"),
        ("latest.jsonl", "trainer.jsonl", "developers.jsonl", "contest/b.jsonl"),
    ]):  # fmt: skip
        folder = make(tmp_path / str(number), *names)
        for split, patterns in get_data_patterns(folder).items():
            theirs: set[str] = set()
            for pattern in patterns:
                with suppress(FileNotFoundError):  # a pattern that no file matches
                    theirs.update(str(Path(file).relative_to(folder)) for file in resolve_pattern(pattern, folder))
            ours = {str(file.path.relative_to(folder)) for file in open_source(folder, split=str(split)).files}
            assert ours == theirs, (names, split)


def test_train_and_test_sets_are_splits_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", "trainset.jsonl", "testset.jsonl", "asset.jsonl")
    assert [file.path.name for file in open_source(folder).files] == ["trainset.jsonl"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match=r"pipe.jsonl is neither a file nor a folder"):
        open_source(str(tmp_path / "pipe.jsonl"))


def test_the_other_splits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "d", "train.jsonl", "dev.jsonl", "test/x.jsonl", "rest.jsonl")
    assert files_of(folder) == files_of(folder) == ["train.jsonl"]
    assert capsys.readouterr().err == (
        f"warning: data.path={folder}: only the split train is read, not: "
        "validation (dev.jsonl), test (test/x.jsonl), no split (rest.jsonl)\n"
    )
    assert files_of(folder, split="val") == files_of(folder, split=None) == ["dev.jsonl"]
    assert len(files_of(folder, split="all")) == 4
    assert files_of(folder, split="train+test") == ["x.jsonl", "train.jsonl"]
    assert files_of(f"{folder}/*.jsonl") == ["train.jsonl"], "a glob that names no split"
    assert files_of(f"{folder}/test*/*.jsonl") == files_of(f"{folder}/test/x.jsonl") == ["x.jsonl"], "named as such"
    with pytest.raises(UsageError, match="has no split train; its splits are test"):
        files_of(f"{folder}/*/*.jsonl")
    with pytest.raises(UsageError, match=r"no split foo; its splits are train, validation, test\n.*data\.split=all"):
        files_of(folder, split="foo")
    assert files_of(make(tmp_path / "unnamed", "a.jsonl", "test.jsonl")) == ["a.jsonl"]
    with pytest.raises(UsageError, match="has no split train; its splits are test"):
        files_of(make(tmp_path / "tests only", "test.jsonl"))
    with pytest.raises(UsageError, match="no name of a file or folder in it is that of a split"):
        files_of(make(tmp_path / "none", "a.jsonl"), split="test")


def test_files_that_do_not_count_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard with an unknown suffix would be missed by nobody, and one that is there twice would count twice."""
    folder = tmp_path / "d"
    make(folder, "a.jsonl", "b.jsonl", "c.jsonl.part", ".d.jsonl", "notes.txt", "part-00000", ".git/x.jsonl")
    make(folder, "README.md", "LICENSE", "dataset_infos.json", "._a.jsonl", "picture.png")
    make(folder, "run/.hydra/config.yaml", "run/metrics.jsonl", "run/final/tokenizer.json", "run/final/config.json")
    make(folder, "model/config.json", "model/tokenizer.json", "cache/k/meta.json", "cache/k/input_ids.npy")
    make(tmp_path, "far/linked.jsonl")
    write(folder / "a.jsonl.gz", gzip.compress((folder / "a.jsonl").read_bytes()))
    write(folder / "copy.jsonl", (folder / "b.jsonl").read_bytes())
    (folder / "link.jsonl").symlink_to("a.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "far").symlink_to("../far")
    os.mkfifo(folder / "pipe.jsonl")
    assert files_of(str(folder)) == ["a.jsonl", "b.jsonl", "copy.jsonl", "linked.jsonl"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: data.path={folder}: not read: model (a model), run (a run's output), notes.txt (a text next to rows), "
        ".d.jsonl (hidden), pipe.jsonl (not a file), loop (the same folder as .), "
        "a.jsonl.gz, link.jsonl (the same rows as a.jsonl), cache/k (tokenized data), "
        "c.jsonl.part, part-00000 (unknown suffix)",
        f"warning: data.path={folder}: b.jsonl, copy.jsonl hold the same bytes; are rows in there twice?",
    ]


def test_several_forms_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with the original and the converted file has each row twice."""
    folder = make(tmp_path, "a.jsonl", "b.jsonl", "a.csv")
    write(tmp_path / "c.jsonl.xz", lzma.compress(JSONL))
    assert files_of(folder) == ["a.csv", "a.jsonl", "b.jsonl", "c.jsonl.xz"]
    forms = "a.csv; a.jsonl, b.jsonl; c.jsonl.xz"
    expected = f"warning: data.path={folder}: files in 3 forms are read: {forms}; are rows in there twice?\n"
    assert capsys.readouterr().err == expected


def test_a_list_of_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, "b.jsonl", "c/a.jsonl", "c/test.jsonl")
    assert files_of([f"{folder}/c", f"{folder}/b.jsonl", f"{folder}/c/*.jsonl"]) == ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert f"warning: data.path names {folder}/c/a.jsonl more than once\n" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"^data\.path=nowhere: there is no such file"):
        files_of([f"{folder}/b.jsonl", "nowhere"])


@pytest.mark.parametrize("folder", ["plain", "a[1]", "[/b]", "new\nline", os.fsdecode(b"latin-\xe9")])
def test_odd_names(tmp_path: Path, folder: str) -> None:
    """They are read, and shown on one line that every terminal takes."""
    make(tmp_path / folder, "a.jsonl")
    for path in (tmp_path / folder, tmp_path / folder / "*.jsonl", tmp_path / folder / "a.jsonl"):
        ((where, row),) = read(str(path))
        assert row == {"text": "a.jsonl"}
        assert where.encode().decode().isprintable()


def test_documents(tmp_path: Path) -> None:
    make(tmp_path, "README.md")
    for name, text in (("b.txt", "One.\r\nTwo."), ("a.txt", "\ufeffÄ\n")):
        write(tmp_path / name, text.encode())
    for path in ("", "*.txt"):
        assert [row["text"] for row in rows_of(str(tmp_path / path))] == ["Ä\n", "One.\r\nTwo."]
    write(tmp_path / "b.txt", b"\xff")
    with pytest.raises(BadRowError, match="not valid UTF-8 at byte 1 of the file"):
        rows_of(str(tmp_path / "b.txt"))


def test_csv_rows(tmp_path: Path) -> None:
    """Cells stay text (007 is no number), and a row with too many cells is a bad row, which `skip` can skip."""
    path = write(tmp_path / "a.csv", b'prompt,completion\n1 + 1 =,007\n"a, ""b""\nc",\nx,y,z\n\xff,y\nlast,row\n')
    (batch,) = open_source(path).batches()
    assert batch.lines == [2, 3, 5, 6, 7]
    assert batch.rows[:2] == [{"prompt": "1 + 1 =", "completion": "007"}, {"prompt": 'a, "b"\nc', "completion": None}]
    for row, reason in zip(
        batch.rows[2:4], ["has 3 fields, and the first line names 2", "not valid UTF-8"], strict=True
    ):
        with pytest.raises(BadRowError, match=reason):
            decode_row(row)


@pytest.mark.torch
def test_saved_data_sets(tmp_path: Path) -> None:
    """`datasets` writes values of mixed types as text of Arrow's type json: they are objects again."""
    from datasets import Dataset, DatasetDict

    rows = [{"text": "a", "tools": [{"x": 1}]}, {"text": "b", "tools": [{"x": "y"}]}]
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    data.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict({"train_sft": data, "test_sft": data.select([0])}).save_to_disk(tmp_path / "both")
    data.to_parquet(tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "one")) == rows_of(str(tmp_path / "a.parquet")) == rows
    assert files_of(str(tmp_path / "both"), split="test_sft") == ["data-00000-of-00001.arrow"]
    with pytest.raises(UsageError, match="its splits are test_sft, train_sft"):
        rows_of(str(tmp_path / "both"))


def test_subsets_of_a_repository(tmp_path: Path) -> None:
    """A copy of a repository holds all subsets, often the same rows in several forms."""
    folder = make(tmp_path, "main/train-0.jsonl", "main/test-0.jsonl", "other/train-0.jsonl")
    with pytest.raises(UsageError, match="has no subset none; its subsets are main, other"):
        files_of(folder, subset="none")
    assert len(files_of(folder, subset="other")) == 1, "a subfolder"
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("main", "other")
    )
    write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n# Data\n".encode())
    with pytest.raises(UsageError, match=r"has several subsets: main, other\n  choose one with data\.subset"):
        files_of(folder)
    assert files_of(folder, subset="main") == ["train-0.jsonl"]
    marked = configs.replace("config_name: other", "config_name: other\n  default: true")
    write(tmp_path / "README.md", f"---\nconfigs:\n{marked}---\n".encode())
    assert [read(folder)[0][0], read(folder)[0][1]] == [
        f"{folder}/other/train-0.jsonl:1",
        {"text": "other/train-0.jsonl"},
    ]
    assert files_of(folder, subset="other") == ["train-0.jsonl"]


# Size


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_row_that_would_fill_the_memory_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few hundred kilobytes of .zst can hold a line of gigabytes."""
    monkeypatch.setattr(readers, "ROW_BYTES", 3 << 20)
    content = b'{"text": "a"}\n{"text": "' + b" " * (8 << 20) + b'"}\n'
    if name == "a.json":
        content = b"[" + content.replace(b"\n{", b"\n,{") + b"]"
    if name == "a.csv":
        content = b'text\n"' + (b" " * 1023 + b"\n") * (8 << 10) + b'"\n'
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    path = write(tmp_path / name, pack(content))
    with pytest.raises(UsageError, match=rf"{name}:2: .*(larger than 3 MiB|more than 3 MiB|field larger)"):
        rows_of(path)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    indent=st.none() | st.integers(0, 2),
    window=st.integers(1, 40),
    ascii=st.booleans(),
)
@example(rows=[0.0, -1e-7], indent=None, window=1, ascii=False)
def test_arrays_are_read_in_parts(rows: list[Any], indent: int | None, window: int, ascii: bool) -> None:
    """Wherever the window ends, in a number, an escape or a character, the elements are those of `json.loads`."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "WINDOW_BYTES", window)
        found = list(json_array.json_elements(io.BytesIO(text), largest=1 << 20))
    assert [json.loads(element.decode("utf-8", "surrogatepass")) for element in found] == rows


# Changes while reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("change", ["edit", "append"])
def test_a_change_after_the_fingerprint_is_noticed(tmp_path: Path, name: str, change: str) -> None:
    """Other rows under this fingerprint would be believed for good. Size and time of the file need not change."""
    if name == "a.parquet":
        path = Path(write_parquet(tmp_path / name, [{"text": f"row {number}"} for number in range(2000)]))
    else:
        rows = [{"text": f"row {number}"} for number in range(2000)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content = json.dumps(rows).encode() if name == "a.json" else content
        content = b"text\n" + b"row\n" * 2000 if name == "a.csv" else content
        path = Path(write(tmp_path / name, gzip.compress(content, 0) if name.endswith(".gz") else content))
    opened = open_source(str(path))
    assert isinstance(opened, LocalFiles)
    before = opened.fingerprint()
    assert sum(len(batch.rows) for batch in opened.batches()) == 2000
    with path.open("r+b") as file:
        if change == "edit":
            position = file.read().rindex(b"row") + 1
            file.seek(position)
            file.write(b"O")
        else:
            file.seek(0, 2)
            file.write(b" ")
    with pytest.raises(UsageError, match=r"changed while it was read|cannot be read|invalid JSON"):
        list(opened.batches())
    assert LocalFiles(opened.files).fingerprint() != before


# Hugging Face data sets


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setattr("datasets.load_dataset", load)


@pytest.mark.torch
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(300)]
    one, two = Dataset.from_list(rows), Dataset.from_list(rows[:5])
    hub(monkeypatch, lambda *_: DatasetDict({"test": two, "train": one, "train_sft": two}))
    assert isinstance(open_source("someone/chats"), HubDataset)
    assert rows_of("someone/chats") == rows
    for split, name in (("train_sft", "train_sft"), (None, "test")):
        opened = open_source("someone/chats", split=split)
        assert (opened.names, opened.size) == ((f"someone/chats ({name})",), 5)
    hub(monkeypatch, lambda *_: DatasetDict({"a": one, "b": two}))
    with pytest.raises(UsageError, match=r"has no split train; its splits are a, b\n  choose one with data.split"):
        open_source("someone/chats")


@pytest.mark.parametrize(
    "message",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample ...",
        "BuilderConfig 'other' not found. Available: ['main', 'socratic']",
    ],
)
def test_subsets_of_a_hub_data_set_are_listed(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages are those of datasets 4 and 5."""

    def load(_: str, name: str | None) -> Any:
        raise ValueError(message)

    hub(monkeypatch, load)
    with pytest.raises(UsageError, match=r"subsets(:| are) main, socratic\n"):
        open_source("openai/gsm8k", subset=None if message.startswith("Config") else "other")


def test_datasets_may_import_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`chunkflow analyze` keeps torch out, by an entry in `sys.modules` that `datasets` takes for the module."""
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, lambda *_: pytest.fail("torch is kept out") if "torch" in sys.modules else {"train": [1]})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_source("someone/chats").size == 1


def test_a_local_path_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "someone" / "chats" / "a.jsonl", JSONL)
    hub(monkeypatch, lambda *_: pytest.fail("the hub was asked"))
    assert isinstance(open_source("someone/chats"), LocalFiles)


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> Any:
        raise ConnectionError("Couldn't reach 'someone/chats' on the Hub\nand a page of details")

    hub(monkeypatch, load)
    with pytest.raises(UsageError) as error:
        open_source("someone/chats")
    assert "Couldn't reach" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
