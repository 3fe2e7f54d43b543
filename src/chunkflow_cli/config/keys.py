"""The configuration keys as help, completion, documentation and errors show them. Imports nothing heavy."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from chunkflow_cli.config import schema
from chunkflow_cli.config.foreign import foreign_name
from chunkflow_cli.config.schema import Config


@dataclass(frozen=True)
class Key:
    """A configuration key."""

    name: str
    """Name with its section: `chunk.size`."""
    kind: Any
    """Type of its value."""
    default: str
    """Default in the syntax of an override."""
    help: str
    """Documentation on one line: the string below its field."""
    is_path: bool = False
    """Whether its text, or each text of its list, is a path."""
    null_is_a_name: bool = False
    """Whether `key=null` on the command line means the string `null`."""

    @property
    def is_list(self) -> bool:
        """Whether the value is a list, written in brackets."""
        return get_origin(self.kind) is list

    @property
    def is_text(self) -> bool:
        """Whether the value can be a text. The text is then taken as it is typed."""
        return str in self.kinds or (self.is_path and Any in self.kinds)

    @property
    def is_text_list(self) -> bool:
        """Whether the value can be a list of texts."""
        return list[str] in self.kinds or (self.is_path and Any in self.kinds)

    @property
    def has_sections(self) -> bool:
        """Whether the value is a list of mappings with keys of their own."""
        return self.is_list and is_dataclass(get_args(self.kind)[0])

    @property
    def is_integer(self) -> bool:
        """Whether the value is an integer."""
        return int in self.kinds

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping, which takes keys that the schema does not list."""
        return get_origin(self.kind) is dict

    @property
    def can_be_null(self) -> bool:
        """Whether `key=null` on the command line means no value."""
        return type(None) in self.kinds and not self.null_is_a_name

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that its value can have."""
        return get_args(self.kind) if get_origin(self.kind) in (Union, UnionType) else (self.kind,)

    @property
    def choices(self) -> tuple[str, ...]:
        """Words that the value, or an element of a list, can be. Empty if there are more than a few."""
        words: list[str] = []
        for part in get_args(self.kind) or (self.kind,):
            if part is bool:
                words += ["true", "false"]
            elif isinstance(part, type) and issubclass(part, Enum):
                words += [member.value for member in part]
            elif part is type(None):
                words.append("null")
        return tuple(words) if words != ["null"] else ()


def known_keys() -> list[str]:
    """Return the name of every configuration key, in the order of declaration."""
    return list(describe_keys())


def is_section(name: str) -> bool:
    """Return whether a name is that of a section of keys."""
    return any(known.startswith(f"{name}.") for known in describe_keys())


@cache
def describe_keys() -> dict[str, Key]:
    """Return every configuration key by its name, in the order of declaration."""
    return _described(Config())


@cache
def describe_element_keys() -> dict[str, Key]:
    """Return the keys of the elements of lists by their names, such as `data.sources[].weight`."""
    found: dict[str, Key] = {}
    for key in describe_keys().values():
        if key.has_sections:
            found |= _described(get_args(key.kind)[0](), f"{key.name}[].")
    return found


def described(name: str) -> Key | None:
    """Return the key of a name, which may be one of an element: `data.sources[0].weight`. None if there is none."""
    return describe_keys().get(name) or describe_element_keys().get(_INDEX.sub("[]", name))


_INDEX = re.compile(r"\[\d+\](?=\.)")


def _described(section: Any, prefix: str = "") -> dict[str, Key]:
    documentation = _field_docstrings()
    found = {}
    for name, holder, entry in walk_keys(section, prefix):
        owner = type(holder)
        found[name] = Key(
            name=name,
            kind=_kind(owner, entry.name),
            default=as_written(getattr(holder, entry.name)),
            help=documentation[owner.__name__, entry.name],
            is_path=bool(entry.metadata.get("path")),
            null_is_a_name=bool(entry.metadata.get("null_is_a_name")),
        )
    return found


def _kind(owner: type, name: str) -> Any:
    """Return the type of a key's value. One that OmegaConf does not have is written `Annotated[Any, type]`."""
    kind = get_type_hints(owner, include_extras=True)[name]
    return get_args(kind)[1] if get_origin(kind) is Annotated else kind


def walk_keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield each key of a configuration: its name, the section that holds its value, and its field there."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from walk_keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, section, entry


