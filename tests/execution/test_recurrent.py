"""Models with recurrent layers train exactly in chunks: every architecture against its own whole-sequence training.

The settings bite: states last, weights are large, a last piece of one token shares its chunk with short samples,
samples are shorter than the convolution, and in one case chunks are, too.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import itertools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import ActivationCheckpointing, LoraConfig
from chunkflow_cli.data.sample import IGNORED
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution import chunk_model
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention import own
from chunkflow_cli.execution.attention.backend import Packing
from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, InChunks, Parity, compare, random_sequences
from chunkflow_cli.execution.recurrent import RunningChunk, prepare_recurrent_layers
from chunkflow_cli.execution.recurrent import mixers as mixers_module
from chunkflow_cli.execution.recurrent import running as running_module
from chunkflow_cli.execution.recurrent import scans as scans_module
from chunkflow_cli.execution.recurrent.scans import batches, block_for
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.state import EdgeKey, SequenceState, StateStore
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.forward_scope import ForwardScope, forward_value
from chunkflow_cli.model.recurrent_functions import SCANS
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from support.exact import float64_throughout
from support.models import RECURRENT, recurrent_model

CPU = torch.device("cpu")
TOLERANCE = 1e-10
LENGTHS = (53, 1, 3, 2, 1, 33, 5, 9)
NONE, FULL, SELECTIVE = (ActivationCheckpointing(mode) for mode in ("none", "full", "selective"))


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    chunk_size: int
    k: int
    fill_tails: bool = True
    checkpointing: ActivationCheckpointing = NONE

    def __str__(self) -> str:
        tails = "" if self.fill_tails else " tails apart"
        return f"chunks of {self.chunk_size} K={self.k} {self.checkpointing.value}{tails}"


CASES = (
    Case(LENGTHS, 13, 2, checkpointing=FULL),  # 53 = 4 x 13 + 1: a last piece of one token
    Case((10, 1, 2, 4, 7), 3, 2),  # chunks shorter than the convolution
    Case((64, 1, 3, 2, 9, 32), 16, 1),  # chunks divide the lengths
    Case(LENGTHS, 17, 1, checkpointing=SELECTIVE),
    Case(LENGTHS, 11, 99),  # everything is kept
    Case(LENGTHS, 16, 2, fill_tails=False),
)
MATRIX = [(name, CASES[(3 * row + index) % 6]) for index, name in enumerate(RECURRENT) for row in range(2)]
ONE_OF_EACH = (
    "qwen3_5",
    "kimi_linear",
    "lfm2",
    "nemotron_h",
    "jamba",
    "zaya",
    "minimax",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
)
"""One architecture for each function that crosses tokens, a convolution alone and the four scans, and for each module
that does so in code of its own."""


def compared(model: Any, case: Case, **options: Any) -> Parity:
    sequences = random_sequences(case.lengths, 67)
    enable_activation_checkpointing(model, case.checkpointing)
    return compare(
        model,
        sequences,
        InChunks(ReferenceBackend(), chunk_size=case.chunk_size, k=case.k, fill_tails=case.fill_tails, **options),
    )


@pytest.mark.parametrize(("name", "case"), MATRIX, ids=lambda value: str(value))
def test_float64(name: str, case: Case) -> None:
    """In float64 throughout, nothing but another computation can differ by 1e-10; measured are 1e-15 to 6e-14."""
    with float64_throughout():
        result = compared(recurrent_model(name, torch.float64), case)
    assert result.grad_rel_error <= TOLERANCE
    assert result.loss_rel_error <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "nemotron_h", "jamba", "granitemoehybrid", "minimax"])
def test_float32(name: str) -> None:
    """Chunked training is as close to the truth as whole-sequence training is: what is left is float32's rounding."""
    truth, whole, chunked = float32_gradients(name, CASES[0])
    assert distance(whole, truth) < 1e-4
    assert distance(chunked, truth) <= 2 * distance(whole, truth) + 1e-6
    assert distance(chunked, whole) <= 2 * distance(whole, truth) + 1e-6


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="about how MKL rounds")
@pytest.mark.parametrize("name", ["lfm2", "xlstm"])  # xlstm runs its layers once for each segment
def test_few_tokens_are_rounded_as_in_a_whole_sequence(name: str) -> None:
    """Chunks of three tokens share most of their rounding with whole sequences: they lie half as far from these as these
    lie from the truth. Without padding to the rows that MKL multiplies together, it would be 1.1 times as far."""
    ratios = []
    for seed in range(6):
        truth, whole, chunked = float32_gradients(name, CASES[1], seed)
        ratios.append(distance(chunked, whole) / distance(whole, truth))
    assert np.exp(np.log(ratios).mean()) < 0.9


