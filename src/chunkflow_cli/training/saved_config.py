"""Save the configuration of a run, and compare it with that of a run that is to resume there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.files import write_atomically

CONFIG, OVERRIDES = Path(".hydra/config.yaml"), Path(".hydra/overrides.yaml")
# Keys that may differ between a run and its continuation: they change neither the loss nor the weights of any step.
FREE_KEYS = (
    "train.output_dir", "train.guard", "train.trace", "checkpoint", "log", "data.cache_dir", "data.num_workers", "tune",
    "plan", "cluster", "eval.prompts",
    # The layout: checkpoints do not depend on it. engine.deepspeed is not free, because it can change precisions.
    "launch", "parallel", "engine.zero_stage", "engine.offload", "train.deterministic",
    # Keys that a run which ran out of memory is continued with. Chunks are exact: their size, K and cuts change the
    # rounding and nothing else. (Dropout draws other numbers for other chunks, as it does for another layout.)
    "chunk", "model.activation_checkpointing", "model.kernels", "model.compile",
)  # fmt: skip
SHOWN_CHARACTERS = 60
"""Of a value in a message, at most."""


@dataclass(frozen=True)
class Difference:
    """A key that decides what a run computes, and whose value has changed."""

    key: str
    was: Any
    is_now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.was)} and is {_shown(self.is_now)}"


def save_config(run_folder: Path, loaded: LoadedConfig) -> None:
    """Write the configuration and the overrides of a run into its folder."""
    (run_folder / CONFIG).parent.mkdir(exist_ok=True)
    write_atomically(run_folder / CONFIG, OmegaConf.to_yaml(loaded.tree, resolve=True))
    write_atomically(run_folder / OVERRIDES, OmegaConf.to_yaml(list(loaded.overrides)))


def differing_keys(run_folder: Path, tree: Any) -> list[Difference]:
    """Return the keys that decide what a run computes, and differ between a run's folder and a configuration.

    A key that the folder's configuration does not have is new since then: the run had its default.

    Raises:
        UsageError: the folder's configuration is damaged; names the file.
    """
    theirs = _comparable(OmegaConf.structured(Config)) | _comparable(read_saved_config(run_folder))
    mine = _comparable(tree)
    return [
        Difference(key, theirs.get(key), mine.get(key))
        for key in sorted(mine.keys() | theirs.keys())
        if str(mine.get(key)) != str(theirs.get(key))
    ]


def read_saved_config(run_folder: Path, sections: Collection[str] = ("model", "data", "train")) -> Any:
    """Return the configuration of a run, as a tree.

    Args:
        sections: what it must have.

    Raises:
        UsageError: it is damaged or missing; names the file.
    """
    path = run_folder / CONFIG
    try:
        tree = OmegaConf.create(path.read_text(encoding="utf-8"))
        content = OmegaConf.to_container(tree, resolve=True)
        if isinstance(content, dict) and content.keys() >= set(sections):
            return tree
        reason = "it is not the configuration of a run"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = first_line(error)
    raise UsageError(f"{path} is damaged: {reason}")


def _comparable(tree: Any) -> dict[str, Any]:
    """Return the values that decide what a run computes, by dotted key."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in FREE_KEYS:
                continue
            if isinstance(value, dict):
                walk(value, f"{name}.")
            else:
                flat[name] = getattr(value, "value", value)

    walk(OmegaConf.to_container(tree, resolve=True), "")
    return flat


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
