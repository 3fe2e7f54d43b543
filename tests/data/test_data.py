"""Reading data: every kind of file, every format, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data import source
from chunkflow_cli.data.formats import (
    Conversation,
    Instruction,
    PlainText,
    PromptCompletion,
    TokenRow,
    decode_row,
    detect_format,
    parse_sample,
)
from chunkflow_cli.data.source import BadRowError, HubDataset, LocalFiles, Location, open_source
from chunkflow_cli.errors import UsageError

SHARED = Path(os.environ.get("CHUNKFLOW_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data sets of LLaMA-Factory are not here")

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
    """Location and row of everything that a path holds."""
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
    """A second gzip member, a BOM or CRLF must not lose a row or leave a stray character in one."""
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
    """The order must not be that of the disk: sample i has to be the same on every machine."""
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
        ("a.jsonl", b"\n \n\r\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"\x7fELF\0\0\1\2" * 40, "is a binary file"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16, and must be UTF-8"),
        ("a.jsonl", gzip.compress(JSONL), "holds .gz data under another name"),
        ("a.json", zstandard.compress(JSONL), "holds .zst data under another name"),
        ("a.jsonl.gz", JSONL, "cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", JSONL, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-12], "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-6], "ends inside a zstd frame"),
        ("a.parquet", JSONL, "is not a parquet file"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "cannot be read"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', "a.json:2: the JSON array is broken here"),
        ("a.json", json.dumps({"data": ROWS}, indent=2).encode(), "is one JSON object, not rows"),
        ("a.txt", JSONL, "this kind of file is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the time: no name for a test
)
def test_a_file_that_is_no_data_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each of these has been trained on as nothing, or as noise, by some trainer; a cut-off file above all."""
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError) as error:
        rows_of(path)
    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" in str(error.value), "an error also says what to do"


def test_one_empty_file_of_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    """A shard whose download failed must not shrink the data set without a word."""
    write(tmp_path / "1.jsonl", JSONL)
    write(tmp_path / "2.jsonl", b"")
    with pytest.raises(UsageError, match=r"2\.jsonl is empty"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["./x", "/no/such/folder", "~/no-such", "data/train.jsonl", "a b", "a/b/c", "x.parquet"]
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in a file name must not end in half a minute of network retries."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UsageError, match="there is no such file or folder"):
        open_source(path)


def test_folder_and_glob_without_data(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"x")
    with pytest.raises(UsageError, match="a folder without data files"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="no file matches"):
        open_source(str(tmp_path / "*.jsonl"))
    with pytest.raises(UsageError, match="1 files match, and none is data"):
        open_source(str(tmp_path / "*"))
    with pytest.raises(UsageError, match=r"^data\.eval_path="):
        open_source(str(tmp_path), key="data.eval_path")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "\xff\xfe"}', "not valid UTF-8 at byte 11"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b"[1, 2]", "a list, not an object (a file that is one JSON array must be named .json)"),
        (b'"text"', "a text, not an object"),
        (b"null", "null, not an object"),
    ],
)
def test_a_bad_line_is_a_bad_row_and_not_the_end(tmp_path: Path, line: bytes, reason: str) -> None:
    """One broken line of a million must be reported with its number, and the next one read."""
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
def test_every_line_that_is_not_blank_comes_out_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bytes, bom: bool, batch_bytes: int
) -> None:
    """Lines lost or doubled at the edge of a batch would go unnoticed: compare with the lines themselves."""
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


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a" / "x.jsonl", JSONL), write(tmp_path / "b" / "y.ndjson", JSONL)
    other = write(tmp_path / "c.jsonl", JSONL.replace(b"one", b"two"))
    assert open_source(first).fingerprint() == open_source(same).fingerprint() != open_source(other).fingerprint()
    write(tmp_path / "two" / "1.jsonl", JSONL[:14])
    write(tmp_path / "two" / "2.jsonl", JSONL[14:])
    assert open_source(str(tmp_path / "two")).fingerprint() != open_source(first).fingerprint()


# Hugging Face data sets


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    monkeypatch.setattr("datasets.load_dataset", load)


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
    with pytest.raises(UsageError, match="has no split named train, but a, b"):
        open_source("someone/chats")


def test_a_local_path_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "someone" / "chats" / "a.jsonl", JSONL)
    hub(monkeypatch, lambda _: pytest.fail("the hub was asked"))
    assert isinstance(open_source("someone/chats"), LocalFiles)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> Any:
        raise ConnectionError("Couldn't reach 'someone/chats' on the Hub\nand a page of details")

    hub(monkeypatch, load)
    with pytest.raises(UsageError) as error:
        open_source("someone/chats")
    assert "Couldn't reach" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


# Formats

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"name": "f", "arguments": {"x": 1}}
AS_TOOL_CALL = {"type": "function", "function": CALL}


def turns(sample: object) -> list[tuple[str, str, bool]]:
    assert isinstance(sample, Conversation)
    return [(message.role, message.content, message.is_target) for message in sample.messages]