def float32_gradients(name: str, case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of whole sequences in float64 throughout and in float32, and the chunked one in float32."""
    exact = recurrent_model(name, torch.float64, seed)  # not in float64 throughout, which draws other weights
    with float64_throughout():
        truth = whole_gradient(exact, case)
    whole = whole_gradient(recurrent_model(name, seed=seed), case)
    return truth, whole, chunked_gradient(recurrent_model(name, seed=seed), case)


def whole_gradient(model: Any, case: Case) -> Tensor:
    """Return the gradient of transformers' own forward over whole sequences."""
    for sequence in random_sequences(case.lengths, 67):
        ids, targets = (torch.as_tensor(each, dtype=torch.int64) for each in (sequence.input_ids, sequence.targets))
        logits = model(input_ids=ids[None]).logits[0]
        (nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * 0.01).backward()
    return gradient_of(model)


def chunked_gradient(model: Any, case: Case, **options: Any) -> Tensor:
    enable_activation_checkpointing(model, case.checkpointing)
    run_step(model, case, **options)
    return gradient_of(model)


def run_step(model: Any, case: Case, *, join_retained: bool = False) -> Any:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks(case.lengths, case.chunk_size, fill_tails=case.fill_tails)
    weights = np.full(len(case.lengths), 0.01)
    batch = StepBatch(chunks, random_sequences(case.lengths, 67), weights)
    dtype = next(model.parameters()).dtype
    runner = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), RunnerSettings(CPU, dtype))
    return runner.run((plan(chunks, case.k, join_retained=join_retained),), batch)


def gradient_of(model: Any) -> Tensor:
    """Return all gradients in one vector, zeros for a parameter without any."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# Broken on purpose: each must show in every kind of layer, or the proofs above prove nothing.


def drop_state(self: SequenceState, key: EdgeKey, **_: Any) -> Tensor:
    value = self._edges[key].value
    assert value is not None
    return torch.zeros_like(value)


def drop_gradient(self: SequenceState, key: EdgeKey) -> None:
    return None


def one_segment(self: RunningChunk) -> list[slice]:
    return [slice(0, self.tokens)]


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("owner", "attribute", "broken"),
    [
        (SequenceState, "read_edge", drop_state),
        (SequenceState, "take_edge_gradient", drop_gradient),
        (RunningChunk, "spans", property(one_segment)),
    ],
    ids=["no state", "no gradient", "segments leak"],
)
def test_a_broken_mechanism_shows(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, attribute: str, broken: Any
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    assert compared(recurrent_model(name), Case(LENGTHS, 13, 2)).grad_rel_error > 0.02


@pytest.mark.parametrize(
    "name",
    ["qwen3_5", "kimi_linear", "nemotron_h", "mamba", "falcon_mamba", "mamba2", "zaya", "recurrent_gemma", "rwkv"],
)
def test_the_state_of_the_scan_alone_shows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A proof that saw convolutions only would pass with scans that begin from nothing in each chunk."""
    take = SequenceState.take_edge_gradient
    monkeypatch.setattr(
        SequenceState, "take_edge_gradient", lambda self, key: take(self, key) if key.part.startswith("conv") else None
    )
    assert compared(recurrent_model(name), Case(LENGTHS, 13, 2)).grad_rel_error > 0.01


def of_other_convolutions(self: SequenceState, key: EdgeKey) -> Tensor | None:
    return None if key.layer == "model.layers.1.self_attn.k_sconv" else taken(self, key)


