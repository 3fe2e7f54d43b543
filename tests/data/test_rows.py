"""Decoding rows: nothing that a row holds is lost, and nothing is added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.rows import decode_row, drop_filled_nulls
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.source import open_source

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(row=st.dictionaries(st.text(max_size=2), values, max_size=4), ascii_only=st.booleans())
def test_a_row_is_what_pythons_parser_reads(row: dict[str, Any], ascii_only: bool) -> None:
    assert decode_row(json.dumps(row, ensure_ascii=ascii_only).encode()) == row


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"input_ids": [1, 2], "input_ids": [9]}', "input_ids"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "c"),
        (b'{"a": 1, "\\u0061": "\\u0022\\u0022"}', "a"),
        (b'{"a": NaN, "b": 1, "b": 2}', "b"),
        (b'{"a": 1, "a": ' + b"9" * 30 + b"}", "a"),
    ],
)
def test_a_repeated_key_is_named(line: bytes, key: str) -> None:
    with pytest.raises(BadRowError, match=f"the key '{key}' occurs twice in one object; keep the one that counts"):
        decode_row(line)


def test_a_repeated_key_in_an_array_of_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b", "text": "c"}]')
    (batch,) = open_source(str(path)).batches()
    assert decode_row(batch.rows[0]) == {"text": "a"}
    with pytest.raises(BadRowError, match="the key 'text' occurs twice in one object"):
        decode_row(batch.rows[1])


def test_quotation_marks_in_strings_are_no_keys() -> None:
    assert decode_row(rb'{"a": "\"\u0022\\", "b\"": "\\u0022"}') == {"a": '""\\', 'b"': "\\u0022"}


def test_nan_counts_only_where_it_is_read() -> None:
    row = decode_row(b'{"text": "a NaN", "score": NaN, "limit": -Infinity}')
    assert row["text"] == "a NaN"
    with pytest.raises(BadRowError, match="input_ids holds something other than 64-bit integers"):
        parse_sample(decode_row(b'{"input_ids": [1, NaN]}'), DataFormat.tokens)
    with pytest.raises(BadRowError, match="not valid JSON"):
        decode_row(b'{"text": "\\ud800", "score": NaN}')


def test_a_byte_order_mark() -> None:
    """`cat a.jsonl b.jsonl` puts one in the middle of the result."""
    assert decode_row(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    with pytest.raises(BadRowError, match=r"not valid JSON: .* \(a byte order mark is in the line: delete it\)"):
        decode_row(b'{"a": 1,\xef\xbb\xbf "b": 2}')


def test_deep_nesting_is_named() -> None:
    with pytest.raises(BadRowError, match="nested too deeply"):
        decode_row(b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}")


CALLS = [
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"at": "Elm", "in": {"unit": "km"}}}}],
    },
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "g", "arguments": {"in": {"days": [{"n": 1}, {"m": 2}]}}}}],
    },
    {"role": "assistant", "tool_calls": [{"function": {"name": "h", "arguments": {"at": "Oak"}}}]},
]


def test_keys_of_other_rows_are_no_part_of_a_parquet_row(tmp_path: Path) -> None:
    """Arrow stores a union of all keys, at every depth, and fills it with null."""
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "Q"}, call],
            "tools": [{"name": "f", "parameters": {str(index): {"type": "string"}}}],
        }
        for index, call in enumerate(CALLS)
    ]
    rows[0]["weight"] = 1
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([*rows, {"messages": None}]), path)
    (batch,) = open_source(str(path)).batches()
    parsed = [parse_sample(decode_row(row), DataFormat.messages) for row in batch.rows[:-1]]
    assert parsed == [parse_sample(row, DataFormat.messages) for row in rows]
    assert batch.rows[-1] == {"messages": None, "tools": None, "weight": None}


def test_nulls_of_json_rows_are_kept(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, CALLS[0]], "extra": [{"a": None}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]))
    (batch,) = open_source(str(path)).batches()
    assert [decode_row(raw) for raw in batch.rows] == [row]


def test_nulls_of_json_columns_of_datasets_are_kept() -> None:
    """A stand-in for the types of `datasets`: a struct is a dict, a list has its items' type, other types have neither."""

    class List:
        def __init__(self, feature: object) -> None:
            self.feature = feature

    row = {"calls": [{"name": "f", "arguments": {"a": None}, "id": None}], "n": None}
    features = {"calls": List({"name": "string", "arguments": "json", "id": "string"}), "n": "int"}
    assert drop_filled_nulls(row, features) == {"calls": [{"name": "f", "arguments": {"a": None}}], "n": None}
    assert drop_filled_nulls(row) == {"calls": [{"name": "f", "arguments": {}}], "n": None}
