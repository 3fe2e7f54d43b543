"""The layouts of two to four ranks on as many GPUs, over NCCL: loss and weights as one GPU gives them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank: two"),
]

WORDS = (
    "recipe=tiny_random", "train.steps=2", "optim=sgd", "optim.lr=0.5", "train.guard=false", "chunk.size=64",
    "model.dtype=float32", "data.eval_fraction=0",
)  # fmt: skip


GROUPS = ("parallel.sequence=", "parallel.pipeline=")


def train(folder: Path, *words: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    command = [sys.executable, "-m", "chunkflow_cli", "train", *WORDS, *words, f"train.output_dir={folder}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    return train(tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize(
    "words",
    [
        "engine.zero_stage=0", "engine.zero_stage=1", "engine.zero_stage=2", "engine.zero_stage=3",
        "parallel.sequence=2", "parallel.pipeline=2", "parallel.pipeline=2 parallel.schedule=zero_bubble",
        "parallel.pipeline=3", "parallel.pipeline=4", "parallel.pipeline=2 parallel.sequence=2",
    ],
)  # fmt: skip
def test_gpus_train_as_one_does(words: str, truth: tuple[list[float], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """gloo shares no code with NCCL: communicators, streams and the order of messages differ."""
    sizes = [int(word.partition("=")[2]) for word in words.split() if word.startswith(GROUPS)]
    processes = max(2, math.prod(sizes))
    if torch.cuda.device_count() < processes:
        pytest.skip(f"NCCL wants a GPU for each rank: {processes}")
    losses, weights = train(tmp_path / "run", f"launch.processes={processes}", *words.split())
    assert losses == pytest.approx(truth[0], rel=1e-5)
    for name, expected in truth[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6)
