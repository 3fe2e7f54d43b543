"""Pipelines of real processes against plain whole-sequence Hugging Face training.

One launch per layout runs all of its cases, because starting processes takes longer than a case.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chunkflow_cli.config.schema import Dtype, EngineConfig, LoraConfig, Offload, OptimConfig, OptimizerName
from chunkflow_cli.engine import PATIENCE, EngineSettings, check_pipeline_settings
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.message_order import SENDS_BACK, SENDS_ON
from chunkflow_cli.planning.schedule import Schedule
from support.posting import always_ahead
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

VOCABULARY = 96
LONG_TAILED = ((90, 11, 7, 30, 5), (12, 8, 61, 3, 3), (4, 9, 2, 100, 6))
"""Sample lengths of three steps; chunks have 24 tokens."""
SHORT_ONLY = ((9, 4, 12, 6), (3, 20, 5, 5))
TWO_LONG = ((80, 75, 10, 3), (50, 6, 90, 4))
CHUNK_SIZE = 24


@dataclass(frozen=True)
class Case:
    """One training run of a few steps."""

    name: str
    steps: tuple[tuple[int, ...], ...] = LONG_TAILED
    k: int = 1
    schedule: str = "state_aware_1f1b"
    warmup_extra: int = 0
    fill_tails: bool = True
    tied: bool = False
    lora: bool = False
    zero_stage: int = 1
    optimizer: str = "sgd"
    grad_clip: float = 0.0
    dtype: str = "float32"
    model_type: str = "llama"
    dropout: float = 0.0


def model_of(case: Case, stages: int, attention: str) -> Any:
    """Return a model with the same random weights in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from chunkflow_cli.model.adapters import add_lora

    config = AutoConfig.for_model(
        case.model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=32, intermediate_size=48,
        num_hidden_layers=max(3, stages), num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=case.tied,
    )  # fmt: skip
    if case.dropout:
        config.residual_dropout = case.dropout
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype), attn_implementation=attention)
    model.config.use_cache = False
    if case.lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4, alpha=8.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def samples_of(case: Case, step: int) -> list[Any]:
    from chunkflow_cli.execution.parity import random_sequences

    return random_sequences(case.steps[step], VOCABULARY, seed=100 + step)


def optim_of(case: Case) -> OptimConfig:
    is_sgd = case.optimizer == "sgd"
    return OptimConfig(
        name=OptimizerName(case.optimizer), lr=0.5 if is_sgd else 1e-2, momentum=0.0, weight_decay=0.01 if not is_sgd else 0.0,
        grad_clip=case.grad_clip,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    """After the last step, under the names of the whole model."""
    targets: list[int]


def train_whole(case: Case, stages: int) -> Run:
    """Plain PyTorch: transformers' own forward over whole sequences, torch's optimizer and clipping."""
    from chunkflow_cli.data.sample import IGNORED
    from chunkflow_cli.engine import EngineSettings
    from chunkflow_cli.engine.optimizers import make_optimizer

    torch.set_num_threads(1)
    model = model_of(case, stages, "sdpa")
    settings = EngineSettings(EngineConfig(), optim_of(case), Dtype(case.dtype), torch.device("cpu"))
    optimizer = make_optimizer(model, settings)
    losses, norms, targets = [], [], []
    for step in range(len(case.steps)):
        samples = samples_of(case, step)
        counted = sum(int((sample.targets != IGNORED).sum()) for sample in samples)
        total = 0.0
        for sample in samples:
            ids = torch.as_tensor(sample.input_ids, dtype=torch.long)[None]
            logits = model(input_ids=ids).logits[0].float()
            loss = torch.nn.functional.cross_entropy(
                logits, torch.as_tensor(sample.targets, dtype=torch.long), ignore_index=IGNORED, reduction="sum"
            )
            (loss / counted).backward()
            total += loss.item() / counted
        trained = [p for p in model.parameters() if p.requires_grad]
        most = case.grad_clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, most)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        targets.append(counted)
    return Run(losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}, targets)