def _field_docstrings() -> dict[tuple[str, str], str]:
    """Return the strings below the fields of schema.py by (class, field). Python itself does not keep them."""
    found = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for pair in itertools.pairwise(node.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=field)), ast.Expr(value=ast.Constant(value=text)):
                        found[node.name, field] = " ".join(str(text).split())
    return found


EMPTY = '""'
"""An empty text in a list, in the syntax of an override."""


def as_written(value: Any) -> str:
    """Return a value in the syntax of an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(as_written(each) or EMPTY for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{as_written(each)}' for name, each in value.items())}}}"
    if isinstance(value, Enum):
        return str(value.value)
    if is_dataclass(value):
        return as_written({each.name: getattr(value, each.name) for each in fields(value)})
    return "null" if value is None else str(value)


def as_plain(value: Any) -> Any:
    """Return a value of the configuration, or a mapping or list of them, as JSON takes it."""
    if isinstance(value, dict):
        return {name: as_plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


GONE = {
    **dict.fromkeys(
        ("chunk.k_per", "tune.k_per"),
        "every long sample keeps chunk.k chunks, because a K for each sample had no benefit\n  remove the key",
    ),
    "parallel.parts": "a stage holds one part of the model; interleaved schedules were never run\n  remove the key",
    "parallel.schedule=interleaved": "interleaved schedules were never run\n"
    "  set parallel.schedule=state_aware_1f1b or zero_bubble",
    **{
        f"tune.{name}": f"it is now cluster.{name}"
        for name in ("gpus_per_node", "node_gb_per_second", "network_gb_per_second", "pipelines", "sequences")
    },
}
"""Removed keys, and one removed value (key=value), with their replacement or the reason."""


def unknown_key(name: str) -> str:
    """Return the error for a key that does not exist: its replacement, or the key that may be meant."""
    if name in GONE:
        return f"{name} is gone: {GONE[name]}"
    return f"there is no configuration key {name!r}{_hint(name)}"


def _hint(name: str) -> str:
    """Return a line that suggests the right key for a wrong one, or an empty string."""
    if _INDEX.search(name):
        inside = [
            key
            for key in describe_element_keys()
            if key.rpartition(".")[0] == _INDEX.sub("[]", name).rpartition(".")[0]
        ]
        return f"\n  an element has the keys {', '.join(key.rpartition('.')[2] for key in inside)}"
    foreign = foreign_name(name)
    if foreign is not None:
        return f"\n  {foreign}" if " " in foreign else f"\n  did you mean {foreign}?"
    section, _, last = name.rpartition(".")
    namesakes = [known for known in known_keys() if known.rpartition(".")[2] == last]
    if len(namesakes) == 1 and section not in {known.rpartition(".")[0] for known in known_keys()} - {""}:
        return f"\n  did you mean {namesakes[0]}?"
    return did_you_mean(name, known_keys())


def wrong_value(name: str, value: Any) -> str:
    """Return the error for a value that the type of its key excludes.

    Args:
        name: key, section, or an element of a list such as `optim.betas[0]`.
    """
    written = f"{name}={as_written(value)}"
    if written in GONE:
        return f"{written} is gone: {GONE[written]}"
    key = described(name) or describe_keys().get(name.partition("[")[0])
    mapping = describe_keys().get(name.rpartition(".")[0])
    if key is None and mapping is not None and mapping.is_mapping:
        kind = get_args(mapping.kind)[1]
        return f"{written} must be {'a number' if kind is float else 'a text'}"
    if key is None:
        example = next((known for known in known_keys() if known.startswith(f"{name}.")), "")
        return f"{written}: {name} is a section of keys\n  set one of its keys, such as {example}"
    hint = did_you_mean(str(value), key.choices, f"{name}=") if not key.is_list else ""
    return f"{written} must be {_expected(key, is_element=name.endswith(']'))}{hint}"


def _expected(key: Key, *, is_element: bool) -> str:
    """Describe what the value of a key, or an element of its list, must be."""
    words = {int: "an integer", float: "a number", str: "a string", type(None): "null"}
    if key.has_sections:
        example = "{path: chats.jsonl}"
        return example if is_element else f"a list in brackets, such as [{example}]"
    if key.is_list and not is_element:
        return f"a list in brackets, such as {key.default}"
    if key.choices:
        return f"one of {', '.join(key.choices)}"
    if get_origin(key.kind) is dict:
        return "a mapping such as {key: value}"
    return " or ".join(words.get(part, "a list in brackets") for part in get_args(key.kind) or (key.kind,))


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a line for an error that names the nearest known word, or an empty string if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"\n  did you mean {prefix}{near[0]}?" if near else ""
