"""Loss and weights do not depend on the layout of the processes that share the work.

One launch per layout runs all of its cases, in real processes, over gloo or by the rules of NCCL. They are compared with
a run of one process, which test_train.py compares with a plain Hugging Face loop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.muon import orthogonalise_in_float64
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

LENGTHS = [300, 150, 64, 40, 31, 20, 9, 5, 3]
SGD = ("optim=sgd", "optim.lr=0.5", "optim.grad_clip=0.1")
ADAMW = ("optim.lr=1e-3", "train.steps=8")
BASE = (
    "model.init=pretrained", "model.dtype=float32", "data.format=tokens", "train.guard=false", "train.shuffle=true",
    "optim.schedule=constant", "optim.warmup_ratio=0", "chunk.size=64", "data.num_workers=1",
)  # fmt: skip
RECIPES: dict[str, tuple[str, ...]] = {
    "sgd": (*SGD, "train.steps=1", "train.global_batch_size=9"),
    "sgd, K=2, tails alone": (
        *SGD,
        "train.steps=1",
        "train.global_batch_size=9",
        "chunk.k=2",
        "chunk.fill_tails=false",
    ),
    "few samples, noise": (
        *SGD,
        "train.steps=3",
        "train.global_batch_size=1",
        "train.loss_weighting=sequence",
        "train.neftune_noise_alpha=5",
    ),
    "adamw": (*ADAMW, "train.global_batch_size=4", "data.eval_fraction=0.2"),
    "muon, frozen, K=2, tails alone": (
        *ADAMW,
        "optim=muon",
        "optim.freeze=[layers.1.self_attn,layers.1.mlp,layers.2.mlp]",  # layer 1 has no matrix left, but norms
        "train.global_batch_size=4",
        "chunk.k=2",
        "chunk.fill_tails=false",
    ),
    "drawn lengths": (
        *SGD,
        "train.steps=2",
        "train.global_batch_size=6",
        "chunk.k=3",
        "chunk.size=40",
        "data.path=DRAWN",
    ),
    "lora": (
        *SGD,
        "optim.lr=5",
        "train.steps=2",
        "train.global_batch_size=9",
        "model.lora.enabled=true",
        "chunk.k=2",
        "model.lora.use_dora=true",
        "model.lora.use_rslora=true",
        "model.lora.modules_to_save=[embed_tokens,.*norm]",
    ),
}
APART: dict[str, tuple[str, ...]] = {"nf4": (*RECIPES["lora"], "model.quantization=nf4")}
"""Recipes that run in a few layouts only."""
NOTHING_STAYS_GATHERED = "engine.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0}}"
"""ZeRO-3 would otherwise keep these small weights gathered, and a rank that fetches one alone would not be noticed."""
IN_HOST_MEMORY = {"sgd, K=2, tails alone", "drawn lengths"}
"""Recipes that keep their state in host memory where several ranks share the work, in blocks of a few tokens."""
WITHIN = 2e-5
"""Tolerance: Frobenius norm of the difference, divided by that of what training has changed."""


@dataclass(frozen=True)
class Case:
    """One run of `train` in every process of a launch."""

    recipe: str
    words: tuple[str, ...] = ()
    folder: str = field(default="", compare=False)


def run_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Run each case in this process, one after the other, and return the reports."""
    from chunkflow_cli.config.load import load
    from chunkflow_cli.engine import data_parallel
    from chunkflow_cli.planning.state_memory import STATE_BLOCK_TOKENS
    from chunkflow_cli.training import requirements, train

    train.close_process_group = lambda: None  # the next case needs it
    orthogonalise_in_float64()
    # Offload is refused on a machine without a GPU. Its code works there all the same, from host to host.
    data_parallel.check_settings = requirements.check_settings = lambda settings: None  # type: ignore[attr-defined]
    STATE_BLOCK_TOKENS["cpu"] = 48
    reports = []
    for case in arguments["cases"]:
        words = [*arguments["base"], *(RECIPES | APART)[case.recipe], *case.words, f"train.output_dir={case.folder}"]
        if case.recipe in IN_HOST_MEMORY and "launch.processes=1" not in words:
            words.append("chunk.offload_state=host")
        if "engine.zero_stage=3" in words:
            words.append(NOTHING_STAYS_GATHERED)
        words = [word.replace("DRAWN", arguments["drawn"]) for word in words]
        reports.append(train.run(load(words), json_output=True))
    return reports


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of all cases: a four-layer qwen2 with grouped heads, biases and a tied head, and long-tailed rows."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    with (folder / "rows.jsonl").open("w") as file:
        for length in LENGTHS:
            ids = torch.randint(3, 97, (length,), generator=generator).tolist()
            labels = [-100 if i % 3 == 0 else token for i, token in enumerate(ids)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    with (folder / "drawn.jsonl").open("w") as file:
        for length in torch.cat([torch.randint(1, 41, (8,)), torch.randint(41, 400, (4,))]).tolist():
            ids = torch.randint(3, 97, (length + 1,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
    return (*BASE, f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", f"data.cache_dir={folder}")


class Runs:
    """Launches runs, and compares the weights that they end with."""

    def __init__(self, base: tuple[str, ...], folder: Path) -> None:
        self._base, self._folder, self._count = base, folder, 0
        model = next(word.partition("=")[2] for word in base if word.startswith("model.path="))
        self._drawn = str(Path(model).parent / "drawn.jsonl")
        self._before = load_file(Path(model, "model.safetensors"))

    def launch(
        self, processes: int, cases: list[Case], *, serial: bool = False
    ) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Return report and final weights of each case."""
        placed = [
            Case(case.recipe, case.words, str(self._folder / str(self._count + i))) for i, case in enumerate(cases)
        ]
        self._count += len(cases)
        base = (*self._base, f"launch.processes={processes}")
        by_rank = run_ranks(
            processes,
            "test_layouts:run_cases",
            {"base": base, "cases": placed, "drawn": self._drawn},
            serial=serial,
            timeout=900,
        )
        results = []
        for index, case in enumerate(placed):
            reports = [reports[index] for reports in by_rank]
            assert all(report["loss_last"] == reports[0]["loss_last"] for report in reports), "ranks disagree"
            final = Path(case.folder, "final")
            name = (
                "adapter_model.safetensors" if (final / "adapter_model.safetensors").exists() else "model.safetensors"
            )
            results.append((reports[0], load_file(final / name)))
        return results

    def update_error(self, truth: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> float:
        """Return the difference of two results, as a share of what training has changed."""
        assert truth.keys() == weights.keys()
        zero = torch.zeros(())  # of adapters, B starts at zero
        difference = sum(float((truth[name] - weights[name]).square().sum()) for name in truth)
        update = sum(
            float((truth[name] - self._before.get(name.removeprefix("base_model.model."), zero)).square().sum())
            for name in truth
            if "lora_A" not in name and "lora_magnitude" not in name  # they start from elsewhere, and move far less
        )
        return (difference / update) ** 0.5


@pytest.fixture(scope="module")
def runs(base: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def truth(runs: Runs) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """The results of one process with ZeRO-1."""
    names = (*RECIPES, *APART)
    return dict(zip(names, runs.launch(1, [Case(name) for name in names]), strict=True))


def compare(runs: Runs, truth: dict[str, Any], processes: int, cases: list[Case], *, serial: bool) -> None:
    for case, (report, weights) in zip(cases, runs.launch(processes, cases, serial=serial), strict=True):
        true_report, true_weights = truth[case.recipe]
        for key in ("samples_trained", "target_tokens_trained", "tokens_trained", "steps"):
            assert report[key] == true_report[key], (case, key)
        losses = [key for key in true_report if "loss_" in key and true_report[key] is not None]
        assert len(losses) >= 2
        for key in losses:
            assert report[key] == pytest.approx(true_report[key], rel=1e-5), (case, key)
        assert runs.update_error(true_weights, weights) < WITHIN, case


@pytest.mark.parametrize("processes", [2, 4])
def test_data_parallel(runs: Runs, truth: dict[str, Any], processes: int) -> None:
    """ZeRO 0 to 3, with ranks that have no long samples, no samples at all, or more chunks than the others."""
    places = [(stage, index) for stage in (0, 1, 2, 3) for index in range(len(RECIPES))]
    # Each recipe and each stage with both numbers of ranks, and each recipe with each stage.
    cases = [
        Case(list(RECIPES)[index], (f"engine.zero_stage={stage}",))
        for stage, index in places
        if ((stage + index) % 4 == 3) == (processes == 4)
    ]
    if processes == 2:
        offloads = (
            ("drawn lengths", "optimizer", 1), ("adamw", "optimizer", 2),
            ("adamw", "optimizer", 3), ("drawn lengths", "parameters", 3),
        )  # fmt: skip
        cases += [
            Case(name, (f"engine.offload={what}", f"engine.zero_stage={stage}")) for name, what, stage in offloads
        ]
        cases.append(Case("nf4", ("engine.zero_stage=2",)))
    compare(runs, truth, processes, cases, serial=processes == 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_sequence_parallel(runs: Runs, truth: dict[str, Any], processes: int) -> None:
    """One and two groups of two ranks, with all chunks spread or those of long samples only."""
    group = "parallel.sequence=2"
    cases = [
        Case(name, (group, f"engine.zero_stage={stage}"))
        for stage, name in zip((0, 1, 2, 3, 1, 2, 3), RECIPES, strict=True)
    ]
    if processes == 2:
        cases += [Case(name, (group, "parallel.spread=all")) for name in RECIPES]
    cases += [
        Case("sgd, K=2, tails alone", (group, "engine.zero_stage=3")),
        Case("adamw", (group, "engine.zero_stage=3")),
    ]
    compare(runs, truth, processes, cases, serial=processes == 2)


STEPS = {
    "1f1b": "parallel.schedule=1f1b",
    "more warm-up": "parallel.warmup_extra=1",
    "zero bubble": "parallel.schedule=zero_bubble",
}


@pytest.mark.parametrize(
    ("processes", "words"), [(2, "parallel.pipeline=2"), (4, "parallel.pipeline=4"), (4, "parallel.pipeline=2")]
)
def test_pipeline(runs: Runs, truth: dict[str, Any], processes: int, words: str) -> None:
    """Two and four stages, and two pipelines of two stages side by side."""
    # In four stages of one layer, that of layer 1 has no matrix to train, and so fewer groups of parameters.
    cases = [Case(name, (words,)) for name in RECIPES]
    cases += [Case("sgd, K=2, tails alone", (words, schedule)) for schedule in STEPS.values()]
    cases += [Case("sgd", (words, "engine.zero_stage=0")), Case("lora", (words, "engine.zero_stage=0"))]
    cases += [Case("nf4", (words,))] if processes == 2 else []
    compare(runs, truth, processes, cases, serial=words == "parallel.pipeline=4")


def test_pipeline_of_sequence_groups(runs: Runs, truth: dict[str, Any]) -> None:
    """The tokens of each chunk are spread over two ranks, on each of two stages."""
    words = ("parallel.pipeline=2", "parallel.sequence=2")
    compare(runs, truth, 4, [Case(name, words) for name in RECIPES], serial=True)
