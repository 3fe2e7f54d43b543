"""Chunked training equals whole-sequence training: a matrix of architectures, settings, chunk sizes, K and memory savers.

The comparison is transformers' own forward over whole sequences, with its own attention, masks and head. In float32 the
gradients may differ by rounding, in float64 by next to nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention, LoraConfig
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution import guard as guard_module
from chunkflow_cli.execution import parity, stages
from chunkflow_cli.execution import step as step_module
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention import layer, own
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Gradients, Output, Packing, Saved, Sight
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.attention.layer import LayerAttention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.batch import ChunkBatch, build_batch
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.execution.parity import DirectEngine, InChunks, Parity, compare, random_sequences
from chunkflow_cli.execution.precision import use_float64_parts
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.small_copy import small_config
from chunkflow_cli.execution.state import PastBlock, SequenceState
from chunkflow_cli.execution.state_home import OnDevice, host_home
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import refuse_length_dependent_rope
from chunkflow_cli.model.loading import random_model
from chunkflow_cli.model.shape import model_shape
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import Schedule, plan
from support.models import BEYOND, LLAMA3_ROPE, MIDDLE_WINDOW, MODELS, OWN_ATTENTION, SHAPES, YARN_ROPE

CPU = torch.device("cpu")
LENGTHS = (100, 13, 9, 31)
VOCABULARY = 96
FLOAT32_TOLERANCE, FLOAT64_TOLERANCE = 2e-6, 1e-12


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    model: str
    chunk_size: int
    """25 divides the longest sequence, 32 and 17 do not; 25 makes two sequences long."""
    k: int
    """99 means all chunks: nothing is recomputed."""
    checkpointing: ActivationCheckpointing
    fill_tails: bool
    lora: bool

    def __str__(self) -> str:
        words = [self.model, f"size {self.chunk_size}", "K=N" if self.k == 99 else f"K={self.k}"]
        words += [self.checkpointing.value] if self.checkpointing is not ActivationCheckpointing.none else []
        words += ["lora"] if self.lora else []
        words += [] if self.fill_tails else ["tails apart"]
        return " - ".join(words).replace(",", "")


SIZES, KS, CHECKPOINTING = (25, 32, 17), (1, 2, 99), tuple(ActivationCheckpointing)
LORA_AND_TAILS = ((False, True), (True, True), (True, False))


def covering(models: list[str]) -> list[Case]:
    """Return three rows per model, with every level of every factor once; the pairing rotates from model to model."""
    cases = []
    for index, model in enumerate(models):
        for row in range(3):
            lora, fill_tails = LORA_AND_TAILS[(row + index // 2) % 3]
            cases.append(
                Case(
                    model,
                    SIZES[row],
                    KS[(row + index) % 3],
                    CHECKPOINTING[(row + 2 * index + index // 3) % 3],
                    fill_tails,
                    lora,
                )
            )
    return cases


MATRIX = covering([*MODELS])


def build(tiny_model: Callable[..., Any], case: Case, dtype: torch.dtype) -> Any:
    model_type, settings = {**MODELS, **BEYOND, **SHAPES, **OWN_ATTENTION}[case.model]
    model = tiny_model(model_type, dtype=dtype, **settings)
    use_float64_parts(model, dtype)
    enable_activation_checkpointing(model, case.checkpointing)
    if case.lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4, alpha=8.0))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first, which would leave half of the gradients zero
                parameter.data.normal_(std=0.05, generator=generator)
    return model


def compared(model: Any, backend: Backend, case: Case) -> Parity:
    """Compare chunks, with the past in one block, or in several on the device or in host memory."""
    sequences = random_sequences(LENGTHS, VOCABULARY, seed=3)
    home = {SIZES[0]: OnDevice(20), SIZES[2]: host_home(CPU, 20)}.get(case.chunk_size, OnDevice())
    return compare(
        model,
        sequences,
        InChunks(backend, chunk_size=case.chunk_size, k=case.k, fill_tails=case.fill_tails, state_home=home),
    )


@pytest.fixture
def _everything_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep norms and routers in float64, on both sides.

    They compute in float32 for every dtype (`x.float()`, `x.to(torch.float32)`), so two orders of the same sums differ
    by 1e-8. Without that, any difference is a mistake.
    """
    to, type_, softmax = torch.Tensor.to, torch.Tensor.type, nn.functional.softmax

    def to_float64(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype is torch.float64 else to(self, torch.float32)
    )
    monkeypatch.setattr(torch.Tensor, "to", to_float64)
    monkeypatch.setattr(
        torch.Tensor, "type", lambda self, *args: self if self.dtype is torch.float64 and args else type_(self, *args)
    )
    monkeypatch.setattr(
        nn.functional,
        "softmax",
        lambda x, dim, dtype=None: softmax(x, dim, dtype=None if x.dtype is torch.float64 else dtype),
    )


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_float32(tiny_model: Callable[..., Any], case: Case) -> None:
    """The gradient of a training run, with the backend that training chooses, is equal up to rounding."""
    model = build(tiny_model, case, torch.float32)
    backend = choose_backend(Attention.auto, model.config, CPU, torch.float32).backend
    assert isinstance(backend, CpuBackend)
    result = compared(model, backend, case)
    assert result.grad_rel_error <= FLOAT32_TOLERANCE
    assert result.loss_rel_error <= FLOAT32_TOLERANCE


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_float64(tiny_model: Callable[..., Any], case: Case) -> None:
    """In float64 rounding hides nothing: a difference of 1e-9 means another computation."""
    result = compared(build(tiny_model, case, torch.float64), ReferenceBackend(), case)
    assert result.grad_rel_error <= FLOAT64_TOLERANCE
    assert result.loss_rel_error <= FLOAT64_TOLERANCE
    # For a parameter whose gradient is zero up to rounding (the router of one expert, say), this is rounding, too.
    assert result.grad_max_rel_error <= 1e-9, result.grad_max_rel_error_parameter


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize("case", [c for c in MATRIX if c.model in ("llama", "mistral, short window")], ids=str)
def test_float64_with_the_cpu_kernels(tiny_model: Callable[..., Any], case: Case) -> None:
    """The CPU kernels that float32 uses do not hide a mistake behind a float32 error of their own."""
    result = compared(build(tiny_model, case, torch.float64), CpuBackend(), case)
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("case", covering([*BEYOND])[::2], ids=str)
def test_beyond_plain_attention(tiny_model: Callable[..., Any], case: Case) -> None:
    """Sinks, soft caps and scaled heads were 4e-5 to 1e-1 off in the prototype: small enough to miss."""
    model = build(tiny_model, case, torch.float32)
    backend = choose_backend(Attention.auto, model.config, CPU, torch.float32).backend
    assert compared(model, backend, case).grad_rel_error <= FLOAT32_TOLERANCE


