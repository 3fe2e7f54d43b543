"""Parse the words of a command line by the declared type of each key, not by a grammar.

A key that holds text takes it as it is typed: spaces, `=`, commas, brackets, accents and what looks like a number. Four
things keep their meaning: quotes around the whole text (`"..."`, `'...'`), `null` where the key can be null, `${...}`,
and a list in brackets where the key takes a list. Everything else is Hydra's grammar.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from chunkflow_cli.config.foreign import foreign_name
from chunkflow_cli.config.keys import Key, describe_element_keys, describe_keys, is_section, known_keys, unknown_key
from chunkflow_cli.config.texts import for_the_shell, is_list, is_quoted, quoted, split_list, unquoted

FILES = ("recipe", "overrides")
"""Words that name YAML files: `recipe=NAME`, `recipe=FILE`, and `overrides=FILE`, which `--overrides FILE` becomes."""
_SETS = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<name>[A-Za-z_$][\w.$/@:-]*)=(?P<value>.*)", re.DOTALL)
_REMOVES = re.compile(r"(?P<sign>~)(?P<name>[A-Za-z_$][\w.$@-]*)")
_SWEEP = re.compile(r"(choice|range|glob|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?\d[\d_]*(\.\d*)?([eE]\+?\d{1,2})?")
_DATA = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")
_READ = ("data.path", "data.eval_path")
"""Keys whose path must exist."""


@dataclass(frozen=True)
class Word:
    """A word that sets a key, names a file, or removes a key."""

    typed: str
    """As the user typed it."""
    sign: str
    """The prefix `+`, `++` or `~`, or an empty string."""
    name: str
    value: str | None
    """The text after the `=`; None if there is no `=`."""


def read_words(words: Sequence[str]) -> tuple[list[Word], list[str]]:
    """Return what the words of a command line set, and an error for each word that sets nothing.

    A word that ends in .yaml is a recipe. `section={key: value}` is taken apart into its keys.
    """
    found: list[Word] = []
    problems = []
    for typed in words:
        word = _read(typed)
        if word is None:
            problems.append(_sets_nothing(typed))
        else:
            found += _keys_of_section(word)
    return found, problems


def is_override(typed: str) -> bool:
    """Return whether a word sets a key, names a recipe or removes a key; otherwise it is a path."""
    word = _read(typed)
    return word is not None and (word.value is None or word.name == "recipe" or not Path(typed).exists())


def as_word(name: str, text: str) -> str:
    """Return the word that sets a key to exactly this text."""
    key = describe_keys()[name]
    is_plain = _plain(key, text) and not (key.is_text_list and text.startswith("["))
    return f"{name}={text if is_plain else quoted(text)}"


def hydra_form(word: Word) -> str:
    """Return a word as Hydra's grammar takes it, with the texts quoted that it would read otherwise."""
    if word.value is None:
        return word.typed
    key = describe_keys().get(word.name)
    sign = "++" if mapping_of(word.name) else word.sign  # its keys are new to Hydra
    return f"{sign}{word.name}={word.value if key is None else _value(key, word.value)}"


def mapping_of(name: str) -> Key | None:
    """Return the key that holds a mapping and that a name is, or is below of: `engine.deepspeed.dump_state`."""
    for key in describe_keys().values():
        if key.is_mapping and f"{name}.".startswith(f"{key.name}."):
            return key
    return None


def choices(word: Word) -> list[str] | None:
    """Return the words of a sweep over a key that holds text, as typed: `a=x,y` gives `a=x` and `a=y`.

    None leaves it to Hydra's grammar.
    """
    key = describe_keys().get(word.name)
    holds_text = word.name in FILES or (key is not None and (key.is_text or key.is_text_list))
    if word.value is None or not holds_text or _SWEEP.fullmatch(word.value):
        return None
    parts = split_list(word.value)
    return [word.typed] if len(parts) < 2 else [f"{word.sign}{word.name}={part}" for part in parts]


def text_problem(word: Word) -> str | None:
    """Return an error for a text that cannot be what the user means, or None."""
    key = describe_keys().get(word.name)
    if word.value is None or key is None or not (key.is_text or key.is_text_list):
        return None
    value = word.value
    if value == "???":
        return f"{word.typed} means that the value is missing\n  for a path of this name, write {word.name}=./???"
    if "${" in value and not _is_interpolation(unquoted(value)):
        literal = for_the_shell(word.name, unquoted(value).replace("${", "\\${"))
        return (
            f"{word.typed} has a ${{ that does not begin an interpolation such as ${{chunk.size}}\n"
            f"  for the characters themselves, write {literal}"
        )
    if key.is_text_list and not key.is_text:
        return (
            None
            if is_list(value) or value.startswith("${")
            else f"{word.typed} must be a list in brackets\n  write '{word.name}=[{value}]'"
        )
    if key.is_text_list and is_list(value):
        return None
    if word.name in _READ and "," in value and _plain(key, value) and not _exists(value):
        parts = ",".join(split_list(value.strip("{}")))
        remedy = f"write a list: '{word.name}=[{parts}]'" if key.is_text_list else "name their folder, or a glob"
        return f"{word.typed}: there is no such file\n  for several files, {remedy}"
    return None


