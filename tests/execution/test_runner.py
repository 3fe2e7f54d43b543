"""The runner turns operations into loss and gradients, and leaves nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import ActivationCheckpointing, LoraConfig
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.batch import build_batch, dummy_token
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.dropout import RandomReplay
from chunkflow_cli.execution.parity import DirectEngine, InChunks, compare, random_sequences
from chunkflow_cli.execution.precision import use_float64_parts
from chunkflow_cli.execution.runner import Interrupted, Runner
from chunkflow_cli.execution.state import StateStore
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepResult
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import IDLE, Schedule, plan
from support.models import SHAPES

CPU = torch.device("cpu")
VOCABULARY = 96
SIZE = 16
LENGTHS = (50, 7, 37, 12, 5)
"""Two long sequences of four and three chunks, whose tails the short ones fill."""


def step_batch(sequences: Sequence[TokenizedSample], size: int = SIZE) -> StepBatch:
    total = sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences)
    chunks = build_chunks([len(sequence.input_ids) for sequence in sequences], size)
    return StepBatch(chunks, sequences, np.full(len(sequences), 1 / total))


@pytest.fixture
def batch() -> StepBatch:
    return step_batch(random_sequences(LENGTHS, VOCABULARY, seed=1))


@pytest.fixture
def chunked(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """A tiny model that runs in chunks, by default an exact one of float64."""

    def build(model_type: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
        attention.register()
        model = tiny_model(model_type, dtype=dtype, **settings)
        use_float64_parts(model, dtype)
        model.set_attn_implementation(attention.NAME)
        return model

    return build


def runner_of(model: Any, backend: Backend | None = None, **options: Any) -> Runner:
    weight_dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    engine = DirectEngine(ChunkModel(model, backend or ReferenceBackend()))
    return Runner(engine, RunnerSettings(CPU, weight_dtype, **options))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def ran(model: Any, batch: StepBatch, k: int, **options: Any) -> tuple[StepResult, Tensor]:
    model.zero_grad(set_to_none=True)
    result = runner_of(model, **options).run((plan(batch.chunks, k),), batch)
    return result, gradients(model)


# --- Loss, gradient, accounting --------------------------------------------------------------------------------------


def test_evaluate_is_the_loss_without_gradient(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """The held-out loss must be the training loss of the same samples, and leave no gradient for the next step."""
    model = chunked()
    evaluated = runner_of(model).evaluate(batch).loss
    assert all(parameter.grad is None for parameter in model.parameters())
    result, _ = ran(model, batch, k=1)
    assert evaluated == pytest.approx(result.loss, rel=1e-13)
    assert result.loss == pytest.approx(np.log(VOCABULARY), rel=0.05), "the mean over all targets"


def test_evaluate_frees_each_sequence_when_it_ends(
    chunked: Callable[..., Any], batch: StepBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that is kept for all samples of an evaluation would fill the memory."""
    held = []
    close = StateStore.close

    def recorded(self: StateStore, sequence: int) -> None:
        held.append((sequence, len(self)))
        close(self, sequence)

    monkeypatch.setattr(StateStore, "close", recorded)
    runner_of(chunked()).evaluate(batch)
    assert held == [(0, 1), (2, 1)]


@pytest.mark.parametrize("k", [1, 2, 3, 99])
def test_every_k_gives_the_same_step(chunked: Callable[..., Any], batch: StepBatch, k: int) -> None:
    """K trades memory for time and nothing else: loss, gradient and count of targets stay."""
    model = chunked()
    result, gradient = ran(model, batch, k)
    expected, truth = ran(model, batch, 99)
    assert result.loss == pytest.approx(expected.loss, rel=1e-14)
    assert torch.allclose(gradient, truth, rtol=0, atol=1e-15)
    assert (
        result.target_tokens
        == expected.target_tokens
        == sum(int((s.targets != IGNORED).sum()) for s in batch.sequences)
    )
    assert result.not_finite == ()


