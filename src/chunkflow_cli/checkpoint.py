"""Save, resume, and export as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chunkflow_cli.engine import Engine
from chunkflow_cli.errors import RunError
from chunkflow_cli.run_folder import written_aside


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


def save_checkpoint(folder: Path, engine: Engine, progress: Progress, generators: dict[str, Any], *, keep: int) -> Path:
    """Write `folder`/step-<step>, complete or not at all, then delete all but the newest `keep`.

    `generators` are the random states after `progress.step` steps; an interrupted step has drawn more since.
    """
    target = folder / f"step-{progress.step:08d}"
    with written_aside(target) as temporary:
        engine.save(temporary)
        torch.save(generators, temporary / "random.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
    for old in sorted(folder.glob("step-[0-9]*[0-9]"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(checkpoint: Path, engine: Engine) -> Progress:
    """The inverse of `save_checkpoint`.

    Raises:
        RunError: a file of it is missing.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        generators = torch.load(checkpoint / "random.pt", weights_only=True)
    except OSError as error:
        raise RunError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    engine.load(checkpoint)
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"]:
        torch.cuda.set_rng_state_all(generators["cuda"])
    return Progress(**state)


def save_final(folder: Path, model: Any, tokenizer: Any, engine: Engine, *, writes: bool = True) -> None:
    """The model (or its adapters) and tokenizer as a Hugging Face folder in safetensors.

    Args:
        writes: one process does; the others only give it their part of the weights.
    """
    with engine.gathered_weights():
        if writes:
            _write_model(folder, model, tokenizer)


def _write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    with written_aside(folder) as temporary:
        model.save_pretrained(str(temporary))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))


def random_states() -> dict[str, Any]:
    """Of every generator that a forward can draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
