"""`train` learns what a plain Hugging Face loop learns, and accounts for every target (test_resuming.py: interruptions and kills)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import LossWeighting
from chunkflow_cli.errors import RunError
from chunkflow_cli.execution.noise import SequenceNoise, TokenNoise
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.run_plan import RunPlan, StepPlan
from chunkflow_cli.planning.schedule import Schedule
from chunkflow_cli.training.inputs import target_weights
from chunkflow_cli.training.learning_rate import learning_rate_schedule
from support.ranks import run_ranks
from support.training import RECIPE, losses, rows, train

pytestmark = pytest.mark.ranks

TINY = (
    "model.init=random",
    "model.dtype=float32",
    "data.format=tokens",
    "train.guard=false",
    "optim.schedule=constant",
)
SGD = ("optim=sgd", "optim.lr=0.5", "optim.warmup_ratio=0", "optim.grad_clip=0")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer qwen2: grouped heads, biases, tied head."""
    return make_model(tmp_path_factory.mktemp("model"), is_tied=True)


def make_model(folder: Path, *, is_tied: bool) -> Path:
    AutoConfig.for_model(
        "qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=1024, tie_word_embeddings=is_tied, initializer_range=0.1,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_falcon(folder: Path) -> Path:
    """Write a model that computes its attention itself, with a bias of distances (ALiBi)."""
    AutoConfig.for_model(
        "falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, alibi=True,
        multi_query=False, initializer_range=0.1, architectures=["FalconForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    """Eleven short sequences and one of 300 tokens, whose middle has no targets at all."""
    rng = np.random.default_rng(7)
    made = []
    for length in [9, 40, 300, 17, 64, 33, 5, 58, 21, 12, 47, 30]:
        ids = rng.integers(3, 97, length).tolist()
        labels = list(ids)
        labels[: length // 3] = [-100] * (length // 3)
        if length == 300:
            labels[100:240] = [-100] * 140
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, list[int]]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture(scope="module")
def plain_weights(model_folder: Path, samples: list[dict[str, list[int]]]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after one SGD step of a plain Hugging Face loop over whole samples, for each weighting."""
    return {weighting: plain_step(model_folder, samples, weighting) for weighting in ("token", "sequence", "noise")}


def plain_step(folder: Path, samples: list[dict[str, list[int]]], weighting: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    all_targets = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    for place, sample in enumerate(samples):
        labels = torch.tensor(sample["labels"])[1:]
        embeddings = model.get_input_embeddings()(torch.tensor(sample["input_ids"])[None])
        if weighting == "noise":
            embeddings = embeddings + noise_of(place, embeddings)
        logits = model(inputs_embeds=embeddings).logits[0, :-1]
        total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        own = int((labels != -100).sum())
        (total / (own * len(samples) if weighting == "sequence" else all_targets)).backward()
    optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def noise_of(sample: int, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the noise of a sample in the first step, with alpha = 5 (test_noise.py tests its numbers)."""
    tokens = embeddings.shape[1]
    keys = SequenceNoise.of_step(5.0, 0, 0, [sample]).keys_of(np.zeros(tokens, dtype=np.int64), np.arange(tokens))
    return TokenNoise(torch.from_numpy(keys), torch.full((tokens,), 5 / tokens**0.5)).of(embeddings)


def relative_difference(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    mine = load_file(folder / "final" / "model.safetensors")
    difference = sum(float((mine[name] - expected[name]).norm()) ** 2 for name in mine) ** 0.5
    return difference / sum(float(expected[name].norm()) ** 2 for name in mine) ** 0.5


ONE_STEP = [
    ("chunk.size=64", "chunk.k=1"),
    ("chunk.size=64", "chunk.k=2"),
    ("chunk.size=64", "chunk.k=8"),
    ("chunk.size=128", "chunk.k=1"),
    ("chunk.size=128", "chunk.k=2", "chunk.fill_tails=false"),
    ("chunk.size=4096", "chunk.k=1"),
    ("chunk.size=64", "chunk.k=2", "engine.zero_stage=3"),
    (
        "chunk.size=77",
        "chunk.k=1",
        "engine.zero_stage=0",
        "model.activation_checkpointing=full",
        "chunk.offload_state=host",
    ),
    ("chunk.size=64", "chunk.k=2", "engine.zero_stage=2", "model.activation_checkpointing=selective"),
    ("chunk.size=50", "chunk.k=2", "train.loss_weighting=sequence"),
    ("chunk.size=64", "chunk.k=2", "chunk.cuts=time"),
    ("chunk.size=64", "chunk.k=1", "train.neftune_noise_alpha=5"),
]
FALCON = ("chunk.size=64", "chunk.k=2", "engine.zero_stage=3", "model.activation_checkpointing=full")
HEAD_APART = [("chunk.size=64", "chunk.k=2", f"engine.zero_stage={stage}") for stage in (1, 3)]


def run_all(runs: list[tuple[str, ...]]) -> None:
    """Train one run after the other, in one process: starting a process for each takes longer than the training."""
    from chunkflow_cli.training import train as training

    training.close_process_group = lambda: None  # the next run needs it
    for words in runs:
        training.run(load(list(words)), json_output=True)


@pytest.fixture(scope="module")
def one_step(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Run folders by their words: those of ONE_STEP, of HEAD_APART behind the word "untied", and FALCON."""
    folder = tmp_path_factory.mktemp("one_step")
    untied = make_model(folder / "untied", is_tied=False)
    runs, folders = [], {}
    for key, model, words in [
        *((words, model_folder, words) for words in ONE_STEP),
        *((("untied", *words), untied, words) for words in HEAD_APART),
        (FALCON, make_falcon(folder / "falcon"), FALCON),
    ]:
        folders[key] = folder / f"run-{len(runs)}"
        runs.append((*TINY, *SGD, f"model.path={model}", f"data.path={data_file}", f"data.cache_dir={folder}",
                     "train.global_batch_size=12", f"train.output_dir={folders[key]}", *words))  # fmt: skip
    run_ranks(1, "test_train:run_all", runs)
    return folders


@pytest.mark.parametrize("words", ONE_STEP, ids=" ".join)
def test_one_step_equals_a_plain_hugging_face_loop(
    words: tuple[str, ...], one_step: dict[Any, Path], plain_weights: dict[str, Any]
) -> None:
    """Packing, chunk size, K, layout and activation checkpointing do not change what is learned."""
    weighting = "sequence" if "train.loss_weighting=sequence" in words else "token"
    weighting = "noise" if "train.neftune_noise_alpha=5" in words else weighting
    assert relative_difference(one_step[words], plain_weights[weighting]) <= 1e-6
    report = json.loads((one_step[words] / "report.json").read_text())
    assert report["target_tokens_trained"] == report["target_tokens_planned"] > 0
    assert report["samples_trained"] == report["samples_read"] == 12


@pytest.mark.parametrize("words", HEAD_APART, ids=" ".join)
def test_an_untied_head_is_trained_exactly(
    words: tuple[str, ...], one_step: dict[Any, Path], samples: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """The weight of a tied head also gets gradient through the embedding; that of an untied head only from the loss."""
    expected = plain_step(make_model(tmp_path / "model", is_tied=False), samples, "token")
    run = one_step["untied", *words]
    assert "lm_head.weight" in load_file(run / "final" / "model.safetensors")
    assert relative_difference(run, expected) <= 1e-6


def test_a_model_that_computes_its_attention_itself(
    one_step: dict[Any, Path], samples: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    assert relative_difference(one_step[FALCON], plain_step(make_falcon(tmp_path), samples, "token")) <= 1e-6


def test_the_comparison_notices_a_lost_target(plain_weights: dict[str, Any]) -> None:
    """Another weighting and noise differ by far more than the tolerance, so the comparison above can fail."""
    token = plain_weights["token"]
    for other in (plain_weights["sequence"], plain_weights["noise"]):
        assert max(float((token[name] - other[name]).norm() / token[name].norm()) for name in token) > 1e-3


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, samples: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folders of runs of which only the results are looked at, from one process."""
    folder = tmp_path_factory.mktemp("finished")
    lines = [json.dumps(sample) for sample in samples]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join([lines[0], '{"input_ids": []}', lines[2], lines[3]]) + "\n")
    with (folder / "rows.jsonl").open("w") as file:
        for length in (30, 300, 12):
            file.write(json.dumps({"input_ids": [3 + i % 90 for i in range(length)]}) + "\n")
    (folder / "bad_rows.jsonl").write_text("\n".join(with_bad_rows(samples)) + "\n")
    recipe = ("recipe=tiny_random", "train.guard=false")
    own = (*TINY, *SGD, f"model.path={model_folder}")
    short = ("data.bad_rows=skip", "data.max_length=100", "data.overlong=drop")
    runs = {
        "lora": (*recipe, "model.lora.enabled=true", "model.lora.r=4", "optim.lr=0.05", "chunk.size=64"),
        "bfloat16": (*recipe, "train.steps=1", "model.dtype=bfloat16"),
        "held out": (*recipe, "train.global_batch_size=8", "eval.every=3", "log.every=100"),
        "tensorboard": (*recipe, "train.steps=2", "log.backends=[jsonl,tensorboard]"),
        "bad rows": (
            *own, *short, f"data.path={folder / 'bad_rows.jsonl'}", "chunk.size=64", "data.eval_fraction=0.2",
            "train.epochs=2", "train.global_batch_size=5",
        ),
        "held-out file": (
            *own, *short, f"data.path={folder / 'samples.jsonl'}", f"data.eval_path={folder / 'held_out.jsonl'}",
        ),
        "cut small": (
            "recipe=qwen7b", f"model.path={model_folder}", "model.init=random", f"data.path={folder / 'rows.jsonl'}",
            "data.train_on=all", "data.max_length=512", "chunk.size=128", "train.epochs=1", "engine.offload=none",
        ),
    }  # fmt: skip
    folders = {name: folder / f"run-{index}" for index, name in enumerate(runs)}
    cache = f"data.cache_dir={folder}"
    run_ranks(1, "test_train:run_all", [(*runs[name], f"train.output_dir={folders[name]}", cache) for name in runs])
    return folders


def test_lora_run_exports_merged(finished: dict[str, Path], tmp_path: Path) -> None:
    """final/ is a peft folder; merged, it becomes a whole model with the same outputs."""
    from peft import PeftModel

    run, output = finished["lora"], tmp_path / "merged"
    assert set(json.loads((run / "final" / "checksums.json").read_text())) == {"adapter_model.safetensors"}
    result = CliRunner().invoke(app, ["export", str(run), "--merge", "--output", str(output), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": str(output), "merged": True}
    config = AutoConfig.from_pretrained(load(["recipe=tiny_random"]).config.model.path)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(3, 40)[None]
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, str(run / "final"))(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(output)(input_ids=ids).logits
    assert float((merged - adapted).norm() / adapted.norm()) < 1e-5
    assert float((merged - before).norm() / before.norm()) > 1e-2


def test_final_loads_in_the_model_dtype(finished: dict[str, Path]) -> None:
    assert AutoModelForCausalLM.from_pretrained(finished["held out"] / "final").dtype is torch.float32
    model = AutoModelForCausalLM.from_pretrained(finished["bfloat16"] / "final")
    assert model.dtype is torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None


def test_a_loss_that_is_not_finite_names_step_and_samples(
    model_folder: Path, samples: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """A run that keeps training on NaN wastes the rest of its time."""
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    run = train(*TINY, f"model.path={model_folder}", "data.path=samples.jsonl", "optim=sgd", "optim.lr=1e30", "optim.grad_clip=0",
                "train.global_batch_size=4", "train.shuffle=false", "train.output_dir=run", cwd=tmp_path, code=1)  # fmt: skip
    assert "not finite" in run.stderr
    assert "step 2" in run.stderr
    assert "samples.jsonl:" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run" / "final").exists()
    assert (
        "failed after step 1 of 3: the loss of step 2 is not finite" in (tmp_path / "run" / "report.html").read_text()
    )


def with_bad_rows(samples: list[dict[str, list[int]]]) -> list[str]:
    """Return the lines of a file with four rows that cannot be trained on, in lines 3, 6, 8 and 16."""
    lines = [json.dumps(sample) for sample in samples]
    lines.insert(2, '{"input_ids": [5, 6')  # cut off
    lines.insert(5, '{"input_ids": []}')
    lines.insert(7, json.dumps({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}))
    lines.append(json.dumps({"input_ids": [5, 6, 1000]}))
    return lines


def test_accounting_of_every_policy(
    model_folder: Path, samples: list[dict[str, list[int]]], finished: dict[str, Path], tmp_path: Path
) -> None:
    """read = rejected + dropped + held out + trained on, and every target of the last is trained on."""
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(with_bad_rows(samples)) + "\n")
    words = [*TINY, *SGD, f"model.path={model_folder}", f"data.path={path}", f"train.output_dir={tmp_path / 'run'}"]
    refused = CliRunner().invoke(app, ["train", *words, f"data.cache_dir={tmp_path}"])
    assert refused.exit_code == 2
    assert "samples.jsonl:3" in refused.stderr
    assert "data.bad_rows=skip" in refused.stderr
    run = finished["bad rows"]
    report = json.loads((run / "report.json").read_text())
    assert (report["samples_read"], report["samples_rejected"], report["samples_dropped"]) == (16, 4, 1)
    assert report["samples_held_out"] == 2
    assert report["samples_trained"] == 2 * (16 - 4 - 1 - 2)
    assert report["target_tokens_trained"] == report["target_tokens_planned"]
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [3, 6, 8, 16]
    assert all(row["reason"] for row in rejected)


def test_rows_of_the_held_out_file_are_accounted_for_too(finished: dict[str, Path]) -> None:
    """A held-out file that silently lost rows would still give a loss."""
    run = finished["held-out file"]
    report = json.loads((run / "report.json").read_text())
    counts = [report[f"eval_samples_{word}"] for word in ("read", "rejected", "dropped", "truncated")]
    assert counts == [4, 1, 1, 0]
    assert (report["samples_read"], report["samples_dropped"], report["samples_held_out"]) == (12, 1, 0)
    (rejected,) = (run / "rejected.jsonl").read_text().splitlines()
    assert "held_out.jsonl" in rejected


def test_held_out_losses_are_taken_when_asked(finished: dict[str, Path]) -> None:
    run = finished["held out"]
    report = json.loads((run / "report.json").read_text())
    assert [row["step"] for row in rows(run) if "eval_loss" in row] == [3, 6, 8]
    assert report["steps"] == 8
    assert report["eval_loss_end"] < report["eval_loss_start"]


def test_tensorboard_rows(finished: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished["tensorboard"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(run), rel=1e-6)


def test_metric_rows_hold_what_is_promised(finished: dict[str, Path]) -> None:
    promised = [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "samples",
        "tokens",
        "target_tokens",
        "chunks",
        "recomputed_chunks",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    ]
    for row in rows(finished["held out"]):
        assert set(promised) <= set(row)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])


def test_model_init_random_trains_a_large_recipe_cut_small(finished: dict[str, Path]) -> None:
    """`recipe=qwen7b` trains without weights, on a local configuration of a few layers."""
    assert [row["step"] for row in rows(finished["cut small"])] == [1]


def test_weights_of_a_global_batch_sum_to_one() -> None:
    """They sum to one over all ranks: dividing by a rank's own targets would favor samples on ranks with few targets."""
    lengths, targets = np.array([5, 20, 7]), np.array([3, 10, 1])
    step = RunPlan(GlobalBatches(3, 3, 0, False), 1, lengths, targets, chunk_size=8, k=1, ranks=2)[0]
    for weighting in LossWeighting:
        weights = [target_weights(rank, step, weighting) for rank in step.ranks]
        assert sum(
            float((own * rank.target_counts).sum()) for own, rank in zip(weights, step.ranks, strict=True)
        ) == pytest.approx(1.0)
    by_sample = {
        int(sample): weight
        for rank in step.ranks
        for sample, weight in zip(rank.samples, target_weights(rank, step, LossWeighting.sequence), strict=True)
    }
    assert by_sample == pytest.approx({0: 1 / 9, 1: 1 / 30, 2: 1 / 3})


def run_with_a_damaged_plan(words: list[str]) -> str:
    """Train with a plan that loses the last operation of the second step, and return the error."""
    from chunkflow_cli.training import train as training

    planned = RunPlan.__getitem__

    def damaged(plan: RunPlan, step: int) -> StepPlan:
        made = planned(plan, step)
        (rank,) = made.ranks
        return (
            made if step == 0 else replace(made, ranks=(replace(rank, schedules=(Schedule(rank.schedule.ops[:-1]),)),))
        )

    RunPlan.__getitem__ = damaged  # type: ignore[method-assign]
    with pytest.raises(RunError) as error:
        training.run(load(words), json_output=True)
    return str(error.value)


def test_a_plan_that_fails_its_proof_is_not_trained_on(tmp_path: Path) -> None:
    """The proof runs before the step: a lost backward would otherwise give a wrong gradient silently."""
    words = [word for word in RECIPE if not word.startswith("train.output_dir")] + [
        f"train.output_dir={tmp_path / 'run'}"
    ]
    (error,) = run_ranks(1, "test_train:run_with_a_damaged_plan", words)
    assert re.search(r"the plan of step 2 breaks a rule.*: rank 0: chunk \d+ never goes backward", error)
    assert "bug in chunkflow" in error
    assert "nothing was trained on in this step" in error
    assert len(rows(tmp_path / "run")) == 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_no_step_idles_at_a_learning_rate_of_zero(schedule: str) -> None:
    """The warm-up of transformers starts at zero, which would waste a tenth of a run of ten steps."""
    optim = load([f"optim.schedule={schedule}", "optim.lr=1.0", "optim.warmup_ratio=0.2"]).config.optim
    rate = learning_rate_schedule(optim, 10)
    rates = [rate(step) for step in range(10)]
    assert min(rates) > 0
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] == max(rates) == pytest.approx(1.0)
    assert (rates[-1] < 0.6) == (schedule != "constant")
    optim.min_lr_ratio = 0.4
    floored = learning_rate_schedule(optim, 10)
    decayed = [0.4 + 0.6 * rate for rate in rates[1:]]
    assert [floored(step) for step in range(10)] == pytest.approx([rates[0], *decayed])
