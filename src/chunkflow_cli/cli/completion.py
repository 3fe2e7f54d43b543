"""Shell completion of recipes, configuration keys and the values of choices, without importing torch or Hydra.

A shell puts a space after the only candidate. A word that must go on (`chunk.`, `chunk.size=`) is therefore never the
only candidate: a section is replaced by its keys, and a key comes with values.
"""

from __future__ import annotations

import os
import re
import textwrap

import typer

Candidates = list[tuple[str, str]]
"""Pairs of (text to type, its meaning)."""


def complete_override(ctx: typer.Context, incomplete: str) -> Candidates:
    """Return the candidates for one override, as Typer's `autocompletion` takes them."""
    word = (_words_of_bash() or [incomplete])[-1]
    given = len(word) - len(incomplete)  # bash replaces only what follows an `=`
    return [(text[given:], meaning) for text, meaning in candidates(word, _config_dir(ctx))]


def complete_recipe(ctx: typer.Context, incomplete: str) -> Candidates:
    """Return the names of recipes that begin with what is typed."""
    return [(name, "") for name in _recipes(_config_dir(ctx)) if name.startswith(incomplete)]


def candidates(word: str, config_dir: str | None = None) -> Candidates:
    """Return the possible completions of an override that begins with `word`.

    >>> [text for text, _ in candidates("chunk.s")]
    ['chunk.size=', 'chunk.size=8192']
    """
    key, separator, value = word.partition("=")
    if not separator:
        return _keys(word, config_dir)
    found = [(name, "") for name in _recipes(config_dir)] if key == "recipe" else _values(key)
    return [(f"{key}={text}", meaning) for text, meaning in found if text.startswith(value)]


def _keys(typed: str, config_dir: str | None) -> Candidates:
    """Return the keys that begin with the typed text, or their sections in their place."""
    from chunkflow_cli.config.keys import describe_keys

    level: dict[str, str] = {}
    meanings = {"recipe": "Name of a recipe, or a path that ends in .yaml"}
    meanings |= {key.name: _first_sentence(key.help) for key in describe_keys().values()}
    for name, meaning in meanings.items():
        if name.startswith(typed):
            end = name.find(".", len(typed)) + 1
            level.setdefault(*((name[:end], "") if end else (f"{name}=", meaning)))
    if len(level) != 1:
        return list(level.items())
    ((only, meaning),) = level.items()
    if only.endswith("."):
        return _keys(only, config_dir)
    return [(only, meaning), *(candidates(only, config_dir) or [(f"{only}VALUE", meaning)])]


def _values(key: str) -> Candidates:
    """Return the choices of a key, or its default."""
    from chunkflow_cli.config.keys import describe_keys

    described = describe_keys().get(key)
    if described is None:
        return []
    words = () if described.is_list else described.choices
    if not words and described.default not in ("", "null"):
        words = (described.default,)
    return [(word, _first_sentence(described.help)) for word in words]


def _recipes(config_dir: str | None) -> list[str]:
    from chunkflow_cli.config.recipe_files import recipe_files
    from chunkflow_cli.errors import UsageError

    try:
        return list(recipe_files(config_dir))
    except UsageError:  # --config-dir is not a folder: the command will report it
        return []


def _first_sentence(text: str) -> str:
    """Return the first sentence on one line: Typer wraps longer text, and fish reads each line as a candidate."""
    return textwrap.shorten(text.replace("`", "").partition(". ")[0].rstrip("."), 60, placeholder=" ...")


def _words_of_bash() -> list[str]:
    """Return the words up to the one to complete; none in another shell.

    Bash cuts words at `=`: `recipe=q` arrives as three lines, `recipe`, `=` and `q`, which are joined here.
    """
    if os.environ.get("_CHUNKFLOW_COMPLETE") != "complete_bash":
        return []
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    return re.sub(r"\n=(\n|$)", "=", "\n".join(words)).split("\n")


def _config_dir(ctx: typer.Context) -> str | None:
    option = "--config-dir="
    joined = [word.removeprefix(option) for word in _words_of_bash() if word.startswith(option)]
    return joined[0] if joined else ctx.params.get("config_dir")
