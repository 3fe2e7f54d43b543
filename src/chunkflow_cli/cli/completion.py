"""Shell completion: recipes, groups, keys and values, answered without torch or Hydra in a fraction of a second.

The shell puts a space behind a candidate that stands alone. A word that is not finished (`chunk.`, `chunk.size=`)
would be broken by it, so it never stands alone: a section is replaced by its keys, and a key comes with a value of its.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from chunkflow_cli.config.keys import describe_keys
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.errors import UsageError

Candidates = list[tuple[str, str]]
"""(what to type, what it means)."""


def complete_override(ctx: typer.Context, incomplete: str) -> Candidates:
    """Candidates for one override, as Typer's `autocompletion` wants them."""
    words = _words_of_bash()
    config_dir = _config_dir(ctx, words)
    if words is None:
        return candidates(incomplete, config_dir)
    before, word = words
    if word == "=" and before:
        key, value = before[-1], ""
    elif before and before[-1] == "=" and len(before) > 1:
        key, value = before[-2], word
    else:
        return candidates(word, config_dir)
    if _is_path(key) and value not in ("n", "nu", "nul"):
        return []  # then bash completes file names itself, and knows how to go on behind a folder
    prefix = f"{key}="
    found = candidates(prefix + value, config_dir)
    return [(text.removeprefix(prefix), meaning) for text, meaning in found]


def complete_recipe(ctx: typer.Context, incomplete: str) -> Candidates:
    """Names of recipes, for `chunkflow recipes show`."""
    found = _recipes(_config_dir(ctx, _words_of_bash()))
    return [(name, meaning) for name, meaning in found if name.startswith(incomplete)]


def candidates(word: str, config_dir: str | None = None) -> Candidates:
    """What an override that begins with `word` may become.

    >>> [text for text, _ in candidates("chunk.s")]
    ['chunk.size=', 'chunk.size=8192']
    """
    signs = re.match(r"\+{0,2}", word)
    assert signs is not None
    typed = word[signs.end() :]
    key, separator, value = typed.partition("=")
    found = _values(key, value, config_dir) if separator else _keys(typed, config_dir)
    return [(signs.group() + text, meaning) for text, meaning in found]


def _keys(typed: str, config_dir: str | None) -> Candidates:
    described = describe_keys()
    level: dict[str, str] = {}
    groups = {f"{name}=": f"a file of conf/{name}/" for name in _groups(config_dir)}
    for name, meaning in {"recipe=": "a recipe's name, or a path that ends in .yaml", **groups}.items():
        if name.startswith(typed):
            level[name] = meaning
    for key in described.values():
        if key.name.startswith(typed):
            end = key.name.find(".", len(typed))
            level.setdefault(*((f"{key.name}=", _brief(key.help)) if end < 0 else (key.name[: end + 1], "")))
    if len(level) != 1:
        return list(level.items())
    ((only, meaning),) = level.items()
    if only.endswith("."):
        return _keys(only, config_dir)
    return [(only, meaning), *_values(only[:-1], "", config_dir)]


def _values(key: str, typed: str, config_dir: str | None) -> Candidates:
    """Values of a key behind what is typed of it; those of a list or a sweep behind the last comma."""
    done, last = re.fullmatch(r"(.*[\[,])?(.*)", typed, re.DOTALL).groups("")  # type: ignore[union-attr]
    if key == "recipe":
        found = _recipes(config_dir)
        to_folders = "/" in last or not any(name.startswith(last) for name, _ in found)
        paths = _paths(last, (".yaml", ".yml"))
        found += [(path, "") for path in paths if to_folders or not path.endswith("/")]
    elif key in _groups(config_dir):
        found = [(name, "") for name in _groups(config_dir)[key]]
    else:
        described = describe_keys().get(key)
        if described is None:
            return []
        meaning = _brief(described.help)
        words: tuple[str, ...] = (described.default,)
        if done if described.is_list else described.choices:
            words = described.choices
        found = [(word, f"{'default. ' if word == described.default else ''}{meaning}") for word in words if word]
        if _is_path(key):
            found += [(path, meaning) for path in _paths(last, ())] or [("./", meaning)]
    return [(f"{key}={done}{text}", meaning) for text, meaning in found if text.startswith(last)]


def _recipes(config_dir: str | None) -> Candidates:
    try:
        return [(name, _first_comment(path)) for name, path in recipe_files(config_dir).items()]
    except UsageError:  # --config-dir is no folder: the command will say so
        return []


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as lines:
        line = next(lines, "")
    return _brief(line.lstrip("# ").strip()) if line.startswith("#") else ""


def _groups(config_dir: str | None) -> dict[str, list[str]]:
    """Files of each configuration group, by the group's name."""
    groups: dict[str, list[str]] = {}
    for folder in [shipped_folder("conf"), *([Path(config_dir)] if config_dir else [])]:
        for path in sorted(folder.glob("*/*.yaml")):
            if path.parent.name != "recipes":
                groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def _paths(typed: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Files (with one of the endings) and folders whose path begins with what is typed.

    A folder that stands alone gives way to what is in it.
    """
    parent, slash, name = typed.rpartition("/")
    try:
        entries = sorted(Path(f"{parent}{slash}" or ".").expanduser().iterdir())
    except OSError:
        return
    shown = [
        f"{parent}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(name)
        and (name.startswith(".") or not entry.name.startswith("."))
        and (entry.is_dir() or not endings or entry.name.endswith(endings))
    ]
    if len(shown) == 1 and shown[0].endswith("/"):
        yield from _paths(shown[0], endings)
    else:
        yield from shown


def _is_path(key: str) -> bool:
    return key.rpartition(".")[2] in ("path", "eval_path", "output_dir", "cache_dir")


def _brief(text: str) -> str:
    """The first sentence, cut to one line: Typer breaks longer ones, and fish takes the rest for a candidate."""
    return textwrap.shorten(text.replace("`", "").partition(". ")[0].rstrip("."), 60, placeholder=" ...")


def _words_of_bash() -> tuple[list[str], str] | None:
    """The words before the one to complete, and that one; None in another shell.

    Bash cuts words at `=`: `recipe=q` arrives as `recipe`, `=`, `q`, and only what follows the `=` is replaced.
    """
    if "COMP_CWORD" not in os.environ or "COMP_WORDS" not in os.environ:
        return None
    try:
        words = shlex.split(os.environ["COMP_WORDS"])
    except ValueError:  # an open quote
        words = os.environ["COMP_WORDS"].split()
    position = int(os.environ["COMP_CWORD"])
    return words[:position], words[position] if position < len(words) else ""


def _config_dir(ctx: typer.Context, words: tuple[list[str], str] | None) -> str | None:
    if words is not None and "--config-dir" in words[0]:  # bash may have cut --config-dir=DIR in three
        behind: Iterable[str] = words[0][words[0].index("--config-dir") + 1 :]
        return next((word for word in behind if word != "="), None)
    value = ctx.params.get("config_dir")
    return value if isinstance(value, str) else None
