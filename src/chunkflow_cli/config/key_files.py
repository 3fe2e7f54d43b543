"""YAML files of configuration keys: read within bounds of memory and time, with the line of every key.

These files may come from strangers. A few lines of YAML can stand for gigabytes (an anchor that repeats an anchor), so
the size, the depth and the number of values are bounded before anything is built from them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow_cli.config.foreign import foreign_name
from chunkflow_cli.config.keys import GONE, describe_keys, described, is_section, unknown_key, wrong_value
from chunkflow_cli.errors import UsageError, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from yaml import Node, YAMLError

MOST_BYTES = 65536
MOST_VALUES = 10_000
HYDRAS = ("defaults",)
"""Keys that belong to Hydra."""


@dataclass(frozen=True)
class KeyFile:
    """The keys of a YAML file."""

    source: str
    """How errors name the file: `recipe mine.yaml`, `--overrides=tuned.yaml`."""
    group: str
    """What it is: `recipe` or `overrides`."""
    tree: DictConfig
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each key and section, by dotted name."""
    texts: dict[str, str] = field(default_factory=dict)
    """Each single value as it stands in the file, without quotes."""

    def where(self, name: str) -> str:
        """Return the file, and the line of a key if it is there."""
        line = self.lines.get(name) or self.lines.get(name.partition("[")[0])
        return self.source if line is None else f"{self.source}, line {line}"

    def problems(self) -> list[str]:
        """Return an error for each key that does not exist, and for each section that is none."""
        from omegaconf import OmegaConf

        return [f"{self.where(name)}: {problem}" for name, problem in _problems(OmegaConf.to_container(self.tree))]

    def with_types_of_keys(self) -> DictConfig:
        """Return the tree with values as their keys mean them.

        A text is what stands in the file (`1.10` is not 1.1, `007` not 7), a whole number may be written as 1e6, and a
        section or a required path with nothing behind it is not set.
        """
        from omegaconf import OmegaConf

        return OmegaConf.create(self._typed(OmegaConf.to_container(self.tree), ""))

    def _typed(self, section: Any, prefix: str) -> dict[Any, Any]:
        typed: dict[Any, Any] = {}
        for name, value in section.items():
            full = f"{prefix}{name}"
            key = described(full)
            if key is not None and key.has_sections and isinstance(value, list):
                value = [
                    self._typed(each, f"{full}[{index}].") if isinstance(each, dict) else each
                    for index, each in enumerate(value)
                ]
            elif key is None and isinstance(value, dict) and is_section(full):
                value = self._typed(value, f"{full}.")
            elif value is None and (key is None or (key.is_text and key.default == "")):
                continue
            elif key is not None and key.is_text and isinstance(value, (bool, int, float)):
                value = self.texts[full]
            elif key is not None and key.is_text_list and isinstance(value, list):
                value = [self.texts.get(f"{full}[{i}]", each) for i, each in enumerate(value)]
            elif key is not None and key.is_integer and isinstance(value, float) and value.is_integer():
                value = int(value)
            elif key is not None and key.is_text and key.default == "" and value == "???":
                continue  # Hydra's sign for a value that the user has to set
            typed[name] = value
        return typed


def read_key_file(path: Path, source: str, group: str = "recipe") -> KeyFile:
    """Read a YAML file of configuration keys.

    Args:
        path: the file.
        source: how errors name it.
        group: what it is.

    Raises:
        UsageError: it cannot be read, is too large, is not YAML in UTF-8, or holds no keys.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = _read_text(path, source)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None or _count(root, {}) > MOST_VALUES:
            why = "holds no keys" if root is None else f"stands for more than {MOST_VALUES:,} values"
            raise UsageError(f"{source} {why}\n  write keys such as `chunk: {{size: 4096}}`")
        tree = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not valid YAML: {_in_a_line(error)}") from error
    except RecursionError as error:
        raise UsageError(f"{source} is not valid YAML for keys: its values are nested too deeply") from error
    except (OmegaConfBaseException, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source} is not valid YAML: {first_line(error)}") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise UsageError(f"{source} holds no keys\n  write keys such as `chunk: {{size: 4096}}`")
    found = KeyFile(source, group, tree)
    for name, line, value in _places(root, ""):
        found.lines[name] = line
        if value is not None:
            found.texts[name] = value
    return found


def _read_text(path: Path, source: str) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"{source} is not a file\n  name a YAML file of keys")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UsageError(f"{source} has more than {MOST_BYTES // 1024} KiB: it is not a file of keys")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not valid YAML: it is not a text in UTF-8 (byte {error.start})") from error


def _count(node: Node, known: dict[int, float]) -> float:
    """Return the number of values that a node stands for, its repeated anchors included; infinite in a cycle."""
    import yaml

    if id(node) not in known:
        known[id(node)] = float("inf")  # while it is being counted
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _places(node: Node, prefix: str) -> Iterator[tuple[str, int, str | None]]:
    """Yield the dotted name, the line and, of a single value, the text of everything in a mapping."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        yield name, line, value.value if isinstance(value, yaml.ScalarNode) else None
        if isinstance(value, yaml.SequenceNode):
            for index, element in enumerate(value.value):
                if isinstance(element, yaml.ScalarNode):
                    yield f"{name}[{index}]", element.start_mark.line + 1, element.value
                yield from _places(element, f"{name}[{index}].")
        yield from _places(value, f"{name}.")


def _problems(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name of each key that cannot stand in a file, and why."""
    for name, value in section.items():
        full = f"{prefix}{name}"
        if full in describe_keys():
            if f"{full}={value}" in GONE:
                yield full, wrong_value(full, value)
            elif "." in str(name):
                *sections, last = full.split(".")
                nested = ": {".join([*sections, f"{last}: VALUE"]) + "}" * len(sections)
                yield full, f"{full} is one name with a dot\n  write its sections: {nested}"
        elif is_section(full):
            if isinstance(value, dict):
                yield from _problems(value, f"{full}.")
            elif value is not None:
                yield full, wrong_value(full, value)
        elif full not in HYDRAS:
            if isinstance(value, dict) and value and foreign_name(full) is None:  # its keys say more than it does
                yield from _problems(value, f"{full}.")
            else:
                yield full, unknown_key(full)


def _in_a_line(error: YAMLError) -> str:
    """Return what is wrong with a YAML text, and where, on one line."""
    from yaml import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError):
        return first_line(error)
    line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
    return f"{error.problem or error.context}{line}"
