"""Training on preferences: losses, rewards and weights are those of TRL's trainers, and those of any other layout."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chunkflow_cli.training.reference_cache import read_kept, write_kept
from support.ranks import free_port, run_ranks
from support.tokenizers import make_tokenizer

pytestmark = pytest.mark.ranks

LR, BATCH, STEPS = 1e-3, 4, 5
BASE = (
    "model.dtype=float32", "train.guard=false", "train.shuffle=false", f"train.global_batch_size={BATCH}",
    f"train.steps={STEPS}", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.grad_clip=0", f"optim.lr={LR}",
    "chunk.size=48", "data.num_workers=1",
)  # fmt: skip
TASKS = {
    "dpo": ("train.task=dpo",),
    "ipo": ("train.task=dpo", "preference.loss=ipo", "chunk.k=2"),
    "orpo": ("train.task=orpo", "chunk.fill_tails=false"),
    "kto": ("train.task=kto", "preference.desirable_weight=1.5", "chunk.k=2"),
    "lora": ("train.task=dpo", "model.lora.enabled=true", "model.lora.r=4"),
}
ADAPTER = "final/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, 20 pairs of which the longest answer has four chunks, and 20 answers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("preferences")
    make_tokenizer(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=260,
            num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, eos_token_id=258,
            bos_token_id=None, pad_token_id=258,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return "".join(map(chr, rng.integers(97, 123, length)))

    lengths = rng.choice([8, 20, 60, 150], (BATCH * STEPS, 2))
    pairs = [{"prompt": text(rng.integers(5, 40)), "chosen": text(a), "rejected": text(b)} for a, b in lengths]
    feedback = [
        {"prompt": text(rng.integers(5, 40)), "completion": text(a), "label": bool(index % 3)}
        for index, a in enumerate(lengths[:, 0])
    ]
    for name, rows in (("pairs", pairs), ("feedback", feedback)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(folder: Path, task: str, output: str, *more: str) -> list[str]:
    data = folder / ("feedback.jsonl" if task == "kto" else "pairs.jsonl")
    return [
        f"model.path={folder / 'model'}", f"data.path={data}", f"data.cache_dir={folder / 'cache'}", *BASE,
        *TASKS[task], f"train.output_dir={folder / output}", *more,
    ]  # fmt: skip


Session = tuple[int, list[list[str]]]
"""Ranks, and the words of the runs that they train one after the other."""


def run_sessions(sessions: list[Session]) -> None:
    """Run sessions one after the other. Their ranks are forked from this process, which has imported everything."""
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from chunkflow_cli.processes.worker import die_with
    from chunkflow_cli.training import train

    train.close_process_group = lambda: None  # the next run of a session needs it
    parent = os.getpid()
    for ranks, runs in sessions:
        names = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": free_port()}
        children = []
        for rank in range(ranks):
            if (child := os.fork()) == 0:
                die_with(parent)
                os.environ.update({name: str(value) for name, value in names.items()}, RANK=str(rank))
                os.environ["LOCAL_RANK"] = str(rank)
                run_each(runs)
            children.append(child)
        while children:  # if one of them fails, the others may wait for it forever: this process ends, and they with it
            child, status = os.waitpid(-1, 0)
            children.remove(child)
            expected = -signal.SIGKILL if runs[0][-1] == "killed" else 0
            assert os.waitstatus_to_exitcode(status) == expected, (status, ranks, runs[0])


def run_each(runs: list[list[str]]) -> None:
    """Train each of the runs, and end the process. With the word `killed`, it ends by SIGKILL after four steps."""
    from chunkflow_cli.config.load import load
    from chunkflow_cli.training import steps, train

    code = 1
    try:
        for each in runs:
            if each[-1] == "killed":
                steps._run_step = partial(_killed_after_four, steps._run_step)
            train.run(load([word for word in each if word != "killed"]), json_output=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _killed_after_four(run_step: Any, run: Any, state: Any, on_backward: Any) -> Any:
    if state.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_step(run, state, on_backward)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """The runs of one process, in folders of the tasks' names, and one that is killed and goes on."""
    killed = words(folder, "dpo", "killed", "checkpoint.every=3")
    checkpoint = f"checkpoint.resume={folder / 'killed/checkpoints/step-00000003'}"
    goes_on = [*killed, f"data.cache_dir={folder / 'another cache'}", checkpoint]
    runs = [words(folder, task, task) for task in TASKS]
    sessions = [(1, runs), (1, [[*killed, "killed"]]), (1, [goes_on])]
    run_ranks(1, "training.test_preference_training:run_sessions", sessions)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run."""
    adapter = folder / ADAPTER
    return load_file(adapter if adapter.exists() else folder / "final/model.safetensors")


def new_adapter(folder: Path) -> Any:
    """The peft model that a run with new adapters begins with."""
    from chunkflow_cli.config.load import load
    from chunkflow_cli.model.adapters import add_lora
    from chunkflow_cli.model.hf_config import load_config
    from chunkflow_cli.model.loading import load_model

    config = load(words(folder, "lora", "lora")).config
    torch.manual_seed(config.train.seed)
    found = load_config(config.model)
    model = load_model(config.model, found, dtype=torch.float32, attention="sdpa", seed=config.train.seed)
    return add_lora(model, config.model.lora)


def by_trl(folder: Path, task: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Train the same rows with TRL's trainer, in their order, and return its log and its weights.

    It computes in float64: in float32, TRL adds up log-probabilities in float32, and its rewards under kto are 1e-5 off.
    """
    import trl
    from datasets import Dataset
    from peft import get_peft_model_state_dict
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental import orpo

    from chunkflow_cli.execution.precision import float64_throughout

    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 4096, "optim": "adamw_torch", "disable_tqdm": True, "beta": 0.1,
    }  # fmt: skip
    trainers: dict[str, tuple[Any, Any]] = {
        "dpo": (trl.DPOTrainer, partial(trl.DPOConfig, precompute_ref_log_probs=True)),
        "ipo": (trl.DPOTrainer, partial(trl.DPOConfig, precompute_ref_log_probs=True, loss_type=["ipo"])),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
        "kto": (trl.KTOTrainer, partial(trl.KTOConfig, precompute_ref_log_probs=True, desirable_weight=1.5)),
        "lora": (trl.DPOTrainer, trl.DPOConfig),  # its reference is the model with the adapters switched off
    }
    trainer, arguments = trainers[task]

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    data = [json.loads(line) for line in (folder / f"{'feedback' if task == 'kto' else 'pairs'}.jsonl").open()]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    adapter = new_adapter(folder) if task == "lora" else None
    with float64_throughout():
        run = InOrder(
            model=model, args=arguments(**settings), train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            peft_config=None if adapter is None else adapter.peft_config["default"],
        )  # fmt: skip
        if adapter is not None:
            begun = {name: weight.double() for name, weight in adapter.state_dict().items() if "lora_" in name}
            assert not run.model.load_state_dict(begun, strict=False).unexpected_keys
        run.train()
    state = run.model.state_dict() if adapter is None else get_peft_model_state_dict(run.model)
    return [row for row in run.state.log_history if "loss" in row], state


