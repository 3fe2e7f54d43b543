"""Evaluation: losses by source and by length, the best model, early stopping, and sample answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chunkflow_cli.config.load import load
from chunkflow_cli.data.lengths import bucket_names, bucket_of
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.training.inputs import load_run_data
from support.ranks import run_ranks
from support.tokenizers import CHATML, make_tokenizer

pytestmark = pytest.mark.ranks

WORDS = (
    "model.dtype=float32", "data.format=tokens", "data.num_workers=1", "train.guard=false", "chunk.size=256", "optim=sgd",
    "optim.lr=0.5", "optim.schedule=constant", "optim.warmup_ratio=0", "eval.every=1",
)  # fmt: skip
SCRIPT = (5.0, 4.0, 4.5, 4.2, 3.0, 2.0)
"""Held-out losses after steps: the best of the first four is the second, and two evaluations do not better it."""
STEPS, BEST, LAST = 6, 2, 4


def train_each(folder: Path) -> None:
    """Train what the tests look at, in this process: real evaluations first, then scripted ones."""
    from chunkflow_cli.execution.runner import Interrupted
    from chunkflow_cli.training import evaluation, train
    from chunkflow_cli.training.held_out import HeldOutLoss

    train.close_process_group = lambda: None  # the next run needs it
    common = (*WORDS, f"model.path={folder / 'model'}", f"data.cache_dir={folder}")
    for weighting in ("token", "sequence"):
        train.run(load([*common, *mixed(folder, weighting)]), json_output=True)
    common = (*common, f"data.path={folder / 'b.jsonl'}", "data.eval_fraction=0.2", "train.global_batch_size=2")
    two = (
        f"train.steps={BEST}",
        f"train.output_dir={folder / 'two steps'}",
        "train.trace=true",
        "data.deduplicate=true",
    )
    train.run(load([*common, *two]), json_output=True)
    interrupted_after: list[int] = []

    def scripted(run: Any, state: Any) -> HeldOutLoss:
        step = state.progress.step
        if interrupted_after == [step]:
            interrupted_after.clear()
            raise Interrupted
        return HeldOutLoss(SCRIPT[step - 1] if step else 9.0)

    evaluation.held_out_loss = scripted
    patient = (*common, f"train.steps={STEPS}", "eval.early_stopping_patience=2", "eval.keep_best=true")
    train.run(load([*patient, f"train.output_dir={folder / 'stopped'}"]), json_output=True)
    again = [*patient, f"train.output_dir={folder / 'resumed'}", "checkpoint.every=2", "checkpoint.keep=1"]
    for step in (3, 4):
        interrupted_after.append(step)
        with pytest.raises(KeyboardInterrupt):
            train.run(load(again), json_output=True)
    train.run(load(again), json_output=True)


def mixed(folder: Path, weighting: str) -> tuple[str, ...]:
    sources = f"[{{path: {folder / 'a.jsonl'}, weight: 1}},{{path: {folder / 'b.jsonl'}, weight: 2}}]"
    return (
        f"data.sources={sources}", "data.eval_fraction=0.3", "train.global_batch_tokens=2600", "train.steps=2",
        f"train.output_dir={folder / weighting}", f"train.loss_weighting={weighting}",
        "eval.prompts=[Hi,What is it?]" if weighting == "token" else "eval.prompts=[]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    model = AutoConfig.for_model(
        "qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model, dtype=torch.float32).save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    rng = np.random.default_rng(5)
    for name, lengths in (("a", (1100, 1500, 700, 30)), ("b", rng.integers(3, 90, 14).tolist())):
        rows = [rng.integers(1, 250, length).tolist() for length in lengths]
        labels = [
            [token if rng.random() < 0.7 or place == 1 else -100 for place, token in enumerate(row)] for row in rows
        ]
        made = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    run_ranks(1, "test_evaluation:train_each", folder)
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())  # type: ignore[no-any-return]


def sample_losses(model: Path, data: TokenizedData) -> Iterator[float]:
    """Yield the sum of the cross entropy of each sample's targets, by plain transformers."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for sample in map(data.__getitem__, range(len(data))):
        logits = module(input_ids=torch.as_tensor(sample.input_ids, dtype=torch.int64)[None]).logits[0]
        targets = torch.as_tensor(sample.targets, dtype=torch.int64)
        yield torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()