def test_messages() -> None:
    row = {"messages": [*CHAT, {"role": "user", "content": "Q2", "name": "Bo"}, {"role": "assistant", "content": ""}]}
    sample = parse_sample(row, DataFormat.messages)
    assert turns(sample) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", True),
        ("user", "Q2", False),
        ("assistant", "", True),
    ]
    assert isinstance(sample, Conversation)
    assert sample.messages[3].extra == {"name": "Bo"}
    assert sample.tools == ()


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": CALL},
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        CALL,
    ],
)
def test_tool_calls_of_messages_have_arguments_as_objects(call: dict[str, Any]) -> None:
    """OpenAI keeps arguments as JSON text; a template that writes `arguments | tojson` would encode them twice."""
    row = {
        "messages": [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    sample = parse_sample(row, DataFormat.messages)
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls == (AS_TOOL_CALL,)
    assert sample.messages[1].content == ""
    assert sample.tools == ({"type": "function", "function": {"name": "f"}},)


def test_sharegpt() -> None:
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
            {"from": "user", "value": "Q2"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "O"},
            {"from": "function_call", "value": "f(1)"},
            {"from": "tool", "value": "O2"},
            {"from": "assistant", "value": "A2"},
        ],
        "tools": json.dumps([{"name": "f", "description": "d"}]),
    }
    sample = parse_sample(row, DataFormat.sharegpt)
    assert turns(sample) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", True),
        ("user", "Q2", False),
        ("assistant", "", True),
        ("tool", "O", False),
        ("assistant", "f(1)", True),
        ("tool", "O2", False),
        ("assistant", "A2", True),
    ]
    assert isinstance(sample, Conversation)
    assert [message.tool_calls for message in sample.messages if message.tool_calls] == [(AS_TOOL_CALL,)]
    assert sample.tools == ({"type": "function", "function": {"name": "f", "description": "d"}},)


@pytest.mark.parametrize("tools", [None, "", "  ", "[]", []])
def test_no_tools(tools: object) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}], "tools": tools}
    sample = parse_sample(row, DataFormat.sharegpt)
    assert isinstance(sample, Conversation)
    assert sample.tools == ()


def test_alpaca() -> None:
    row = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["h1", "r1"]]}
    sample = parse_sample(row, DataFormat.alpaca)
    assert isinstance(sample, Instruction)
    assert turns(sample.conversation()) == [
        ("system", "S", False),
        ("user", "h1", False),
        ("assistant", "r1", True),
        ("user", "I\nX", False),
        ("assistant", "O", True),
    ]
    with pytest.raises(BadRowError, match="history needs a chat template"):
        sample.prompt_completion()
    short = parse_sample({"instruction": "I", "input": "", "output": "O"}, DataFormat.alpaca)
    assert isinstance(short, Instruction)
    assert turns(short.conversation()) == [("user", "I", False), ("assistant", "O", True)]


def test_alpaca_without_chat_template_is_stanfords_prompt() -> None:
    """Models that were trained on this prompt know it to the letter."""
    with_input = parse_sample({"instruction": "{I}", "input": "X", "output": "O"}, DataFormat.alpaca)
    without = parse_sample({"instruction": "I", "output": "O", "input": None}, DataFormat.alpaca)
    assert isinstance(with_input, Instruction)
    assert isinstance(without, Instruction)
    assert with_input.prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{I}\n\n### Input:\nX\n\n### Response:\n",
        "O",
    )
    assert without.prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nI\n\n### Response:\n",
        "O",
    )


def test_prompt_completion() -> None:
    assert parse_sample({"prompt": "P ", "completion": "C"}, DataFormat.prompt_completion) == PromptCompletion(
        "P ", "C"
    )
    row = {"prompt": [*CHAT, CHAT[1]], "completion": [{"role": "assistant", "content": "B"}]}
    assert turns(parse_sample(row, DataFormat.prompt_completion)) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", False),
        ("user", "Q", False),
        ("assistant", "B", True),
    ]


