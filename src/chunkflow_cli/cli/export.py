"""`chunkflow export`: write the model of a run as a Hugging Face folder, and on request upload it to the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from chunkflow_cli.cli.finished_run import FinishedRun
from chunkflow_cli.cli.hub_upload import LOGIN, Upload
from chunkflow_cli.cli.model_card import CARD, model_card
from chunkflow_cli.config.schema import Quantization
from chunkflow_cli.console import human_bytes, stderr_console, stdout_console, working
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.files import to_be_writable, written_aside
from chunkflow_cli.model.adapter_merge import merge_adapters
from chunkflow_cli.model.folder import write_checksums
from chunkflow_cli.model.quantised import dequantise
from chunkflow_cli.model.saving import GENERATION_CONFIG, loading_code, save_model, save_tokenizer


def run(
    run_folder: str, *, output: str | None, merge: bool, push_to_hub: str | None = None, dry_run: bool = False,
    json_output: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Copy `final/` to `output` (default RUN_DIR/export), or with `merge` write the model with its adapters merged.

    Args:
        push_to_hub: the repository of the Hugging Face hub that the result is uploaded to.
        dry_run: say what would be written and uploaded, and do neither.

    Raises:
        UsageError: the run is not finished, the target is not empty, there is nothing to merge, the base model is
            not where it was or not what it was, or the hub refuses the upload.
    """
    source = FinishedRun.at(run_folder)
    target = Path(output) if output is not None else source.folder / "export"
    with to_be_writable(f"--output={target}", "name another folder"):
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"--output={target} is not empty: choose another folder")
        if target.resolve().is_relative_to(source.final.resolve()):
            raise UsageError(f"--output={target} is inside of {source.final}, which is exported: choose another folder")
    if merge and not source.has_adapters:
        raise UsageError(f"--merge: {source.final} has no LoRA adapters: export it without --merge")
    upload = None if push_to_hub is None else Upload.to(push_to_hub, is_dry=dry_run)
    result = {"output": str(target), "merged": merge}
    if dry_run:
        _say_what_would_be(source, target, upload, merge=merge)
        return {**result, "dry_run": True, **({} if upload is None else {"repository": upload.repository})}
    notes = _write(source, target, merge=merge)
    if not source.has_tokenizer:
        notes.append("It has no tokenizer, because the model of the run has none")
    _explain(target, notes, is_adapter=source.has_adapters and not merge)
    if upload is not None:
        with working(stderr_console(), "uploading"):
            url = upload.send(target)
        stderr_console().print(f"Uploaded: {url}", soft_wrap=True)
        result["url"] = url
    if not json_output:
        stdout_console().print(str(target), soft_wrap=True)
    return result


def _write(source: FinishedRun, target: Path, *, merge: bool) -> list[str]:
    """Write the folder completely or not at all, and return notes for the user."""
    notes: list[str] = []
    with (
        working(stderr_console(), "writing the model"),
        to_be_writable(f"--output={target}", "name another folder"),
        written_aside(target) as temporary,
    ):
        if merge:
            notes = _merge(source, temporary)
        else:
            shutil.copytree(source.final, temporary, dirs_exist_ok=True)
        (temporary / CARD).write_text(model_card(source, temporary, is_merged=merge), encoding="utf-8")
    return notes


def _explain(target: Path, notes: list[str], *, is_adapter: bool) -> None:
    """Print on stderr what was written and how to load it. stdout gets only the path."""
    what = "A LoRA adapter without its base model" if is_adapter else "A whole model"
    for line in [*notes, f"{what}. Load it:", *(f"  {line}" for line in loading_code(target))]:
        stderr_console().print(Text(line), soft_wrap=True)


def _say_what_would_be(source: FinishedRun, target: Path, upload: Upload | None, *, merge: bool) -> None:
    """Print what would be written and uploaded."""
    lines = [f"Would write {target}:"]
    if merge:
        lines.append(f"  {source.base_config.path} with the adapters merged, in {source.base_config.dtype.value}")
    else:
        files = sorted(path for path in source.final.rglob("*") if path.is_file() and path.name != CARD)
        lines += [f"  {path.relative_to(source.final)}  {human_bytes(path.stat().st_size)}" for path in files]
    lines.append(f"  {CARD}  the model card")
    if upload is not None:
        lines.append(f"Would upload it to {upload.url}, a private repository if it is new")
        if not upload.is_logged_in:
            lines.append(f"Log in to the hub first: {LOGIN}")
    for line in lines:
        stderr_console().print(line, soft_wrap=True)


def _merge(source: FinishedRun, target: Path) -> list[str]:
    """Write the base model with the run's adapters merged, and return notes for the user."""
    from transformers import AutoTokenizer, GenerationConfig

    base, config = source.load_base(), source.base_config
    if config.quantization is not Quantization.none:
        dequantise(base, getattr(torch, config.dtype.value))
        base.to("cpu")
    try:
        merged, is_separated = merge_adapters(base, source.final)
    except ValueError as error:
        raise UsageError(f"{source.final} cannot be merged: {first_line(error)}") from error
    if (source.final / GENERATION_CONFIG).is_file():  # the run may have learned to stop at other tokens than the base
        merged.generation_config = GenerationConfig.from_pretrained(str(source.final))
    save_model(target, merged, merged.state_dict())
    if source.has_tokenizer:
        save_tokenizer(target, AutoTokenizer.from_pretrained(str(source.final)))
    write_checksums(target)
    notes = [f"Merged into {config.path}, in {config.dtype.value}"]
    if config.quantization is not Quantization.none:
        notes.append(f"Its weights are those of the {config.quantization.value} base that the adapter was trained on")
    if is_separated:
        notes.append("Embedding and head were one weight; now each has its own, because only one has the adapter")
    return notes
