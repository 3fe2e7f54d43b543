"""The configuration keys as help, completion and errors show them."""

from __future__ import annotations

import ast
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from chunkflow_cli.config import schema
from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError


@dataclass(frozen=True)
class Key:
    """A configuration key as help and completion show it."""

    name: str
    """Dotted."""
    default: str
    """As it is written on the command line."""
    choices: tuple[str, ...]
    """The words that it may be; empty where any value of its type goes."""
    is_list: bool
    """Whether it takes several, in brackets."""
    help: str
    """The docstring below its field, on one line; empty without one."""


def known_keys() -> list[str]:
    """Every dotted configuration key, in the order of declaration."""
    return [name for name, _, _ in _walk_keys(Config(), "")]


def describe_keys() -> dict[str, Key]:
    """Every configuration key by its dotted name, in the order of declaration. Imports nothing heavy."""
    documentation = _field_docstrings()
    described = {}
    for name, section, value in _walk_keys(Config(), ""):
        field_name = name.rpartition(".")[2]
        kind = get_type_hints(section)[field_name]
        described[name] = Key(
            name=name,
            default=_as_written(value),
            choices=_choices(kind),
            is_list=get_origin(kind) is list,
            help=documentation.get((section.__name__, field_name), ""),
        )
    return described


def _walk_keys(section: Any, prefix: str) -> Iterator[tuple[str, type, Any]]:
    """(dotted name, the dataclass that declares it, default) of every key below a section."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from _walk_keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, type(section), value


@cache
def _field_docstrings() -> dict[tuple[str, str], str]:
    """The strings below the fields of schema.py, which Python itself throws away, by (class, field)."""
    source = Path(schema.__file__)
    if not source.is_file():  # imported from an archive: then keys have no help, which is all that is lost
        return {}
    found = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, below in itertools.pairwise(node.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[node.name, statement.target.id] = " ".join(str(below.value.value).split())
    return found


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a value of this type may be; of the elements, for a list."""
    words: list[str] = []
    for part in get_args(kind) or (kind,):
        if part is bool:
            words += ["true", "false"]
        elif isinstance(part, type) and issubclass(part, Enum):
            words += [member.value for member in part]
        elif part is type(None):
            words.append("null")
    return tuple(words) if words != ["null"] else ()


def _as_written(value: Any) -> str:
    """A default in the syntax of an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_as_written, value))}]"
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value)


GONE = {
    "chunk.k_per": "every long sample keeps chunk.k chunks: a K for each sample brought nothing\n  remove the key",
    "tune.k_per": "every long sample keeps chunk.k chunks: a K for each sample brought nothing\n  remove the key",
    "parallel.parts": "a stage holds one part of the model: interleaved schedules never ran\n  remove the key",
    "parallel.schedule=interleaved": "interleaved schedules never ran\n"
    "  take parallel.schedule=state_aware_1f1b or zero_bubble",
    **{
        f"tune.{name}": f"it is now cluster.{name}"
        for name in ("gpus_per_node", "node_gb_per_second", "network_gb_per_second", "pipelines", "sequences")
    },
}
"""Keys, and one value as key=value, that earlier versions had: what became of each."""


def refuse_gone(overrides: Sequence[str]) -> None:
    """Refuse an override that sets, adds or removes a key of an earlier version.

    Raises:
        UsageError: names the override and what became of the key.
    """
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        for name in (key, f"{key}={value}"):
            if name in GONE:
                raise UsageError(gone(name))


def gone(name: str) -> str:
    """Return the error for a key, or a key=value, of GONE."""
    return f"{name} is gone: {GONE[name]}"


def unknown_key(key: str) -> str:
    """Return the error for a key that the configuration does not have: a gone one is named, not taken for a typo."""
    if key in GONE:
        return gone(key)
    return f"there is no configuration key {key!r}{did_you_mean(key, known_keys())}"


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """A line for an error that names the nearest known word; empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"\n  did you mean {prefix}{near[0]}?" if near else ""