def is_refused(case: Case) -> bool:
    return case.model.startswith("gemma3n") and case.checkpointing is ActivationCheckpointing.selective


def test_a_kept_product_that_is_changed_in_place_is_refused(tiny_model: Callable[..., Any]) -> None:
    """The recompute would get it as it was left: gradients were off by a factor of two, and torch did not notice."""
    (case,) = filter(is_refused, covering([*SHAPES]))
    with pytest.raises(UsageError, match=r"selective: a layer changes the result of a matrix product in place"):
        compared(build(tiny_model, case, torch.float64), CpuBackend(), case)


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize("case", [case for case in covering([*SHAPES]) if not is_refused(case)], ids=str)
def test_other_shapes_of_attention(tiny_model: Callable[..., Any], case: Case) -> None:
    """With torch's CPU kernels, which know one width, no blocks and no sharing."""
    parity = compared(build(tiny_model, case, torch.float64), CpuBackend(), case)
    assert parity.grad_rel_error <= FLOAT64_TOLERANCE, parity
    assert parity.loss_rel_error <= FLOAT64_TOLERANCE, parity


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize(
    "case",
    [c for c in covering([*OWN_ATTENTION]) if c.checkpointing is not ActivationCheckpointing.selective and c.k < 99],
    ids=str,
)
def test_models_that_compute_attention_themselves(tiny_model: Callable[..., Any], case: Case) -> None:
    model = build(tiny_model, case, torch.float64)
    parity = compared(model, ReferenceBackend(), case)
    assert parity.grad_rel_error <= FLOAT64_TOLERANCE, parity
    assert parity.loss_rel_error <= FLOAT64_TOLERANCE, parity


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize("function", ["add_from_later_chunks", "_running"])
def test_own_attention_fails_without_its_mechanism(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Gradients of later chunks, and the mask that keeps packed samples apart."""
    monkeypatch.setattr(own, function, lambda *_: None)
    case = Case("falcon, alibi", 32, 2, ActivationCheckpointing.none, True, False)
    parity = compared(build(tiny_model, case, torch.float64), ReferenceBackend(), case)
    assert parity.grad_rel_error > 1e-6


def test_openai_gpt() -> None:
    """It has no attention to exchange: its own is called by name, and stays the truth to compare with."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=VOCABULARY, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **sizes
    )
    model = random_model(config, dtype=torch.float64).train()
    case = Case("openai-gpt", 17, 1, ActivationCheckpointing.none, True, False)
    assert compared(model, CpuBackend(), case).grad_rel_error <= FLOAT64_TOLERANCE
    assert model_shape(model).attention == (AttentionLayers(2, 4, 4, 16, 16),)


