"""Chunks spread over the ranks of a group equal whole-sequence training: real gloo ranks against transformers alone.

The comparison is transformers' own forward over whole sequences in this process, without chunks, without a group and
without any of our code but the random sequences. One launch per group size runs all cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from chunkflow_cli.config.schema import ActivationCheckpointing, Config, LoraConfig, ModelConfig, ParallelConfig
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.batch import build_batch, tokens_of_rank
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.noise import SequenceNoise
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.layouts import check_layouts
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.topology import Topology, key_value_copies
from chunkflow_cli.training.setup import planned_topology
from support.exact import float64_throughout
from support.models import MLA, SHARED_KEYS, TINY, recurrent_model
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
VOCABULARY = TINY["vocab_size"]
LENGTHS = (101, 13, 9, 31, 1, 50)
"""Odd numbers, so that chunks need padding. In chunks of 17, three long sequences have six, three and two pieces."""
SIZES = (2, 4)


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    chunk_size: int = 17
    k: int = 2
    """99 means all chunks: nothing is recomputed."""
    fill_tails: bool = True
    join_retained: bool = False
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    lora: tuple[str, ...] = ()
    """Target modules of the adapters; empty without adapters."""
    only_last_target: bool = False
    """The last token of each sequence is the only target: most slices of most chunks have none."""
    dtype: str = "float64"
    recurrent: bool = False
    """The model is one of `RECURRENT`."""


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
    "values of another width": Case("minicpm3", {**MLA, "v_head_dim": 40}),
    "keys shared by layers": Case("gemma4_text", {**SHARED_KEYS, "num_kv_shared_layers": 3, "global_head_dim": 24}, k=1),
    "blocks, temperature": Case(
        "llama4_text",
        {"no_rope_layers": [1, 0], "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
         "attention_chunk_size": 10, "floor_scale": 8}, dtype="float32",
    ),
    "layers checkpointed": Case("qwen2", k=2, checkpointing=ActivationCheckpointing.full),
    "products kept": Case("qwen2", k=2, checkpointing=ActivationCheckpointing.selective),
    "products kept, retained chunks joined": Case(
        "qwen2", k=3, checkpointing=ActivationCheckpointing.selective, join_retained=True, dtype="float32"
    ),
    "adapters": Case("qwen2", k=2, lora=("all-linear",)),
    "adapters of queries": Case("qwen2", k=1, lora=("q_proj",)),
    "delta rule": Case("qwen3_5", k=1, recurrent=True, checkpointing=ActivationCheckpointing.full),
    "short convolutions": Case("lfm2", recurrent=True),
    "mamba 2": Case("nemotron_h", recurrent=True, join_retained=True),
    "mamba": Case("jamba", recurrent=True, lengths=(40, 13, 9, 1)),
    "modules for all tokens": Case("zaya", recurrent=True, lengths=(40, 13, 9, 1)),
    "modules with three states": Case("xlstm", recurrent=True, lengths=(40, 13, 9, 1)),
    "modules without attention": Case("rwkv", recurrent=True, lengths=(40, 13, 9, 1)),
    "modules that take positions": Case("recurrent_gemma", recurrent=True, lengths=(40, 13, 9, 1)),
    "cpu kernel": Case("qwen2", k=2, dtype="float32"),
    "cpu kernel, window": Case("mistral", {"sliding_window": 20}, dtype="float32"),
}  # fmt: skip
TOLERANCES = {"float64": 1e-12, "float32": 3e-6}
"""Relative to the gradient's norm. transformers' experts, sinks and Gemma norms support only float32."""


def exact_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep float64 cases in float64.

    transformers computes norms and rotary angles in float32 for every dtype, so two orders of the same sums differ by
    1e-8. Without that, any difference is a mistake.
    """
    to = torch.Tensor.to

    def to_float64(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    def to_float(self: Tensor) -> Tensor:
        return self if self.dtype is torch.float64 else to(self, torch.float32)

    @functools.wraps(function)
    def within(case: Case, *rest: Any) -> Any:
        if case.recurrent:
            with float64_throughout():
                return function(case, *rest)
        with pytest.MonkeyPatch.context() as patch:
            if case.dtype == "float64":
                patch.setattr(torch.Tensor, "float", to_float)
                patch.setattr(torch.Tensor, "to", to_float64)
            return function(case, *rest)

    return within


def make_model(case: Case) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if case.recurrent:
        return recurrent_model(case.model_type, getattr(torch, case.dtype), vocab_size=VOCABULARY)
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


def make_sequences(case: Case) -> list[TokenizedSample]:
    sequences = random_sequences(case.lengths, VOCABULARY, seed=3)
    if not case.only_last_target:
        return sequences
    return [replace(each, targets=np.append(np.full(len(each.targets) - 1, IGNORED, np.int32), np.int32(5)))
            for each in sequences]  # fmt: skip


def make_weights(sequences: Sequence[TokenizedSample]) -> np.ndarray:
    """Return a different weight for each sequence, which must stay with it through slices."""
    return np.arange(1, len(sequences) + 1) / 100


def chunks_of(case: Case) -> Chunks:
    return build_chunks(case.lengths, case.chunk_size, fill_tails=case.fill_tails)


@exact_dtype
def whole_sequence_training(case: Case) -> tuple[float, Tensor]:
    """Return loss and gradients of transformers alone, one sequence per forward."""
    model = make_model(case)
    # Its eager attention takes the softmax in float32, but knows sinks and soft caps.
    model.set_attn_implementation("sdpa" if case.dtype == "float64" and model._supports_sdpa else "eager")
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
    """Return the gradients of all trained parameters, zeros for those that a rank never used."""
    parts = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts])


