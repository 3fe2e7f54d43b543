"""The loss of a fine-tune, step by step: `chunkflow train` beside TRL's SFTTrainer.

    python benchmarks/loss_curve.py                      SmolLM2-135M, 28 steps, half an hour on one core
    python benchmarks/loss_curve.py --samples 16 --epochs 1
    python benchmarks/loss_curve.py --draw docs/images/loss-curve.json    draw the picture of docs/benchmarks.md again

Both train on the demo's conversations, one long-tailed sample set: the same order, the same batches, the same learning
rate, AdamW, float32, and the mean over the targets of a batch as loss. chunkflow packs and splits into chunks of 512
tokens with K = 1; TRL runs each sample whole. Each tokenizes the conversations and marks the targets itself; TRL's last
target of each answer, the line break behind its end token, is taken out.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

from common import emit, hardware, load_plain_model, say, smollm2_path

BATCH_SIZE = 4
LEARNING_RATE = 2e-5
CHUNK_SIZE = 512
PICTURE = Path(__file__).parents[1] / "docs/images/loss-curve.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--draw", type=Path, help="draw this result and train nothing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(json.loads(arguments.draw.read_text(encoding="utf-8")))
        return
    from chunkflow_cli.cli.demo import stdlib_pairs, subset

    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data.jsonl")
        pairs = sorted(subset(list(stdlib_pairs())), key=lambda pair: -pair.characters)[: arguments.samples]
        pairs.sort(
            key=lambda pair: zlib.crc32(pair.request.encode())
        )  # the longest is always among them, at no special place
        data.write_text("".join(pair.to_json() + "\n" for pair in pairs), encoding="utf-8")
        ours = run_chunkflow(data, arguments.epochs)
        theirs = run_trl(data, arguments.epochs, ours["target_tokens"])
    differences = [abs(one - other) / other for one, other in zip(ours["loss"], theirs["loss"], strict=True)]
    result = {
        "benchmark": "loss_curve",
        "hardware": hardware(),
        "samples": len(pairs),
        "batch_size": BATCH_SIZE,
        "chunk_size": CHUNK_SIZE,
        "chunkflow": ours,
        "trl": theirs,
        "largest_relative_difference": max(differences),
    }
    emit(result, arguments.out)


def run_chunkflow(data: Path, epochs: int) -> dict[str, Any]:
    say("chunkflow trains")
    folder = data.parent / "run"
    command = [
        sys.executable, "-m", "chunkflow_cli", "train", f"model.path={smollm2_path()}", "model.dtype=float32",
        f"data.path={data}", "data.format=messages", f"chunk.size={CHUNK_SIZE}", f"train.epochs={epochs}",
        f"train.global_batch_size={BATCH_SIZE}", "train.shuffle=false", f"optim.lr={LEARNING_RATE}",
        "optim.schedule=constant", "optim.warmup_ratio=0", f"train.output_dir={folder}",
        f"data.cache_dir={data.parent}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {
        "loss": [row["loss"] for row in rows],
        "target_tokens": sum(row["target_tokens"] for row in rows),
        "longest_sample_chunks": max(row["recomputed_chunks"] for row in rows) + 1,
    }


def run_trl(data: Path, epochs: int, expected_targets: int) -> dict[str, Any]:

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from chunkflow_cli.data.tokenizer import load_tokenizer

    say("TRL trains")
    conversations = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    rows = {"prompt": [turns[:1] for turns in conversations], "completion": [turns[1:] for turns in conversations]}
    losses: list[float] = []

    class Recording(SFTTrainer):
        """Keeps each sample's part of its batch's loss; the logged losses have four digits."""

        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keywords)
            losses.append(float(loss))
            return loss

    settings = SFTConfig(
        output_dir=str(data.parent / "trl"), max_length=None, packing=False, per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH_SIZE, num_train_epochs=epochs, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch", max_grad_norm=1.0, bf16=False,
        use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, train_sampling_strategy="sequential", dataset_num_proc=1,
    )  # fmt: skip
    trainer = Recording(
        model=load_plain_model(torch.float32), args=settings, train_dataset=Dataset.from_dict(rows),
        processing_class=load_tokenizer(smollm2_path(), trust_remote_code=False),
    )  # fmt: skip
    # TRL also counts what the template writes after the end of the answer, which no model has to write.
    trainer.train_dataset = trainer.train_dataset.map(without_last_newline)
    targets = epochs * sum(label != -100 for row in trainer.train_dataset["labels"] for label in row)
    if targets != expected_targets:
        raise SystemExit(f"chunkflow has {expected_targets} targets and TRL {targets}")
    trainer.train()
    return {
        "loss": [sum(losses[first : first + BATCH_SIZE]) for first in range(0, len(losses), BATCH_SIZE)],
        "target_tokens": targets,
    }


def without_last_newline(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [*row["labels"][:-1], -100]}


def draw(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "chunkflow", "font.size": 11})
    ours, theirs = result["chunkflow"]["loss"], result["trl"]["loss"]
    steps = range(1, len(ours) + 1)
    figure, (losses, differences) = plt.subplots(2, 1, figsize=(7.2, 4.6), sharex=True, height_ratios=(3, 1.3))
    losses.plot(steps, theirs, color="#bbbbbb", linewidth=6, label="TRL, whole samples")
    losses.plot(
        steps, ours, color="#0077bb", linewidth=1.6, label=f"chunkflow, chunks of {result['chunk_size']} tokens"
    )
    losses.set_ylabel("training loss")
    losses.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    relative = [abs(one - other) / other for one, other in zip(ours, theirs, strict=True)]
    differences.semilogy(steps, [max(value, 1e-9) for value in relative], "o-", color="#cc3377", markersize=3)
    differences.set_ylim(1e-9, 1e-3)
    differences.set_yticks([1e-9, 1e-7, 1e-5, 1e-3])
    differences.set_ylabel("relative\ndifference")
    differences.set_xlabel("optimizer step")
    for axes in (losses, differences):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
