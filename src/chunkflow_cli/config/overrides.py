"""Overrides, checked one by one before Hydra composes them, so that an error names the user's own words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.keys import GONE, known_keys, unknown_key, wrong_value
from chunkflow_cli.config.recipe_files import shipped_folder
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MAPPINGS = ("engine.deepspeed", "data.columns")
"""The keys that take any keys below them."""


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's parser.

    Raises:
        UsageError: a word is not an override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(words))
    except OverrideParseException as error:
        raise UsageError(
            f"{error.override!r} does not have the form key=value\n"
            "  put a value with special characters in quotes, for the shell and for Hydra: 'key=\"a=b\"'"
        ) from error
    return parsed


def check_overrides(words: Sequence[str], config_dir: str | None = None) -> None:
    """Reject what Hydra would accept without a word, or would explain in its own terms.

    Args:
        config_dir: folder that can hold more groups of configuration files than `conf`.

    Raises:
        UsageError: a word is not an override; its key is unknown or gone, or cannot be added or removed; or it has
            several values.
    """
    folders = [shipped_folder("conf"), *([Path(config_dir)] if config_dir is not None else [])]
    for override in parse_overrides(words):
        _check_override(override, folders)


def _check_override(override: Override, folders: Sequence[Path]) -> None:
    word, value = override.input_line, override.value()
    name = override.get_key_element().lstrip("+~")
    if override.is_sweep_override():
        raise UsageError(
            f"{word} has several values\n"
            f"  write a list as {name}=[a,b], a string as '{name}=\"a,b\"'; to run each: chunkflow train --multirun"
        )
    if name == "recipe" or override.is_hydra_override() or name.startswith(tuple(f"{key}." for key in MAPPINGS)):
        return
    if name and any((folder / name).is_dir() for folder in folders):
        if value is None and not override.is_delete():
            raise UsageError(f"{word} is not a file in {name}/\n  write {name}=NAME, or leave it out")
        return
    if f"{name}={value}" in GONE:
        raise UsageError(wrong_value(name, value))
    if not any(key == name or key.startswith(f"{name}.") for key in known_keys()):
        raise UsageError(unknown_key(name))
    if override.is_delete():
        raise UsageError(f"{word}: a configuration key cannot be removed\n  set its value instead")
    if override.is_add() and name not in MAPPINGS:
        raise UsageError(f"{word}: the key exists\n  leave out the +")
