"""`chunkflow recipes`: list the recipes, show one, copy one."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.syntax import Syntax
from rich.text import Text

from chunkflow_cli.cli.screens.tables import columns
from chunkflow_cli.config.home import expand_home
from chunkflow_cli.config.key_files import read_key_file
from chunkflow_cli.config.keys import did_you_mean
from chunkflow_cli.config.recipe_files import recipe_files
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import stdout_console
from chunkflow_cli.errors import UsageError

ONE_LINE_COLUMNS = 210
"""Smallest terminal width that shows each recipe on one line. A narrower terminal shows two lines per recipe."""


@dataclass(frozen=True)
class Recipe:
    """The description of a recipe, read from its file."""

    name: str
    path: str
    model: str
    """The model as written in the file, with interpolations unresolved; empty if the recipe does not set it."""
    hardware: str
    chunk_size: int
    k: int
    max_length: int | None
    """Longest sample in tokens; None means the model's own limit."""
    description: str
    """First sentence of the comment at the top of the file."""


def list_recipes(config_dir: str | None, *, json_output: bool) -> dict[str, Any]:
    """Print every recipe with what you need to choose one.

    Raises:
        UsageError: `config_dir` is not a folder, or a recipe in it is not valid YAML.
    """
    recipes = [describe(name, path) for name, path in recipe_files(config_dir).items()]
    if not json_output:
        _print(recipes)
    return {"recipes": [asdict(recipe) for recipe in recipes]}


def show(name: str, config_dir: str | None, *, json_output: bool = False) -> dict[str, Any]:
    """Print the file of a recipe: `chunkflow recipes show NAME > mine.yaml` makes a copy.

    Raises:
        UsageError: there is no such recipe; the message names the nearest one.
    """
    path = find(name, config_dir)
    text = path.read_text(encoding="utf-8")
    if not json_output:
        console = stdout_console()
        if console.is_terminal:
            console.print(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True))
        else:
            print(text, end="")
    return {**asdict(describe(name, path)), "text": text}


def copy(name: str, destination: str | None, config_dir: str | None, *, json_output: bool = False) -> dict[str, Any]:
    """Copy a recipe to `destination` (a file, or a folder; default ./NAME.yaml) and print how to run it.

    Raises:
        UsageError: there is no such recipe, or the file exists, cannot be written, or does not end in .yaml.
    """
    path = find(name, config_dir)
    target = Path(expand_home(destination or f"{name}.yaml", "DEST"))
    if target.is_dir():
        target /= f"{name}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target} does not end in .yaml, as recipe=PATH requires\n  copy to {target}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UsageError(
            f"{target} exists and is not overwritten\n"
            f"  name another file, as in chunkflow recipes copy {name} OTHER.yaml, or remove it first"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror}\n  name a file in a folder that exists"
        ) from error
    command = f"chunkflow train {shlex.quote(f'recipe={target}')}"
    if not {"path", "sources"} & _read(path).get("data", {}).keys():
        command += " data.path=YOUR_DATA"
    if not json_output:
        console = stdout_console()
        console.print(f"{target}", soft_wrap=True)
        console.print(f"  run it:  {command}", soft_wrap=True)
    return {"recipe": name, "path": str(target), "command": command}


def find(name: str, config_dir: str | None) -> Path:
    """Return the file of a recipe.

    Raises:
        UsageError: there is no recipe of this name; the message names the nearest one.
    """
    files = recipe_files(config_dir)
    if name not in files:
        near = did_you_mean(name.removesuffix(".yaml"), list(files))
        raise UsageError(f"there is no recipe {name!r}{near}\n  recipes: {', '.join(files)}")
    return files[name]


def describe(name: str, path: Path) -> Recipe:
    """Return what a recipe file says about itself, read without Hydra.

    Raises:
        UsageError: it is not a YAML file of keys.
    """
    tree = _read(path)
    defaults = Config()

    def value(section: str, key: str) -> Any:
        return (tree.get(section) or {}).get(key, getattr(getattr(defaults, section), key))

    return Recipe(
        name=name,
        path=str(path),
        model=value("model", "path"),
        hardware=tree.get("hardware") or "",
        chunk_size=value("chunk", "size"),
        k=value("chunk", "k"),
        max_length=value("data", "max_length"),
        description=_first_sentence(path.read_text(encoding="utf-8")),
    )


def _read(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(read_key_file(path, str(path)).tree)
    if not isinstance(tree, dict) or not all(
        isinstance(tree.get(key) or {}, dict) for key in ("model", "data", "chunk")
    ):
        raise UsageError(f"{path} is not a recipe: it must have keys such as `chunk: {{size: 4096}}`")
    return {str(key): value for key, value in tree.items()}


def _first_sentence(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# ").rstrip())
    sentence, stop, _ = " ".join(lines).partition(". ")
    return sentence + stop.strip()


def _print(recipes: list[Recipe]) -> None:
    console = stdout_console()
    if console.width >= ONE_LINE_COLUMNS:
        table = columns("recipe", "model", ">chunk.size", ">K", ">longest", "made for", "")
        for recipe in recipes:
            table.add_row(*_cells(recipe), _made_for(recipe), Text(recipe.description))
    else:
        table = columns("recipe", "what it trains, and on what")
        table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
        for recipe in recipes:
            name, _, size, k, longest = _cells(recipe)
            facts = f"chunk.size={size}" + (f" chunk.k={k}" if recipe.k != Config().chunk.k else "")
            if longest and longest not in recipe.description:
                facts += f", samples up to {longest}"
            table.add_row(name, Text(f"{recipe.description}\n{facts}; {_made_for(recipe)}"))
    table.columns[0].style = "cyan"
    console.print(table, soft_wrap=False)


def _cells(recipe: Recipe) -> tuple[str, str, str, str, str]:
    path = recipe.model.partition(",")[0].rstrip("}")  # `Qwen/NAME` or `${package_file:.../NAME,make demo}`
    model = path.rpartition("/")[2] or "(yours)"
    tokens = recipe.max_length
    longest = "" if tokens is None else f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
    return recipe.name, model, str(recipe.chunk_size), str(recipe.k), longest


def _made_for(recipe: Recipe) -> str:
    return recipe.hardware or "any machine"
