"""Preferences against TRL: the same five AdamW steps, and the peak memory of a pair of long answers.

    python benchmarks/preferences.py exact --tasks dpo orpo kto     20 pairs, float32: some ten minutes on two cores
    python benchmarks/preferences.py memory --length 8192           a pair, and one sample of supervised training
    python benchmarks/preferences.py memory --length 8192 --trl 2048    TRL's peak for a shorter pair beside it

`exact` trains SmolLM2-135M on 20 pairs (or labelled answers) in the order of the data, with chunks of 128 tokens; the
longest answer has four. It reports how far losses, rewards and weights are from those of TRL's trainer.
`memory` runs each point in a process of its own; its peak is what the kernel says of it.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import emit, hardware, load_plain_model, say, smollm2_path
from memory import Point, measured, state_bytes

STEPS, BATCH, CHUNK, LR = 5, 4, 128, 1e-5
WORDS = "the tide turns at noon and boats come home with fish for the old market by the sea".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "memory"))
    parser.add_argument("--tasks", nargs="+", default=["dpo", "orpo", "kto"])
    parser.add_argument("--length", type=int, default=8192, help="tokens of each answer with its prompt")
    parser.add_argument("--trl", type=int, help="tokens of each answer of the pair that TRL takes")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    parser.add_argument("--trl-child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_child:
        with tempfile.TemporaryDirectory() as folder:
            train_with_trl("dpo", [long_pair(arguments.trl_child)], Path(folder), batch=1, steps=1)
        return
    found = {task: exact(task) for task in arguments.tasks} if arguments.what == "exact" else memory(arguments)
    emit({"benchmark": f"preferences {arguments.what}", "hardware": hardware(), **found}, arguments.out)


def rows_of(task: str) -> list[dict[str, Any]]:
    """20 rows of words; the answers are short but for a few, of which the longest has four chunks."""
    generator = random.Random(0)

    def text(words: int) -> str:
        return " " + " ".join(generator.choices(WORDS, k=words))

    rows = []
    for index in range(STEPS * BATCH):
        long = {3: 420, 9: 200, 14: 150}.get(index)
        prompt, chosen, rejected = text(20), text(long or 30), text((long or 40) // 2)
        if task == "kto":
            rows.append({"prompt": prompt, "completion": chosen, "label": index % 3 > 0})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def exact(task: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from chunkflow_cli.config.load import load
    from chunkflow_cli.training.train import run

    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), rows_of(task)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = [
            f"model.path={smollm2_path()}", "model.dtype=float32", f"data.path={data}", f"data.cache_dir={folder}/c",
            "data.num_workers=1", f"train.task={task}", f"train.steps={STEPS}", f"train.global_batch_size={BATCH}",
            "train.shuffle=false", "train.guard=false", f"train.output_dir={folder}/run", f"chunk.size={CHUNK}",
            f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.grad_clip=0",
        ]  # fmt: skip
        report = run(load(words), json_output=True)
        ours = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        log, weights = train_with_trl(task, rows, folder, batch=BATCH, steps=STEPS)
        final = load_file(folder / "run/final/model.safetensors")
        apart = {name: float((final[name] - weights[name]).norm()) for name in final}
        norms = {name: float(weights[name].norm()) for name in final}
        names = [name for name in log[0] if name in ours[0] and (name in ("loss", "kl") or "rewards/" in name)]
        say(f"{task}: {ours[-1]['loss']} and {log[-1]['loss']} in the last step")
        return {
            "longest": report["longest_sample"],
            "weights_relative_difference": sum(v**2 for v in apart.values()) ** 0.5
            / sum(v**2 for v in norms.values()) ** 0.5,
            "largest_difference": {
                name: max(abs(own[name] - theirs[name]) for own, theirs in zip(ours, log, strict=True))
                for name in names
            },
            "losses": [row["loss"] for row in ours],
            "losses_of_trl": [row["loss"] for row in log],
        }


def train_with_trl(
    task: str, rows: list[dict[str, Any]], folder: Path, *, batch: int, steps: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train SmolLM2 on the rows in their order with TRL; return its log and the weights."""
    import torch
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl.experimental import orpo

    from chunkflow_cli.data.tokenizer import load_tokenizer

    trainer, arguments = {
        "dpo": (trl.DPOTrainer, partial(trl.DPOConfig, precompute_ref_log_probs=True)),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
        "kto": (trl.KTOTrainer, partial(trl.KTOConfig, precompute_ref_log_probs=True)),
    }[task]

    class InOrder(trainer):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    tokenizer = load_tokenizer(smollm2_path(), trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    run = InOrder(
        model=load_plain_model(torch.float32),
        args=arguments(
            output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=65536, optim="adamw_torch", beta=0.1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    run.train()
    return [row for row in run.state.log_history if "loss" in row], run.model.state_dict()


def long_pair(length: int) -> dict[str, str]:
    """A pair of answers of `length` tokens each, a quarter of which are the prompt."""
    asked = length // 4
    answers = length - asked - 1
    return {"prompt": " the" * asked, "chosen": " blue" * answers, "rejected": " green" * answers}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    pair = long_pair(arguments.length)
    answer = {"prompt": pair["prompt"], "completion": pair["chosen"]}
    points = {
        "supervised": train_in_chunks(answer, arguments.chunk_size),
        "pair": train_in_chunks(pair, arguments.chunk_size, "train.task=dpo"),
    }
    if arguments.trl:
        command = [sys.executable, __file__, "memory", "--trl-child", str(arguments.trl)]
        points[f"trl, {arguments.trl} tokens"] = measured(f"TRL, a pair of {arguments.trl:,}", command)
    # While the second answer goes backward, the keys and values of the first one wait: half of its float32 state.
    second = state_bytes(arguments.length, arguments.chunk_size, "float32") // 2
    one, two = points["supervised"].peak_bytes, points["pair"].peak_bytes
    for name, point in points.items():
        say(f"{name}: {point}")
    return {
        "length": arguments.length,
        "chunk_size": arguments.chunk_size,
        "second_state_bytes": second,
        "peak_bytes": {name: point.peak_bytes for name, point in points.items()},
        "seconds": {name: round(point.seconds, 1) for name, point in points.items()},
        "above_supervised_and_second_state": None if one is None or two is None else two / (one + second) - 1,
    }


def train_in_chunks(row: dict[str, str], chunk_size: int, *more: str) -> Point:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "chunkflow_cli", "train", f"model.path={smollm2_path()}", "model.dtype=float32",
            f"data.path={data}", "data.max_length=1000000", "data.num_workers=1", f"data.cache_dir={folder}/cache",
            f"chunk.size={chunk_size}", "train.steps=2", "train.global_batch_size=1", "train.guard=false",
            f"train.output_dir={folder}/run", *more,
        ]  # fmt: skip
        return measured(" ".join(["in chunks", *more]), command)


if __name__ == "__main__":
    main()