def _read(typed: str) -> Word | None:
    match = _SETS.fullmatch(typed)
    is_yaml = typed.endswith((".yaml", ".yml"))
    if is_yaml and (match is None or (match["name"] not in (*known_keys(), *FILES) and Path(typed).is_file())):
        return Word(typed, "", "recipe", typed)
    if match is None:
        match = _REMOVES.fullmatch(typed)
        return None if match is None else Word(typed, "~", match["name"], None)
    return Word(typed, match["sign"] or "", match["name"], match["value"])


def _keys_of_section(word: Word) -> list[Word]:
    """Return `section={key: value, ...}` as one word a key, so that each value is read by the type of its key."""
    value = (word.value or "").strip()
    if not is_section(word.name) or not (value.startswith("{") and value.endswith("}")):
        return [word]
    words = []
    for part in split_list(value[1:-1]):
        name, colon, rest = part.partition(":")
        if not colon:
            return [word]
        words.append(replace(word, name=f"{word.name}.{name.strip()}", value=rest.strip()))
    return [inner for each in words for inner in _keys_of_section(each)]


def _value(key: Key, value: str) -> str:
    """Return a value in Hydra's grammar."""
    if key.has_sections and is_list(value):
        return f"[{','.join(_section(key, part.strip()) for part in split_list(value[1:-1]))}]"
    if key.is_text_list and is_list(value):
        return f"[{','.join(part if is_quoted(part) else quoted(part) for part in split_list(value[1:-1]))}]"
    if key.is_text:
        return quoted(value) if _plain(key, value) else value
    if key.is_integer and _WHOLE.fullmatch(value):
        number = Decimal(value.replace("_", ""))
        return str(int(number)) if number == int(number) else value
    return value


def _section(key: Key, value: str) -> str:
    """Return an element of a list of mappings, `{path: a.jsonl}`, in Hydra's grammar."""
    if not (value.startswith("{") and value.endswith("}")):
        return value
    parts = []
    for part in split_list(value[1:-1]):
        name, colon, rest = part.partition(":")
        inner = describe_element_keys().get(f"{key.name}[].{name.strip()}")
        parts.append(part if inner is None or not colon else f"{name.strip()}: {_value(inner, rest.strip())}")
    return f"{{{','.join(parts)}}}"


def _plain(key: Key, value: str) -> bool:
    """Return whether a value is text as it stands: neither in quotes nor null."""
    return not is_quoted(value) and not (key.can_be_null and value.lower() == "null")


def _is_interpolation(value: str) -> bool:
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    try:
        OmegaConf.create({"value": value})
    except GrammarParseError:
        return False
    return True


def _exists(value: str) -> bool:
    import glob

    path = str(Path(value).expanduser()) if value.startswith("~/") else value
    return Path(path).exists() or bool(glob.glob(path))


def _sets_nothing(typed: str) -> str:
    """Return the error for a word that is neither a key with a value nor a file of keys."""
    from chunkflow_cli.config.recipe_files import recipe_files

    if typed == "=" or typed.startswith("="):
        return f"{typed!r} has no key\n  write key=value without spaces around the ="
    if typed in known_keys():
        return f"{typed!r} has no value: write it in the form key=value, such as {typed}=VALUE"
    if typed in recipe_files():
        return f"{typed!r} does not have the form key=value\n  did you mean recipe={typed}?"
    path = Path(typed).expanduser() if typed.startswith("~/") else Path(typed)
    if "=" not in typed and (foreign_name(typed) is not None and not path.exists()):
        return unknown_key(typed)
    if (path / "config.json").is_file() or typed.lower().endswith((".gguf", ".safetensors")):
        return f"{typed!r} does not have the form key=value\n  did you mean {shlex.quote(f'model.path={typed}')}?"
    if path.exists() or "/" in typed or typed.lower().endswith(_DATA):
        return f"{typed!r} does not have the form key=value\n  did you mean {shlex.quote(f'data.path={typed}')}?"
    return f"{typed!r} does not have the form key=value\n  as in chunk.size=4096, recipe=NAME or recipe=FILE.yaml"