def test_joined_engine_calls_give_the_same_step(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """The arrangement that ZeRO-3 needs does not change the computation."""
    model = chunked()
    schedule = plan(batch.chunks, 2, join_retained=True)
    assert "+" in str(schedule)
    result = runner_of(model).run((schedule,), batch)
    gradient = gradients(model)
    expected, truth = ran(model, batch, 2)
    assert result.loss == pytest.approx(expected.loss, rel=1e-14)
    assert torch.allclose(gradient, truth, rtol=0, atol=1e-15)
    assert result.target_tokens == expected.target_tokens


def test_gradients_of_steps_add_up_until_they_are_taken(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """The runner leaves gradients in the engine and must not clear or scale them."""
    model = chunked()
    _, once = ran(model, batch, 1)
    runner_of(model).run((plan(batch.chunks, 1),), batch)
    assert torch.allclose(gradients(model), 2 * once, rtol=1e-12)


def test_weights_stay_with_their_sequences(chunked: Callable[..., Any]) -> None:
    """`train.loss_weighting=sequence` gives each sample its own weight, which must follow it through packing and
    splitting."""
    model = chunked()
    sequences = random_sequences(LENGTHS, VOCABULARY, seed=1)
    chunks = build_chunks([len(s.input_ids) for s in sequences], SIZE)
    weights = np.array([0.5, 0.0, 2.0, 1.0, 3.0])
    mixed = runner_of(model).evaluate(StepBatch(chunks, sequences, weights)).loss
    single = [
        runner_of(model).evaluate(StepBatch(build_chunks([len(s.input_ids)], SIZE), [s], np.ones(1))).loss
        for s in sequences
    ]
    assert mixed == pytest.approx(float(np.dot(weights, single)), rel=1e-12)


@pytest.mark.parametrize("head", ["plain", "adapter"])
def test_losses_of_sequences(tiny_model: Callable[..., Any], chunked: Callable[..., Any], head: str) -> None:
    """Losses by source and by length are sums of these; a loss counted for its neighbor in the chunk would show a
    source learning that is not trained on."""
    config = LoraConfig(enabled=True, target_modules=["lm_head" if head == "adapter" else "q_proj"], r=2)
    model, whole = (
        add_lora(build("llama", **dtype), config)
        for build, dtype in ((chunked, {}), (tiny_model, {"dtype": torch.float64}))
    )
    sequences = random_sequences(LENGTHS, VOCABULARY, seed=1)
    targets = [torch.as_tensor(sequence.targets, dtype=torch.int64) for sequence in sequences]
    truth = [
        nn.functional.cross_entropy(
            whole(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]).logits[0], target,
            ignore_index=IGNORED, reduction="sum",
        ).item()
        for sequence, target in zip(sequences, targets, strict=True)
    ]  # fmt: skip
    batch = replace(step_batch(sequences), by_sequence=True)
    for k in (1, 2):
        result, _ = ran(model, batch, k)
        np.testing.assert_allclose(result.sequence_losses, truth, rtol=1e-12)
    np.testing.assert_allclose(runner_of(model).evaluate(batch).sequence_losses, truth, rtol=1e-12)
    lockstep = runner_of(model, lockstep=True).evaluate(batch, forwards=len(batch.chunks) + 2)
    np.testing.assert_allclose(lockstep.sequence_losses, truth, rtol=1e-12)


def test_a_dummy_is_no_token_whose_embedding_is_zero(chunked: Callable[..., Any]) -> None:
    """The padding of a new gemma3n has an embedding of zeros, where the root of a mean square has no gradient."""
    model_type, settings = SHAPES["gemma3n, shared keys"]
    model = chunked(model_type, **settings)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[embedding.padding_idx] = 0
    batch = StepBatch(build_chunks([], SIZE), [], np.zeros(0))
    runner_of(model, dummy_token=dummy_token(model)).run((IDLE,), batch)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("counted", [slice(0, 10), slice(34, 44), slice(20, 24)], ids=["first", "third", "second"])
def test_chunks_without_targets(tiny_model: Callable[..., Any], counted: slice) -> None:
    """With a prompt longer than a chunk, chunks without any target must still go backward, because later ones read their
    keys and values. A chunk after the last target adds nothing."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 50, dtype=np.int32)
    targets = np.full(50, IGNORED, dtype=np.int32)
    targets[counted] = np.append(ids[1:], IGNORED)[counted]
    batch = step_batch([TokenizedSample(ids, targets)])
    without = [
        chunk for chunk in batch.chunks if build_batch(chunk, batch.sequences, batch.weights, CPU).target_tokens == 0
    ]
    assert len(without) == 3
    model = tiny_model("llama", dtype=torch.float64)
    for k in (1, 99):
        result = compare(model, [TokenizedSample(ids, targets)], InChunks(ReferenceBackend(), chunk_size=SIZE, k=k))
        assert result.grad_rel_error <= 1e-12
        assert result.loss_rel_error <= 1e-12


def test_float64_all_the_way(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """Weights of targets in float32 would leave 1e-8 in a float64 proof."""
    model = chunked()
    exact, _ = ran(model, batch, 1)
    rounded = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), RunnerSettings(CPU)).run(
        (plan(batch.chunks, 1),), batch
    )
    assert exact.loss != rounded.loss
    by_hand = 0.0
    model.set_attn_implementation("sdpa")
    for sequence, weight in zip(batch.sequences, batch.weights, strict=True):
        logits = model(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None], use_cache=False).logits[
            0
        ]
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
        by_hand += weight * float(
            nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").detach()
        )
    assert exact.loss == pytest.approx(by_hand, rel=1e-14)


def test_bfloat16_step_is_close_to_float32(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """In the dtype of training, with the CPU kernels and float32 state gradients, the step differs by rounding only."""
    plain, half = chunked(dtype=torch.float32), chunked(dtype=torch.float32).bfloat16()
    expected, truth = ran(plain, batch, 1, backend=CpuBackend())
    result, gradient = ran(half, batch, 1, backend=CpuBackend())
    assert result.loss == pytest.approx(expected.loss, rel=1e-2)
    assert float((gradient.float() - truth).norm() / truth.norm()) < 3e-2


def test_progress_counts_every_token_once(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """The progress bar counts tokens that went backward, and recomputed ones only once."""
    told: list[int] = []
    runner_of(chunked()).run((plan(batch.chunks, 1),), batch, on_backward=told.append)
    assert len(told) == len(batch.chunks)
    assert sum(told) == sum(LENGTHS)
    told.clear()
    runner_of(chunked()).run((plan(batch.chunks, 2, join_retained=True),), batch, on_backward=told.append)
    assert sum(told) == sum(LENGTHS)


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bytes_"), [(torch.bfloat16, 2 + 4), (torch.float32, 4 + 4), (torch.float64, 8 + 8)], ids=str
)
@pytest.mark.parametrize("k", [1, 99])
def test_peak_state_bytes(chunked: Callable[..., Any], k: int, dtype: torch.dtype, bytes_: int) -> None:
    """It is the memory plan's formula: keys and values of all tokens before the last chunk, and their gradients."""
    model = chunked(dtype=dtype)
    batch = step_batch(random_sequences((50, 37), VOCABULARY))
    result, _ = ran(model, batch, k)
    stored = 50 // SIZE * SIZE
    config = model.config
    per_token = (
        config.num_hidden_layers * 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    )
    assert result.peak_state_bytes == stored * per_token * bytes_


def test_standalone_chunks_keep_no_state(chunked: Callable[..., Any]) -> None:
    """Short samples cost no state at all."""
    result, _ = ran(chunked(), step_batch(random_sequences((16, 5, 9), VOCABULARY)), 1)
    assert result.peak_state_bytes == 0


@pytest.mark.parametrize(
    ("text", "left"), [("F0", "activations"), ("S0 F1 B1 R0", "activations"), ("S0 F1 B1", "state")], ids=str
)
def test_what_a_schedule_leaves_behind_is_noticed(chunked: Callable[..., Any], text: str, left: str) -> None:
    """Memory that is never freed would show as a slow leak, far from its cause."""
    batch = step_batch(random_sequences((30,), VOCABULARY))
    with pytest.raises(AssertionError, match=f"left {left}"):
        runner_of(chunked()).run((Schedule.parse(text),), batch)


# --- Trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 5])
def test_interrupt_between_operations(chunked: Callable[..., Any], batch: StepBatch, after: int) -> None:
    """Ctrl-C during a long step stops before the next operation, not at the end of the step."""
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > after

    forwarded = []

    class Counting(DirectEngine):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            forwarded.append(True)
            return super().forward(*args, **kwargs)

        def backward(self, loss: Tensor) -> None:
            forwarded.append(True)
            super().backward(loss)

    engine = Counting(ChunkModel(chunked(), ReferenceBackend()))
    runner = Runner(engine, RunnerSettings(CPU, torch.float64, stop_requested=stop))
    with pytest.raises(Interrupted):
        runner.run((plan(batch.chunks, 1),), batch)
    assert len(forwarded) == after
    asked.clear()
    forwarded.clear()
    with pytest.raises(Interrupted):
        runner.evaluate(batch)
    assert len(forwarded) == after


def test_after_an_interrupt_the_next_step_is_right(chunked: Callable[..., Any], batch: StepBatch) -> None:
    """Nothing of the broken step may remain in the runner."""
    model = chunked()
    _, truth = ran(model, batch, 1)
    left = [9]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    runner = runner_of(model, stop_requested=stop)
    with pytest.raises(Interrupted):
        runner.run((plan(batch.chunks, 1),), batch)
    model.zero_grad(set_to_none=True)
    runner.run((plan(batch.chunks, 1),), batch)
    assert torch.allclose(gradients(model), truth, rtol=0, atol=1e-15)


def test_loss_that_is_not_finite_names_its_chunks(chunked: Callable[..., Any]) -> None:
    """With one bad sample in a global batch of thousands, its chunks are named, and only chunks that saw it."""
    sequences = random_sequences((50, 9, 14), VOCABULARY - 1, seed=1)
    batch = step_batch(sequences)
    model = chunked(dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
    assert ran(model, batch, 1)[0].not_finite == ()
    groups = batch.chunks.dependent_groups()
    standalone = [index for index in range(len(batch.chunks)) if index < groups[0].start]
    assert len(standalone) == 1
    sequences[1].input_ids[3] = VOCABULARY - 1
    result, _ = ran(model, batch, 1)
    assert result.not_finite == (standalone[0],)
    assert np.isnan(result.loss)
    sequences[1].input_ids[3] = 1
    sequences[0].input_ids[SIZE + 3] = VOCABULARY - 1  # in the second chunk of four: it and all that see it
    assert ran(model, batch, 1)[0].not_finite == tuple(groups[0])[1:]


def test_loss_that_is_not_finite_in_a_joined_call(chunked: Callable[..., Any]) -> None:
    """Chunks of one engine call share one loss: all of them are named."""
    sequences = random_sequences((50,), VOCABULARY - 1, seed=1)
    batch = step_batch(sequences)
    model = chunked(dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = float("nan")
    sequences[0].input_ids[-3] = VOCABULARY - 1
    result = runner_of(model).run((plan(batch.chunks, 2, join_retained=True),), batch)
    assert result.not_finite == (2, 3)


# --- Dropout ---------------------------------------------------------------------------------------------------------

DROPOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "modules": ("gpt2", {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.0}),
    "functions": ("starcoder2", {"residual_dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.0}),
    "drawn experts": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.2}),
}


def with_dropout(chunked: Callable[..., Any], name: str, checkpointing: ActivationCheckpointing) -> Any:
    if name == "adapters":
        model = chunked("llama")
        enable_activation_checkpointing(model, checkpointing)
        model = add_lora(model, LoraConfig(enabled=True, r=4, dropout=0.2))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        return model
    model_type, settings = DROPOUT[name]
    model = chunked(model_type, **settings)
    enable_activation_checkpointing(model, checkpointing)
    return model


def ran_from_seed(model: Any, batch: StepBatch, k: int) -> tuple[StepResult, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        result, gradient = ran(model, batch, k)
        return result, gradient, torch.get_rng_state()


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*itertools.product(("modules", "functions", "adapters"), ActivationCheckpointing),
     ("drawn experts", ActivationCheckpointing.none)],
)  # fmt: skip
def test_recompute_replays_dropout(
    chunked: Callable[..., Any],
    batch: StepBatch,
    name: str,
    checkpointing: ActivationCheckpointing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout, the recompute of a chunk must drop what its state pass dropped. Otherwise its keys and values are not
    those that later chunks have read.

    With K = N nothing is recomputed: each chunk draws its numbers once, in order. A state pass draws the same numbers at
    the same place, so with replay a run with K = 1 from the same seed must have the same loss and gradient, and leave the
    generator in the same state for the next chunk.
    """
    model = with_dropout(chunked, name, checkpointing)
    expected, truth, state = ran_from_seed(model, batch, 99)
    for k in (1, 2):
        result, gradient, after = ran_from_seed(model, batch, k)
        assert result.loss == pytest.approx(expected.loss, rel=1e-13)
        assert float((gradient - truth).norm() / truth.norm()) <= 1e-12
        assert torch.equal(after, state)
    monkeypatch.setattr(RandomReplay, "remember", lambda self, chunk: None)
    unlike, gradient, _ = ran_from_seed(model, batch, 1)
    assert unlike.loss != pytest.approx(expected.loss, rel=1e-5), "without replay, dropout does differ"
    assert float((gradient - truth).norm() / truth.norm()) > 1e-2


@pytest.mark.parametrize("use_dora", [False, True])
def test_recompute_repeats_adapters_with_dropout_to_the_bit(chunked: Callable[..., Any], use_dora: bool) -> None:
    model = add_lora(chunked(), LoraConfig(enabled=True, r=4, dropout=0.1, use_dora=use_dora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    outputs: list[Tensor] = []
    layers = model.get_base_model().model.layers
    for layer in (layers[0].mlp.down_proj, layers[1].self_attn.v_proj):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    batch = step_batch(random_sequences((64,), VOCABULARY, seed=1))
    schedule = plan(batch.chunks, 1)
    assert str(schedule) == "S0 S1 S2 F3 B3 R2 B2 R1 B1 R0 B0"
    runner_of(model).run((schedule,), batch)
    first, again = outputs[: 2 * 3], outputs[2 * 4 :]
    for chunk in range(3):
        for one, other in zip(first[2 * chunk :][:2], again[2 * (2 - chunk) :][:2], strict=True):
            assert torch.equal(one, other)
