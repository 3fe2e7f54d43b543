"""Save, resume, and export as a Hugging Face folder; by one process or many.

A checkpoint is a folder step-<step> with

    state-<rank>-<number>.safetensors   weights and optimizer states, independent of the layout (engine/state_files.py)
    random-<rank>.pt                    the random states of each rank
    state.json                          format, layout, and how far the run has come

It is written under another name, by all ranks, and renamed by the first when every file of every rank is on the disk.
So a folder of that name is whole, whenever whichever process dies.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkflow_cli.config.schema import EngineConfig, Offload
from chunkflow_cli.engine import Engine, PipelineEngine, StateFiles, all_or_none, own_rank, process_count
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.files import write_json, written_aside
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.run_folder import REPLACED

AnyEngine = Engine | PipelineEngine

FORMAT = 2
"""Of the folder. Format 1, which named none, held DeepSpeed's own files and could be read by its own layout only."""


@dataclass
class Progress:
    """How far a run has come: all that a continuation needs beside weights, optimizer and random numbers."""

    step: int = 0
    """Optimizer steps done. The data position follows from it."""
    samples_trained: int = 0
    target_tokens_planned: int = 0
    target_tokens_trained: int = 0
    tokens_trained: int = 0
    chunks: int = 0
    recomputed_chunks: int = 0
    train_seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    eval_loss_start: float | None = None
    eval_loss_end: float | None = None
    eval_step: int | None = None
    """The step after which `eval_loss_end` was taken."""


@dataclass(frozen=True)
class Resumed:
    """What a run continues from."""

    progress: Progress
    saved_on: str
    """The layout, in words."""
    is_reseeded: bool
    """Random states could not be taken over: they are of so many ranks and one kind of device, and those are others."""


def describe_layout(topology: Topology, engine: EngineConfig) -> str:
    """`data 2 x pipeline 4, ZeRO-1`."""
    offload = "" if engine.offload is Offload.none else f", {engine.offload.value} offloaded"
    return f"{topology}, ZeRO-{engine.zero_stage}{offload}"


def save_checkpoint(
    folder: Path, engine: AnyEngine, progress: Progress, generators: dict[str, Any], *, layout: str, keep: int
) -> Path:
    """Write `folder`/step-<step>, complete or not at all, then delete all but the newest `keep`. Every rank calls it.

    Args:
        folder: where checkpoints are; on a disk that all ranks share.
        engine: whose weights and optimizer states are saved.
        progress: how far the run is.
        generators: the random states after `progress.step` steps; an interrupted step has drawn more since.
        layout: the present one in words.
        keep: at least 1.

    Raises:
        RunError: a rank could not write; the checkpoints from before are untouched.
    """
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{target.name}.writing"
    what = f"saving {target}"
    with all_or_none(what):
        if own_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with all_or_none(what):
        _check_shared(temporary)
        engine.save(temporary)
        _save_random_states(temporary / _random_name(own_rank()), generators)
    with all_or_none(what):
        if own_rank() == 0:
            StateFiles(temporary)  # raises if not every number is there
            state = {"format": FORMAT, "layout": layout, "processes": process_count(), "progress": asdict(progress)}
            write_json(temporary / "state.json", state)
            _put_in_place(temporary, target)
            _delete_old(folder, keep)
    return target


def load_checkpoint(checkpoint: Path, engine: AnyEngine, *, seed: int) -> Resumed:
    """The inverse of `save_checkpoint`, on any number of ranks and any layout. Every rank calls it.

    Args:
        checkpoint: the folder.
        engine: is given its weights and optimizer states.
        seed: of the run; random states are drawn from it, the step and the rank if there is not one for each rank.

    Raises:
        RunError: a file of it is missing or damaged.
        UsageError: it is of an earlier format, another model or another optimizer.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    if state.get("format", 1) != FORMAT:
        raise UsageError(
            f"{checkpoint} has format {state.get('format', 1)}, and this version reads format {FORMAT}\n"
            "  finish that run with the version that began it, or take checkpoint.resume=never to begin anew"
        )
    engine.load(checkpoint)
    progress = Progress(**state["progress"])
    is_reseeded = state["processes"] != process_count() or not _load_random_states(
        checkpoint / _random_name(own_rank())
    )
    if is_reseeded:
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step, own_rank()]).generate_state(1)[0]))
    return Resumed(progress, state["layout"], is_reseeded)


def save_final(folder: Path, model: Any, tokenizer: Any, engine: AnyEngine, *, skeleton: Any = None) -> None:
    """The model (or its adapters) and tokenizer as a Hugging Face folder in safetensors. Every rank calls it.

    Args:
        skeleton: of the whole model, if `model` is a stage of it: peft writes down only what it finds in the model.
    """
    weights = engine.whole_weights(model, trained_only=hasattr(model, "peft_config"))
    with all_or_none(f"saving {folder}"):
        if weights is None:
            return
        with written_aside(folder) as temporary:
            (skeleton or model).save_pretrained(str(temporary), state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))


def random_states() -> dict[str, Any]:
    """Of every generator of this process that a forward can draw from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _save_random_states(path: Path, generators: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(generators, file)
        file.flush()
        os.fsync(file.fileno())


def _load_random_states(path: Path) -> bool:
    """Whether the states are those of the devices that are here: a GPU cannot go on from what a CPU has drawn."""
    try:
        generators = torch.load(path, weights_only=True)
    except OSError as error:
        raise RunError(f"{path.parent} is not a complete checkpoint: {error}") from error
    if (generators["cuda"] is not None) != torch.cuda.is_available():
        return False
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"] is not None:
        torch.cuda.set_rng_state(generators["cuda"])
    return True


def _check_shared(temporary: Path) -> None:
    """
    Raises:
        RunError: the folder that the first rank has made is not to be seen here.
    """
    if not temporary.is_dir():
        raise RunError(f"{temporary} is not there: train.output_dir must be on a disk that all nodes share")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; one of the same step goes aside first, under a name by which it is found until the new one is there."""
    _sync_folder(temporary)
    aside = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    _sync_folder(target.parent)


def _delete_old(folder: Path, keep: int) -> None:
    """Each loses its name first, so that no half-deleted one is ever taken for whole."""
    for old in sorted(folder.glob("step-[0-9]*[0-9]"))[:-keep]:
        old.rename(old.with_name(f".{old.name}.deleting"))
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