def test_alibi_is_rounded_as_in_its_own_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """falcon's is bfloat16: counted through a chunk, keys beyond 256 would get other distances than alone."""
    from transformers.models.falcon import modeling_falcon as falcon

    alone = falcon.build_alibi_tensor(torch.ones(1, 300, dtype=torch.long), 4, torch.float32)
    chunk = ChunkAttentionContext(Packing((0, 400, 700), CPU), ReferenceBackend())
    through = falcon.build_alibi_tensor(torch.ones(1, 700, dtype=torch.long), 4, torch.float32)[..., 400:]
    assert not torch.equal(through - through[..., :1], alone)
    monkeypatch.setattr(own, "_running", lambda: chunk)
    packed = own._by_position(falcon.build_alibi_tensor)(torch.ones(1, 700, dtype=torch.long), 4, torch.float32)
    assert torch.equal(packed[..., 400:], alone)


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize(("model", "function"), [
    ("llama4, blocks, temperature", "counts_positions"), ("llama4, blocks, temperature", "describe_layer"),
    ("gemma4, shared keys, head_dim by kind", "describe_layer"),
])  # fmt: skip
def test_other_shapes_fail_without_their_mechanism(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model: str, function: str
) -> None:
    """Blocks and temperature make a difference here; a layer that only shares keys must not release them."""
    if function == "describe_layer" and model.startswith("gemma4"):
        find = attention.describe_layer
        monkeypatch.setattr(attention, function, lambda *args: replace(find(*args), owns_keys=True))
    else:
        wrong = {
            "counts_positions": lambda module: False,
            "describe_layer": lambda module, rule: LayerAttention(module.layer_idx, rule),
        }
        monkeypatch.setattr(attention, function, wrong[function])
    case = Case(model, 17, 2, ActivationCheckpointing.none, True, False)
    try:
        parity = compared(build(tiny_model, case, torch.float64), CpuBackend(), case)
    except (AssertionError, RuntimeError):
        return  # the store has lost what was released
    assert parity.grad_rel_error > 1e-6


@pytest.mark.usefixtures("_everything_in_float64")
@pytest.mark.parametrize("model", ["deepseek_v3, narrow values", "llama4, blocks, temperature", "granite_swa, sinks"])
def test_other_shapes_through_the_stages_of_a_pipeline(tiny_model: Callable[..., Any], model: str) -> None:
    case = Case(model, 17, 2, ActivationCheckpointing.full, True, False)
    sequences = random_sequences(LENGTHS, VOCABULARY, seed=3)
    built = build(tiny_model, case, torch.float64)
    parity = compare(built, sequences, InChunks(CpuBackend(), chunk_size=case.chunk_size, k=case.k, stages=2))
    assert parity.grad_rel_error <= FLOAT64_TOLERANCE, parity