def backend_of(case: Case) -> Backend:
    return CpuBackend() if case.dtype == "float32" and case.model_type != "gemma2" else ReferenceBackend()


@dataclass(frozen=True)
class Outcome:
    """The results of one rank, and their sums over the group."""

    loss: float
    """Summed over the group."""
    gradients: Tensor
    """Summed over the group."""
    evaluated: float
    """The loss without gradient, summed over the group."""
    target_tokens: int
    """Targets of this rank."""
    peak_state_bytes: int
    """Bytes on this rank."""


@exact_dtype
def run_case(case: Case, group: SequenceGroup | None) -> Outcome:
    """Run the case with our runner, spread over the group or alone."""
    attention.register()
    model = make_model(case)
    model.set_attn_implementation(attention.NAME)
    enable_activation_checkpointing(model, case.checkpointing)
    sequences, chunks = make_sequences(case), chunks_of(case)
    batch = StepBatch(chunks, sequences, make_weights(sequences), by_sequence=True)
    weight_dtype = torch.promote_types(getattr(torch, case.dtype), torch.float32)
    settings = RunnerSettings(CPU, weight_dtype, sequence_group=group)
    runner = Runner(DirectEngine(ChunkModel(model, backend_of(case))), settings)
    result = runner.run((plan(chunks, case.k, join_retained=case.join_retained),), batch)
    gradient, losses = gradients(model), torch.tensor([result.loss, runner.evaluate(batch).loss], dtype=torch.float64)
    assert result.not_finite == ()
    assert result.sequence_losses @ batch.weights == pytest.approx(result.loss, rel=1e-5)
    if group is not None:
        torch.distributed.all_reduce(gradient, group=group.process_group)
        torch.distributed.all_reduce(losses, group=group.process_group)
    return Outcome(losses[0].item(), gradient, losses[1].item(), result.target_tokens, result.peak_state_bytes)


def run_all_cases(size: int) -> dict[str, Outcome]:
    """Run all cases on a rank of a group."""
    group = join(Topology(sequence=size))
    return {name: run_case(case, group) for name, case in CASES.items()}


def join(topology: Topology) -> SequenceGroup:
    torch.distributed.init_process_group("gloo")
    settle_vector_math()
    group = SequenceGroup.join(topology)
    assert group is not None
    return group


@pytest.fixture(scope="module", params=SIZES)
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    """Return the outcomes of all cases, by rank, for each group size; one launch per size."""
    return run_ranks(request.param, "test_sequence_parallel:run_all_cases", request.param)


@pytest.fixture(scope="module")
def truth() -> Callable[[str], tuple[float, Tensor]]:
    """Return a function that gives whole-sequence training of a case, computed once."""
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
    """A head sent to the wrong rank, a slice off by one, attention to padding, state of another head: all of these show
    in the gradient, and none of them crashes."""
    loss, gradient = truth(name)
    tolerance = TOLERANCES[CASES[name].dtype]
    ranks = [outcome[name] for outcome in outcomes]
    for rank in ranks:
        assert rank.loss == pytest.approx(loss, rel=tolerance)
        assert rank.evaluated == pytest.approx(loss, rel=tolerance)
        assert float((rank.gradients - gradient).norm() / gradient.norm()) < tolerance
    targets = sum(int((sequence.targets != IGNORED).sum()) for sequence in make_sequences(CASES[name]))
    assert sum(rank.target_tokens for rank in ranks) == targets, "padding is not counted, and no target twice"


