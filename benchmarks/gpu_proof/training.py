"""Runs of `train` in this process, one step at a time, with what `plan` says of them."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chunkflow_cli.config.keys import known_keys
from chunkflow_cli.config.load import LoadedConfig, load
from chunkflow_cli.console import stderr_console
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.training.joining import open_folder, watched
from chunkflow_cli.training.prepare import prepare
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.requirements import check_requirements
from chunkflow_cli.training.steps import run_steps
from gpu_proof.rows import NotHere

OFFLOAD_KEY = "chunk.offload_state"


@dataclass(frozen=True)
class Place:
    """Where a section runs."""

    work: Path
    """Folder for models, data and runs; deleted at the end."""
    out: Path
    """Folder for results."""
    dry: bool


def run_words(place: Place, name: str, model: Path, data: Path) -> list[str]:
    """Return the words that every run of the proof has."""
    return [
        f"model.path={model}", f"data.path={data}", "data.format=tokens", f"data.cache_dir={place.work / 'cache'}",
        "data.num_workers=1", "train.shuffle=false", "train.guard=false", "checkpoint.resume=never",
        "optim.schedule=constant", "optim.warmup_ratio=0", f"train.output_dir={place.work / name}",
    ]  # fmt: skip


def words_of_state(state: str) -> list[str]:
    """Return the words that keep the state of long samples on the "device", or on the "host".

    Raises:
        NotHere: this version cannot keep it on the host.
    """
    if state == "device":
        return []
    if OFFLOAD_KEY not in known_keys():
        raise NotHere(f"not built: this version has no {OFFLOAD_KEY}")
    return [f"{OFFLOAD_KEY}={state}"]


@contextmanager
def prepared(words: Sequence[str]) -> Iterator[tuple[LoadedConfig, Iterator[dict[str, Any]]]]:
    """Prepare a run as `train` does, and yield its configuration and its steps; nothing is saved at its end.

    Each step is run when it is asked for, and is the row that `train` writes to metrics.jsonl, with the seconds in
    which it page-locked host memory for the first time.
    """
    loaded = load(list(words))
    model = check_requirements(loaded)
    folder, data = open_folder(loaded, model.hf_config)
    try:
        with watched(folder.path, 0) as heartbeat:
            state = RunState(heartbeat)
            run = prepare(loaded.config, model, data, folder, stderr_console(), state)
            steps = _steps(run, state)
            del run, state
            yield loaded, steps
            steps.close()  # it holds the model
    finally:
        folder.close()
        close_process_group()
        free_memory()


def _steps(run: Prepared, state: RunState) -> Iterator[dict[str, Any]]:
    home = run.parts.runner.settings.state_home
    for step in range(1, run.plan.steps + 1):
        before = getattr(home, "page_lock_seconds", 0.0)
        run_steps(dataclasses.replace(run, plan=dataclasses.replace(run.plan, steps=step)), state)
        row = json.loads(run.folder.metrics.read_text(encoding="utf-8").splitlines()[-1])
        yield row | {"page_lock_seconds": getattr(home, "page_lock_seconds", 0.0) - before}


def free_memory() -> None:
    """Give back what the last run has left, and count peaks anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