def test_text_and_tokens() -> None:
    assert parse_sample({"text": " t\n"}, DataFormat.text) == PlainText(" t\n")
    row = parse_sample({"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, DataFormat.tokens)
    assert isinstance(row, TokenRow)
    assert row.labels is not None
    np.testing.assert_array_equal(row.input_ids, [3, 4, 5])
    np.testing.assert_array_equal(row.labels, [-100, 4, 5])
    unlabelled = parse_sample({"input_ids": [3], "labels": None}, DataFormat.tokens)
    assert isinstance(unlabelled, TokenRow)
    assert unlabelled.labels is None


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"text": "a"}, "no key 'messages' (keys: text)"),
        ("messages", {}, "no key 'messages' (keys: none)"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": "hi"}, "messages is a text, not a list"),
        ("messages", {"messages": None}, "messages is null, not a list"),
        ("messages", {"messages": [CHAT[0], "hi"]}, "messages[1] is a text, not an object"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] has no key 'content' (keys: role)"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0].content is null, not a text"),
        ("messages", {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content is a list, not a text"),
        (
            "messages",
            {"messages": [{"role": "robot", "content": "a"}]},
            "messages[0].role is 'robot', which is none of",
        ),
        (
            "messages",
            {"messages": [{"from": "human", "value": "a"}]},
            "messages[0] has no key 'role' (keys: from, value)",
        ),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls has a call without a name"),
        ("messages", {"messages": CHAT, "tools": "{"}, "tools is a text that is not JSON"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from is 'bot'"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value is null"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}], "system": 1}, "system is a number, not a text"),
        ("alpaca", {"instruction": "a"}, "no key 'output'"),
        ("alpaca", {"instruction": "a", "output": None}, "output is null, not a text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is not a pair of texts"),
        ("prompt_completion", {"prompt": "a"}, "no key 'completion'"),
        ("prompt_completion", {"prompt": "a", "completion": CHAT}, "prompt is a text and completion is a list"),
        ("text", {"text": ""}, "text is empty"),
        ("text", {"text": 7}, "text is a number, not a text"),
        ("tokens", {"input_ids": []}, "input_ids is empty"),
        ("tokens", {"input_ids": [1.5]}, "input_ids holds something other than integers"),
        ("tokens", {"input_ids": ["1"]}, "input_ids holds something other than integers"),
        ("tokens", {"input_ids": [[1]]}, "input_ids holds something other than integers"),
        ("tokens", {"input_ids": [1 << 70]}, "input_ids holds something other than integers"),
        ("tokens", {"input_ids": "1 2"}, "input_ids is a text, not a list"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries and input_ids 2"),
        ("tokens", {"input_ids": [1, 2], "labels": [1, None]}, "labels holds something other than integers"),
    ],
)
def test_a_row_that_is_not_of_its_format_says_which_key(format: str, row: dict[str, Any], reason: str) -> None:
    """`KeyError: 'role'` from the middle of a run, without the row, is what users of other trainers get."""
    with pytest.raises(BadRowError) as error:
        parse_sample(row, DataFormat(format))
    assert reason in str(error.value)


# Detection


def detect(tmp_path: Path, *rows: object) -> DataFormat:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return detect_format(open_source(write(tmp_path / "a.jsonl", b"\n".join(lines))))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": CHAT, "tools": None, "prompt": "Q", "prompt_id": 1}, "messages"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "Below is ..."}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "url": "x"}, "text"),
        ({"input_ids": [1], "attention_mask": [1], "labels": [1]}, "tokens"),
    ],
)
def test_format_is_found_by_keys(tmp_path: Path, row: dict[str, Any], format: str) -> None:
    assert detect(tmp_path, b"{broken", row, row) is DataFormat(format)


def test_rows_that_no_or_several_formats_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as unknown:
        detect(tmp_path, {"question": "a", "answer": "b"})
    assert "keys question, answer: no format" in str(unknown.value)
    assert "alpaca: instruction + output" in str(unknown.value)
    with pytest.raises(UsageError) as mixed:
        detect(tmp_path, {"text": "a"}, {"messages": CHAT})
    assert "rows of more than one format" in str(mixed.value)
    assert "keys text: text" in str(mixed.value)
    with pytest.raises(UsageError, match=r"fit several formats\n  say which: data.format=text or data.format=tokens"):
        detect(tmp_path, {"text": "a", "input_ids": [1]})
    with pytest.raises(UsageError, match=r"none of the first 2 rows is a JSON object\n  .*a.jsonl:1: not valid JSON"):
        detect(tmp_path, b"hello", b"world")


def test_a_stray_row_after_the_first_hundred_does_not_change_the_format(tmp_path: Path) -> None:
    assert detect(tmp_path, *[{"text": "a"}] * 100, {"messages": CHAT}) is DataFormat.text
    with pytest.raises(UsageError, match="more than one format"):
        detect(tmp_path, *[{"text": "a"}] * 99, {"messages": CHAT})


@needs_shared
@pytest.mark.parametrize(
    ("name", "format", "count", "kind"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, Instruction),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, Conversation),
        ("c4_demo.jsonl", "text", 300, PlainText),
    ],
)
def test_llama_factorys_demo_files(name: str, format: str, count: int, kind: type) -> None:
    """Data that nobody here wrote is read to the last row."""
    opened = open_source(str(SHARED / name))
    found = detect_format(opened)
    assert found is DataFormat(format)
    samples = [parse_sample(decode_row(row), found) for batch in opened.batches() for row in batch.rows]
    assert len(samples) == count
    assert {type(sample) for sample in samples} == {kind}


@needs_shared
def test_glaives_calls_are_understood() -> None:
    """Every function_call of the file is a call; each must become one, in the order of the file."""
    rows = json.loads((SHARED / "glaive_toolcall_en_demo.json").read_text())
    expected = [
        json.loads(turn["value"]) for row in rows for turn in row["conversations"] if turn["from"] == "function_call"
    ]
    samples = [parse_sample(row, DataFormat.sharegpt) for row in rows]
    found = [
        call["function"]
        for sample in samples
        if isinstance(sample, Conversation)
        for message in sample.messages
        for call in message.tool_calls
    ]
    assert found == expected
    assert len(found) > 200
