"""Read the folder of a finished run for `export` and `chat`: model, base model, configuration and report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG, read_adapter_config
from chunkflow_cli.model.folder import damage_of
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.identity import changed_files, model_files
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.training.identity import RunIdentity
from chunkflow_cli.training.run_folder import IDENTITY
from chunkflow_cli.training.saved_config import CONFIG, read_saved_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FinishedRun:
    """A finished run."""

    folder: Path

    @classmethod
    def at(cls, folder: str) -> FinishedRun:
        """Return the run in a folder.

        Raises:
            UsageError: it holds no finished run.
            RunError: a file of its model is damaged.
        """
        run = cls(Path(folder))
        if not run.final.is_dir():
            raise UsageError(f"{run.folder} is not the folder of a finished run: it has no final/{_hint(run.folder)}")
        if reason := damage_of(run.final):
            raise RunError(
                f"the result of this run is damaged: {reason}\n"
                "  repeat the train command of the run, which says how to repair it"
            )
        return run

    @classmethod
    def or_model_at(cls, folder: str) -> FinishedRun:
        """Return the run in a folder, or a whole model on its own, as `export` writes it.

        Raises:
            UsageError: it is neither.
            RunError: a file of the model is damaged.
        """
        path = Path(folder)
        is_model = (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file()
        if not is_model or _run_around(path) is not None:
            return cls.at(folder)
        if reason := damage_of(path):
            raise RunError(f"this model is damaged: {reason}")
        return _Model(path)

    @property
    def final(self) -> Path:
        """The folder of its model, or of its adapters."""
        return self.folder / "final"

    @property
    def has_adapters(self) -> bool:
        return (self.final / ADAPTER_CONFIG).is_file()

    @property
    def has_tokenizer(self) -> bool:
        return (self.final / "tokenizer_config.json").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the run. Another version may have written it, so keys may be missing."""
        config = OmegaConf.to_container(read_saved_config(self.folder, ("model", "train")), resolve=True)
        assert isinstance(config, dict)
        return {str(name): value for name, value in config.items()}

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json; empty if it is gone."""
        try:
            return dict(json.loads((self.folder / "report.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    @cached_property
    def base_config(self) -> ModelConfig:
        """The configuration of the model that the run started from, with a path that is valid now.

        Raises:
            UsageError: the model was a folder or file, and is there no more.
        """
        # Only what loading a model needs: other keys may be of another version.
        names = {field.name for field in fields(ModelConfig)} - {"lora"}
        known = {name: value for name, value in self.config["model"].items() if name in names}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), known))
        assert isinstance(config, ModelConfig)
        return replace(config, path=self._base_path(config.path))

    def load_base(self) -> PreTrainedModel:
        """Return the model that the adapters of the run were trained on.

        Raises:
            UsageError: it is not where it was, or not what it was.
        """
        config = self.base_config
        hf_config = load_config(config)
        self._check_base(config)
        dtype: torch.dtype = getattr(torch, config.dtype.value)
        return load_model(config, hf_config, dtype=dtype, attention=None, seed=int(self.config["train"]["seed"]))

    def _base_path(self, typed: str) -> str:
        """Return the path of the base model: the one in the adapter, or the run's `model.path`, as the run resolved it.

        Raises:
            UsageError: the model was a folder or file, and is there no more.
        """
        named = read_adapter_config(self.final).get("base_model_name_or_path") or typed
        if typed.endswith(".gguf") and not named.endswith(".gguf"):
            named = str(Path(named) / Path(typed).name)
        # Runs of earlier versions name a relative path. It holds in the folder in which `train` ran.
        output_dir = self.config["train"].get("output_dir")
        folder, parts = self.folder.resolve(), Path(output_dir).parts if output_dir else ("outputs", "recipe", "date")
        is_below = output_dir is None or folder.parts[-len(parts) :] == parts
        start = folder.parents[len(parts) - 1] if is_below and not Path(parts[0]).is_absolute() else Path()
        for path in (Path(named), start / typed):
            if path.is_absolute() and path.exists():
                return str(path)
        if Path(named).is_absolute() or Path(typed).is_absolute() or typed.endswith(".gguf") or typed.startswith("."):
            raise UsageError(
                f"the base model of this run is gone: {named} does not exist\n"
                f"  put it back, or write its new place as base_model_name_or_path into {self.final / ADAPTER_CONFIG}"
            )
        return typed

    def _check_base(self, config: ModelConfig) -> None:
        """Check that the base model has the weights that the adapters were trained on.

        Raises:
            UsageError: names each file that differs.
        """
        path = self.folder / IDENTITY
        if not path.is_file():
            return  # a run of an earlier version
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged: it is not JSON") from error
        was = RunIdentity.from_json(content, path).model
        now = model_files(config)
        if was and now and (changed := changed_files(was, now)):
            raise UsageError(
                f"{config.path} is not the base model of this run any more: {'; '.join(changed)}\n"
                "  the adapters fit only the weights that they were trained on: put those back"
            )


class _Model(FinishedRun):
    """A whole model without a run."""

    @property
    def final(self) -> Path:
        return self.folder

    @cached_property
    def config(self) -> dict[str, Any]:
        return {"model": {}}


def _run_around(folder: Path) -> Path | None:
    """Return the folder of the run that a folder is a part of."""
    return next((parent for parent in folder.absolute().parents if (parent / CONFIG).is_file()), None)


def _hint(folder: Path) -> str:
    """Return a line for a directory that holds no finished run."""
    if not folder.exists():
        return "\n  there is no such folder"
    if (inside := _run_around(folder)) is not None:
        return f"\n  did you mean the run that it belongs to, {os.path.relpath(inside)}?"
    if (folder / CONFIG).is_file():
        return "\n  the run has not finished: the same train command resumes it"
    if (folder / ADAPTER_CONFIG).is_file():
        return "\n  it holds adapters without their run: name the run, or merge them with chunkflow export RUN --merge"
    return "\n  name the train.output_dir of a finished run"
