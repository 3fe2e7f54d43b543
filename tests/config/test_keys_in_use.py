"""Every configuration key has an effect and a test: a key that nothing reads is a promise that nobody keeps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from chunkflow_cli.config.keys import describe_element_keys, known_keys

REPOSITORY = Path(__file__).parents[2]
KEYS = [*known_keys(), *describe_element_keys()]
OTHER_NAMES = {"eval": "evaluation", "tune": "tried", "sources": "source"}
"""What code calls the section that a key is in, if not by its name or `config`."""


def reads(text: str) -> set[tuple[str, str]]:
    """Return the attributes that a module reads: what each is an attribute of, by its last name, and its own name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name, node.attr))
    return found


def in_use(read: set[tuple[str, str]], key: str) -> bool:
    """Return whether a key is read as an attribute of its section: `config.chunk.size`, `chunk.size`."""
    section, _, name = key.replace("[]", "").rpartition(".")
    last = section.rpartition(".")[2]
    return any((owner, name) in read for owner in (last, OTHER_NAMES.get(last, last), "config"))


def named(text: str, key: str) -> bool:
    """Return whether a test names a key: as a word of a command line, in a mapping, or as an argument of its class."""
    section, _, name = key.rpartition(".")
    last = section.rpartition(".")[2]
    if section.endswith("[]"):
        return re.search(rf"[{{ ]{name}: ", text) is not None
    words = rf"(\b{re.escape(key)}=|\b{last or 'config'}\.{name}\b|\b\w*{last.title()}Config\([^)]*\b{name}=)"
    is_alone = [other.rpartition(".")[2] for other in KEYS].count(name) == 1
    return (
        re.search(words, text) is not None or (is_alone and f"({name}=" in text) or (is_alone and f" {name}=" in text)
    )


@pytest.fixture(scope="module")
def read() -> set[tuple[str, str]]:
    """What the code reads. What declares, checks and describes keys does not count."""
    folder = REPOSITORY / "src" / "chunkflow_cli"
    files = [path for path in folder.rglob("*.py") if path.parent.name != "config"]
    return set().union(
        *(
            reads(path.read_text(encoding="utf-8"))
            for path in [*files, folder / "config" / "sources.py", folder / "config" / "objective.py"]
        )
    )


@pytest.fixture(scope="module")
def tests() -> str:
    files = [path for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__)]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_key_is_read(read: set[tuple[str, str]]) -> None:
    assert [key for key in KEYS if not in_use(read, key)] == []


def test_every_key_is_named_in_a_test(tests: str) -> None:
    assert [key for key in KEYS if not named(tests, key)] == []


def test_an_unused_key_is_found(read: set[tuple[str, str]], tests: str) -> None:
    for key in ("chunk.weight", "eval.colour", "data.sources[].colour", "colour"):
        assert not in_use(read, key)
        assert not named(tests, key)