@pytest.mark.parametrize(("name", "kv_heads"), [("own heads, head_dim", 4), ("grouped queries, biases", 2),
                                                ("one key head, tied", 1)])  # fmt: skip
def test_state_shrinks_with_the_group(outcomes: list[dict[str, Outcome]], name: str, kv_heads: int) -> None:
    """The purpose of a group: a rank stores only its own heads, and one head if there are fewer heads than ranks."""
    alone = run_case(CASES[name], None).peak_state_bytes
    assert alone > 0
    for rank in outcomes:
        assert rank[name].peak_state_bytes * min(len(outcomes), kv_heads) == alone


def run_two_groups(_: None) -> dict[str, Any]:
    """Run two groups side by side on four ranks, each on its own chunks, and an exchange of bfloat16."""
    group = join(Topology(data=2, sequence=2))
    first = torch.distributed.get_rank() < 2
    outcome = run_case(CASES["k 2" if first else "short window"], group)
    whole = torch.arange(2 * 4 * 6 * 8).view(2, 4, 6, 8).to(torch.bfloat16)  # of both ranks (heads, tokens, head_dim)
    mine = whole[group.rank : group.rank + 1]
    queries, keys, values = group.tokens_to_heads(mine, mine[:, :1], mine[:, :1, :, :3])
    all_tokens = torch.cat([whole[0], whole[1]], dim=1)
    expected = all_tokens[2 * group.rank : 2 * group.rank + 2]
    return {
        "ranks": torch.distributed.get_process_group_ranks(group.process_group),
        "place": (group.size, group.rank),
        "outcome": outcome,
        "exchanged": [
            torch.equal(queries[0], expected),
            torch.equal(keys[0], all_tokens[:1]),
            torch.equal(values[0], all_tokens[:1, :, :3]),
            torch.equal(group.heads_to_tokens(queries), mine),
        ],
    }


def test_groups_side_by_side(truth: Callable[[str], tuple[float, Tensor]]) -> None:
    """Data-parallel groups run different chunks, and different numbers of them: an exchange over all ranks would mix
    them or hang. In bfloat16 an exchange copies every bit, and with fewer key heads than ranks both get the same."""
    ranks = run_ranks(4, "test_sequence_parallel:run_two_groups")
    assert [rank["ranks"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["place"] for rank in ranks] == [(2, 0), (2, 1), (2, 0), (2, 1)]
    for rank, name in zip(ranks, ["k 2", "k 2", "short window", "short window"], strict=True):
        loss, gradient = truth(name)
        assert rank["outcome"].loss == pytest.approx(loss, rel=1e-12)
        assert float((rank["outcome"].gradients - gradient).norm() / gradient.norm()) < 1e-12
        assert rank["exchanged"] == [True] * 4


# --- What needs no other process -------------------------------------------------------------------------------------


def group_of(size: int, rank: int) -> SequenceGroup:
    """Return a group without other processes; it cannot exchange."""
    return SequenceGroup(cast("Any", None), size, rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 24, 37])