taken = SequenceState.take_edge_gradient


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        ("inkling", own, "POSITIONS_FROM_CACHE", frozenset()),
        ("inkling2", chunk_model, "known_ids", lambda config: config.vocab_size),
        ("inkling2", SequenceState, "take_edge_gradient", of_other_convolutions),
    ],
    ids=["positions", "unused rows of the head", "weights of each token"],
)
def test_what_is_special_in_inkling_shows(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, attribute: str, broken: Any
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    assert compared(recurrent_model(name), Case(LENGTHS, 13, 2)).grad_rel_error > 0.01


# Around the mechanism.


@pytest.mark.parametrize(
    "name", ["qwen3_5", "lfm2", "nemotron_h", "falcon_h1", "bamba", "jamba", "kimi_linear", "recurrent_gemma"]
)
def test_two_pipeline_stages(name: str) -> None:
    """A stage that took a layer's tuple for its hidden states, or lost the layer's kind, would fail or differ."""
    with float64_throughout():
        result = compared(recurrent_model(name, torch.float64), Case(LENGTHS, 13, 2), stages=2)
    assert result.grad_rel_error <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zamba2", "its layers read the embeddings, which only the first stage has"),
        ("zaya", "each router reads what the one of the layer before has computed"),
        ("rwkv", "it is not an embedding, a list of layers, a norm and a head"),
    ],
)
def test_stages_of_a_model_whose_layers_read_more_than_hidden_states(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"cannot be cut into stages: {reason}"):
        compared(recurrent_model(name), CASES[1], stages=2)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen3_5", ["all-linear"]),
        ("lfm2", ["out_proj"]),
        ("nemotron_h", ["in_proj", "q_proj"]),
        ("jamba", ["x_proj"]),
        ("zaya", ["v_proj_delayed"]),  # the first layer's adapters train one part of its state, and not its queries
        ("minimax", ["all-linear"]),
        ("rwkv", ["value"]),
        ("xlstm", ["all-linear"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [NONE, FULL], ids=str)
def test_lora(
    monkeypatch: pytest.MonkeyPatch, name: str, targets: list[str], checkpointing: ActivationCheckpointing
) -> None:
    """Under frozen weights, states of the first layers have no gradient, and those behind them do."""
    closed = closed_states(monkeypatch)
    with float64_throughout():
        model = add_lora(
            recurrent_model(name, torch.float64), LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=targets)
        )
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zeros at first, which would leave half of the gradients zero
                nn.init.normal_(parameter, std=0.05)
        result = compared(model, Case(LENGTHS, 13, 2, checkpointing=checkpointing))
    assert result.grad_rel_error <= TOLERANCE
    assert len(closed) == 2
    assert all(edge.gradient is None for state in closed for edge in state._edges.values())


@pytest.mark.parametrize("name", ["qwen3_5", "jamba"])
@pytest.mark.parametrize("checkpointing", ActivationCheckpointing, ids=lambda mode: mode.value)
def test_retained_chunks_in_one_engine_call(name: str, checkpointing: ActivationCheckpointing) -> None:
    """ZeRO-3 runs the retained chunks in one forward and one backward, within which later chunks must go first."""
    case = Case(LENGTHS, 13, 3, checkpointing=checkpointing)
    with float64_throughout():
        whole = whole_gradient(recurrent_model(name, torch.float64), case)
        chunked = chunked_gradient(recurrent_model(name, torch.float64), case, join_retained=True)
    assert distance(chunked, whole) <= TOLERANCE


def test_a_recompute_in_another_thread_knows_its_chunk() -> None:
    """On a GPU backward runs in a thread of its own, where a context variable of the forward is not set."""
    case = Case((26, 5), 13, 2, checkpointing=FULL)
    whole = whole_gradient(recurrent_model("qwen3_5", torch.float64), case)

    class Elsewhere(DirectEngine):
        def backward(self, loss: Tensor) -> None:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()

    model = recurrent_model("qwen3_5", torch.float64)
    enable_activation_checkpointing(model, FULL)
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks(case.lengths, case.chunk_size)
    batch = StepBatch(chunks, random_sequences(case.lengths, 67), np.full(2, 0.01))
    runner = Runner(Elsewhere(ChunkModel(model, ReferenceBackend())), RunnerSettings(CPU, torch.float64))
    runner.run((plan(chunks, 2),), batch)
    assert distance(gradient_of(model), whole) <= 1e-4