def test_shared_keys_are_stored_once(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six layers, the last three attend to keys of the third and the second."""
    written: set[int] = set()
    write = SequenceState.write
    monkeypatch.setattr(
        SequenceState, "write", lambda self, layer, *rest: written.add(layer) or write(self, layer, *rest)
    )
    case = Case("gemma4, shared keys, head_dim by kind", 32, 1, ActivationCheckpointing.none, True, False)
    compared(build(tiny_model, case, torch.float32), CpuBackend(), case)
    assert written == {0, 1, 2}


def test_the_matrix_covers_every_pair() -> None:
    """Dropping a setting from the matrix would leave all tests green. So every pair of levels must occur, and every
    architecture must occur with every chunk size, K and memory saver."""
    factors = {
        "chunk_size": SIZES, "k": KS, "checkpointing": CHECKPOINTING, "fill_tails": (True, False), "lora": (True, False),
    }  # fmt: skip
    for one, two in itertools.combinations(factors, 2):
        seen = Counter((getattr(case, one), getattr(case, two)) for case in MATRIX)
        pairs = set(itertools.product(factors[one], factors[two])) - {(False, False)}  # tails apart only under LoRA
        assert pairs <= set(seen), (one, two)
    types = {model_type for model_type, _ in MODELS.values()}
    assert types == {
        "llama", "qwen2", "qwen3", "mistral", "mixtral", "phi3", "gemma3_text", "olmo2", "granite", "glm4",
        "starcoder2", "smollm3",
    }  # fmt: skip
    for model in MODELS:
        for name in ("chunk_size", "k", "checkpointing"):
            assert {getattr(case, name) for case in MATRIX if case.model == model} == set(factors[name])


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing, ids=lambda mode: mode.value)
def test_retained_chunks_in_one_engine_call(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, checkpointing: ActivationCheckpointing
) -> None:
    """ZeRO-3 runs the retained chunks in one forward and one backward, within which later chunks must go first."""
    case = Case("llama", 17, 3, checkpointing, fill_tails=True, lora=False)
    planned = []

    def joined(chunks: Any, k: int) -> Schedule:
        planned.append(plan(chunks, k, join_retained=True))
        return planned[-1]

    monkeypatch.setattr(parity, "plan", joined)
    result = compared(build(tiny_model, case, torch.float64), ReferenceBackend(), case)
    assert "+" in str(planned[0])
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("targets", [["o_proj"], ["down_proj"], ["q_proj"], ["v_proj"]], ids=str)
def test_lora_on_some_layers_only(tiny_model: Callable[..., Any], targets: list[str]) -> None:
    """If keys or values of the first layer need no gradient, its attention has no backward, or half of one. Nothing may
    depend on what it would have stored or freed."""
    model = add_lora(tiny_model("llama", dtype=torch.float64), LoraConfig(enabled=True, r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    result = compared(
        model, ReferenceBackend(), Case("llama", 25, 2, ActivationCheckpointing.none, fill_tails=True, lora=True)
    )
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


def test_the_head_alone_is_trained(tiny_model: Callable[..., Any]) -> None:
    """A chunk of a prompt then has no gradient to give, and must go backward all the same."""
    adapters = LoraConfig(enabled=True, r=4, target_modules=["lm_head"])
    adapted = add_lora(tiny_model("llama", dtype=torch.float64), adapters)
    plain = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    plain.lm_head.requires_grad_()
    for model in (adapted, plain):
        result = compare(model, random_sequences((40, 3), VOCABULARY), InChunks(ReferenceBackend(), chunk_size=8, k=2))
        assert result.grad_rel_error <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("lengths", [(64,), (16,), (5, 5), (1, 33, 2), (48, 48)], ids=str)
def test_shapes_at_the_edges(tiny_model: Callable[..., Any], lengths: tuple[int, ...]) -> None:
    """Only full chunks, one chunk exactly, no long sequence, samples of one token, a tail of one token."""
    model = tiny_model("qwen2", dtype=torch.float64)
    result = compare(
        model, random_sequences(lengths, VOCABULARY, seed=3), InChunks(ReferenceBackend(), chunk_size=16, k=1)
    )
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


def test_chunks_of_one_token(tiny_model: Callable[..., Any]) -> None:
    """The extreme: every token its own chunk, every one but the last recomputed."""
    model = tiny_model("llama", dtype=torch.float64)
    result = compare(
        model, random_sequences((12, 1), VOCABULARY, seed=3), InChunks(ReferenceBackend(), chunk_size=1, k=1)
    )
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("k", [1, 2, 99])
@pytest.mark.parametrize("pair_weight", [1e-3, 0.1, 3.0])
def test_pieces_of_equal_time(tiny_model: Callable[..., Any], pair_weight: float, k: int) -> None:
    """The places where a sequence is cut must not matter. The last of these pieces are a few tokens long."""
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=20)
    sequences = random_sequences((90, 7, 40), VOCABULARY, seed=3)
    result = compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=16, k=k, pair_weight=pair_weight))
    assert result.grad_rel_error <= FLOAT64_TOLERANCE


# --- The comparison itself -------------------------------------------------------------------------------------------

PLAIN = Case("llama", 17, 2, ActivationCheckpointing.none, fill_tails=True, lora=False)
BREAKAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def breakage(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BREAKAGES[(function.__doc__ or "").rstrip(".")] = function
    return function


@breakage
def _drop_state_gradient(patch: pytest.MonkeyPatch) -> None:
    """gradient to earlier chunks dropped."""
    patch.setattr(PastBlock, "add_gradient", lambda *_: None)


@breakage
def _drop_one_piece(patch: pytest.MonkeyPatch) -> None:
    """gradient of earlier values dropped."""
    add = PastBlock.add_gradient
    patch.setattr(PastBlock, "add_gradient", lambda self, gradients: add(self, {"keys": gradients["keys"]}))


@breakage
def _ignore_the_past(patch: pytest.MonkeyPatch) -> None:
    """chunks do not see earlier chunks."""
    patch.setattr(SequenceState, "past", lambda *_, **__: iter(()))


@breakage
def _ignore_the_window(patch: pytest.MonkeyPatch) -> None:
    """window ignored."""
    patch.setattr(attention, "AttentionRule", lambda scale, window, softcap: AttentionRule(scale, None, softcap))
    patch.setattr(layer, "window_of", lambda *_: None)


@breakage
def _window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """window one too long."""
    patch.setattr(attention, "AttentionRule", lambda scale, window, softcap: AttentionRule(scale, window + 1, softcap))


@breakage
def _ignore_the_scale(patch: pytest.MonkeyPatch) -> None:
    """scale of the scores ignored."""
    patch.setattr(attention, "AttentionRule", lambda scale, window, softcap: AttentionRule(1.0, window, softcap))


def _batches(patch: pytest.MonkeyPatch, change: Callable[[ChunkBatch], ChunkBatch]) -> None:
    patch.setattr(step_module, "build_batch", lambda *args, **keywords: change(build_batch(*args, **keywords)))


@breakage
def _shift_targets(patch: pytest.MonkeyPatch) -> None:
    """targets shifted by one."""
    _batches(patch, lambda batch: replace(batch, targets=batch.targets.roll(1)))


@breakage
def _shift_within_chunks(patch: pytest.MonkeyPatch) -> None:
    """last target of each chunk lost."""
    _batches(
        patch,
        lambda batch: replace(
            batch, target_weights=batch.target_weights * (batch.target_positions < batch.input_ids.shape[1] - 1)
        ),
    )


@breakage
def _restart_positions(patch: pytest.MonkeyPatch) -> None:
    """positions from zero in every chunk."""
    _batches(patch, lambda batch: replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None]))


@breakage
def _mean_of_each_chunk(patch: pytest.MonkeyPatch) -> None:
    """loss averaged in each chunk."""
    _batches(
        patch,
        lambda batch: replace(
            batch, target_weights=torch.full_like(batch.target_weights, 1 / max(1, batch.target_tokens))
        ),
    )


@breakage
def _let_segments_see_each_other(patch: pytest.MonkeyPatch) -> None:
    """packed sequences see each other."""

    class Joined(ReferenceBackend):
        def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
            return super().forward(queries, keys, values, joined(sight))

        def backward(self, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
            return super().backward(grad_out, saved, joined(sight))

    def joined(sight: Sight) -> Sight:
        return replace(sight, packing=sight.packing and Packing((0, sight.packing.boundaries[-1]), CPU))

    patch.setattr("chunkflow_cli.execution.chunk_model.ChunkAttentionContext", _with_backend(Joined()))


def _with_backend(backend: Backend) -> Callable[..., ChunkAttentionContext]:
    return lambda packing, _, *rest: ChunkAttentionContext(packing, backend, *rest)


@breakage
def _go_backward_in_another_order(patch: pytest.MonkeyPatch) -> None:
    """second to last chunk backward before the last."""

    def swapped(chunks: Any, k: int) -> Schedule:
        text = str(plan(chunks, 99))
        last = chunks.dependent_groups()[0].stop - 1
        broken = text.replace(f"B{last} B{last - 1} ", f"B{last - 1} B{last} ")
        assert broken != text
        return Schedule.parse(broken)

    patch.setattr(parity, "plan", swapped)


@breakage
def _skip_a_backward(patch: pytest.MonkeyPatch) -> None:
    """one standalone chunk left out."""

    def shortened(chunks: Any, k: int) -> Schedule:
        text = str(plan(chunks, k))
        assert text.startswith("F0 B0 ")
        return Schedule.parse(text.removeprefix("F0 B0 "))

    patch.setattr(parity, "plan", shortened)


@contextmanager
def broken(function: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        function(patch)
        yield


@pytest.mark.parametrize("function", BREAKAGES.values(), ids=BREAKAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_comparison_fails_when_chunks_are_wrong(
    tiny_model: Callable[..., Any], function: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype
) -> None:
    """A proof that always passes is worthless: each mistake that is easy to make with chunks must fail it."""
    model = tiny_model("mistral", dtype=dtype, sliding_window=MIDDLE_WINDOW, initializer_range=0.1)
    sequences = random_sequences((125, 13, 9), VOCABULARY, seed=3)
    sequences.append(
        TokenizedSample(np.arange(16, dtype=np.int32), np.arange(16, dtype=np.int32))
    )  # a chunk of its own

    def result() -> Parity:
        return compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=17, k=2))

    assert result().passed
    # The state store notices by itself that chunks go backward in another order.
    is_noticed = function is _go_backward_in_another_order
    notice = pytest.raises(AssertionError, match="descending order") if is_noticed else nullcontext()
    with broken(function), notice:
        wrong = result()
        assert not wrong.passed
        assert wrong.grad_rel_error > 1e-3
    assert result().passed, "the breakage is undone"


def test_the_paper_as_printed_does_not_run(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping the first chunks and going backward in ascending order frees state too early: it must crash."""
    monkeypatch.setattr(parity, "plan", lambda chunks, k: Schedule.parse("F0 F1 F2 B0 B1 B2"))
    with pytest.raises(AssertionError, match="a part was dropped"):
        compare(
            tiny_model("llama"),
            random_sequences((40,), VOCABULARY, seed=3),
            InChunks(ReferenceBackend(), chunk_size=17, k=2),
        )


def test_comparison_agrees_with_one_written_by_hand(tiny_model: Callable[..., Any]) -> None:
    """`compare` is checked against another comparison: labels and loss of transformers itself, and a sum over all
    parameters. Chunks are broken on purpose, so that both must find the same large error, not the same zero."""
    model = tiny_model("qwen2", dtype=torch.float64)
    sequences = random_sequences(LENGTHS, VOCABULARY, seed=3)
    with broken(_drop_state_gradient):
        result = compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=25, k=2))

    total = sum(int((s.targets != IGNORED).sum()) for s in sequences)
    loss_whole = 0.0
    model.set_attn_implementation("eager")
    for sequence in sequences:
        labels = torch.full((1, len(sequence.targets)), IGNORED)
        labels[0, 1:] = torch.as_tensor(sequence.targets[:-1])  # transformers shifts them back
        loss = model(
            input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None],
            labels=labels,
            num_items_in_batch=total,
        ).loss
        loss.backward()
        loss_whole += float(loss.detach())
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks([len(s.input_ids) for s in sequences], 25)
    weights = np.full(len(sequences), 1 / total)
    runner = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), RunnerSettings(CPU, torch.float64))
    with broken(_drop_state_gradient):
        loss_chunked = runner.run((plan(chunks, 2),), StepBatch(chunks, sequences, weights)).loss
    squares = {
        name: (float(((parameter.grad - whole[name]) ** 2).sum()), float((whole[name] ** 2).sum()))
        for name, parameter in model.named_parameters()
    }
    expected = (sum(error for error, _ in squares.values()) / sum(norm for _, norm in squares.values())) ** 0.5

    assert result.grad_rel_error == pytest.approx(expected, rel=1e-5)  # transformers takes its loss in float32
    assert result.grad_rel_error > 1e-2
    assert result.loss_whole == pytest.approx(loss_whole, rel=1e-6)
    assert result.loss_chunked == pytest.approx(loss_chunked, rel=1e-8)  # `compare` takes norms in float64, too
    worst = max(squares, key=lambda name: squares[name][0] / squares[name][1])
    assert result.grad_max_rel_error_parameter == worst
    assert result.grad_max_rel_error == pytest.approx((squares[worst][0] / squares[worst][1]) ** 0.5, rel=1e-5)