def plan_of(case: Case, step: int, stages: int, data: int) -> Any:
    """Return the step's plan, by the code that `plan` and `train` use."""
    from chunkflow_cli.data.sample import IGNORED
    from chunkflow_cli.planning.batches import GlobalBatches
    from chunkflow_cli.planning.pipeline import PipelineLayout
    from chunkflow_cli.planning.run_plan import RunPlan

    samples = samples_of(case, step)
    run = RunPlan(
        batches=GlobalBatches(len(samples), len(samples), 0, False),
        steps=1,
        lengths=np.array([len(sample.input_ids) for sample in samples]),
        target_counts=np.array([int((sample.targets != IGNORED).sum()) for sample in samples]),
        chunk_size=CHUNK_SIZE,
        k=case.k,
        fill_tails=case.fill_tails,
        pipeline=PipelineLayout(stages, case.schedule, case.warmup_extra),
        ranks=data,
    )
    return run[0]


def run_cases(arguments: tuple[int, int, int, Sequence[Case]]) -> list[dict[str, Any]]:
    """Run all cases on a rank, one after the other."""
    stages, data, sequence, cases = arguments
    return [_train_stage(case, stages, data, sequence) for case in cases]


@dataclass(frozen=True)
class Stage:
    """One rank's model, engine and runner of a case."""

    case: Case
    place: Any
    model: Any
    engine: Any
    runner: Any
    stages: int
    data: int

    def share(self, step: int) -> tuple[Any, Any]:
        """Return this pipeline's part of a step, and its batch."""
        from chunkflow_cli.execution.step import StepBatch

        planned = plan_of(self.case, step, self.stages, self.data)
        share = planned.ranks[self.place.data_rank]
        samples = samples_of(self.case, step)
        weights = np.full(len(share.samples), 1.0 / planned.target_tokens)
        sequences = [samples[sample] for sample in share.samples]
        return share, StepBatch(share.chunks, sequences, weights, by_sequence=True)

    def weights(self) -> dict[str, Tensor]:
        module = self.engine.module
        return {module.hf_parameter_names[name]: p.detach().clone() for name, p in module.named_parameters()}


def stage_of(case: Case, stages: int, data: int, sequence: int = 1) -> Stage:
    from chunkflow_cli.engine import EngineSettings, PipelineEngine, init_process_group
    from chunkflow_cli.execution.attention import function as attention
    from chunkflow_cli.execution.attention.cpu import CpuBackend
    from chunkflow_cli.execution.messages import Links
    from chunkflow_cli.execution.sequence_parallel import SequenceGroup
    from chunkflow_cli.execution.stage_runner import StageRunner
    from chunkflow_cli.execution.stages import StageModel
    from chunkflow_cli.execution.step import RunnerSettings
    from chunkflow_cli.planning.stage_cut import cut_layers
    from chunkflow_cli.planning.topology import Topology

    device = torch.device("cpu")
    init_process_group(device)
    attention.register()
    rank = torch.distributed.get_rank()
    topology = Topology(data=data, sequence=sequence, pipeline=stages)
    place = topology.place_of(rank)
    model = model_of(case, stages, attention.NAME)
    layers = model.config.get_text_config().num_hidden_layers
    stage = StageModel(model, CpuBackend(), cut_layers(layers, stages)[place.stage])
    settings = EngineSettings(EngineConfig(zero_stage=case.zero_stage), optim_of(case), Dtype(case.dtype), device)
    engine = PipelineEngine(stage, settings, stages=stages)
    links = Links([topology.pipeline_group(first) for first in range(topology.replicas)], device)
    group = SequenceGroup.join(topology)
    running = RunnerSettings(device, sequence_group=group)
    runner = StageRunner(engine, links, running, splits_backwards=case.schedule == "zero_bubble")
    return Stage(case, place, model, engine, runner, stages, data)


