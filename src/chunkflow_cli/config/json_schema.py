"""The JSON schema of the configuration, for editors: made from the dataclasses of schema.py."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin

from chunkflow_cli.config.key_files import HYDRAS
from chunkflow_cli.config.keys import as_plain, described, walk_keys
from chunkflow_cli.config.schema import Config

_BOUNDS = {"at_least": "minimum", "at_most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
"""An interpolation such as `${chunk.size}`, which may replace any value."""
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def json_schema() -> dict[str, Any]:
    """Return the schema of a YAML file of keys, such as a recipe, in JSON Schema's draft of 2020-12.

    No key is required: the command line may set what the file leaves out.
    """
    schema = _section(Config(), "")
    schema["properties"] |= {name: {"description": "Hydra's list of what a file is based on."} for name in HYDRAS}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "chunkflow configuration", **schema}


def _section(section: Any, prefix: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, holder, entry in walk_keys(section, prefix):
        parts = name.removeprefix(prefix).split(".")
        place = properties
        for depth, part in enumerate(parts[:-1]):
            inner = _holder(section, parts[: depth + 1])
            place = place.setdefault(part, _object(inner) | {"type": ["object", "null"]})["properties"]
        place[parts[-1]] = _key(name, getattr(holder, entry.name), entry.metadata)
    return _object(section) | {"properties": properties}


def _holder(section: Any, parts: list[str]) -> Any:
    for part in parts:
        section = getattr(section, part)
    return section


def _object(section: Any) -> dict[str, Any]:
    about = " ".join((inspect.getdoc(type(section)) or "").split())
    return {"description": about, "type": "object", "additionalProperties": False, "properties": {}}


def _key(name: str, default: Any, metadata: Any) -> dict[str, Any]:
    key = described(name)
    assert key is not None
    bounds = {_BOUNDS[bound]: limit for bound, limit in metadata.items() if bound in _BOUNDS}
    value = _value(key.kind, bounds, name)
    if value.get("type") != "string":
        value = {"anyOf": [*value.get("anyOf", [value]), _INTERPOLATION]}
    return {"description": key.help, "default": as_plain(default), **value}


def _value(kind: Any, bounds: dict[str, float], name: str) -> dict[str, Any]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return {"anyOf": [_value(part, bounds, name) for part in parts]}
    if origin is list:
        return {"type": "array", "items": _value(parts[0], bounds, name)}
    if origin is dict:
        return {
            "type": ["object", "null"],
            "additionalProperties": True if parts[1] is Any else _value(parts[1], {}, name),
        }
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _section(kind(), f"{name}[].")
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": _TYPES[kind]} | (bounds if kind in (int, float) else {})
