"""One step of `train` on models with recurrent layers is a step of a plain Hugging Face loop over whole samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import RECURRENT, RECURRENT_TINY, recurrent_model
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

LENGTHS = (97, 1, 40, 2, 3, 17, 65, 5)
"""Pieces of 32 tokens: one sample ends with a piece of one token, and some are shorter than a convolution."""
LEARNING_RATE = 0.5
WORDS = (
    "model.init=pretrained", "model.dtype=float32", "data.format=tokens", "train.guard=false", "chunk.size=32",
    "data.num_workers=1", "train.steps=1", f"train.global_batch_size={len(LENGTHS) - 1}", "optim=sgd",
    f"optim.lr={LEARNING_RATE}", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.grad_clip=0",
)  # fmt: skip
FAMILIES = (
    "qwen3_5", "qwen3_next", "kimi_linear", "lfm2", "lfm3", "nemotron_h", "falcon_h1", "granitemoehybrid", "jamba", "mamba2",
    "minimax", "recurrent_gemma",
)  # fmt: skip


def train_each(runs: list[tuple[str, ...]]) -> None:
    """Run `train` for each list of words, in this process."""
    from chunkflow_cli.config import load
    from chunkflow_cli.training import train

    train.close_process_group = lambda: None  # the next run needs it
    for words in runs:
        train.run(load.load(list(words)), json_output=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    """Rows with every second token as a target, but for one of a single token, which has none and is left out."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(1, RECURRENT_TINY["vocab_size"], (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [token if i % 2 else -100 for i, token in enumerate(ids)]})
    return [row for row in made if len(row["input_ids"]) > 1]


@pytest.fixture(scope="module")
def trained(rows: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family with its model and, in `run/final`, the same after a step."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for index, name in enumerate(FAMILIES):
        recurrent_model(name).save_pretrained(folder / name / "model")
        checkpointing = "full" if index % 2 and name != "mamba2" else "none"
        runs.append((
            *WORDS, f"model.path={folder / name / 'model'}", f"train.output_dir={folder / name / 'run'}",
            f"data.path={folder / 'rows.jsonl'}", f"data.cache_dir={folder}", f"chunk.k={1 + index % 3}",
            f"model.activation_checkpointing={checkpointing}",
        ))  # fmt: skip
    run_ranks(1, "test_recurrent_training:train_each", runs)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_a_plain_loop(name: str, trained: Path, rows: list[dict[str, list[int]]]) -> None:
    """The norm of the difference, over that of the update, is rounding; a lost state shows as a tenth and more."""
    assert name in RECURRENT
    before, truth = plain_step(trained / name / "model", rows)
    after = load(trained / name / "run" / "final").state_dict()
    difference = sum(float((after[key] - truth[key]).square().sum()) for key in before)
    update = sum(float((truth[key] - before[key]).square().sum()) for key in before)
    assert (difference / update) ** 0.5 < 5e-5


def plain_step(folder: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights before and after a step."""
    model = load(folder).train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = model(input_ids=torch.tensor(row["input_ids"])[None], use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        (torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / targets).backward()
    optimizer.step()
    return before, model.state_dict()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
