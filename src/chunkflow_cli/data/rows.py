"""Rows as the reader of a file hands them over, decoded without losing or adding anything.

JSON lines are parsed by orjson, which silently keeps the last of two equal keys, and refuses NaN. Here a row with a
repeated key is bad, because one of its values would be lost. NaN and infinity, which Python writes, are read: the
parser of a format refuses them only in fields that count.

Arrow (parquet, Hugging Face data sets) gives all structs of a column the same keys, and null to those that a row did
not have. `drop_filled_nulls` removes them. A null that the row did have looks the same and goes with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson

from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.values import kind

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class UnreadableRow:
    """A row that cannot be parsed, in a file whose other rows can be."""

    reason: str


def decode_row(raw: object) -> dict[str, Any]:
    """Return the JSON object of a row.

    Raises:
        BadRowError: the row is not valid UTF-8, not valid JSON, not an object, or has a key twice.
    """
    if isinstance(raw, UnreadableRow):
        raise BadRowError(raw.reason)
    row = parse_json(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        hint = " (a file that holds one JSON array must be named .json)" if isinstance(row, list) else ""
        raise BadRowError(f"the row is {kind(row)}, not an object{hint}")
    return row


def parse_json(line: bytes) -> Any:
    """Return the value of a line. A byte order mark before it, as where two files were joined, is no part of it.

    Raises:
        BadRowError: it is not valid UTF-8, not valid JSON, or an object in it has a key twice.
    """
    line = line.removeprefix(UTF8_BOM)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b"NaN" not in line and b"Infinity" not in line:
            raise BadRowError(_why_not_json(line, error)) from error
        return _parse_with_nan(line, error)
    check_keys(line, value)
    return value


def check_keys(text: bytes, value: object) -> None:
    """Raise if an object in a JSON text has a key twice.

    Args:
        value: what orjson made of the text. Every key that it lost took two quotation marks along.

    Raises:
        BadRowError: it has, or the value is nested too deeply to tell.
    """
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise BadRowError("the row is nested too deeply (more than 254 levels)") from error
    if written.count(b'"') == text.count(b'"') and b"\\u0022" not in text:
        return
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for name in set(names) if names.count(name) > 1)

    json.loads(text, object_pairs_hook=note, parse_int=float)
    if found:
        raise BadRowError(_repeated(found[0]))


def _repeated(key: str) -> str:
    return f"the key {key!r} occurs twice in one object; keep the one that counts"


def _parse_with_nan(line: bytes, error: orjson.JSONDecodeError) -> Any:
    """Return the value of a line that orjson refuses, if NaN or infinity is its only fault."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise BadRowError(_repeated(next(name for name in value if sum(name == other for other, _ in pairs) > 1)))
        return value

    try:
        value = json.loads(line, object_pairs_hook=object_of)
        orjson.dumps(value)  # refuses lone surrogates and integers above 64 bits, as orjson.loads does
    except BadRowError:
        raise
    except (ValueError, TypeError, RecursionError):
        raise BadRowError(_why_not_json(line, error)) from error
    return value


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as utf8_error:
        return f"not valid UTF-8 at byte {utf8_error.start + 1} of the line"
    bom = " (a byte order mark is in the line: delete it)" if UTF8_BOM in line else ""
    return f"not valid JSON: {error.msg} at character {error.pos + 1} of the line{bom}"


def drop_filled_nulls(row: dict[str, Any], features: Any = None) -> dict[str, Any]:
    """Return a row that Arrow read without the nulls of structs inside of its columns.

    Args:
        features: the columns' types as `datasets` has them. They tell structs from JSON objects, whose nulls are the
            row's own. Without them every object is a struct.
    """
    return {key: _without_nulls(value, features[key] if features else None) for key, value in row.items()}


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(value, dict) and (feature is None or isinstance(feature, dict)):
        return {
            key: _without_nulls(item, feature[key] if feature else None)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list) and isinstance(next(filter(None, value), None), (dict, list)):
        if feature is None:
            return [_without_nulls(item, None) for item in value]
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return value if inner is None else [_without_nulls(item, inner) for item in value]
    return value
