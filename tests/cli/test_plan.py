"""`plan` prints what `train` runs: the same steps, samples, chunks and operations. It reproduces the paper's example."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from torch import nn
from transformers import AutoConfig
from typer.testing import CliRunner

from chunkflow_cli.cli import plan
from chunkflow_cli.cli.app import app
from chunkflow_cli.config.load import load
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import StepBatch, StepResult
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.loading import on_meta_device
from chunkflow_cli.planning.devices import DeviceProfile
from chunkflow_cli.planning.memory_parts import MemoryParts
from chunkflow_cli.planning.schedule import OpKind, Schedule
from chunkflow_cli.planning.schedule_proof import validate
from chunkflow_cli.planning.topology import Place, Topology
from chunkflow_cli.planning.trace import TRACE_FILE, TracedOperation, chrome_trace
from chunkflow_cli.training import train
from chunkflow_cli.training.requirements import check_requirements
from chunkflow_cli.training.tuning import prepare_tuning

pytestmark = pytest.mark.processes

TINY = ("recipe=tiny_random", "train.guard=false", "data.num_workers=1")


def planned(*words: str, step: int = 1, **options: Any) -> dict[str, Any]:
    return plan.run(load(words), step=step, json_output=True, **options)


def write_ids(path: Path, lengths: list[int]) -> str:
    path.write_text("".join(json.dumps({"input_ids": [1] * length}) + "\n" for length in lengths))
    return str(path)


# The plan that is printed is the plan that runs


@pytest.fixture(scope="module")
def one_process_group() -> Iterator[None]:
    """Keep the process group open: DeepSpeed reuses the groups of its first engine for every later one in this process."""
    linear = nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "close_process_group", lambda: None)
        yield
    close_process_group()
    assert nn.functional.linear is linear, "layers of later runs in this process would keep what those of ZeRO-3 keep"


class Ran:
    """Records what `train` gives the runner in each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[Schedule, StepBatch]] = []
        run = Runner.run

        def spy(
            runner: Runner, schedules: tuple[Schedule, ...], batch: StepBatch, *others: Any, **options: Any
        ) -> StepResult:
            self.steps.append((schedules[0], batch))
            return run(runner, schedules, batch, *others, **options)

        monkeypatch.setattr(Runner, "run", spy)