@torch.no_grad()
def test_held_out_losses_by_source_and_by_length(folder: Path) -> None:
    """A mean over all tokens hides that the long samples do not learn."""
    run = folder / "token"
    data = load_run_data(load([*WORDS, f"data.cache_dir={folder}", *mixed(folder, "token")]).config, None).evaluation
    losses = np.array(list(sample_losses(run / "final", data)))
    names, buckets = np.array(["a", "b"])[data.sources], np.array(bucket_names())[bucket_of(data.lengths)]
    truth = {part: losses[own].sum() / data.target_counts[own].sum()
             for part, own in [(part, of == part) for of in (names, buckets) for part in np.unique(of)]}  # fmt: skip
    assert set(truth) == {"a", "b", "<1K", "1K-4K"}
    report, last = report_of(run), rows_of(run)[-1]
    assert report["eval_loss_end"] == pytest.approx(losses.sum() / data.target_counts.sum(), rel=1e-5)
    assert report["eval_parts_end"] == pytest.approx(truth, rel=1e-5)
    assert {name: last[f"eval_loss/{name}"] for name in truth} == report["eval_parts_end"]
    assert report["eval_parts_start"] != report["eval_parts_end"]


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_losses_of_a_step_by_source(folder: Path, weighting: str) -> None:
    from chunkflow_cli.planning.devices import DEVICES
    from chunkflow_cli.training.setup import read_setup

    config = load([*WORDS, f"data.cache_dir={folder}", *mixed(folder, weighting)]).config
    data = load_run_data(config, None).train
    step = read_setup(config, None, DEVICES["cpu"]).plan(data)[0]
    chosen = data.select(np.sort(step.samples))
    losses = np.array(list(sample_losses(folder / "model", chosen)))
    row, total = rows_of(folder / weighting)[0], 0.0
    for number, name in enumerate(("a", "b")):
        own = chosen.sources == number
        weights = np.ones(own.sum()) if weighting == "token" else 1 / chosen.target_counts[own]
        mass = (weights * chosen.target_counts[own]).sum()
        assert row[f"loss/{name}"] == pytest.approx((weights * losses[own]).sum() / mass, rel=1e-5)
        total += row[f"loss/{name}"] * mass
    every = chosen.target_counts.sum() if weighting == "token" else len(chosen)
    assert row["loss"] == pytest.approx(total / every, rel=1e-6), "the parts make up the whole"
    assert row["tokens"] == chosen.lengths.sum() <= 2600


def test_the_report_accounts_for_each_source(folder: Path) -> None:
    report = report_of(folder / "token")
    parts = report["sources"]
    for key in ("samples_read", "samples_to_train", "samples_held_out", "samples_trained"):
        assert sum(part[key] for part in parts.values()) == report[key]
    assert sum(part["targets"] for part in parts.values()) == report["target_tokens_trained"]
    assert parts["a"]["samples_read"] == 4


def test_early_stopping_keeps_the_best_model(folder: Path) -> None:
    """final/ is the model after the best step, to the bit: not the last one, and not the one as it came."""
    run, report = folder / "stopped", report_of(folder / "stopped")
    assert [row["eval_loss"] for row in rows_of(run)] == list(SCRIPT[:LAST])
    assert (report["steps"], report["best_step"], report["final_step"], report["stopped_early"]) == (
        LAST,
        BEST,
        BEST,
        True,
    )
    expected, found = (load_file(each / "final" / "model.safetensors") for each in (folder / "two steps", run))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (run / "best").exists()
    plain = report_of(folder / "two steps")
    assert (plain["final_step"], plain["stopped_early"], plain["samples_duplicate"]) == (BEST, False, 0)
    assert (folder / "two steps" / "trace.json").exists()


def test_a_run_that_was_interrupted_stops_at_the_same_step(folder: Path) -> None:
    """It is interrupted while it evaluates after the third step, in the middle of the patience, and after the fourth:
    an evaluation that is skipped, or made twice, would end the run at another step."""
    one, other = folder / "stopped", folder / "resumed"
    for key in ("steps", "best_step", "final_step", "best_eval_loss", "evaluations_since_best"):
        assert report_of(one)[key] == report_of(other)[key]
    keys = ("step", "loss", "eval_loss", "grad_norm")
    assert [[row[key] for key in keys] for row in rows_of(one)] == [
        [row[key] for key in keys] for row in rows_of(other)
    ]
    expected, found = (load_file(each / "final" / "model.safetensors") for each in (one, other))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_answers_are_what_the_model_generates(folder: Path) -> None:
    """At the start and after each evaluation; the last ones are those of the saved model, token for token."""
    answers = [json.loads(line) for line in (folder / "token" / "answers.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in answers] == [
        (step, prompt) for step in (0, 1, 2) for prompt in ("Hi", "What is it?")
    ]
    for model, step in ((folder / "model", 0), (folder / "token" / "final", 2)):
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert tokenizer.chat_template == CHATML
        module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for row in answers[2 * step : 2 * step + 2]:
            ids = tokenizer(
                f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
            )
            out = module.generate(**ids, max_new_tokens=64, do_sample=False)
            assert row["answer"] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert report_of(folder / "token")["final_step"] == 2
