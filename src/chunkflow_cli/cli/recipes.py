"""`chunkflow recipes`: what ships, what is in a recipe, and a copy to make one's own."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from chunkflow_cli.config.keys import did_you_mean
from chunkflow_cli.config.recipe_files import recipe_files
from chunkflow_cli.config.schema import Config
from chunkflow_cli.console import stdout_console
from chunkflow_cli.errors import UsageError

ONE_LINE_COLUMNS = 170
"""A terminal at least this wide shows a recipe on one line; a narrower one on three, so that nothing wraps."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says about itself."""

    name: str
    path: str
    model: str
    """As in the file, interpolations unresolved; empty where the recipe leaves it to the user."""
    hardware: str
    chunk_size: int
    k: int
    max_length: int | None
    """Longest sample in tokens; None is the model's own limit."""
    description: str
    """First sentence of the comment at the top."""


def list_recipes(config_dir: str | None, *, json_output: bool = False) -> dict[str, Any]:
    """Show every recipe, with what decides whether it is the right one.

    Raises:
        UsageError: `config_dir` is no folder, or a recipe in it is no YAML.
    """
    recipes = [describe(name, path) for name, path in recipe_files(config_dir).items()]
    if not json_output:
        _print(recipes)
    return {"recipes": [asdict(recipe) for recipe in recipes]}


def show(name: str, config_dir: str | None, *, json_output: bool = False) -> dict[str, Any]:
    """Print a recipe as it is, comments included: `chunkflow recipes show NAME > mine.yaml` is a copy.

    Raises:
        UsageError: there is no such recipe; the nearest one is named.
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
    """Write a recipe to `destination` (default ./NAME.yaml; in a folder, NAME.yaml there) and say how to run it.

    Raises:
        UsageError: there is no such recipe, or the file exists, cannot be written, or does not end in .yaml.
    """
    path = find(name, config_dir)
    target = Path(destination or f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target}: recipe=PATH takes files that end in .yaml\n  copy it to {target}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UsageError(
            f"{target} exists and is left as it is\n"
            f"  name another file: chunkflow recipes copy {name} OTHER.yaml; or remove it first"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror}\n  name a file in a folder that exists"
        ) from error
    command = f"chunkflow train {shlex.quote(f'recipe={target}')}"
    if not _read(path).get("data", {}).get("path"):
        command += " data.path=YOUR_DATA"
    if not json_output:
        console = stdout_console()
        console.print(f"{target}", markup=False, soft_wrap=True)
        console.print(f"  run it:  {command}", markup=False, soft_wrap=True)
    return {"recipe": name, "path": str(target), "command": command}


def find(name: str, config_dir: str | None) -> Path:
    """The file of a recipe.

    Raises:
        UsageError: there is none of this name; the nearest one is named.
    """
    files = recipe_files(config_dir)
    if name not in files:
        near = did_you_mean(name.removesuffix(".yaml"), list(files))
        raise UsageError(f"there is no recipe {name!r}{near}\n  recipes: {', '.join(files)}")
    return files[name]


def describe(name: str, path: Path) -> Recipe:
    """What a recipe file says about itself.

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
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(
        isinstance(tree.get(key) or {}, dict) for key in ("model", "data", "chunk")
    ):
        raise UsageError(f"{path} is not a recipe: it must hold keys such as `chunk: {{size: 4096}}`")
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
    rows = [("recipe", "model", "size/K", "longest"), *(_cells(recipe) for recipe in recipes)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    aligned = [
        f"{name:<{widths[0]}}  {model:<{widths[1]}}  {size:>{widths[2]}}  {longest:>{widths[3]}}"
        for name, model, size, longest in rows
    ]
    # A pipe has no width, so nothing need be cut there.
    one_line = not console.is_terminal or console.width >= ONE_LINE_COLUMNS
    hardware_width = max((len(_made_for(recipe)) for recipe in recipes), default=0)
    _print_line(console, Text(aligned[0] + (f"  {'made for':<{hardware_width}}" if one_line else ""), style="bold"))
    for recipe, line in zip(recipes, aligned[1:], strict=True):
        text = Text(line)
        text.stylize("cyan", 0, widths[0])
        if one_line:
            text.append(f"  {_made_for(recipe):<{hardware_width}}  {recipe.description}")
            _print_line(console, text)
            continue
        _print_line(console, text)
        for detail in (f"for {_made_for(recipe)}", recipe.description):
            _print_line(console, Text(f"  {detail}", style="dim"))


def _print_line(console: Console, text: Text) -> None:
    text.rstrip()
    cut = console.is_terminal
    console.print(text, no_wrap=True, overflow="ellipsis" if cut else "ignore", crop=cut, soft_wrap=not cut)


def _cells(recipe: Recipe) -> tuple[str, str, str, str]:
    longest = "" if recipe.max_length is None else _in_k(recipe.max_length)
    return recipe.name, _short_model(recipe.model), f"{recipe.chunk_size}/{recipe.k}", longest


def _made_for(recipe: Recipe) -> str:
    return recipe.hardware or "any machine"


def _short_model(path: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct` and `${package_file:folder/model.gguf}` by their last part."""
    return path.rstrip("}").rpartition("/")[2] or "(yours)"


def _in_k(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
