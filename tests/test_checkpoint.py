"""Checkpoints: exact on the layout that saved them and on every other, whole or absent whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from chunkflow_cli import checkpoint as checkpoints
from chunkflow_cli.checkpoint import Progress, load_checkpoint, random_states, save_checkpoint
from chunkflow_cli.config import Dtype, EngineConfig, OptimConfig, OptimizerName
from chunkflow_cli.engine import Engine, EngineSettings, StateFiles, state_files
from chunkflow_cli.engine.state_files import Part, write_parts
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.run_folder import newest_checkpoint

OPTIMIZERS = {
    "adamw": OptimConfig(lr=0.05, weight_decay=0.1, grad_clip=1.0),
    "sgd with momentum": OptimConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.9, grad_clip=1.0),
    "sgd": OptimConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.0, grad_clip=0.0),
}
LAYOUTS = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
ROWS = 4
"""Of a global batch, shared among the ranks."""


class Tiny(nn.Module):
    """A tied head, a frozen parameter, and sizes that two ranks do not divide."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.rand(5), requires_grad=False)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.scale
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return nn.functional.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


def engine_of(stage: int, dtype: str, optim: OptimConfig, *, seed: int) -> Engine:
    """Large matrices are partitioned under ZeRO-3, vectors stay gathered, as in a real model."""
    engine = EngineConfig(zero_stage=stage)
    if stage == 3:
        engine.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 8}}
    model = Tiny(seed).to(getattr(torch, dtype))
    model.scale.data.fill_(0.5)  # frozen: it comes with the model, not with the checkpoint
    return Engine(model, EngineSettings(engine, optim, Dtype(dtype), torch.device("cpu")))


def train(engine: Engine, steps: range) -> list[float]:
    """Loss and gradient norm of each step, for a batch that only the step decides."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(0, 11, (2, ROWS, 6), generator=generator)
        for row in range(rank, ROWS, ranks):
            loss = engine.forward(tokens[row], targets[row]) / (ROWS * 6)
            engine.backward(loss)
            seen.append(float(loss))
        seen.append(engine.step())
    return seen


def model_weights(engine: Engine) -> dict[str, Tensor]:
    weights = engine.whole_weights(engine.module, trained_only=False)
    return {name: tensor.clone() for name, tensor in (weights or {}).items()}


def written(engine: Engine, folder: Path) -> Path:
    from torch import distributed

    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    distributed.barrier()
    return folder


def numbers(folder: Path) -> dict[str, Tensor]:
    """Every master weight and optimizer state as a whole array, and every count of steps."""
    files = StateFiles(folder)
    arrays = {
        f"{kind} {name}": files.whole(name, kind) for name in files.shapes for kind in ("weight", *files.states(name))
    }
    counts = {
        f"{word} {name}": torch.tensor(value) for name in files.shapes for word, value in files.scalars[name].items()
    }
    return {**arrays, **counts}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit, the sign of a zero included."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    as_bytes = {True: torch.int16, False: torch.int32}
    return [
        name
        for name in one
        if not torch.equal(*(t[name].view(as_bytes[t[name].dtype is torch.bfloat16]) for t in (one, other)))
    ]


def saved_name(ranks: int, stage: int, dtype: str) -> str:
    return f"{ranks} ranks ZeRO-{stage} {dtype}"


# On one layout


def resume_on_the_same_layout(root: str) -> list[str]:
    """What a continued run does differently from an uninterrupted one, over all cases."""
    wrong = []
    for stage, dtype in LAYOUTS:
        for name, optim in OPTIMIZERS.items():
            case = f"{name}, ZeRO-{stage} {dtype}"
            first = engine_of(stage, dtype, optim, seed=0)
            train(first, range(2))
            folder = written(first, Path(root, case))
            expected = train(first, range(2, 5))
            second = engine_of(stage, dtype, optim, seed=1)
            second.load(folder)
            if train(second, range(2, 5)) != expected:
                wrong.append(f"{case}: losses or norms")
            if differing(model_weights(first), model_weights(second)):
                wrong.append(f"{case}: the model's weights")
            states = [numbers(written(engine, Path(root, f"{case} {i}"))) for i, engine in enumerate((first, second))]
            wrong += [f"{case}: {array}" for array in differing(*states)]
    return wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_continues_to_the_bit(ranks: int, tmp_path: Path) -> None:
    """Weights, momenta and counts of steps, in a model that was made from another seed."""
    assert run_ranks(ranks, "test_checkpoint:resume_on_the_same_layout", str(tmp_path)) == [[]] * ranks


# Across layouts


def save_on_all_layouts(root: str) -> dict[str, dict[str, Tensor]]:
    """Model weights one step after each checkpoint."""
    after = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, OPTIMIZERS["adamw"], seed=0)
        train(engine, range(2))
        name = saved_name(int(os.environ["WORLD_SIZE"]), stage, dtype)
        written(engine, Path(root, name))
        train(engine, range(2, 3))
        after[name] = model_weights(engine)
    return after


def load_all_layouts(root: str) -> dict[tuple[str, str], tuple[list[str], dict[str, Tensor]]]:
    """By who saved and who loads: what of the loaded state differs, and the model's weights one step later."""
    found = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, OPTIMIZERS["adamw"], seed=1)
        me = saved_name(int(os.environ["WORLD_SIZE"]), stage, dtype)
        for saved in sorted(path for path in Path(root).iterdir() if path.name.endswith(dtype)):
            engine.load(saved)
            mine = written(engine, Path(root, "loaded", me, saved.name))
            wrong = differing(numbers(saved), numbers(mine))
            train(engine, range(2, 3))
            found[saved.name, me] = (wrong, model_weights(engine))
    return found


def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    """One and two processes, all ZeRO stages, both precisions: the same state to the bit, and then the same step."""
    after = {}
    for ranks in (1, 2):
        after |= run_ranks(ranks, "test_checkpoint:save_on_all_layouts", str(tmp_path))[0]
    for ranks in (1, 2):
        found = run_ranks(ranks, "test_checkpoint:load_all_layouts", str(tmp_path))[0]
        assert len(found) == 4 * 8 + 2 * 4
        for (saved, me), (wrong, weights) in found.items():
            assert wrong == [], f"{saved}, read by {me}"
            for name, expected in after[saved].items():
                tolerance = 1e-6 if saved.endswith("float32") else 2**-7
                torch.testing.assert_close(weights[name], expected, rtol=tolerance, atol=tolerance, msg=f"{saved} {me}")


def test_the_comparison_across_layouts_would_notice_a_lost_momentum(tmp_path: Path) -> None:
    """Without its exp_avg the step after would differ by far more than the tolerance."""
    after = run_ranks(1, "test_checkpoint:save_on_all_layouts", str(tmp_path))[0]
    saved = tmp_path / saved_name(1, 0, "float32")
    for file in saved.iterdir():
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        state_files.save_file({k: v for k, v in tensors.items() if not k.startswith("exp_avg:")}, file, metadata)
    for other in tmp_path.iterdir():
        if other != saved:
            shutil.rmtree(other)
    wrong, weights = run_ranks(1, "test_checkpoint:load_all_layouts", str(tmp_path))[0][
        saved.name, saved_name(1, 1, "float32")
    ]
    assert wrong
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in after[saved.name].items()) > 1e-3
