"""Expand `~` in paths. The shell expands it only at the beginning of a word, so not after `key=`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkflow_cli.config.keys import describe_keys
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def expand_home(path: str, name: str) -> str:
    """Return a path with a leading `~` or `~USER` replaced by the home folder.

    Args:
        path: any path.
        name: key or option that it belongs to, for the error.

    Raises:
        UsageError: there is no such home folder.
    """
    if not path.startswith("~"):
        return path
    user = path[1:].partition("/")[0]
    expanded = os.path.expanduser(path)
    if user and expanded == path:
        if Path(path).parts[0] in os.listdir():
            return path
        raise UsageError(
            f"{name}={path}: this machine has no user {user}\n  for a folder of this name, write {name}=./{path}"
        )
    if expanded == path or (not user and os.environ.get("HOME") == ""):
        raise UsageError(f"{name}={path}: there is no home folder, because HOME is not set\n  write the whole path")
    return expanded


def expand_homes(tree: DictConfig) -> None:
    """Expand `~` in every path of a configuration, also where an interpolation leads to it.

    Raises:
        UsageError: there is no such home folder.
    """
    from omegaconf import OmegaConf

    for key in describe_keys().values():
        if key.is_path and not OmegaConf.is_missing(tree, key.name):
            _expand(tree, key.name, key.name)
    for index, source in enumerate(tree.data.sources):
        _expand(source, "path", f"data.sources[{index}].path")


def _expand(section: DictConfig, place: str, name: str) -> None:
    from omegaconf import OmegaConf

    value: Any = OmegaConf.select(section, place)
    if isinstance(value, str) and value.startswith("~"):
        OmegaConf.update(section, place, expand_home(value, name))
    elif OmegaConf.is_list(value):
        for index, each in enumerate(value):
            if isinstance(each, str) and each.startswith("~"):
                value[index] = expand_home(each, name)