def test_nothing_changes_for_a_model_that_runs_by_itself() -> None:
    """The functions are exchanged for every model of the kind in the process: without a chunk they do what they did."""
    model = recurrent_model("qwen3_5")
    ids = torch.arange(20)[None]
    first = model(input_ids=ids).logits
    assert prepare_recurrent_layers(model) == ("model.layers.0.linear_attn", "model.layers.2.linear_attn")
    assert torch.equal(model(input_ids=ids).logits, first)
    cached = model(input_ids=ids, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 20
    assert torch.equal(cached.logits, first)


def test_a_model_is_prepared_once() -> None:
    """A second chunk model of the same weights, or of a copy, must not wrap functions twice or hook layers twice."""
    import transformers.models.qwen3_5.modeling_qwen3_5 as home

    model = recurrent_model("qwen3_5")
    names = ChunkModel(model, ReferenceBackend()).recurrent_layers
    function, hooks = home.torch_chunk_gated_delta_rule, len(model.model.layers[0].linear_attn._forward_pre_hooks)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        assert ChunkModel(each, ReferenceBackend()).recurrent_layers == names
        assert len(each.model.layers[0].linear_attn._forward_pre_hooks) == hooks == 1
    assert home.torch_chunk_gated_delta_rule is function


def test_a_layer_that_inherits_from_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a model's own folder may extend a layer of transformers: the functions are in the file of that layer."""
    model = recurrent_model("qwen3_5", torch.float64)
    layers = [layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn")]
    base = type(layers[0])
    home = sys.modules[base.__module__]
    for name in ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"):  # as if no test before had exchanged them
        monkeypatch.setattr(home, name, inspect.unwrap(getattr(home, name)))
    extended = type("Extended", (base,), {"__module__": __name__})
    for layer in layers:
        layer.__class__ = extended
    with float64_throughout():
        assert compared(model, Case((20, 3), 7, 2)).grad_rel_error <= TOLERANCE


def test_models_without_recurrent_layers_have_none(tiny_model: Any) -> None:
    assert prepare_recurrent_layers(tiny_model("llama")) == ()


def test_a_layer_with_a_state_of_its_own_is_refused() -> None:
    """Of a class that nobody has looked at, such as one in a model's own folder, the state would be dropped."""
    model = recurrent_model("minimax")
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("OwnAttention", (type(layer),), {"__module__": __name__})
    with pytest.raises(UsageError, match="OwnAttention keeps a state between tokens by means of its own"):
        ChunkModel(model, ReferenceBackend())


def test_layers_of_a_package_are_refused() -> None:
    """With the package xlstm, transformers takes its layers. Their kernels take the normalizer for a constant."""
    layer = type("mLSTMLayer", (nn.Module,), {"__module__": "xlstm.xlstm_large.model"})
    with pytest.raises(UsageError, match="with the package xlstm, whose kernels leave out a part of the gradient"):
        prepare_recurrent_layers(nn.Sequential(layer()))


# State in the store.


def edges(layers: int, channels: int, width: int, state: int) -> int:
    return layers * 4 * (channels * (width - 1) + state)


def test_bytes_of_a_step() -> None:
    """The store holds what is documented: per edge and layer the last inputs of the convolution and one state."""
    model = recurrent_model("qwen3_5")
    result = run_step(model, Case((52,), 13, 1))
    keys_and_values = 2 * 2 * 8 * 4  # a token of the one attention layer: 2 heads of 8 numbers
    an_edge = edges(layers=2, channels=2 * 16 + 32, width=4, state=4 * 8 * 8)
    without_gradients = 3 * an_edge + 39 * keys_and_values
    assert without_gradients <= result.peak_state_bytes <= without_gradients + 39 * keys_and_values


@pytest.mark.parametrize(("name", "one_edge"), [
    ("mamba2", edges(layers=2, channels=64 + 2 * 2 * 8, width=4, state=8 * 8 * 8)),
    ("rwkv", edges(layers=2, channels=2 * 32, width=2, state=3 * 40)),
    ("xlstm", edges(layers=2, channels=0, width=1, state=2 * (8 * 16 + 8 + 1))),
])  # fmt: skip
def test_evaluation_keeps_one_edge(monkeypatch: pytest.MonkeyPatch, name: str, one_edge: int) -> None:
    """Without backward an edge is read once: a long sample would otherwise hold one for each of its chunks.

    Left to themselves, rwkv divides its weights in evaluation, and xlstm runs pieces of its input without our chunks.
    """
    settings = {"max_inference_chunksize": 5} if name == "xlstm" else {}
    model = recurrent_model(name, **settings)
    weights = [parameter.clone() for parameter in model.parameters()]
    chunks = build_chunks((52, 5), 13)
    batch = StepBatch(chunks, random_sequences((52, 5), 67), np.full(2, 0.01))
    runner = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), RunnerSettings(CPU))
    held: list[int] = []
    write = SequenceState.write_edge
    monkeypatch.setattr(
        SequenceState, "write_edge", lambda self, *rest: (write(self, *rest), held.append(self.edge_nbytes))[0]
    )
    model.eval()
    loss = runner.evaluate(batch).loss
    model.train()
    assert max(held) == one_edge
    assert all(map(torch.equal, model.parameters(), weights))
    assert loss == pytest.approx(runner.run((plan(chunks, 1),), batch).loss, rel=1e-5)