def _train_stage(case: Case, stages: int, data: int, sequence: int) -> dict[str, Any]:
    stage = stage_of(case, stages, data, sequence)
    losses, norms, targets, ran = [], [], [], []
    _, batch = stage.share(0)
    stage.model.eval()
    evaluated = stage.runner.evaluate(batch).loss
    stage.model.train()
    for step in range(len(case.steps)):
        share, batch = stage.share(step)
        ops: list[str] = []
        result = stage.runner.run(share.schedules, batch, record=lambda op, _, ops=ops: ops.append(str(op)))
        assert result.not_finite == ()
        on_last = result.loss if stage.place.stage == stages - 1 else 0.0
        assert result.sequence_losses @ batch.weights == pytest.approx(on_last, rel=1e-5)
        ran.append((" ".join(ops), str(share.schedules[stage.place.stage])))
        norms.append(stage.engine.step())
        losses.append(result.loss)
        targets.append(result.target_tokens)
    return {
        "losses": losses, "norms": norms, "weights": stage.weights(), "targets": targets, "ran": ran,
        "evaluated": evaluated,
    }  # fmt: skip


def run_three_stages(cases: Sequence[Case]) -> dict[str, Any]:
    """Run all cases on a rank, and the messages of one over other links."""
    from chunkflow_cli.execution import messages
    from support.serial_backend import patience_of_groups

    result = {"cases": run_cases((3, 1, 1, cases)), "patience": patience_of_groups()}
    own_groups = messages.Links._new_groups

    def shared_groups(pipelines: list[list[int]]) -> dict[tuple[int, bool], Any]:
        (ranks,) = pipelines
        directions = {onward: torch.distributed.new_group(ranks) for onward in (True, False)}
        return {key: directions[key[1]] for key in own_groups(pipelines)}

    schedules = plan_of(Case("in turn", IN_TURN), 0, 3, 1).ranks[0].schedules
    result["ends"] = _ends(schedules, within_seconds=60)
    messages.receives_of = always_ahead  # type: ignore[assignment]
    messages.Links._new_groups = staticmethod(shared_groups)  # type: ignore[method-assign]
    result["ends with shared groups"] = _ends(schedules, within_seconds=3)
    return result


def _ends(schedules: tuple[Schedule, ...], within_seconds: float) -> bool:
    """Return whether the messages of a step all arrive."""
    from chunkflow_cli.execution.messages import Links, Messages

    links = Links([[0, 1, 2]], torch.device("cpu"))

    def exchange() -> None:
        messages = Messages(links, schedules, lambda chunk: torch.empty(4))
        for op in schedules[links.stage].ops:
            received = messages.receive(op)
            assert received is None or received.tolist() == [*op.chunks] * 4
            message = torch.full((4,), float(op.chunks[0]))
            if op.kind in SENDS_ON and not links.is_last:
                messages.send(message, onward=True)
            elif op.kind in SENDS_BACK and not links.is_first:
                messages.send(message, onward=False)
        messages.close()
        done.set()

    done = threading.Event()
    threading.Thread(target=exchange, daemon=True).start()
    return done.wait(within_seconds)


def run_other_cases(folder: str) -> dict[str, Any]:
    """Run on each of two ranks the cases that are not compared with whole-sequence training."""
    dropout, *saved = OTHER_CASES
    return {
        "replayed": _outputs_of_both_forwards(dropout),
        "resumed": [_resumed(case, f"{folder}/{case.name}") for case in saved],
        "discarded": _after_a_discarded_step(),
        "sums": {dtype: _sums(dtype) for dtype in ("float32", "bfloat16")},
        "tied sums": {dtype: _sums(dtype, tied=True) for dtype in ("float32", "bfloat16")},
    }


def _outputs_of_both_forwards(case: Case) -> dict[int, list[Tensor]]:
    """Return for each chunk the output of this stage in its state pass, and in its recompute."""
    from chunkflow_cli.execution.step import StepContext

    stage = stage_of(case, 2, 1)
    outputs: dict[int, list[Tensor]] = {}
    forward, call = stage.engine.forward, StepContext.call
    current: list[int] = []

    def spy_call(context: StepContext, index: int, *others: Any, **keywords: Any) -> Any:
        current[:] = [index]
        return call(context, index, *others, **keywords)

    def spy_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output is not None:
            outputs.setdefault(current[0], []).append(output.detach().clone())
        return output

    StepContext.call = spy_call  # type: ignore[method-assign]
    stage.engine.forward = spy_forward
    try:
        share, batch = stage.share(0)
        stage.runner.run(share.schedules, batch)
    finally:
        StepContext.call = call  # type: ignore[method-assign]
    stage.engine.discard_gradients()
    return outputs


