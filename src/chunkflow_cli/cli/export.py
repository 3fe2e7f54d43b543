"""`chunkflow export`: write the model of a run as a Hugging Face directory, with its adapters merged on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.console import stderr_console, stdout_console, working
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import to_be_writable, written_aside
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import load_model
from chunkflow_cli.training.run_folder import CONFIG


def run(run_folder: str, *, output: str | None, merge: bool, json_output: bool = False) -> dict[str, Any]:
    """Copy `final/` to `output` (default RUN_DIR/export), or with `merge` write the model with its adapters merged.

    Raises:
        UsageError: the run is not finished, the target is not empty, or there is nothing to merge.
    """
    source = Path(run_folder)
    final = source / "final"
    if not final.is_dir():
        raise UsageError(f"{source} is not the directory of a finished run: it has no {final}")
    target = Path(output) if output is not None else source / "export"
    with to_be_writable(f"--output={target}", "name another directory"):
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"--output={target} is not empty: choose another directory")
    has_adapters = (final / "adapter_config.json").is_file()
    if merge and not has_adapters:
        raise UsageError(f"--merge: {final} has no LoRA adapters: export it without --merge")
    with (
        working(stderr_console(), "writing the model"),
        to_be_writable(f"--output={target}", "name another directory"),
        written_aside(target) as temporary,
    ):
        if merge:
            _merge(source, final, temporary)
        else:
            shutil.copytree(final, temporary, dirs_exist_ok=True)
    if not json_output:
        stdout_console().print(str(target), markup=False, soft_wrap=True)
    return {"output": str(target), "merged": merge}


def _merge(source: Path, final: Path, target: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    saved = OmegaConf.load(source / CONFIG)
    fields = OmegaConf.structured(ModelConfig)
    config = OmegaConf.to_object(OmegaConf.merge(fields, saved.model))
    assert isinstance(config, ModelConfig)
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    seed = int(saved.train.seed)  # a randomly initialised base model is drawn from it again
    base = load_model(config, load_config(config), dtype=dtype, attention="sdpa", seed=seed)
    merged = PeftModel.from_pretrained(base, str(final)).merge_and_unload()
    merged.save_pretrained(str(target))
    if (final / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(str(final)).save_pretrained(str(target))
