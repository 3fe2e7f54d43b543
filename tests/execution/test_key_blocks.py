"""Models that pick or sum up blocks of keys train exactly in chunks, wherever a border of chunks cuts a block."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import ActivationCheckpointing, LoraConfig, PreferenceConfig, Task
from chunkflow_cli.execution.attention import own
from chunkflow_cli.execution.attention.key_blocks import PieceCache
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, InChunks, Parity, compare, random_sequences
from chunkflow_cli.execution.recurrent import RunningChunk
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.state_home import OnDevice, host_home
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepContext
from chunkflow_cli.execution.whole_sequence import cross_entropies
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.shape import model_shape
from chunkflow_cli.model.shape_probe import kept_for_backward
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.memory_parts import state_bytes
from chunkflow_cli.planning.schedule import plan
from support.exact import float64_throughout
from support.models import BLOCKS, recurrent_model

CPU = torch.device("cpu")
LENGTHS = (53, 1, 3, 2, 1, 33, 5, 9)
SHORT = (10, 1, 2, 4, 7)
TOLERANCE = 1e-10


def compared(name: str, lengths: tuple[int, ...], chunk_size: int, k: int, checkpointing: str, **how: Any) -> Parity:
    with float64_throughout():
        model = recurrent_model(name, torch.float64)
        enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
        if lora := how.pop("lora", None):
            model = with_adapters(model, lora)
        sequences = random_sequences(lengths, 67)
        return compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=chunk_size, k=k, **how))


def with_adapters(model: Any, modules: list[str]) -> Any:
    adapted = add_lora(model, LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=modules))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, which would leave half of the gradients zero
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return adapted


CASES = (
    (SHORT, 3, 2, "none", OnDevice()),  # chunks shorter than a block
    (LENGTHS, 13, 1, "full", host_home(CPU, 5)),  # 53 = 4 x 13 + 1: a last piece of one token
)
MORE_CASES = ((SHORT, 4, 2, "full", OnDevice(3)), (LENGTHS, 11, 99, "none", OnDevice()))
MATRIX = [
    *((name, *case) for name in BLOCKS for case in CASES),
    *(("deepseek_v4", *case) for case in MORE_CASES),
]


@pytest.mark.parametrize(("name", "lengths", "chunk_size", "k", "checkpointing", "home"), MATRIX)
def test_float64(name: str, lengths: tuple[int, ...], chunk_size: int, k: int, checkpointing: str, home: Any) -> None:
    result = compared(name, lengths, chunk_size, k, checkpointing, state_home=home)
    assert result.grad_rel_error <= TOLERANCE
    assert result.loss_rel_error <= TOLERANCE


def test_pairs_of_answers() -> None:
    """Both answers continue from one prompt, which ends within a block."""
    how = {"objective": Objective(Task.dpo, PreferenceConfig())}
    assert compared("minimax_m3", (33, 21, 9, 7), 7, 1, "none", **how).grad_rel_error <= TOLERANCE


def test_adapters_of_a_compressor_alone() -> None:
    """A chunk that completes no block has nothing with a gradient, and yet entries of earlier chunks get one."""
    parity = compared("deepseek_v4", (33, 15), 3, 2, "full", lora=["compressor.kv_proj"])
    assert parity.grad_rel_error <= TOLERANCE


def test_evaluation() -> None:
    """It frees what a chunk hands on as soon as the next one has read it, so nothing may be read twice."""
    with float64_throughout():
        model = recurrent_model("deepseek_v4", torch.float64).eval()
        sequences = random_sequences(SHORT, 67)
        with torch.no_grad():
            truth = sum(float(cross_entropies(model, sequence, CPU).sum()) for sequence in sequences)
        batch = StepBatch(build_chunks(list(SHORT), 2), sequences, np.ones(len(SHORT)))
        settings = RunnerSettings(CPU, weight_dtype=torch.float64)
        result = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), settings).evaluate(batch)
    assert result.loss == pytest.approx(truth, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "module"), [("minimax_m3", "layers.0.self_attn.q_proj"), ("glm5_next", "q_b_proj")])
def test_adapters_of_queries_alone(name: str, module: str) -> None:
    """The first layer's keys and values have no gradient, and yet the output that depends on them has one."""
    parity = compared(name, SHORT, 4, 2, "none", lora=[module])
    assert max(parity.grad_rel_error, parity.loss_rel_error) <= TOLERANCE