def test_comparison_leaves_the_model_as_it_was(tiny_model: Callable[..., Any]) -> None:
    """`verify` runs on the user's model: weights, attention and gradients must not change."""
    model = tiny_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    compare(model, random_sequences((40,), VOCABULARY), InChunks(CpuBackend(), chunk_size=17, k=1))
    assert model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("loss", "gradient", "passed"),
    [(1.0, 1e-6, True), (1.0, 1e-4, False), (1.1, 1e-6, False), (1.0, float("nan"), False)],
)
def test_what_passes(loss: float, gradient: float, passed: bool) -> None:
    """Both loss and gradient must agree, and NaN agrees with nothing."""
    assert Parity(1.0, loss, gradient, "weight", gradient, tolerance=1e-5).passed is passed


# --- The guard -------------------------------------------------------------------------------------------------------


def guarded(config: Any, **options: Any) -> Parity:
    return guard(config, **{"requested": Attention.auto, "device": CPU, "dtype": torch.float32, **options})


@pytest.mark.parametrize("model", [*MODELS, *BEYOND])
def test_guard_passes_what_is_exact(tiny_config: Callable[..., Any], model: str) -> None:
    """Users turn off a guard that refuses a good model."""
    model_type, settings = {**MODELS, **BEYOND}[model]
    assert guarded(tiny_config(model_type, **settings)).grad_rel_error <= 1e-5


