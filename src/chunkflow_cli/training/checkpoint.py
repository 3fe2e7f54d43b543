"""Save and load checkpoints, and save the final model as a Hugging Face folder, on one process or many.

A checkpoint is a folder step-<step> with

    state-<rank>-<number>.safetensors   weights and optimizer states, independent of the layout (engine/state_files.py)
    random-<rank>.pt                    the random states of each rank
    state.json                          how far the run has come, over which data, and the checksums of these files

All ranks write it under another name, and the first rank renames it when every file of every rank is on the disk. So a
folder of that name is complete, no matter when a process dies. `checkpoint_folder.py` knows names and checksums.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from chunkflow_cli.config.schema import EngineConfig, Offload
from chunkflow_cli.engine import Engine, PipelineEngine, StateFiles, all_or_none, gather, own_rank, process_count
from chunkflow_cli.errors import RunError
from chunkflow_cli.files import describe_file, written_aside
from chunkflow_cli.model.adapter_saving import save_adapters
from chunkflow_cli.model.folder import write_checksums
from chunkflow_cli.model.saving import save_generation, save_model, save_tokenizer
from chunkflow_cli.planning.topology import Topology
from chunkflow_cli.training.checkpoint_folder import (
    SavedState,
    check_files,
    damaged,
    delete_old,
    put_in_place,
    read_state,
    write_state,
)
from chunkflow_cli.training.identity import RunIdentity
from chunkflow_cli.training.progress import Progress

AnyEngine = Engine | PipelineEngine


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that has been loaded."""

    progress: Progress
    saved_on: str
    """The layout that saved it, in words."""
    is_reseeded: bool
    """True if the saved random states could not be used: the number of ranks or the kind of device is another one."""


def describe_layout(topology: Topology, engine: EngineConfig) -> str:
    """Return the layout in words: `data 2 x pipeline 4, ZeRO-1`."""
    offload = "" if engine.offload is Offload.none else f", {engine.offload.value} offloaded"
    return f"{topology}, ZeRO-{engine.zero_stage}{offload}"


def save_checkpoint(
    folder: Path, engine: AnyEngine, progress: Progress, generators: dict[str, Any], *, layout: str, keep: int,
    identity: RunIdentity | None,
) -> Path:  # fmt: skip
    """Write `folder`/step-<step>, complete or not at all, and return it; then delete all but the newest `keep`.

    Every rank calls it.

    Args:
        folder: the folder of checkpoints, on a disk that all ranks share.
        generators: the random states after `progress.step` steps; an interrupted step has drawn more numbers since.
        layout: the current layout in words.
        keep: number of checkpoints to keep, at least 1.
        identity: what the run is made of; the first rank gives it.

    Raises:
        RunError: a number is not finite, or a rank could not write; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{target.name}.writing"
    what = f"saving {target}"
    with all_or_none(what):
        if own_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with all_or_none(what):
        if not temporary.is_dir():
            raise RunError(f"{temporary} does not exist here: train.output_dir must be on a disk that all nodes share")
        engine.save(temporary)
        _save_random_states(temporary / _random_name(own_rank()), generators)
    own = [*temporary.glob(f"state-{own_rank():05d}-*"), temporary / _random_name(own_rank())]
    files = gather({path.name: describe_file(path) for path in own})
    with all_or_none(what):
        if own_rank() == 0:
            assert identity is not None
            StateFiles(temporary)  # raises an error if a number is missing
            listed = {name: described for of_rank in files for name, described in of_rank.items()}
            write_state(temporary, SavedState(progress, layout, process_count(), identity, listed))
            put_in_place(temporary, target)
            delete_old(folder, target, keep)
    return target


def load_checkpoint(checkpoint: Path, engine: AnyEngine, *, seed: int) -> Resumed:
    """Load what `save_checkpoint` saved, on any number of ranks and any layout. Every rank calls it.

    Every file is compared with its checksum before anything is loaded; the ranks share this work.

    Args:
        seed: the seed of the run. If the number of ranks has changed, random states are drawn from this seed, the step
            and the rank.

    Raises:
        RunError: a file of it is missing or damaged.
        UsageError: it has an earlier format, or belongs to another model or optimizer.
    """
    with all_or_none(f"reading {checkpoint}"):
        state = read_state(checkpoint)
        check_files(checkpoint, state.files, share=slice(own_rank(), None, process_count()))
    engine.load(checkpoint)
    progress = state.progress
    is_reseeded = state.processes != process_count() or not _load_random_states(checkpoint, own_rank())
    if is_reseeded:
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step, own_rank()]).generate_state(1)[0]))
    return Resumed(progress, state.layout, is_reseeded)


def save_final(folder: Path, model: Any, tokenizer: Any, engine: AnyEngine, *, skeleton: Any, card: str) -> None:
    """Save the model (or its adapters) and tokenizer as a Hugging Face folder in safetensors. Every rank calls it.

    Args:
        folder: the folder to write, complete or not at all.
        model: the model, or the part of it that this pipeline stage holds.
        skeleton: the whole model without weights, if `model` is a stage: peft saves only modules that it finds.
        card: the README.md of adapters.
    """
    has_adapters = hasattr(model, "peft_config")
    weights = engine.whole_weights(model, trained_only=has_adapters)
    with all_or_none(f"saving {folder}"):
        if weights is None:
            return
        with written_aside(folder) as temporary:
            if has_adapters:
                save_adapters(skeleton or model, temporary, weights, card)
                save_generation(temporary, getattr(model, "generation_config", None))  # for a merge, and for chat
            else:
                save_model(temporary, model, weights, skeleton=skeleton)
            if tokenizer is not None:
                save_tokenizer(temporary, tokenizer)
            write_checksums(temporary)


def random_states() -> dict[str, Any]:
    """Return the state of each random number generator of this process that a forward can draw from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _save_random_states(path: Path, generators: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(generators, file)
        file.flush()
        os.fsync(file.fileno())


def _load_random_states(checkpoint: Path, rank: int) -> bool:
    """Restore random states, and return True; return False if they belong to another kind of device.

    A GPU cannot continue the numbers that a CPU has drawn.
    """
    path = checkpoint / _random_name(rank)
    try:
        generators = torch.load(path, weights_only=True)
        is_same_device = (generators["cuda"] is not None) == torch.cuda.is_available()
        if is_same_device:
            torch.set_rng_state(generators["cpu"])
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError) as error:
        raise damaged(checkpoint, f"{path.name} holds no random states: {error}") from error
    if is_same_device and generators["cuda"] is not None:
        torch.cuda.set_rng_state(generators["cuda"])
    return is_same_device