@pytest.mark.parametrize("task", TASKS)
def test_losses_rewards_and_weights_are_those_of_trl(ours: Path, task: str) -> None:
    pytest.importorskip("trl")
    log, weights = by_trl(ours, task)
    final = weights_of(ours / task)
    apart = sum(float((final[key] - weights[key]).square().sum()) for key in final) ** 0.5
    assert apart < 1e-5 * sum(float(weight.square().sum()) for weight in final.values()) ** 0.5
    compared = set()
    for own, theirs in zip(rows(ours / task), log, strict=True):
        for key in ("loss", "nll_loss", "kl", "grad_norm", *(key for key in theirs if key.startswith("rewards/"))):
            if key in theirs and not (key == "rewards/accuracies" and own["step"] == 1):  # a tie: its own reference
                assert own[key] == pytest.approx(theirs[key], rel=3e-5, abs=1e-5), (key, own["step"])
                compared.add(key)
    assert len(compared) >= 6, compared


LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "prompts run twice": (2, ("dpo", "orpo"), ("preference.share_prompts=false", "chunk.size=64", "chunk.k=2",
                                               "engine.zero_stage=0")),
    "zero 2": (2, ("dpo",), ("engine.zero_stage=2",)),
    # Weights of few numbers would otherwise stay gathered, which those of a real model do not.
    "zero 3": (2, ("dpo", "lora"), ("engine.zero_stage=3",
                                    "engine.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0}}")),
    "sequence": (2, ("dpo", "kto"), ("parallel.sequence=2",)),
    "pipeline": (2, ("orpo", "kto"), ("parallel.pipeline=2",)),
    "1f1b": (2, ("dpo",), ("parallel.pipeline=2", "parallel.schedule=1f1b")),
    "zero_bubble": (2, ("ipo",), ("parallel.pipeline=2", "parallel.schedule=zero_bubble")),
    "four": (4, ("kto",), ("engine.zero_stage=1",)),
    "four, zero 3, sequence": (4, ("dpo",), ("engine.zero_stage=3", "parallel.sequence=2")),
    "four, pipeline": (4, ("orpo",), ("parallel.pipeline=2", "parallel.schedule=zero_bubble")),
    "four, pipeline, sequence": (4, ("dpo",), ("parallel.pipeline=2", "parallel.sequence=2")),
}  # fmt: skip
"""Name -> ranks, tasks, words."""
CASES = [(task, name) for name, (_, tasks, _) in LAYOUTS.items() for task in tasks]