@pytest.mark.parametrize(
    "model_type", ["gpt2", "opt", "gpt_neox", "phi", "exaone4", "qwen3_moe", "stablelm", "nemotron"]
)
def test_guard_passes_more_architectures(tiny_config: Callable[..., Any], model_type: str) -> None:
    """No code for chunks is written for an architecture: learned positions pass, and layers that get no keywords."""
    assert guarded(tiny_config(model_type)).grad_rel_error <= 1e-5


def test_guard_refuses_what_is_not(tiny_config: Callable[..., Any]) -> None:
    """Silently wrong training is the worst outcome: a model whose attention depends on how keys are compared at once."""
    with pytest.raises(UsageError, match=r"'doge' cannot be trained in chunks(.|\n)*keys with the largest gates"):
        guarded(tiny_config("doge", keep_window_size=8))


def test_guard_looks_at_windows_longer_than_its_test(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that ignores windows passes any test that is shorter than the window: the guard shortens it."""
    config = tiny_config("mistral", sliding_window=4096)
    guarded(config)
    _ignore_the_window(monkeypatch)
    with pytest.raises(UsageError, match="cannot be trained exactly in chunks"):
        guarded(config)


def test_guard_sees_a_missing_soft_cap(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With default weights a missing soft cap makes a difference of 4e-5, which is easy to miss. The guard raises it."""
    config = tiny_config("gemma2", head_dim=16)
    guarded(config)
    monkeypatch.setattr(attention, "AttentionRule", lambda scale, window, softcap: AttentionRule(scale, window, None))
    with pytest.raises(UsageError, match="cannot be trained exactly in chunks"):
        guarded(config)


@pytest.mark.parametrize(
    "name", ["embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"]
)
def test_guard_keeps_every_multiplier(tiny_config: Callable[..., Any], name: str) -> None:
    """granite's multipliers were 7.0 off in the prototype: a small configuration without them would hide that."""
    assert getattr(small_config(tiny_config("granite", **{name: 3.5})), name) == 3.5


def test_guard_keeps_one_layer_of_each_kind(tiny_config: Callable[..., Any]) -> None:
    """A hybrid model cut to its first two layers would be tested without its other kinds."""
    kinds = ["full_attention", "full_attention", "full_attention", "sliding_attention"] * 3
    settings = {"use_sliding_window": True, "sliding_window": 16, "layer_types": kinds}
    small = small_config(tiny_config("qwen3", num_hidden_layers=12, **settings))
    assert small.num_hidden_layers == 2
    assert small.layer_types == ["full_attention", "sliding_attention"]


def test_guard_leaves_the_configuration_alone(tiny_config: Callable[..., Any]) -> None:
    """The run continues with the configuration that the guard was given."""
    config = tiny_config("gemma2", head_dim=16, sliding_window=400)
    before = config.to_dict()
    guarded(config)
    assert config.to_dict() == before


def test_guard_leaves_random_numbers_alone(tiny_config: Callable[..., Any]) -> None:
    """Turning the guard off must not change the run."""
    state = torch.get_rng_state()
    guarded(tiny_config("llama"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing, ids=lambda mode: mode.value)
def test_guard_with_the_run_s_memory_saver(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, checkpointing: ActivationCheckpointing
) -> None:
    """Selective checkpointing once reused merged attention as the kernel's output: only a test with it turned on fails."""
    assert guarded(tiny_config("llama"), activation_checkpointing=checkpointing).passed
    used = []
    monkeypatch.setattr(guard_module, "enable_activation_checkpointing", lambda model, mode: used.append(mode))
    guarded(tiny_config("llama"), activation_checkpointing=checkpointing)
    assert used == [checkpointing]


def test_guard_checks_the_kernel_in_the_dtype_of_the_run(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small model runs in float32; a kernel that is wrong only in bfloat16 must still be found."""
    guarded(tiny_config("llama"), dtype=torch.bfloat16)
    backward = CpuBackend.backward

    def wrong_in_bfloat16(self: CpuBackend, grad_out: Tensor, saved: Saved, sight: Sight) -> Gradients:
        grads = backward(self, grad_out, saved, sight)
        is_wrong = sight.packing is None and grad_out.dtype is torch.bfloat16
        return (grads[0], grads[1] * 1.1, grads[2]) if is_wrong else grads

    monkeypatch.setattr(CpuBackend, "backward", wrong_in_bfloat16)
    guarded(tiny_config("llama"), dtype=torch.float32)
    with pytest.raises(UsageError, match=r"model\.attention=cpu computes wrong results on this device"):
        guarded(tiny_config("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "granite", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [ActivationCheckpointing.none, ActivationCheckpointing.full])
def test_guard_goes_through_the_stages_of_a_pipeline(
    tiny_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    checkpointing: ActivationCheckpointing,
) -> None:
    """A cut may lose something that the model does between its layers; gradients of tied weights must add up."""
    config = tiny_config(model_type, tie_word_embeddings=True)
    assert guarded(config, is_pipeline=True, activation_checkpointing=checkpointing).passed
    monkeypatch.setattr(stages._Entry, "forward", lambda self, *_, **__: 1.01 * self.received)
    guarded(config)
    with pytest.raises(UsageError, match="exactly in chunks through the stages of a pipeline"):
        guarded(config, is_pipeline=True)


def test_guard_names_what_cannot_be_cut(tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"^parallel\.pipeline=2: GPT2LMHeadModel cannot be cut into stages"):
        guarded(tiny_config("gpt2"), is_pipeline=True)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")])
def test_length_dependent_rope_is_refused(tiny_config: Callable[..., Any], model_type: str, kind: str) -> None:
    """It changes with the longest position of a forward, so the chunks of a sequence would disagree (2e-4 to 2e-3)."""
    config = tiny_config(model_type, rope_parameters=ROPES[kind], max_position_embeddings=256)
    with pytest.raises(UsageError, match=f"rotary embedding is of the kind '{kind}'"):
        refuse_length_dependent_rope(config)


def test_length_dependent_rope_of_one_layer_kind_is_refused(tiny_config: Callable[..., Any]) -> None:
    """gemma3 has a rotary embedding for each kind of layer: the one that matters may be the second."""
    default = {"rope_type": "default", "rope_theta": 1e4}
    config = tiny_config(
        "gemma3_text", rope_parameters={"sliding_attention": default, "full_attention": ROPES["dynamic"]}
    )
    with pytest.raises(UsageError, match="of the kind 'dynamic'"):
        refuse_length_dependent_rope(config)


@pytest.mark.parametrize("rope", [None, {"rope_type": "default", "rope_theta": 1e4}, LLAMA3_ROPE, YARN_ROPE], ids=str)
def test_fixed_rope_is_not_refused(tiny_config: Callable[..., Any], rope: dict[str, Any] | None) -> None:
    """Rotary embeddings that depend on the position alone are exact (the matrix has llama3 and yarn)."""
    refuse_length_dependent_rope(tiny_config("llama", **({} if rope is None else {"rope_parameters": rope})))
