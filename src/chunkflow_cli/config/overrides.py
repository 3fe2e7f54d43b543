"""Overrides, checked one by one before Hydra composes them, so that an error names the user's own words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.keys import GONE, describe_keys, did_you_mean, is_section, unknown_key, wrong_value
from chunkflow_cli.config.recipe_files import shipped_folder
from chunkflow_cli.config.texts import for_the_shell, unquoted
from chunkflow_cli.config.words import FILES, Word, choices, hydra_form, mapping_of, read_words, text_problem
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MOST_SHOWN = 40


def parse_override(word: Word) -> Override:
    """Parse a word with Hydra's parser.

    Raises:
        UsageError: its value is not what its key takes, or the word is not an override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([hydra_form(word)])
    except OverrideParseException as error:
        raise UsageError(_does_not_parse(word)) from error
    return parsed


def sweep(words: Sequence[str]) -> list[list[str]]:
    """Return the choices of each word of a sweep: `["a=1,2", "b=x"]` gives `[["a=1", "a=2"], ["b=x"]]`.

    Raises:
        UsageError: a word is not an override.
    """
    read, problems = read_words(words)
    if problems:
        raise UsageError(in_one(problems))
    found = []
    for word in read:
        texts = choices(word)
        if texts is None:
            override = parse_override(word)
            swept = override.sweep_string_iterator() if override.is_sweep_override() else None
            texts = [_typed(word)] if swept is None else [f"{word.sign}{word.name}={value}" for value in swept]
        found.append(texts)
    return found


def check_words(words: Sequence[Word], config_dir: str | None = None) -> list[str]:
    """Return an error for each word that Hydra would accept silently, or would reject with a message about its grammar.

    Args:
        words: as `read_words` returns them.
        config_dir: folder that can hold more groups of configuration files than `conf`.
    """
    folders = [shipped_folder("conf"), *([Path(config_dir)] if config_dir is not None else [])]
    problems = []
    for word in words:
        if word.name in FILES and word.value is not None:
            continue
        try:
            problem = text_problem(word) or _problem(word, folders)
        except UsageError as error:
            problem = str(error)
        if problem is not None:
            problems.append(problem)
    return problems


def in_one(problems: Sequence[str]) -> str:
    """Return several errors as the text of one, a line for each."""
    if len(problems) == 1:
        return problems[0]
    lines = [problem.replace("\n  ", "; ") for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"and {len(problems) - MOST_SHOWN} more")
    return "\n  ".join([f"{len(problems)} things are wrong:", *lines])


def _problem(word: Word, folders: Sequence[Path]) -> str | None:
    name, value = word.name, word.value
    mapping = mapping_of(name)
    if name.startswith(("hydra.", "hydra/")) or (mapping is not None and mapping.name != name):
        parse_override(word)
        return None
    if any((folder / name).is_dir() for folder in folders):
        if value is not None and value.lower() in ("", "null"):
            return f"{word.typed} is not a file in {name}/\n  write {name}=NAME, or leave it out"
        return None if value is None else _several_values(word) or _no_such_file(word, folders)
    if value is not None and f"{name}={value}" in GONE:
        return wrong_value(name, value)
    if name not in describe_keys():
        if not is_section(name):
            return unknown_key(name)
        if value is not None and word.sign != "~":
            return wrong_value(name, value)
    if word.sign == "~":
        return f"{word.typed}: a configuration key cannot be removed\n  set its value instead"
    if word.sign == "+" and mapping is None:
        return f"{word.typed}: the key exists\n  leave out the +"
    return _several_values(word)


def _no_such_file(word: Word, folders: Sequence[Path]) -> str | None:
    """Return the error for a word that chooses a file of a group that is not there."""
    names = sorted({path.stem for folder in folders for path in (folder / word.name).glob("*.yaml")})
    value = unquoted(word.value or "")
    if not re.fullmatch(r"[\w-]+", value) or value in names:
        return None
    return f"{word.typed} must be one of {', '.join(names)}{did_you_mean(value, names, f'{word.name}=')}"


def _several_values(word: Word) -> str | None:
    if not parse_override(word).is_sweep_override():
        return None
    key = describe_keys().get(word.name)
    as_list = f"write a list as {word.name}=[a,b]; " if key is not None and key.is_list else ""
    return f"{_typed(word)} has several values\n  {as_list}to run each of them: chunkflow train --multirun"


def _does_not_parse(word: Word) -> str:
    key = describe_keys().get(word.name)
    value = unquoted(word.value or "")
    if key is not None:
        return wrong_value(word.name, value)
    if is_section(word.name):
        return f"{word.typed} cannot be read\n  set one key at a time, as in {word.name}.KEY=VALUE"
    form = for_the_shell(word.name, value)
    return f"{word.typed} cannot be read\n  put a value with special characters in quotes: {form}"


def _typed(word: Word) -> str:
    """Return the word; a part of a section in braces is written as a word of its own."""
    return word.typed if word.value is None else f"{word.sign}{word.name}={word.value}"
