"""Chunks spread over the ranks of a group are whole-sequence training: real gloo ranks against transformers alone.

The truth is transformers' own eager forward over whole sequences in this process, with no chunk, no group and none of
our code but the random sequences. Each group size is one launch that runs all of its cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chunkflow_cli.chunks import Chunks, build_chunks
from chunkflow_cli.config import ActivationCheckpointing, LoraConfig
from chunkflow_cli.execution import attention
from chunkflow_cli.execution.backends import Backend, CpuBackend, ReferenceBackend
from chunkflow_cli.execution.batch import IGNORED
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.parity import DirectEngine, RandomSequence, random_sequences
from chunkflow_cli.execution.runner import Runner, StepBatch
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.model import add_lora, enable_activation_checkpointing
from chunkflow_cli.schedule import Layout, plan
from chunkflow_cli.topology import Topology
from conftest import TINY
from ranks import run_ranks

CPU = torch.device("cpu")
VOCABULARY = TINY["vocab_size"]
LENGTHS = (101, 13, 9, 31, 1, 50)
"""Odd numbers, so that chunks need padding; of chunks of 17, two long sequences of six and three, and a third of two."""
SIZES = (2, 4)


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    chunk_size: int = 17
    k: int = 2
    """99 stands for N: nothing is recomputed."""
    fill_tails: bool = True
    join_retained: bool = False
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    lora: tuple[str, ...] = ()
    """Target modules of the adapters; none without."""
    only_last_target: bool = False
    """The last token of each sequence is the only target: most slices of most chunks have none."""
    dtype: str = "float64"


CASES = {
    "k 1": Case("llama", k=1),
    "k 2": Case("llama", k=2),
    "k N": Case("llama", k=99),
    "retained chunks joined": Case("llama", k=3, join_retained=True),
    "tails not filled": Case("llama", k=1, fill_tails=False),
    "chunks that divide": Case("llama", chunk_size=16, lengths=(64, 16, 8, 8)),
    "whole sequences packed": Case("llama", chunk_size=512),
    "one token": Case("llama", lengths=(1, 40), chunk_size=40),
    "chunks of one token": Case("llama", lengths=(5, 1), chunk_size=1),
    "few targets": Case("llama", k=2, only_last_target=True),
    "few targets, retained chunks joined": Case("llama", k=3, only_last_target=True, join_retained=True),
    "grouped queries, biases": Case("qwen2", k=1),
    "one key head, tied": Case("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "own heads, head_dim": Case("llama", {"num_key_value_heads": 4, "head_dim": 24}),
    "short window": Case("mistral", {"sliding_window": 11}),
    "window over chunks": Case("mistral", {"sliding_window": 45}, k=1),
    "sinks": Case("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 11}, dtype="float32"),
    "soft caps": Case("gemma2", {"head_dim": 16, "sliding_window": 11, "attn_logit_softcapping": 1.5,
                                 "final_logit_softcapping": 3.0}, dtype="float32"),
    "experts": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, dtype="float32"),
    "layers checkpointed": Case("qwen2", k=2, checkpointing=ActivationCheckpointing.full),
    "products kept": Case("qwen2", k=2, checkpointing=ActivationCheckpointing.selective),
    "products kept, retained chunks joined": Case(
        "qwen2", k=3, checkpointing=ActivationCheckpointing.selective, join_retained=True, dtype="float32"
    ),
    "adapters": Case("qwen2", k=2, lora=("all-linear",)),
    "adapters of queries": Case("qwen2", k=1, lora=("q_proj",)),
    "cpu kernel": Case("qwen2", k=2, dtype="float32"),
    "cpu kernel, window": Case("mistral", {"sliding_window": 20}, dtype="float32"),
}  # fmt: skip
TOLERANCES = {"float64": 1e-12, "float32": 3e-6}
"""Of the norm of the gradients' difference; transformers' experts, sinks and Gemma norms know only float32."""


def exact_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """transformers computes norms and rotary angles in float32 whatever the dtype, and so rounds to 1e-8 between two
    orders of the same sums. In a case of float64 let all of it stay so: what then differs is a mistake."""
    to = torch.Tensor.to

    def to_float64(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    def to_float(self: Tensor) -> Tensor:
        return self if self.dtype is torch.float64 else to(self, torch.float32)

    @functools.wraps(function)
    def within(case: Case, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if case.dtype == "float64":
                patch.setattr(torch.Tensor, "float", to_float)
                patch.setattr(torch.Tensor, "to", to_float64)
            return function(case, *rest)

    return within


def make_model(case: Case) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **{**TINY, "initializer_range": 0.1, **case.settings})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model.config.use_cache = False
    if case.lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4, target_modules=list(case.lora)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros otherwise, and with them the gradient of the other half
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_sequences(case: Case) -> list[RandomSequence]:
    sequences = random_sequences(case.lengths, VOCABULARY, seed=3)
    if not case.only_last_target:
        return sequences
    return [replace(each, targets=np.append(np.full(len(each.targets) - 1, IGNORED, np.int32), np.int32(5)))
            for each in sequences]  # fmt: skip


def make_weights(sequences: Sequence[RandomSequence]) -> np.ndarray:
    """Of each sequence its own: a weight must stay with its sequence through slices."""
    return np.arange(1, len(sequences) + 1) / 100


def chunks_of(case: Case) -> Chunks:
    return build_chunks(case.lengths, case.chunk_size, fill_tails=case.fill_tails)


@exact_dtype
def whole_sequence_training(case: Case) -> tuple[float, Tensor]:
    """Loss and gradients of transformers alone: eager attention, one sequence a forward."""
    model = make_model(case)
    model.set_attn_implementation("eager")
    sequences = make_sequences(case)
    total = 0.0
    for sequence, weight in zip(sequences, make_weights(sequences).tolist(), strict=True):
        logits = model(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]).logits[0]
        loss = weight * torch.nn.functional.cross_entropy(
            logits, torch.as_tensor(sequence.targets, dtype=torch.int64), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def gradients(model: Any) -> Tensor:
    """Of all trained parameters; none where a rank never used one."""
    parts = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts])


def backend_of(case: Case) -> Backend:
    return CpuBackend() if case.dtype == "float32" and case.model_type != "gemma2" else ReferenceBackend()


@dataclass(frozen=True)
class Outcome:
    """What one rank found, and what it is of the whole group."""

    loss: float
    """Summed over the group."""
    gradients: Tensor
    """Summed over the group."""
    evaluated: float
    """The loss without gradient, summed over the group."""
    target_tokens: int
    """Of this rank."""
    peak_state_bytes: int
    """Of this rank."""


@exact_dtype
def run_case(case: Case, group: SequenceGroup | None) -> Outcome:
    """The case by our runner, spread over the group or alone."""
    attention.register()
    model = make_model(case)
    model.set_attn_implementation(attention.NAME)
    enable_activation_checkpointing(model, case.checkpointing)
    sequences, chunks = make_sequences(case), chunks_of(case)
    batch = StepBatch(chunks, sequences, make_weights(sequences))
    runner = Runner(
        DirectEngine(ChunkModel(model, backend_of(case))), CPU,
        weight_dtype=torch.promote_types(getattr(torch, case.dtype), torch.float32), sequence_group=group,
    )  # fmt: skip
    result = runner.run(plan(chunks, case.k, Layout(join_retained=case.join_retained)), batch)
    gradient, losses = gradients(model), torch.tensor([result.loss, runner.evaluate(batch)], dtype=torch.float64)
    assert result.not_finite == ()
    if group is not None:
        torch.distributed.all_reduce(gradient, group=group.process_group)
        torch.distributed.all_reduce(losses, group=group.process_group)
    return Outcome(losses[0].item(), gradient, losses[1].item(), result.target_tokens, result.peak_state_bytes)


def join(topology: Topology) -> SequenceGroup:
    torch.distributed.init_process_group("gloo")
    settle_vector_math()
    group = SequenceGroup.join(topology)
    assert group is not None
    return group


def run_all_cases(size: int) -> dict[str, Outcome]:
    """On each rank of the group."""
    group = join(Topology(sequence=size))
    return {name: run_case(case, group) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=SIZES)
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    """The outcomes of all cases, by rank, of each group size; one launch a size."""
    return run_ranks(request.param, "test_sequence_parallel:run_all_cases", request.param)


@pytest.fixture(scope="module")
def truth() -> Callable[[str], tuple[float, Tensor]]:
    """Whole-sequence training of a case, computed once."""
    known: dict[str, tuple[float, Tensor]] = {}

    def of(name: str) -> tuple[float, Tensor]:
        if name not in known:
            known[name] = whole_sequence_training(CASES[name])
        return known[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_a_group_s_step_is_whole_sequence_training(
    outcomes: list[dict[str, Outcome]], truth: Callable[[str], tuple[float, Tensor]], name: str
) -> None:
    """A head sent to the wrong rank, a slice off by one, padding that is attended to, state of another head: all of
    them show in the gradient, and none of them crashes."""
    loss, gradient = truth(name)
    tolerance = TOLERANCES[CASES[name].dtype]
    ranks = [outcome[name] for outcome in outcomes]
    for rank in ranks:
        assert rank.loss == pytest.approx(loss, rel=tolerance)
        assert rank.evaluated == pytest.approx(loss, rel=tolerance)
        assert float((rank.gradients - gradient).norm() / gradient.norm()) < tolerance
    targets = sum(int((sequence.targets != IGNORED).sum()) for sequence in make_sequences(CASES[name]))
    assert sum(rank.target_tokens for rank in ranks) == targets, "padding is not counted, and no target twice"