def test_an_edge_goes_through_the_store() -> None:
    state, key = SequenceState(4), EdgeKey("layer", "scan0", 4)
    value = torch.ones(2, 3, requires_grad=True)
    state.write_edge(key, value * 2)
    state.write_edge(key, value * 3)  # a recompute: what is there stays
    assert torch.equal(state.read_edge(key), torch.full((2, 3), 2.0))
    assert not state.read_edge(key).requires_grad
    assert state.nbytes == state.edge_nbytes == 24
    state.put_edge_gradient(key, torch.full((2, 3), 5.0))
    assert state.nbytes == 24
    with pytest.raises(AssertionError, match="read after its last use"):
        state.read_edge(key)
    gradient = state.take_edge_gradient(key)
    assert gradient is not None
    assert torch.equal(gradient, torch.full((2, 3), 5.0))
    assert state.nbytes == 0
    state.write_edge(key, value)  # a late recompute must not bring it back
    assert state.nbytes == 0
    assert state.take_edge_gradient(key) is None


def closed_states(monkeypatch: pytest.MonkeyPatch) -> list[SequenceState]:
    """Return the states of sequences that have gone backward; filled later."""
    closed: list[SequenceState] = []
    close = StateStore.close
    monkeypatch.setattr(
        StateStore, "close", lambda self, sequence: (closed.append(self._sequences[sequence]), close(self, sequence))[1]
    )
    return closed


def test_the_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edge is used up when its sequence closes."""
    closed = closed_states(monkeypatch)
    run_step(recurrent_model("nemotron_h"), Case(LENGTHS, 13, 2, checkpointing=FULL))
    assert [state.nbytes for state in closed] == [0, 0]


# Segments.


@pytest.mark.parametrize(("tokens", "block", "expected"), [
    (1, 64, 16), (16, 64, 16), (17, 64, 32), (33, 64, 64), (1000, 64, 64), (20, 256, 32), (5, 8, 8),
])  # fmt: skip
def test_blocks_of_short_segments(tokens: int, block: int, expected: int) -> None:
    assert block_for(tokens, block) == expected


def test_batches_waste_little() -> None:
    lengths = [1, 2, 40, 30, 9, 10, 28, 7]
    spans = Packing((0, *itertools.accumulate(lengths)), CPU).spans
    made = batches(spans, torch.device("cuda"))
    assert sorted(span.start for batch in made for span in batch) == [span.start for span in spans]
    for batch in made:
        sizes = [span.stop - span.start for span in batch]
        assert sum(sizes) >= 0.7 * len(sizes) * max(sizes)
    assert batches(spans, CPU) == [[span] for span in spans]


SHORT_ONES = Case((40, 9, 10, 8, 3, 2, 2, 1), 16, 1)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name != "lfm2"])
def test_padded_batches_are_exact(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What GPUs do: segments of similar lengths as one padded batch."""
    for module in (scans_module, mixers_module):
        monkeypatch.setattr(module, "batches", lambda spans, device: batches(spans, torch.device("cuda")))
    with float64_throughout():
        result = compared(recurrent_model(name, torch.float64), SHORT_ONES)
    assert result.grad_rel_error <= TOLERANCE