def _resumed(case: Case, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after a step that follows a save, and after the same step repeated from the saved state."""
    stage = stage_of(case, 2, 1)
    weights = []
    for step, action in ((0, stage.engine.save), (1, stage.engine.load), (1, None)):
        share, batch = stage.share(step)
        stage.runner.run(share.schedules, batch)
        stage.engine.step()
        weights.append(stage.weights())
        if action is not None:
            Path(folder).mkdir(exist_ok=True)
            torch.distributed.barrier()
            action(Path(folder))
    return weights[1], weights[2]


def _after_a_discarded_step() -> tuple[list[float], list[float]]:
    """Return the norms of a step, and of the same step after gradients that were discarded."""
    norms = []
    for discards in (False, True):
        both = []
        for zero_stage in (0, 1):
            stage = stage_of(Case("discarded", zero_stage=zero_stage, tied=True), 2, 1)
            share, batch = stage.share(0)
            if discards:
                stage.runner.run(share.schedules, batch)
                stage.engine.discard_gradients()
            stage.runner.run(share.schedules, batch)
            both.append(stage.engine.step())
        norms.append(both)
    return norms[0], norms[1]


class Sum(torch.nn.Module):
    """A module whose gradient is the factor, everywhere."""

    def __init__(self, dtype: torch.dtype, tied: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        self.own = torch.nn.Parameter(torch.zeros(1, dtype=dtype))  # a stage is never only a copy of a tied weight
        self.tied_weight = self.weight if tied else None
        self.hf_parameter_names = {"weight": "weight", "own": "own"}

    def forward(self, factor: float) -> Tensor:
        return (self.weight.float() * factor).sum() + self.own.sum() * 0


def _sums(dtype: str, *, tied: bool = False) -> tuple[list[float], list[float]]:
    from chunkflow_cli.engine import EngineSettings, PipelineEngine

    optim = OptimConfig(name=OptimizerName.sgd, lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip=0.0)
    settings = EngineSettings(EngineConfig(zero_stage=1), optim, Dtype(dtype), torch.device("cpu"))
    module = Sum(getattr(torch, dtype), tied)
    engine = PipelineEngine(module, settings, stages=2)
    weights, norms = [], []
    for count in (256, 3):
        for index in range(count + 1):
            engine.backward(engine.forward(1.0 if index == 0 else 2.0**-9))
        norms.append(engine.step() / 64)
        weights.append(float(module.weight.detach()[0, 0]))
    return weights, norms


def check(case: Case, ranks: list[dict[str, Any]], stages: int, replicas: int) -> None:
    whole = train_whole(case, stages)
    start = dict(model_of(case, stages, "sdpa").named_parameters())
    for result in ranks:
        for ran, planned in result["ran"]:
            assert ran == planned, f"{case.name}: the order that ran is not that of the plan"
        assert result["evaluated"] == pytest.approx(result["losses"][0], rel=1e-5), case.name
        assert result["norms"] == pytest.approx(whole.norms, rel=1e-4), case.name
    # Ranks of one pipeline agree on its loss; pipelines side by side add up.
    for step, loss in enumerate(whole.losses):
        of_pipelines = [
            {ranks[stage * replicas + replica]["losses"][step] for stage in range(stages)}
            for replica in range(replicas)
        ]
        assert all(len(losses) == 1 for losses in of_pipelines), case.name
        assert sum(losses.pop() for losses in of_pipelines) == pytest.approx(loss, rel=1e-5), case.name
        assert sum(ranks[replica]["targets"][step] for replica in range(replicas)) == whole.targets[step], case.name
    found: dict[str, list[Tensor]] = {}
    for result in ranks:
        for name, weight in result["weights"].items():
            found.setdefault(name, []).append(weight)
    assert set(found) == set(start), case.name
    differences, updates = [], []
    for name, copies in found.items():
        update = float((whole.weights[name] - start[name].detach()).norm())
        for copy in copies:
            differences.append(float((copy - whole.weights[name]).norm()))
            updates.append(update)
            if case.optimizer == "sgd":
                assert differences[-1] <= 5e-5 * max(update, 1e-6), f"{case.name}: {name}"
    # AdamW turns the rounding of a gradient that is next to nothing into a whole step of that weight.
    assert np.linalg.norm(differences) <= 5e-4 * np.linalg.norm(updates), case.name


TWO_STAGES = (
    Case("sgd, one step", LONG_TAILED[:1]),
    Case("sgd, K 2, tails apart", LONG_TAILED[1:2], k=2, fill_tails=False),
    Case("adamw, K 2, clip", optimizer="adamw", k=2, grad_clip=0.5),
    Case("adamw, zero 0, clip", optimizer="adamw", zero_stage=0, grad_clip=0.5),
    Case("tied, clip", tied=True, grad_clip=0.3, optimizer="adamw"),
    Case("tied, zero 0, clip", tied=True, zero_stage=0, grad_clip=0.3),
    Case("lora", lora=True, optimizer="adamw", k=2),
    Case("plain 1F1B", TWO_LONG, schedule="1f1b"),
    Case("more warm-up", TWO_LONG, warmup_extra=2),
    Case("searched", TWO_LONG, schedule="searched", optimizer="adamw", k=2),
    Case("zero bubble", TWO_LONG, schedule="zero_bubble", k=2, model_type="qwen2"),
    Case("zero bubble, lora, tails apart", schedule="zero_bubble", lora=True, fill_tails=False, optimizer="adamw"),
    Case("only short", SHORT_ONLY, optimizer="adamw", tied=True, zero_stage=0),
    Case("one sample", ((70,), (5,)), optimizer="adamw"),
)
IN_TURN = ((CHUNK_SIZE,) * 8,)
"""Forwards and backwards take turns: where one group carries several edges, that hangs by the rules of NCCL."""
FOUR_STAGES = (
    Case("sgd", IN_TURN),
    Case("adamw, tied, clip", tied=True, optimizer="adamw", grad_clip=0.5, k=2),
    Case("1F1B, zero 0", TWO_LONG, schedule="1f1b", zero_stage=0, tied=True, grad_clip=0.5),
    Case("zero bubble, tied", TWO_LONG, schedule="zero_bubble", tied=True, optimizer="adamw", grad_clip=0.5),
    Case("searched, lora", schedule="searched", lora=True, optimizer="adamw"),
    Case("warm-up, tails apart", TWO_LONG, warmup_extra=1, fill_tails=False, optimizer="adamw", model_type="qwen2"),
)
TWO_BY_TWO = (
    Case("sgd", LONG_TAILED[:1]),
    Case("adamw, K 2, tied, clip", k=2, tied=True, optimizer="adamw", grad_clip=0.5),
    Case("zero 0, tied, clip", tied=True, zero_stage=0, grad_clip=0.3),
    Case("more pipelines than samples", ((80,), (5,), (60, 7)), optimizer="adamw", tied=True),
    Case("more pipelines than samples, zero 0", ((80,), (5,), (60, 7)), zero_stage=0, grad_clip=0.5),
    Case("lora, 1F1B", lora=True, schedule="1f1b", optimizer="adamw"),
)
OTHER_CASES = (
    Case("dropout", TWO_LONG[:1], k=2, model_type="starcoder2", dropout=0.3),
    Case("saved", optimizer="adamw", tied=True),
    Case("saved, zero 0", optimizer="adamw", zero_stage=0, lora=True),
)
SPREAD = (
    Case("K 2, tied", k=2, tied=True, optimizer="adamw", grad_clip=0.5),
    Case("zero bubble", TWO_LONG, schedule="zero_bubble"),
)
THREE_STAGES = (
    Case("K 2, tied", TWO_LONG[:1], tied=True, k=2),
    Case("zero bubble", (*LONG_TAILED[:1], *IN_TURN), schedule="zero_bubble"),
)
LAYOUTS = {
    "2 stages": (2, 1, 1, TWO_STAGES),
    "4 stages": (4, 1, 1, FOUR_STAGES),
    "2 stages x 2 data": (2, 2, 1, TWO_BY_TWO),
    "2 stages x 2 sequence": (2, 1, 2, SPREAD),
}


OVER_GLOO = ("2 stages",)
"""The other layouts run by the rules of NCCL, which are stricter."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pipelines_train_as_one_process_does(layout: str) -> None:
    """Compare losses, norms and weights.

    Mistakes that this finds: a message about another chunk, state of another sequence in flight, a tied weight counted
    twice, a pipeline without samples that adds nothing, gradients averaged over stages.
    """
    stages, data, sequence, cases = LAYOUTS[layout]
    serial = layout not in OVER_GLOO
    ranks = run_ranks(stages * data * sequence, "test_pipeline:run_cases", LAYOUTS[layout], serial=serial)
    for index, case in enumerate(cases):
        check(case, [rank[index] for rank in ranks], stages, data * sequence)


def test_three_stages_need_a_group_for_each_edge() -> None:
    """By the rules of NCCL, a middle stage's sends wait behind its receives if an edge shares its group with another.

    Operations of DeepSpeed's own groups wait as long as those of ours do.
    """
    ranks = run_ranks(3, "test_pipeline:run_three_stages", THREE_STAGES, serial=True)
    for index, case in enumerate(THREE_STAGES):
        check(case, [rank["cases"][index] for rank in ranks], 3, 1)
    assert all(rank["ends"] for rank in ranks)
    assert not any(rank["ends with shared groups"] for rank in ranks)
    assert {patience for rank in ranks for patience in rank["patience"]} == {PATIENCE}


def test_dropout_checkpoints_and_sums(tmp_path: Path) -> None:
    """A recompute draws the dropout masks of its state pass. Gradients of 257 chunks are not added in bfloat16, where
    1 + 256 x 2^-9 stays 1. A tied weight's gradient is the sum of both. Checkpoints continue a run, and discarded
    gradients leave nothing."""
    first, last = run_ranks(2, "test_pipeline:run_other_cases", str(tmp_path))
    twice = {chunk: outputs for chunk, outputs in first["replayed"].items() if len(outputs) == 2}
    assert len(twice) >= 2
    assert all(torch.equal(*outputs) for outputs in twice.values())
    outputs = [outputs[0] for outputs in first["replayed"].values()]
    assert all(float((output == 0).float().mean()) < 0.1 for output in outputs)
    for rank in (first, last):
        for once, again in rank["resumed"]:
            assert set(once) == set(again)
            assert all(torch.equal(once[name], again[name]) for name in once)
        assert rank["discarded"][0] == pytest.approx(rank["discarded"][1], rel=1e-6)
        second = 1 + 3 * 2.0**-9
        for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2**-8)):
            weights, norms = rank["sums"][dtype]  # both stages have a weight of their own
            assert norms == pytest.approx([1.5 * 2**0.5, second * 2**0.5], rel=1e-5), dtype
            assert weights == pytest.approx([-1.5, -1.5 - second], rel=tolerance), dtype
            weights, norms = rank["tied sums"][dtype]
            assert norms == pytest.approx([3.0, 2 * second], rel=1e-5), dtype
            assert weights == pytest.approx([-3.0, -3.0 - 2 * second], rel=tolerance), dtype


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (EngineConfig(zero_stage=2), r"engine\.zero_stage=2 with parallel\.pipeline=2"),
        (EngineConfig(zero_stage=3), r"engine\.zero_stage=3 with parallel\.pipeline=2"),
        (EngineConfig(zero_stage=1, offload=Offload.optimizer), r"engine\.offload=optimizer with parallel\.pipeline=2"),
    ],
)
def test_what_a_pipeline_cannot_run_is_refused(engine: EngineConfig, expected: str) -> None:
    """DeepSpeed itself would fail with an assertion, after the model was loaded."""
    settings = EngineSettings(engine, OptimConfig(), Dtype.float32, torch.device("cuda", 0))
    with pytest.raises(UsageError, match=expected):
        check_pipeline_settings(settings, 2)
