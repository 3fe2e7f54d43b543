"""Preferences against TRL: the same five AdamW steps, and the peak memory of a pair of long answers.

    python benchmarks/preferences.py exact --tasks dpo orpo kto     20 pairs, float32: some ten minutes on two cores
    python benchmarks/preferences.py memory --length 8192           a pair, and one sample of supervised training
    python benchmarks/preferences.py memory --length 8192 --layers 6 --trl 8192    the same of six layers, beside TRL

`exact` trains SmolLM2-135M on 20 pairs (or labeled answers) in the order of the data, with chunks of 128 tokens; the
longest answer has four. It reports how far losses, rewards, gradients (AdamW's first moments, to which all steps have
added) and weights are from those of TRL's trainer.
`memory` runs each point in a process of its own; its peak is what the kernel says of it.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from common import emit, hardware, load_plain_model, smollm2_path
from memory import Point, measured, state_bytes

STEPS, BATCH, CHUNK, LR = 5, 4, 128, 1e-5
WORDS = "the tide turns at noon and boats come home with fish for the old market by the sea".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "memory"))
    parser.add_argument("--tasks", nargs="+", default=["dpo", "orpo", "kto"])
    parser.add_argument("--length", type=int, default=8192, help="tokens of each answer with its prompt")
    parser.add_argument("--trl", type=int, help="tokens of each answer of the pair that TRL takes")
    parser.add_argument("--layers", type=int, help="take a random model of SmolLM2's shape with so many layers")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each point")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    parser.add_argument("--trl-child", nargs=3, metavar=("LENGTH", "STEPS", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_child:
        with tempfile.TemporaryDirectory() as folder:
            (length, steps), model = map(int, arguments.trl_child[:2]), arguments.trl_child[2]
            train_with_trl("dpo", [long_pair(length)] * 2, Path(folder), batch=1, steps=steps, model_path=model)
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
            # The long answers are good ones: the model comes to prefer all of their words, so `kl` is above 0.
            rows.append({"prompt": prompt, "completion": chosen, "label": index % 3 != 1})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def exact(task: str) -> dict[str, Any]:
    """Train in chunks and with TRL; return how far apart they are."""
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
            f"checkpoint.every={STEPS}", f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup_ratio=0",
            "optim.grad_clip=0",
        ]  # fmt: skip
        report = run(load(words), json_output=True)
        log = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        final = load_file(folder / "run/final/model.safetensors")
        ours = Trained(log, final, momentums(folder / "run/checkpoints", final))
        theirs = train_with_trl(task, rows, folder, batch=BATCH, steps=STEPS)
        found = {"differences": differences(ours, theirs)}
        if task == "orpo":
            with cross_entropy_in_float64():
                better = train_with_trl(task, rows, folder, batch=BATCH, steps=STEPS)
            found["differences, TRL's cross entropy in float64"] = differences(ours, better)
        names = ("loss", "kl") if task == "kto" else ("loss",)
        return {
            "longest": report["longest_sample"],
            **found,
            "chunkflow": {name: [row[name] for row in ours.log] for name in names},
            "trl": {name: [row[name] for row in theirs.log] for name in names},
        }


def cross_entropy_in_float64() -> AbstractContextManager[Any]:
    """Let `nn.CrossEntropyLoss`, which ORPOTrainer uses, take float32 logits as float64 within the block.

    On a CPU, torch adds a row's 49,152 exponentials in float32 with an error that has one sign: the gradients of whole
    sequences in plain transformers are 6.6e-5 from those in float64, and 1.2e-5 with this.
    """
    from torch import nn

    forward = nn.CrossEntropyLoss.forward
    return mock.patch.object(
        nn.CrossEntropyLoss, "forward", lambda self, logits, labels: forward(self, logits.double(), labels)
    )


@dataclass(frozen=True)
class Trained:
    """A run after its last step."""

    log: list[dict[str, float]]
    weights: dict[str, Any]
    momentums: dict[str, Any]
    """Sums of the gradients of all steps, as AdamW weighs them."""


def momentums(checkpoints: Path, weights: dict[str, Any]) -> dict[str, Any]:
    """Read AdamW's first moments from the only checkpoint of a run of one process."""
    import torch
    from safetensors import safe_open

    parts: dict[str, list[tuple[int, Any]]] = {}
    for path in checkpoints.glob("step-*/state-*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, start, name = key.split(":", 2)
                if kind == "exp_avg":
                    parts.setdefault(name, []).append((int(start), file.get_tensor(key)))
    return {
        name: torch.cat([numbers for _, numbers in sorted(found, key=lambda part: part[0])]).view_as(weights[name])
        for name, found in parts.items()
    }


def differences(one: Trained, other: Trained) -> dict[str, float]:
    """Return the largest difference of any step, and the relative one of weights and of summed gradients by norm."""
    names = [name for name in other.log[0] if name in ("loss", "kl", "nll_loss") or name.startswith("rewards/")]
    found = {
        name: max(abs(a[name] - b[name]) for a, b in zip(one.log, other.log, strict=True))
        for name in names
        if name != "rewards/accuracies"  # of a tie, which the first step is, rounding decides
    }
    return found | {
        "weights": relative(one.weights, other.weights),
        "gradients": relative(one.momentums, other.momentums),
    }


def relative(one: dict[str, Any], other: dict[str, Any]) -> float:
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    norm = sum(float(other[name].double().square().sum()) for name in one)
    return float((apart / norm) ** 0.5)


def train_with_trl(
    task: str, rows: list[dict[str, Any]], folder: Path, *, batch: int, steps: int, model_path: str | None = None
) -> Trained:
    """Train SmolLM2, or the model in a folder, on the rows in their order with TRL."""
    import torch
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM
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
    if task == "orpo" and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.bos_token = None  # ORPOTrainer writes it before every prompt, also where the tokenizer writes none
    if model_path is None:
        model = load_plain_model(torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
    run = InOrder(
        model=model,
        args=arguments(
            output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=65536, optim="adamw_torch",
            beta=0.1, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    run.train()
    moments = {
        name: run.optimizer.state[parameter]["exp_avg"]
        for name, parameter in run.model.named_parameters()
        if parameter in run.optimizer.state
    }
    return Trained([row for row in run.state.log_history if "loss" in row], run.model.state_dict(), moments)


def long_pair(length: int) -> dict[str, str]:
    """A pair of answers of `length` tokens each, a quarter of which are the prompt."""
    asked = length // 4
    answers = length - asked - 1
    return {"prompt": " the" * asked, "chosen": " blue" * answers, "rejected": " green" * answers}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = smollm2_path() if arguments.layers is None else random_model(arguments.layers, Path(folder))
        pair, size = long_pair(arguments.length), arguments.chunk_size
        answer = {"prompt": pair["prompt"], "completion": pair["chosen"]}
        steps, dpo, twice = f"train.steps={arguments.steps}", "train.task=dpo", "preference.share_prompts=false"
        points = {
            "supervised": train_in_chunks(model, answer, size, steps),
            "pair": train_in_chunks(model, pair, size, steps, dpo),
            "pair, prompt run twice": train_in_chunks(model, pair, size, steps, dpo, twice),
        }
        if arguments.trl:
            command = [
                sys.executable,
                __file__,
                "memory",
                "--trl-child",
                str(arguments.trl),
                str(arguments.steps),
                model,
            ]
            points[f"trl, {arguments.trl} tokens"] = measured(f"TRL, a pair of {arguments.trl:,}", command)
    # While the second answer goes backward, the keys and values of the first one wait: half of its float32 state.
    second = state_bytes(arguments.length, size, "float32") // 2 * (arguments.layers or LAYERS) // LAYERS
    peaks = {name: point.peak_bytes for name, point in points.items()}
    supervised = peaks["supervised"]
    return {
        "length": arguments.length,
        "layers": arguments.layers or LAYERS,
        "chunk_size": size,
        "second_state_bytes": second,
        "peak_bytes": peaks,
        "seconds": {name: round(point.seconds, 1) for name, point in points.items()},
        "above_supervised_and_second_state": {
            name: round(peak / (supervised + second) - 1, 4)
            for name, peak in peaks.items()
            if name != "supervised" and peak is not None and supervised is not None
        },
    }


LAYERS = 30
"""Layers of SmolLM2-135M."""
VOCABULARY = 8192
"""Of a random model: the words of a long pair are among the first."""


def random_model(layers: int, folder: Path) -> str:
    """Make a random model of SmolLM2's widths with a small vocabulary, and its tokenizer, and return its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from chunkflow_cli.config.schema import ModelConfig
    from chunkflow_cli.data.tokenizer import load_tokenizer
    from chunkflow_cli.model.hf_config import load_config

    config = load_config(ModelConfig(path=smollm2_path()))
    assert config.num_hidden_layers == LAYERS
    config.num_hidden_layers, config.vocab_size = layers, VOCABULARY
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(smollm2_path(), trust_remote_code=False).save_pretrained(folder)
    return str(folder)


def train_in_chunks(model: str, row: dict[str, str], chunk_size: int, *more: str) -> Point:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "chunkflow_cli", "train", f"model.path={model}", "model.dtype=float32",
            f"data.path={data}", "data.max_length=1000000", "data.num_workers=1", f"data.cache_dir={folder}/cache",
            f"chunk.size={chunk_size}", "train.global_batch_size=1", "train.guard=false",
            f"train.output_dir={folder}/run", *more,
        ]  # fmt: skip
        return measured(" ".join(["in chunks", *more]), command)


if __name__ == "__main__":
    main()
