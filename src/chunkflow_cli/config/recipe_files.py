"""Where `conf/` and the recipes are."""

from __future__ import annotations

from pathlib import Path

import chunkflow_cli
from chunkflow_cli.errors import UsageError


def shipped_folder(name: str) -> Path:
    """Return the path of `conf` or `recipes`: inside the package in a wheel, next to `src` in an editable install."""
    package = Path(chunkflow_cli.__file__).parent
    for folder in (package / name, package.parents[1] / name):
        if folder.is_dir():
            return folder
    raise AssertionError(f"{name}/ is neither in the package nor next to src/")


def recipe_files(config_dir: str | None = None) -> dict[str, Path]:
    """Return the file of each recipe by name. One in `config_dir`/recipes hides a shipped one of the same name.

    Raises:
        UsageError: `config_dir` is not a folder.
    """
    folders = [shipped_folder("recipes")]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UsageError(f"--config-dir={config_dir} is not a folder\n  create it, or name another one")
        folders.append(Path(config_dir) / "recipes")
    found = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))