@pytest.fixture(scope="module")
def layouts(ours: Path) -> Path:
    def runs(ranks: int) -> list[list[str]]:
        return [
            words(ours, task, f"{task}, {name}", f"launch.processes={ranks}", *LAYOUTS[name][2])
            for task, name in CASES
            if LAYOUTS[name][0] == ranks
        ]

    run_ranks(1, "training.test_preference_training:run_sessions", [(2, runs(2)), (4, runs(4))])
    return ours


@pytest.mark.parametrize(("task", "name"), CASES)
def test_every_layout_learns_the_same(layouts: Path, task: str, name: str) -> None:
    one, two = (weights_of(layouts / each) for each in (task, f"{task}, {name}"))
    apart = max(float((one[key] - two[key]).abs().max()) for key in one)
    assert apart < 0.02 * LR * STEPS
    for own, other in zip(rows(layouts / task), rows(layouts / f"{task}, {name}"), strict=True):
        for key in ("loss", *(key for key in own if "rewards" in key), "target_tokens"):
            is_a_tie = key == "rewards/accuracies" and own["step"] == 1  # the model is its own reference still
            assert is_a_tie or other[key] == pytest.approx(own[key], rel=1e-4, abs=1e-5), key


def test_a_killed_run_goes_on_with_the_same_bits(ours: Path) -> None:
    """It computes its reference anew, and finds that of the first step, not of the checkpoint."""
    kinds = ("loss", "grad_norm", "rewards/")
    whole, cut = ([{key: row[key] for key in row if key.startswith(kinds)} for row in rows(ours / each)]
                  for each in ("dpo", "killed"))  # fmt: skip
    assert cut == whole
    for key, weight in weights_of(ours / "dpo").items():
        assert torch.equal(weight, weights_of(ours / "killed")[key]), key


def test_damaged_log_probabilities_of_the_reference_are_computed_anew(tmp_path: Path) -> None:
    values, path = np.arange(6.0).reshape(3, 2), tmp_path / "x" / "kept"
    assert read_kept(path) is None
    write_kept(path, values)
    found = read_kept(path)
    assert found is not None
    np.testing.assert_array_equal(found, values)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert read_kept(path) is None
