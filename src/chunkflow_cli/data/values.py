"""Values of a row, taken out with a reason that names the key if they are not what the format allows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.data.sample import BadRowError


def is_absent(value: object) -> bool:
    """Return True for null, NaN (as pandas writes null), and empty strings, lists and objects."""
    return value is None or (isinstance(value, (str, list, dict)) and not value) or value != value


def flag(value: object) -> bool | None:
    """Return what 0, 1, false or true says, also in a string, as all cells of CSV are; None for other values."""
    if isinstance(value, str):
        return {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def required(row: Mapping[str, Any], key: str, place: str = "") -> Any:
    """Return the value of a key that must be there.

    Raises:
        BadRowError: it is not.
    """
    if key not in row:
        subject = f"{place} has " if place else ""
        raise BadRowError(f"{subject}no key {key!r} (keys: {', '.join(map(str, row)) or 'none'})")
    return row[key]


def text(row: Mapping[str, Any], key: str, place: str = "") -> str:
    """Return the string of a key.

    Raises:
        BadRowError: the key is missing or its value is not a string.
    """
    value = required(row, key, place)
    if not isinstance(value, str):
        raise BadRowError(f"{place + '.' if place else ''}{key} is {kind(value)}, not a string")
    return value


def list_of_objects(value: object, name: str) -> list[dict[str, Any]]:
    """Return the value, a list of objects that is not empty.

    Raises:
        BadRowError: it is something else.
    """
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {kind(value)}, not a list")
    if not value:
        raise BadRowError(f"{name} is empty")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRowError(f"{name}[{index}] is {kind(item)}, not an object")
    return value


def integers(value: object, name: str) -> NDArray[np.int64]:
    """Return a list of integers as an array.

    Raises:
        BadRowError: it is something else, or an integer has more than 64 bits.
    """
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {kind(value)}, not a list")
    if not value:
        return np.empty(0, np.int64)
    try:
        return np.frombuffer(array("q", value), dtype=np.int64)  # rejects 1.5 and "1", which np.array would take
    except (TypeError, OverflowError) as error:
        raise BadRowError(f"{name} holds something other than 64-bit integers") from error


def kind(value: object) -> str:
    """Return the name of a JSON value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