def _lose_gradients_of_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(own, "add_from_later_chunks", lambda *_: None)


def _lose_gradients_of_edges(patch: pytest.MonkeyPatch) -> None:
    enter = RunningChunk.enter
    patch.setattr(RunningChunk, "enter", lambda self, part, **_: enter(self, part, needs_gradient=False))


def _forget_edges(patch: pytest.MonkeyPatch) -> None:
    enter = RunningChunk.enter

    def nothing(self: RunningChunk, part: str, **options: Any) -> Any:
        value = enter(self, part, **options)
        return None if value is None else torch.zeros_like(value)

    patch.setattr(RunningChunk, "enter", nothing)


def _join_segments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunningChunk, "spans", property(lambda self: [slice(0, self.tokens)]))


@pytest.mark.parametrize(("name", "breakage"), [
    ("deepseek_v4", _lose_gradients_of_keys), ("deepseek_v4", _lose_gradients_of_edges),
    ("deepseek_v4", _forget_edges), ("qwen4_exp", _forget_edges), ("minimax_m3", _join_segments),
])  # fmt: skip
def test_fails_without_its_mechanism(name: str, breakage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    assert compared(name, SHORT, 4, 2, "none").grad_rel_error > 1e-4


def test_a_cache_goes_with_the_forward_that_it_was_made_for() -> None:
    """One that refers to itself would keep activations in memory until Python collects garbage."""
    model = recurrent_model("deepseek_v4")
    batch = StepBatch(build_chunks([33], 16), random_sequences([33], 67), np.ones(1))
    step, module = StepContext(RunnerSettings(CPU), batch), ChunkModel(model, ReferenceBackend())
    gc.disable()
    try:
        kept = [module.hidden(step.call(index)) for index in (0, 1)]
        caches = [each for each in gc.get_objects() if type(each) is PieceCache]
    finally:
        gc.enable()
    assert kept
    assert caches == []


@pytest.mark.parametrize(("name", "size", "of_state"), [
    ("deepseek_v4", 64, 0.01), ("deepseek_v4", 60, 0), ("qwen4_exp", 64, 0),
])  # fmt: skip
def test_memory_is_planned(name: str, size: int, of_state: float) -> None:
    """State to the byte if chunks complete all blocks; else, their mean is planned. What layers keep within 4 %."""
    model = recurrent_model(name, torch.bfloat16)
    shape, lengths = model_shape(model), [4 * size, size]
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    chunks = build_chunks(lengths, size)
    batch = StepBatch(chunks, random_sequences(lengths, 67), np.full(2, 1e-3))
    settings, module = RunnerSettings(CPU, weight_dtype=torch.float32), ChunkModel(model, ReferenceBackend())
    peak = Runner(DirectEngine(module), settings).run((plan(chunks, 1),), batch).peak_state_bytes
    assert state_bytes(shape, lengths[0], size, 2) == pytest.approx(peak, rel=of_state, abs=0)
    step = StepContext(settings, batch)
    for index in sorted(range(4), key=lambda index: chunks[index].is_dependent):
        with kept_for_backward(model) as kept:
            hidden, call = module.hidden(step.call(index)), step.call(index)
            measured = sum(kept.values())
        del hidden
        past = 0 if call.piece is None else call.piece.past
        of_pairs = size * (size * shape.score_bytes + past * shape.past_score_bytes)
        predicted = size * shape.layers * (shape.layer_activation_bytes or 0) + of_pairs + past * shape.past_key_bytes
        assert predicted == pytest.approx(measured, rel=0.04)