@pytest.mark.parametrize(("name", "function"), [
    ("qwen3_5", "torch_chunk_gated_delta_rule"), ("kimi_linear", "chunk_kimi_delta_attention"),
])  # fmt: skip
def test_a_kernel_that_takes_packed_chunks(monkeypatch: pytest.MonkeyPatch, name: str, function: str) -> None:
    """flash-linear-attention cannot run here. Its stand-in takes what chunk_gated_delta_rule and chunk_kda of fla 0.6.0
    take, one initial state for each segment, and returns all last states."""
    model = recurrent_model(name, torch.float64)
    prepare_recurrent_layers(model)
    home = sys.modules[type(model).__module__]
    plain = inspect.unwrap(getattr(home, function))
    calls = []

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
        initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if cu_seqlens is None:
            return plain(q, k, v, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
        assert len(q) == 1
        assert scale is None
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        calls.append(len(cu_seqlens) - 1)
        outputs, lasts = [], []
        for index, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            out, last = plain(
                *(each[:, start:stop] for each in (q, k, v, g, beta)), output_final_state=True,
                initial_state=None if initial_state is None else initial_state[index : index + 1],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
            outputs.append(out)
            lasts.append(last)
        return torch.cat(outputs, 1), torch.cat(lasts) if output_final_state else None

    def as_transformers_calls_it(*args: Any, **options: Any) -> Any:
        names = inspect.signature(kernel).parameters
        return kernel(*args, **{key: value for key, value in options.items() if key in names})

    monkeypatch.setattr(home, function, as_transformers_calls_it)  # `ChunkModel` exchanges it
    monkeypatch.setattr(scans_module, "takes_packed_chunks", lambda scan, device: True)
    with float64_throughout():
        result = compared(model, SHORT_ONES)
    assert result.grad_rel_error <= TOLERANCE
    assert max(calls) > 2


def test_packed_chunks_are_for_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as the guard has it, transformers' own function runs where flash-linear-attention is installed, too.

    It would take a packed chunk as one sequence.
    """
    scan, right, find = (
        SCANS["torch_chunk_gated_delta_rule"],
        scans_module.takes_packed_chunks,
        importlib.util.find_spec,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "fla" or find(name, *rest))
    monkeypatch.setattr(scans_module, "takes_packed_chunks", lambda scan, device: right(scan, torch.device("cuda")))
    assert right(scan, torch.device("cuda"))
    with float64_throughout():
        assert compared(recurrent_model("qwen3_5", torch.float64), SHORT_ONES).grad_rel_error <= TOLERANCE


# The scope of a forward.


def test_scopes_nest_and_end() -> None:
    outer, inner = ForwardScope("outer"), ForwardScope("inner")
    assert forward_value() is None
    with outer:
        with inner, outer:
            assert forward_value() == "outer"
        assert forward_value() == "outer"
    assert forward_value() is None


@pytest.fixture(autouse=True)
def _no_scope_is_left() -> Iterator[None]:
    yield
    assert running_module.running_chunk() is None


def test_a_scan_outside_of_known_layers_is_an_error() -> None:
    context = ChunkAttentionContext(Packing((0, 4), CPU), ReferenceBackend())
    with pytest.raises(AssertionError, match="outside of the layers that were found"):
        RunningChunk(context)._key("conv0", 0)


def test_two_convolutions_of_a_layer_are_kept_apart() -> None:
    """With one name for both, the second would read what the first has left."""
    chunk = RunningChunk(ChunkAttentionContext(Packing((0, 4), CPU), ReferenceBackend()))
    chunk.begin_layer("one")
    assert [chunk.begin_call(kind) for kind in ("conv", "scan", "conv")] == ["conv0", "scan0", "conv1"]
    chunk.begin_layer("two")
    assert chunk.begin_call("conv") == "conv0"
