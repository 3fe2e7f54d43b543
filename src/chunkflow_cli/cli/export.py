"""`chunkflow export`: write the model of a run as a Hugging Face directory, with its adapters merged on request."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.text import Text

from chunkflow_cli.config.schema import ModelConfig, Quantization
from chunkflow_cli.console import stderr_console, stdout_console, working
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import to_be_writable, written_aside
from chunkflow_cli.model.adapter_folder import ADAPTER_CONFIG, read_adapter_config
from chunkflow_cli.model.adapter_merge import merge_adapters
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.identity import changed_files, model_files
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.model.quantised import dequantise
from chunkflow_cli.model.saving import loading_code, save_model, save_tokenizer
from chunkflow_cli.training.identity import RunIdentity
from chunkflow_cli.training.run_folder import IDENTITY
from chunkflow_cli.training.saved_config import CONFIG


def run(run_folder: str, *, output: str | None, merge: bool, json_output: bool = False) -> dict[str, Any]:
    """Copy `final/` to `output` (default RUN_DIR/export), or with `merge` write the model with its adapters merged.

    Raises:
        UsageError: the run is not finished, the target is not empty, there is nothing to merge, or the base model is
            not where it was or not what it was.
    """
    source = Path(run_folder)
    final = source / "final"
    if not final.is_dir():
        raise UsageError(f"{source} is not the directory of a finished run: it has no {final}")
    target = Path(output) if output is not None else source / "export"
    with to_be_writable(f"--output={target}", "name another directory"):
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"--output={target} is not empty: choose another directory")
    has_adapters = (final / ADAPTER_CONFIG).is_file()
    if merge and not has_adapters:
        raise UsageError(f"--merge: {final} has no LoRA adapters: export it without --merge")
    notes: list[str] = []
    with (
        working(stderr_console(), "writing the model"),
        to_be_writable(f"--output={target}", "name another directory"),
        written_aside(target) as temporary,
    ):
        if merge:
            notes = _merge(source, final, temporary)
        else:
            shutil.copytree(final, temporary, dirs_exist_ok=True)
    has_tokenizer = (target / "tokenizer_config.json").is_file()
    if not has_tokenizer:
        notes.append("It has no tokenizer, because the model of the run has none")
    _explain(target, notes, is_adapter=has_adapters and not merge)
    if not json_output:
        stdout_console().print(str(target), soft_wrap=True)
    return {"output": str(target), "merged": merge}


def _explain(target: Path, notes: list[str], *, is_adapter: bool) -> None:
    """Say on stderr what was written and how to load it; stdout has the path alone."""
    what = "A LoRA adapter without its base model" if is_adapter else "A whole model"
    for line in [*notes, f"{what}. Load it:", *(f"  {line}" for line in loading_code(target))]:
        stderr_console().print(Text(line), soft_wrap=True)


def _merge(source: Path, final: Path, target: Path) -> list[str]:
    """Write the base model with the run's adapters merged, and return what to say of it."""
    from transformers import AutoTokenizer

    config, seed = _saved_model(source, final)
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    hf_config = load_config(config)
    _check_base(source, config)
    base = load_model(config, hf_config, dtype=dtype, attention="sdpa", seed=seed)
    if config.quantization is not Quantization.none:
        dequantise(base, dtype)
        base.to("cpu")
    try:
        merged, is_separated = merge_adapters(base, final)
    except ValueError as error:
        raise UsageError(f"{final} cannot be merged: {str(error).splitlines()[0]}") from error
    save_model(target, merged, merged.state_dict())
    if (final / "tokenizer_config.json").is_file():
        save_tokenizer(target, AutoTokenizer.from_pretrained(str(final)))
    notes = [f"Merged into {config.path}, in {config.dtype.value}"]
    if config.quantization is not Quantization.none:
        notes.append(f"Its weights are those of the {config.quantization.value} base that the adapter was trained on")
    if is_separated:
        notes.append("Embedding and head were one weight; now each has its own, because only one has the adapter")
    return notes


def _saved_model(source: Path, final: Path) -> tuple[ModelConfig, int]:
    """Return the configuration of the run's base model, with a path that holds here, and the seed of random weights."""
    saved = OmegaConf.load(source / CONFIG)
    # Only what loading a model needs: other keys may be of another version.
    names = {field.name for field in fields(ModelConfig)} - {"lora"}
    known = {name: value for name, value in saved.model.items() if name in names}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), known))
    assert isinstance(config, ModelConfig)
    path = _base_path(config.path, saved.train.get("output_dir"), source, final)
    return replace(config, path=path), int(saved.train.seed)


def _base_path(typed: str, output_dir: str | None, source: Path, final: Path) -> str:
    """Return where the base model is: the path that the adapter names, or what was typed, from where it was typed.

    Raises:
        UsageError: the model was a folder or file, and is there no more.
    """
    named = read_adapter_config(final).get("base_model_name_or_path") or typed
    if typed.endswith(".gguf") and not named.endswith(".gguf"):
        named = str(Path(named) / Path(typed).name)
    # Runs of earlier versions name a relative path. It holds in the folder in which `train` ran.
    folder, parts = source.resolve(), Path(output_dir).parts if output_dir else ("outputs", "recipe", "date")
    is_below = output_dir is None or folder.parts[-len(parts) :] == parts
    start = folder.parents[len(parts) - 1] if is_below and not Path(parts[0]).is_absolute() else Path()
    for path in (Path(named), start / typed):
        if path.is_absolute() and path.exists():
            return str(path)
    if Path(named).is_absolute() or Path(typed).is_absolute() or typed.endswith(".gguf") or typed.startswith("."):
        raise UsageError(
            f"the base model of this run is gone: {named} does not exist\n"
            f"  put it back, or write its new place as base_model_name_or_path into {final / ADAPTER_CONFIG}"
        )
    return typed


def _check_base(source: Path, config: ModelConfig) -> None:
    """Check that the base model has the weights that the adapters were trained on.

    Raises:
        UsageError: names each file that differs.
    """
    if not (source / IDENTITY).is_file():
        return  # a run of an earlier version
    was = RunIdentity.from_json(json.loads((source / IDENTITY).read_text(encoding="utf-8")), source / IDENTITY).model
    now = model_files(config)
    if was and now and (changed := changed_files(was, now)):
        raise UsageError(
            f"{config.path} is not the base model of this run any more: {'; '.join(changed)}\n"
            "  the adapters fit only the weights that they were trained on: put those back"
        )