@pytest.mark.parametrize(
    "words",
    [
        ("chunk.size=128",),
        ("chunk.size=64", "chunk.k=2", "train.epochs=2", "data.eval_fraction=0.3"),
        ("chunk.size=50", "chunk.k=3", "chunk.fill_tails=false", "train.shuffle=false", "data.eval_fraction=0"),
        ("chunk.size=64", "chunk.k=2", "engine.zero_stage=3"),
        ("chunk.size=2048", "train.steps=3", "train.global_batch_size=40", "data.overlong=drop", "data.max_length=300"),
        ("chunk.size=100", "data.overlong=truncate", "data.max_length=300", "train.loss_weighting=sequence"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("one_process_group")
def test_train_runs_what_plan_prints(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare samples, chunks, operations and counts of every step with the runner, metrics.jsonl and report.json."""
    words = (*TINY, f"data.cache_dir={tmp_path / 'cache'}", f"train.output_dir={tmp_path / 'run'}", *words)
    made = plan.make_plan(load(words), step=1)
    ran = Ran(monkeypatch)
    report = train.run(load(words), json_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert made.plan.steps == len(ran.steps) == len(rows) > 1
    totals = dict.fromkeys(("samples", "tokens", "target_tokens", "chunks", "recomputed_chunks"), 0)
    for step, (schedule, batch), row in zip(made.plan, ran.steps, rows, strict=True):
        (rank,) = step.ranks
        assert schedule == rank.schedule
        validate(schedule, rank.chunks, made.plan.k)
        assert list(batch.chunks) == list(rank.chunks)
        for sample, sequence in zip(rank.samples, batch.sequences, strict=True):
            assert np.array_equal(sequence.input_ids, made.data[int(sample)].input_ids)
        result = planned(*words, step=row["step"])["step"]
        assert result["schedules"] == [[str(schedule)]]
        for name in totals:
            value = len(step.samples) if name == "samples" else getattr(step, name)
            assert result[name] == row[name] == value, name
            totals[name] += value
    whole = planned(*words)
    for name, total in totals.items():
        assert whole[name] == total, name
    assert report["samples_trained"] == whole["samples"]
    assert report["tokens_trained"] == whole["tokens"]
    assert report["target_tokens_trained"] == whole["target_tokens"]
    assert (report["chunks"], report["recomputed_chunks"]) == (whole["chunks"], whole["recomputed_chunks"])
    assert (report["steps"], report["longest_sample"]) == (whole["steps"], whole["longest"])


@pytest.mark.parametrize(
    "words",
    [
        ("chunk.size=64", "chunk.k=2", "launch.processes=3", "train.epochs=2"),
        ("chunk.size=32", "chunk.k=1", "chunk.fill_tails=false"),
        ("chunk.size=16", "chunk.k=4", "launch.processes=4", "parallel.pipeline=2"),
        ("chunk.size=4096",),
    ],
    ids=" ".join,
)
def test_totals_are_those_of_the_steps(words: tuple[str, ...], tmp_path: Path) -> None:
    """Count again from the plan itself, chunk by chunk and operation by operation."""
    words = (*TINY, f"data.cache_dir={tmp_path}", *words)
    made, result = plan.make_plan(load(words), step=1), planned(*words)
    ranks = [rank for step in made.plan for rank in step.ranks]
    chunks = [chunk for rank in ranks for chunk in rank.chunks]
    ends = [c for c in chunks if c.is_dependent and not c.segments[0].continues]
    recomputed = sum(len(op.chunks) for rank in ranks for op in rank.schedule.ops if op.kind is OpKind.recompute)
    tokens = sum(chunk.tokens for chunk in chunks)
    assert result["samples"] == sum(len(rank.samples) for rank in ranks) == len(made.data) * result["steps"] // 4
    assert result["tokens"] == tokens
    assert result["chunks"] == len(chunks)
    assert result["dependent"] == sum(chunk.is_dependent for chunk in chunks)
    assert result["standalone"] == len(chunks) - result["dependent"]
    assert result["long_samples"] == len(ends)
    assert result["filled_tails"] == sum(len(chunk.segments) > 1 for chunk in ends)
    assert result["recomputed_chunks"] == recomputed
    assert result["recompute_share"] == recomputed / len(chunks)
    assert result["fill"] == tokens / (len(chunks) * result["chunk_size"])
    assert result["lower_bound_chunks"] == sum(-(-rank.chunks.tokens // result["chunk_size"]) for rank in ranks)
    assert result["lower_bound_chunks"] <= result["chunks"]
    operations = [len(rank.schedule.ops) for rank in ranks]
    assert (result["operations"], result["most_operations"]) == (sum(operations), max(operations))
    assert result["operations_per_step_and_rank"] == np.mean(operations)


def test_every_rank_gets_its_share_and_no_sample_twice(tmp_path: Path) -> None:
    """The samples of each step are divided among four ranks by cost, also in the last, smaller step."""
    words = (*TINY, f"data.cache_dir={tmp_path}", "chunk.size=64", "launch.processes=4")
    made, alone = plan.make_plan(load(words), step=1), plan.make_plan(load(words[:-1]), step=1)
    assert made.plan.ranks == 4
    for step, whole in zip(made.plan, alone.plan, strict=True):
        shares = [rank.samples.tolist() for rank in step.ranks]
        assert sorted(itertools.chain(*shares)) == sorted(whole.samples.tolist())
        assert all(len(rank.schedules) == 1 for rank in step.ranks)
        assert all(shares)
    result = planned(*words)
    assert (result["ranks"], len(result["step"]["schedules"])) == (4, 4)
    slowest, mean = made.totals.seconds.max(axis=1), made.totals.seconds.mean(axis=1)
    assert result["balance"]["idle_share"] == pytest.approx(1 - mean.sum() / slowest.sum())
    assert result["balance"]["worst_ratio"] == pytest.approx((slowest / mean).max())
    assert result["balance"]["worst_step"] == int((slowest / mean).argmax()) + 1


def test_sequence_parallel_groups_and_their_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample or chunk that several ranks share counts once; the gain is computed from the same costs."""
    path = write_ids(tmp_path / "a.jsonl", [900, *[20] * 24])
    words = (
        *TINY, f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "chunk.size=64",
        "train.global_batch_size=25", "launch.processes=4", "parallel.sequence=2", "plan.cost_model=proportional",
        "data.max_length=1024", "data.eval_fraction=0",
    )  # fmt: skip
    result = planned(*words)
    assert (result["ranks"], result["sequence"], len(result["step"]["schedules"])) == (4, 2, 4)
    assert (result["samples"], result["tokens"]) == (25, 900 + 24 * 20)
    assert result["long_samples"] == result["balance"]["spread_samples"] == 1
    assert result["dependent"] == 8  # 900 tokens, 2 x 64 a chunk
    assert result["chunks"] == result["standalone"] + 8
    assert 0 < result["fill"] <= 1
    # Whole: the sample's 15 chunks of 64, all but one forwarded twice, on one rank. Spread: eight of 128, on two.
    before, after = 3 * 900 + 14 * 64, (3 * 900 + 7 * 128) / 2
    others = 3 * 480 / 2
    assert result["balance"]["times_faster_than_whole_samples"] == pytest.approx(before / after)
    assert result["balance"]["idle_share_of_whole_samples"] == pytest.approx(1 - (before + 3 * 480) / 4 / before)
    assert result["balance"]["idle_share"] == pytest.approx(1 - (after + others) / 2 / after)
    whole = planned(*(word for word in words if not word.startswith("parallel.")))
    assert whole["balance"]["idle_share"] == pytest.approx(result["balance"]["idle_share_of_whole_samples"])
    assert result["memory"]["state_bytes"] < whole["memory"]["state_bytes"] / 1.9
    plan.run(load(words))
    shown = capsys.readouterr().out
    assert "2 data-parallel ranks, each a sequence-parallel group of 2" in shown
    assert "1 sample over groups of 2" in shown
    staged = (*words, "parallel.pipeline=2", "plan.cost_model=profile")
    in_stages, without_group = planned(*staged), planned(*staged, "parallel.sequence=1", "launch.processes=2")
    assert in_stages["memory"]["state_bytes"] == pytest.approx(without_group["memory"]["state_bytes"] / 2, rel=0.1)
    assert in_stages["memory"]["activations_bytes"] <= without_group["memory"]["activations_bytes"]
    everything = planned(*words, "parallel.spread=all")
    assert everything["balance"]["spread_samples"] == 25
    assert everything["step"]["schedules"][0] == everything["step"]["schedules"][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("launch.processes=6", "parallel.sequence=4"), "cannot be divided into groups of parallel.sequence=4"),
        (("parallel.spread=all",), "no group to spread over"),
        (("parallel.sequence=0",), "parallel.sequence=0 must be at least 1"),
        (("parallel.sequence=3",), "cannot be divided among 3 ranks, but among 1, 2, 4"),
    ],
)
def test_groups_that_cannot_be_formed_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """The message names the key, its value and the possible values."""
    with pytest.raises(UsageError, match=message):
        planned(*TINY, f"data.cache_dir={tmp_path}", *words)


def test_launch_processes_defaults_to_one_group(tmp_path: Path) -> None:
    """If launch.processes is left at 1, the plan assumes as many processes as the layout needs."""
    result = planned(*TINY, f"data.cache_dir={tmp_path}", "parallel.sequence=2")
    assert (result["ranks"], result["sequence"]) == (2, 2)


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    """A rank without a sample runs a dummy, so that it has a gradient to reduce; it takes no time, and can be plotted."""
    path = write_ids(tmp_path / "a.jsonl", [4, 40])
    result = planned(
        f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "launch.processes=4", "chunk.size=16",
        plot=str(tmp_path / "a.png"),
    )  # fmt: skip
    schedules = [schedule for (schedule,) in result["step"]["schedules"]]
    assert sorted(schedules) == ["F- B-", "F- B-", "F0 B0", "S0 S1 F2 B2 R1 B1 R0 B0"]
    assert result["dummies"] == result["step"]["dummies"] == 4
    assert result["balance"]["worst_ratio"] > 2


# The worked example of the paper: DESIGN, section 7


EXAMPLE = ("data.format=tokens", "parallel.pipeline=4", "launch.processes=4", "plan.cost_model=proportional", "train.shuffle=false")  # fmt: skip
UNIT = 4
"""Tokens per unit of the example."""


@pytest.mark.parametrize(
    ("units", "words", "makespan", "bubble", "recompute_idle"),
    [
        ((2, 2, 2, 2), ("chunk.size=8", "parallel.schedule=1f1b"), 42, 42.86, 42.86),
        ((2, 2, 2, 2), ("chunk.size=8",), 42, 42.86, 42.86),
        ((1, 1, 2, 4), ("chunk.size=16",), 60, 60.00, 60.00),
        ((1, 1, 2, 4), ("chunk.size=8", "chunk.k=2"), 46, 47.83, 47.83),
        ((1, 1, 2, 4), ("chunk.size=8", "chunk.k=1"), 48, 45.83, 50.00),
        ((1, 1, 2, 4), ("chunk.size=8", "chunk.k=2", "parallel.warmup_extra=1"), 42, 42.86, 42.86),
        ((1, 1, 2, 4), ("chunk.size=8", "chunk.k=1", "parallel.warmup_extra=1"), 44, 40.91, 45.45),
    ],
)  # fmt: skip
def test_worked_example_of_the_paper(
    units: tuple[int, ...], words: tuple[str, ...], makespan: int, bubble: float, recompute_idle: float, tmp_path: Path
) -> None:
    """Compute each row of the paper's table from data and keys, as a user would, and read it from the JSON."""
    path = write_ids(tmp_path / "a.jsonl", [UNIT * unit for unit in units])
    result = planned(f"data.path={path}", f"data.cache_dir={tmp_path}", *EXAMPLE, *words)
    pipeline = result["pipeline"]
    assert pipeline["makespan"] == UNIT * makespan
    assert round(100 * pipeline["bubble_ratio"], 2) == bubble
    assert round(100 * pipeline["bubble_ratio_recompute_idle"], 2) == recompute_idle
    assert len(pipeline["live_activations"]) == 4
    assert [len(stages) for stages in result["step"]["schedules"]] == [4]


def test_the_baseline_is_plain_1f1b_in_the_order_of_the_data(tmp_path: Path) -> None:
    """The gain is measured against samples of 4, 2, 1 and 1 units in this order, not against a sorted order."""
    path = write_ids(tmp_path / "a.jsonl", [16, 8, 4, 4])
    pipeline = planned(f"data.path={path}", f"data.cache_dir={tmp_path}", *EXAMPLE, "chunk.size=8", "chunk.k=2")[
        "pipeline"
    ]
    assert pipeline["baseline_makespan"] == UNIT * 56
    assert round(100 * pipeline["baseline_bubble_ratio"], 2) == 57.14
    assert pipeline["makespan"] == UNIT * 46


# Without a model in memory


def save_config(folder: Path, **settings: Any) -> Path:
    """Save the configuration of Qwen2.5-7B, with some settings replaced."""
    sizes = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    }  # fmt: skip
    AutoConfig.for_model("qwen2", architectures=["Qwen2ForCausalLM"], **{**sizes, **settings}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("qwen7b"))


def test_a_7b_model_is_planned_within_two_gigabytes(qwen7b: Path, tmp_path: Path) -> None:
    """A laptop can plan samples of 256K tokens without the weights, including every part of the memory."""
    path = write_ids(tmp_path / "a.jsonl", [1000] * 50 + [262144])
    words = ["recipe=qwen7b_256k", f"model.path={qwen7b}", "model.init=random", f"data.path={path}",
             "data.format=tokens", f"data.cache_dir={tmp_path}", "tune.device=h100", "--json"]  # fmt: skip
    code = (
        "import sys; from chunkflow_cli.cli.app import app\n"
        f"try: app(['plan', *{words!r}])\n"
        "except SystemExit as end: assert not end.code, end\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(status['VmHWM'].split()[0]) * 1024, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stderr.splitlines()[-1]) < 2 << 30
    result = json.loads(run.stdout)
    parameters = 7_615_616_512  # Qwen2.5-7B's model card: 7.61 billion
    memory = result["memory"]
    assert memory["weights_bytes"] == 2 * parameters
    page_locked = (8 * 4 + 32) * 2**30  # gradients by billions, and their sum: each the next power of two
    assert memory["host_bytes"] == 3 * 4 * parameters + page_locked, "AdamW's states, master weights and gradients"
    assert memory["optimizer_bytes"] == 0
    stored = 262144 - 16384
    assert result["state_bytes_longest"] == memory["state_bytes"] == stored * 2 * 28 * 4 * 128 * (2 + 4)
    assert memory["device"] == "H100 SXM"
    assert result["dependent"] == 2 * 16
    assert result["recomputed_chunks"] == 2 * 15
    promised = {"chunk_size", "k", "samples", "tokens", "chunks", "standalone", "dependent", "fill", "recompute_share",
                "lower_bound_chunks", "state_bytes_longest", "memory"}  # fmt: skip
    assert promised <= set(result)


def test_lora_is_planned_without_weights_too(qwen7b: Path, tmp_path: Path) -> None:
    """Only adapters have gradients and optimizer states."""
    path = write_ids(tmp_path / "a.jsonl", [1000] * 5)
    words = (f"model.path={qwen7b}", f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "model.lora.enabled=true", "model.lora.r=8")  # fmt: skip
    made = plan.make_plan(load(words), step=1)
    # Ranks of 8 on q, o (3584 to 3584), k, v (3584 to 512), gate, up and down (3584 and 18944) of 28 layers.
    adapters = 28 * 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert made.setup.shape is not None
    assert made.setup.shape.trainable_parameters == adapters
    assert made.memory is not None
    assert made.memory.optimizer == adapters * 12
    assert made.memory.weights == 2 * (7_615_616_512 + adapters)


def test_a_hybrid_model_is_planned_by_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one of four layers has keys and values, two heads of 32; three hand on states of four heads of 16 x 16.

    Chunks of 100 tokens do not suit scans in blocks of 64, and small chunks leave many states.
    """
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "vocab_size": 96,
    }  # fmt: skip
    AutoConfig.for_model("qwen3_5_text", **sizes).save_pretrained(tmp_path / "model")
    path = write_ids(tmp_path / "a.jsonl", [1000, 50, 20])
    words = (f"model.path={tmp_path / 'model'}", "model.init=random", f"data.path={path}", "data.format=tokens",
             f"data.cache_dir={tmp_path}", "train.global_batch_size=3", "chunk.size=100")  # fmt: skip
    shown = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(plan, "stdout_console", lambda: shown)
    result = plan.run(load(words), step=1)
    edge = 3 * (3 * (2 * 2 * 16 + 4 * 16) * 2 + 4 * 16 * 16 * 4)
    keys_and_values = 2 * 2 * 32 * (2 + 4)
    assert result["recurrent"] == {"edge_bytes": edge, "equal_tokens": round(edge / keys_and_values), "block": 64}
    assert result["state_bytes_longest"] == result["memory"]["state_bytes"] == 9 * (100 * keys_and_values + edge)
    text = " ".join(shown.file.getvalue().split())  # type: ignore[attr-defined]
    assert "recurrent layers keep 14.2 KiB after each chunk of a long sample, as much as attention keeps for 19" in text
    assert "blocks of 64 tokens, so use a multiple as chunk.size" in text
    state_alone, device = MemoryParts(0, 0, 0, 0, 0, 10, 0, 0), DeviceProfile("small", 1.0, memory_bytes=5)
    remedies = [plan.what_does_not_fit(state_alone, device, is_recurrent=recurrent) for recurrent in (False, True)]
    assert ["a larger chunk.size leaves fewer recurrent states" in str(remedy) for remedy in remedies] == [False, True]
    small = plan.run(load((*words, "chunk.size=64")), step=1, json_output=True)
    assert small["state_bytes_longest"] == 15 * (64 * keys_and_values + edge)


def test_rows_of_ids_need_no_model(tmp_path: Path) -> None:
    """Without a model, memory is unknown and times are in units of tokens."""
    path = write_ids(tmp_path / "a.jsonl", [10, 50, 20])
    words = (f"data.path={path}", f"data.cache_dir={tmp_path}", "chunk.size=16")
    result = planned(*words, "data.format=tokens")
    assert (result["memory"], result["state_bytes_longest"], result["predicted_seconds"]) == (None, None, None)
    assert (result["tokens"], result["dependent"]) == (80, 6)
    assert "model.path is not set" in CliRunner().invoke(app, ["plan", *words]).stderr
    assert "data.path is not set" in CliRunner().invoke(app, ["plan", "data.format=tokens"]).stderr


@pytest.mark.parametrize("step", [0, 5, -1])
def test_steps_that_the_run_does_not_have_are_refused(step: int, tmp_path: Path) -> None:
    """The message names the steps that the run has."""
    with pytest.raises(UsageError, match=rf"--step={step}: the run has steps 1 to 4"):
        planned(*TINY, f"data.cache_dir={tmp_path}", step=step)


# A device with too little memory


@pytest.mark.parametrize(
    ("words", "part", "remedy"),
    [
        (("chunk.size=512", "optim=sgd", "optim.momentum=0"), "gradients", "model.lora.enabled=true"),
        (("chunk.size=512",), "optimizer", "engine.offload=optimizer"),
        (("chunk.size=16384", "engine.offload=optimizer"), "activations", "model.activation_checkpointing=full"),
        (("chunk.size=512", "model.lora.enabled=true"), "weights", "engine.zero_stage=3"),
        (("chunk.size=512", "model.lora.enabled=true", "data.max_length=300000"), "state", "data.max_length"),
    ],
)
def test_the_largest_part_that_does_not_fit_is_named_with_its_remedy(
    words: tuple[str, ...], part: str, remedy: str, qwen7b: Path, tmp_path: Path
) -> None:
    """The message names the largest part of the memory and a key that reduces it."""
    long = "data.max_length=300000" in words
    path = write_ids(tmp_path / "a.jsonl", [20000] * 4 + [262144] * long)
    words = (f"model.path={qwen7b}", f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "tune.device=h100", "tune.memory_gib=10", *words)  # fmt: skip
    memory = planned(*words)["memory"]
    assert memory["fits"] is False
    assert memory["device_bytes"] == 10 * 2**30 < memory["total_bytes"]
    sizes = {
        name: memory[f"{name}_bytes"]
        for name in ("weights", "gradients", "optimizer", "activations", "head", "state", "step")
    }
    assert max(sizes, key=lambda name: sizes[name]) == part
    assert memory["total_bytes"] == sum(sizes.values())
    assert memory["remedy"].startswith(f"{part} is the largest part")
    assert remedy in memory["remedy"]
    if part == "state":
        moved = planned(*words, "chunk.offload_state=host")["memory"]
        assert moved["host_state_bytes"] >= memory["state_bytes"] > 20 * moved["state_bytes"]
        assert moved["page_lock_seconds"] == moved["host_state_bytes"] / 3e9 > memory["page_lock_seconds"] == 0
    roomy = planned(*words, "tune.memory_gib=1000")["memory"]
    assert (roomy["fits"], roomy["remedy"]) == (True, None)


def test_memory_of_a_pipeline_is_that_of_its_fullest_stage(qwen7b: Path, tmp_path: Path) -> None:
    """A stage holds a quarter of the layers, and chunks at the same time as its operations say."""
    path = write_ids(tmp_path / "a.jsonl", [4000, 9000, 2500, 30000, 700, 300])
    words = (f"model.path={qwen7b}", f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "chunk.size=4096", "launch.processes=4", "parallel.pipeline=4")  # fmt: skip
    made = plan.make_plan(load(words), step=1)
    alone = plan.make_plan(load([*words[:-2], "launch.processes=1"]), step=1)
    assert made.memory is not None
    assert made.setup.shape is not None
    assert alone.memory is not None
    # The first stage holds a quarter of the layers, and the embedding, which is as large as the head of the last one.
    table = made.setup.shape.head_parameters
    of_layers = (made.setup.shape.parameters - 2 * table) // 4
    assert made.memory.weights == 2 * (of_layers + table)
    assert made.memory.optimizer == 12 * (of_layers + table)
    assert made.memory.head == 0
    at_rest = [20 * (of_layers + table), 20 * of_layers, 20 * of_layers, 20 * (of_layers + table) + alone.memory.head]
    a_token = alone.memory.activations / 4096 / 4
    state_of_token = 2 * 7 * 4 * 128 * (2 + 4)
    (rank,) = made.step.ranks
    fullest = [(0.0, 0.0)] * 4
    for stage, schedule in enumerate(rank.schedules):
        live: set[int] = set()
        stored: set[int] = set()
        received: set[int] = set()  # hidden states of the stage before, kept for the second forward
        for op in schedule.ops:
            (chunk,) = op.chunks
            live |= {chunk} if op.kind in (OpKind.forward, OpKind.recompute) else set()
            stored |= {chunk} if op.kind in (OpKind.forward, OpKind.state_pass) else set()
            activations = sum(rank.chunks[c].tokens for c in live) * a_token
            continuing = [rank.chunks[c].segments[0] for c in stored]
            state = sum(piece.tokens for piece in continuing if piece.continues) * state_of_token
            received |= {chunk} if op.kind is OpKind.state_pass and stage > 0 else set()
            state += sum(rank.chunks[c].tokens for c in received) * 3584 * 2
            fullest[stage] = max(fullest[stage], (activations, state), key=sum)
            if op.kind is OpKind.backward:
                live -= {chunk}
                stored -= {chunk}
                received -= {chunk}
    assert (made.memory.activations, made.memory.state) == pytest.approx(fullest[0], rel=1e-6)
    totals = [rest + sum(held) for rest, held in zip(at_rest, fullest, strict=True)]
    assert made.memory.device_total == pytest.approx(max(totals), rel=1e-6)
    assert planned(*words)["memory"]["total_bytes"] < 0.5 * planned(*words[:-2])["memory"]["total_bytes"]


# Screens and plots


def test_a_trace_is_shown_next_to_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace of another plan is refused, because operations are compared one by one."""
    words = (*TINY, f"data.cache_dir={tmp_path}", "chunk.size=32", "launch.processes=4", "parallel.pipeline=2")
    topology = Topology(data=2, pipeline=2)
    made = plan.make_plan(load(words), step=2)
    operations = []
    for index in range(len(made.timeline.chunk)):
        row = {name: getattr(made.timeline, name)[index] for name in ("rank", "stage", "kind", "chunk")}
        rank = topology.rank_of(Place(int(row["stage"]), int(row["rank"]), 0))
        start, stop = made.timeline.start_seconds[index], made.timeline.stop_seconds[index]
        operations.append(TracedOperation(rank, 2, f"{row['kind']}{row['chunk']}", 5 + 3 * start, 5 + 3 * stop))
    (tmp_path / TRACE_FILE).write_text(json.dumps(chrome_trace(operations, topology)))

    result = planned(*words, step=2, trace=str(tmp_path), plot=str(tmp_path / "both.png"))
    assert result["measured"]["makespan"] == pytest.approx(3 * result["pipeline"]["makespan"])
    assert result["measured"]["bubble_ratio"] == pytest.approx(result["pipeline"]["bubble_ratio"], abs=1e-6)
    assert (tmp_path / "both.png").stat().st_size > 10_000
    plan.run(load(words), step=2, trace=str(tmp_path))
    assert "step 2 as it ran" in capsys.readouterr().out
    with pytest.raises(UsageError, match="had other operations"):
        planned(*words, "chunk.k=3", step=2, trace=str(tmp_path))
    with pytest.raises(UsageError, match="holds steps 2 to 2, not 1"):
        planned(*words, step=1, trace=str(tmp_path))
    with pytest.raises(UsageError, match=r"train\.trace=true"):
        planned(*words, trace=str(tmp_path / "nothing"))


def test_a_model_with_fewer_layers_than_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"parallel\.pipeline=16: the model has 4 layers"):
        planned(*TINY, f"data.cache_dir={tmp_path}", "launch.processes=16", "parallel.pipeline=16")


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("rwkv", ["parallel.pipeline=2"], "RwkvForCausalLM cannot be cut into stages"),
        (
            "gpt2",
            ["cluster.pipelines=[1,2]", "tune.device=h100"],
            "GPT2LMHeadModel cannot be cut .*\n  use cluster.pipe",
        ),
        ("llama", ["model.dtype=bfloat16", "engine.zero_stage=2"], "gradients of all chunks in bfloat16"),
        ("llama", ["model.compile=true", "engine.zero_stage=3"], "gathers weights within each layer"),
        ("gptj", ["model.activation_checkpointing=selective"], "would keep all scores"),
        ("openai-gpt", ["model.activation_checkpointing=full"], "does not support activation checkpointing"),
    ],
)
def test_a_plan_is_refused_as_the_run_is(
    kind: str, words: list[str], message: str, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """In the same words. Otherwise, a plan would promise what `train` refuses after it has read the data."""
    hf_config = tiny_config(kind, vocab_size=512)
    hf_config.save_pretrained(tmp_path)
    common = (*TINY, f"model.path={tmp_path}", f"data.cache_dir={tmp_path}", "launch.processes=2")
    loaded = load((*common, *words))

    def train() -> None:
        check_requirements(loaded)
        model = loaded.config.model
        enable_activation_checkpointing(on_meta_device(model, hf_config), model.activation_checkpointing)

    asked: list[Callable[[], object]] = [lambda: prepare_tuning(loaded, None, ())]
    if "cluster" not in words[0]:
        asked += [lambda: plan.make_plan(loaded, step=1), train]
    said = set()
    for ask in asked:
        with pytest.raises(UsageError, match=message) as error:
            ask()
        said.add(str(error.value))
    assert len(said) == 1


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the configuration of a small model with 16 layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}
    return save_config(tmp_path_factory.mktemp("deep"), num_hidden_layers=16, **sizes)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize(
    "words",
    [
        ("recipe=tiny_random",),
        ("recipe=tiny_random", "chunk.size=16", "launch.processes=64"),
        ("recipe=tiny_random", "chunk.size=64", "launch.processes=4", "parallel.pipeline=2"),
        ("recipe=tiny_random", "model.path=DEEP", "chunk.size=16", "launch.processes=16", "parallel.pipeline=16", "parallel.schedule=zero_bubble"),
        ("recipe=tiny_random", "tune.device=h100", "tune.memory_gib=0.001", "train.epochs=500"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_screens_fit(
    words: tuple[str, ...],
    width: int,
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No line of a drawing wraps, a pipe gets no color codes, and a wide screen is used."""
    monkeypatch.setenv("COLUMNS", str(width))
    plan.run(load([*(word.replace("DEEP", str(deep)) for word in words), f"data.cache_dir={tmp_path}"]))
    screen = capsys.readouterr().out
    assert "\x1b" not in screen
    widths = [cell_len(line) for line in screen.splitlines()]
    assert max(widths) <= width
    assert max(widths) >= 0.9 * width
    for what in ("chunks", "standalone", "dependent", "recomputed", "weights", "at its peak", "step 1:", "F forward"):
        assert what in screen


def test_the_timeline_in_the_terminal_is_in_proportion_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One long sample has four chunks, K is 1, and a backward takes twice as long as a forward."""
    monkeypatch.setenv("COLUMNS", "80")
    path = write_ids(tmp_path / "a.jsonl", [64])
    plan.run(load([f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "chunk.size=16"]))
    screen = capsys.readouterr().out
    assert "S0 S1 S2 F3 B3 R2 B2 R1 B1 R0 B0" in screen
    drawn = next(line for line in screen.splitlines() if line.startswith("rank 0")).split()[-1]
    letters = [letter for letter, _ in itertools.groupby(drawn)]
    assert "".join(letters) == "SFBRBRBRB"
    # 3 state passes, 1 forward, 3 recomputes of one unit each, 4 backwards of two: 15 units.
    for letter, units in (("S", 3), ("F", 1), ("R", 3), ("B", 8)):
        assert drawn.count(letter) == pytest.approx(len(drawn) * units / 15, abs=3)


def test_a_long_schedule_is_shortened_on_the_screen_and_whole_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody reads thousands of operations."""
    path = write_ids(tmp_path / "a.jsonl", [4000])
    words = [f"data.path={path}", "data.format=tokens", f"data.cache_dir={tmp_path}", "chunk.size=8"]
    result = plan.run(load(words))
    assert "..." in capsys.readouterr().out
    ((line,),) = result["step"]["schedules"]
    assert len(Schedule.parse(line).ops) == 500 + 500 + 499


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_plot_is_written(name: str, magic: bytes, tmp_path: Path) -> None:
    """The plot shows the operations of each rank and stage."""
    words = (*TINY, f"data.cache_dir={tmp_path}", "chunk.size=64", "launch.processes=4", "parallel.pipeline=2")
    planned(*words, plot=str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    assert content.startswith(magic)
    assert len(content) > 5000
    if name.endswith("svg"):
        for words_drawn in ("rank 0, stage 0", "rank 1, stage 1", "state pass", "recompute", "step 1 of 4: predicted"):
            assert f"<!-- {words_drawn} -->" in content.decode()


@pytest.mark.parametrize(("name", "message"), [("a.txt", "must end in .png, .svg, .pdf"), ("none/a.png", "no folder")])
def test_plots_that_cannot_be_written_are_refused_before_the_work(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is checked before the data is tokenized."""
    monkeypatch.setattr(plan, "make_plan", lambda *_, **__: pytest.fail("the work was done"))
    with pytest.raises(UsageError, match=message):
        planned(*TINY, plot=str(tmp_path / name))


def test_command_prints_one_json_object(tmp_path: Path) -> None:
    """A user's mistake gives exit code 2 and a few lines."""

    def chunkflow(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "chunkflow_cli", "plan", *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=300, check=False, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip

    run = chunkflow("recipe=tiny_random", "--step", "2", "--json", "launch.processes=2", "parallel.pipeline=2")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["step"]["step"] == 2
    assert {
        "makespan",
        "bubble_ratio",
        "bubble_ratio_recompute_idle",
        "baseline_bubble_ratio",
        "live_activations",
    } <= set(result["pipeline"])
    wrong = chunkflow("recipe=tiny_random", "--step", "9")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--step=9: the run has steps 1 to 4" in wrong.stderr
    assert "Traceback" not in wrong.stderr
