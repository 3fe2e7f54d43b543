"""Write the model card of an export: base model, data, plan and results.

It says nothing about the machine or its folders: of local paths, only the last part is named.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from chunkflow_cli.cli.finished_run import FinishedRun
from chunkflow_cli.console import human_bytes, human_seconds, percent
from chunkflow_cli.data.names import printable
from chunkflow_cli.model.saving import loader_of

CARD = "README.md"
VERSIONS = ("chunkflow", "torch", "transformers", "deepspeed", "peft")


def model_card(run: FinishedRun, folder: Path, *, is_merged: bool) -> str:
    """Return the README.md of an exported model.

    Args:
        folder: what is exported. The card of adapters, which says how to load them, is continued.
    """
    training = "\n".join(["## Training", "", "| | |", "|---|---|", *(_row(*row) for row in _training(run))]) + "\n"
    if (folder / CARD).is_file():
        return (folder / CARD).read_text(encoding="utf-8").rstrip() + "\n\n" + training
    task = run.config["train"].get("task", "sft")
    base, is_random = run.config["model"]["path"], run.config["model"].get("init") == "random"
    package, loader = loader_of(folder)
    head = [f"library_name: {package}", "pipeline_tag: text-generation", "tags:", "- chunkflow", f"- {task}"]
    head += ["- lora"] if is_merged else []
    head += [f"base_model: {base}"] if _is_on_hub(base, "model") and not is_random else []
    data = [path for path in _data(run) if _is_on_hub(path, "dataset")]
    head += ["datasets:", *(f"- {path}" for path in data)] if data else []
    how = (
        "LoRA adapters, merged into the weights"
        if is_merged
        else "all weights, from random ones"
        if is_random
        else "all weights"
    )
    return (
        "\n".join(["---", *head, "---"])
        + f"\n\n# {_text(_named(base, 'model'))}, fine-tuned\n\nFine-tuned with chunkflow: {how}.\n\n"
        + f"```python\nfrom {package} import {loader}\n\n"
        + f'model = {loader}.from_pretrained("FOLDER")\n```\n\n`FOLDER` is the folder of this file.\n\n{training}'
    )


def _training(run: FinishedRun) -> Iterable[tuple[str, str]]:
    """Yield the rows of the table, as far as the run's files contain them."""
    config, report = run.config, run.report
    train, optim = config["train"], config.get("optim", {})
    yield "base model", _named(config["model"]["path"], "model")
    if data := _data(run):
        yield "data", ", ".join(_named(path, "dataset") for path in data)
        counted = {"assistant": "the assistant's answers", "last": "the last answer"}
        if config["data"].get("format") != "tokens":
            yield "targets", counted.get(config["data"].get("train_on"), "all tokens")
    if report:
        lost = ", ".join(
            f"{report[f'samples_{word}']:,} {word}"
            for word in ("held_out", "rejected", "dropped", "truncated", "duplicate", "beyond_limit")
            if report.get(f"samples_{word}")
        ).replace("_", " ")
        yield "samples", f"{report['samples_read']:,} read; {report['samples_trained']:,} passes{lost and '; ' + lost}"
        yield (
            "tokens",
            f"{report['tokens_trained']:,}, {report['target_tokens_trained']:,} of them targets (as planned)",
        )
        yield "longest sample", f"{report['longest_sample']:,} tokens"
        size, tokens = train.get("global_batch_size"), train.get("global_batch_tokens")
        batch = f"{size:,} samples" if tokens is None else f"up to {tokens:,} tokens"
        yield "steps", f"{report['steps']:,} of {batch}, {report['epochs']:.3g} epochs"
        yield "training loss", f"{report['loss_first']:.4f} in the first step, {report['loss_last']:.4f} in the last"
        if report.get("eval_loss_end") is not None:
            yield "held-out loss", f"{report['eval_loss_start']:.4f} before, {report['eval_loss_end']:.4f} after"
    if optim:
        yield "optimizer", f"{optim['name']}, peak learning rate {optim['lr']:g}, {optim['schedule']}"
    yield "data type", str(config["model"]["dtype"])
    if report:
        share = percent(report["recomputed_chunks"] / max(1, report["chunks"]))
        chunks = f"{report['chunks']:,} of at most {report['chunk_size']:,} tokens, {share} recomputed"
        yield "chunks", f"{chunks} (K = {report['k']}); loss and gradients are those of whole samples"
        yield "hardware", f"{report['processes']:,} x {report['device']}, {human_seconds(report['train_seconds'])}"
        yield "peak memory", human_bytes(report["peak_memory_bytes"])
        versions = report.get("environment", {})
        if found := [f"{name} {versions[name]}" for name in VERSIONS if name in versions]:
            yield "versions", ", ".join(found)


def _row(name: str, value: str) -> str:
    return f"| {name} | {_text(value).replace('|', chr(92) + '|')} |"


def _text(value: str) -> str:
    """Return words that Markdown shows as they are: names of files may hold tags."""
    return escape(printable(value), quote=False)


def _data(run: FinishedRun) -> list[str]:
    """Return the paths of the data that the run was trained on."""
    data = run.config.get("data", {})
    paths = data.get("path") or [source.get("path") for source in data.get("sources") or ()]
    return list(map(str, paths)) if isinstance(paths, list) else [str(paths)]


def _named(path: str, kind: str) -> str:
    """Return the id of a model or data set on the hub, or the last part of a local path."""
    return path if _is_on_hub(path, kind) else Path(path).name


def _is_on_hub(path: str, kind: str) -> bool:
    """Whether a path is the id of a model or data set in the local cache of the hub, and not a file or folder here."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = repo_folder_name(repo_id=path, repo_type=kind)
    except HFValidationError:
        return False
    return not Path(path).exists() and Path(HF_HUB_CACHE, folder).is_dir()