def test_slices_together_are_the_chunk(size: int, tokens: int) -> None:
    """Concatenated, the slices are the chunk's tokens in order, then padding. The padding is a segment of its own without
    targets: as part of the last segment, nothing would attend to it, but it would be counted as its tokens."""
    sequences = random_sequences((tokens - tokens // 3, tokens // 3) if tokens > 2 else (tokens,), VOCABULARY)
    (chunk,) = build_chunks([len(each.input_ids) for each in sequences], tokens)
    weights = make_weights(sequences)
    noise = SequenceNoise.of_step(5.0, 0, 0, range(len(sequences)))
    whole, *slices = (
        build_batch(chunk, sequences, weights, CPU, torch.float64, group, noise=noise)
        for group in (None, *(group_of(size, rank) for rank in range(size)))
    )
    share = tokens_of_rank(tokens, size)
    fewest = -(-tokens // size)
    assert share == (fewest if fewest >= 32 else 4 * -(-fewest // 4)), "a few tokens are padded to blocks of four"
    for name in ("input_ids", "position_ids"):
        joined = torch.cat([getattr(each, name) for each in slices], dim=1)
        assert torch.equal(joined[:, :tokens], getattr(whole, name)[:, :tokens])
        assert joined.shape == (1, size * share)
    assert whole.noise is not None
    for name in ("keys", "scales"):
        joined = torch.cat([getattr(each.noise, name) for each in slices])
        assert torch.equal(joined[:tokens], getattr(whole.noise, name)[:tokens])
    positions = [each.target_positions + rank * share for rank, each in enumerate(slices)]
    assert torch.equal(torch.cat(positions), whole.target_positions)
    assert torch.equal(torch.cat([each.targets for each in slices]), whole.targets)
    assert torch.equal(torch.cat([each.target_weights for each in slices]), whole.target_weights)
    segments = [0, *np.cumsum([segment.tokens for segment in chunk.segments]).tolist()]
    padded = [size * share] if size * share > tokens else []
    assert {each.boundaries for each in slices} == {(*segments, *padded)}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "copies"),
    [(28, 4, 1, 1), (28, 4, 2, 1), (28, 4, 4, 1), (8, 2, 4, 2), (8, 1, 8, 8), (32, 32, 16, 1), (9, 3, 3, 1)],
)
def test_copies_of_key_heads(heads: int, kv_heads: int, size: int, copies: int) -> None:
    """By hand: no copies if each rank has a key head, otherwise as many as the ranks that share one."""
    assert key_value_copies(heads, kv_heads, size) == copies


@pytest.mark.parametrize("heads", [1, 4, 6, 9, 12, 28])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6])
def test_each_rank_gets_the_key_heads_of_its_queries(heads: int, kv_heads: int) -> None:
    """Brute force over the heads of each rank: a size is possible if contiguous slices of repeated key heads serve
    exactly the queries of the same rank, and refused if they do not."""
    if heads % kv_heads:
        return
    possible = []
    for size in range(1, heads + 1):
        try:
            copies = key_value_copies(heads, kv_heads, size)
        except ValueError:
            continue
        possible.append(size)
        repeated = [head for head in range(kv_heads) for _ in range(copies)]
        for rank in range(size):
            queries = range(heads)[group_of(size, rank).slice_of(heads)]
            keys = repeated[group_of(size, rank).slice_of(len(repeated))]
            served = [keys[place * len(keys) // len(queries)] for place in range(len(queries))]
            assert served == [query // (heads // kv_heads) for query in queries]
    assert 1 in possible
    assert heads in possible
    with pytest.raises(ValueError, match=f"among {', '.join(map(str, possible))}$"):
        key_value_copies(heads, kv_heads, heads + 1)


def test_heads_that_do_not_divide_are_refused_by_name(tiny_config: Callable[..., Any]) -> None:
    """Before anything is loaded, the error names the model, its heads, the size, and the sizes that are possible."""
    config = Config(model=ModelConfig(path="my-model"), parallel=ParallelConfig(sequence=3))
    with pytest.raises(UsageError) as refused:
        check_layouts(config, tiny_config("qwen2"), [planned_topology(config)])
    assert str(refused.value) == (
        "parallel.sequence=3 does not suit my-model:\n"
        "  its 4 attention heads and 2 key and value heads cannot be divided among 3 ranks, but among 1, 2, 4"
    )
    for size in (1, 2, 4):
        config = Config(parallel=ParallelConfig(sequence=size))
        check_layouts(config, tiny_config("qwen2"), [planned_topology(config)])
        check_layouts(config, tiny_config("gpt2", n_head=4), [planned_topology(config)])


def test_stages_that_would_part_shared_keys_are_refused_by_name(tiny_config: Callable[..., Any]) -> None:
    """The last layers of Gemma 4's small models attend to keys of layers in the middle."""
    model = tiny_config("gemma4_text", **SHARED_KEYS, num_kv_shared_layers=3)
    config = Config(model=ModelConfig(path="my-model"), parallel=ParallelConfig(pipeline=2))
    with pytest.raises(UsageError, match="pipeline=2: the last layers of my-model attend to keys of earlier"):
        check_layouts(config, model, [planned_topology(config)])
    large = tiny_config("gemma4_text", num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    check_layouts(config, large, [planned_topology(config)])
