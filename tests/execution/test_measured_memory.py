"""The formulas for bytes of weights, activations and state, against the tensors that stages and steps really hold."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import recurrent_model
from torch._subclasses import FakeTensor

from chunkflow_cli.config.schema import ActivationCheckpointing, LoraConfig
from chunkflow_cli.execution.activation_probe import activation_bytes_per_token
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkCall, ChunkModel, base_model
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageModel
from chunkflow_cli.execution.state_home import OnDevice, host_home
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepContext
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.shape import model_shape, with_adapters
from chunkflow_cli.model.shape_probe import kept_for_backward
from chunkflow_cli.model.special_types import computes_own_attention
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.memory_parts import (
    kept_bytes_per_token,
    rerun_bytes_per_token,
    state_bytes,
)
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import cut_layers
from chunkflow_cli.planning.state_memory import gradients_of_windows, host_bytes
from support.models import OWN_ATTENTION, RECURRENT

CPU = torch.device("cpu")

NARROW = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def chunk_call(model: Any, length: int = 128) -> tuple[ChunkModel, ChunkCall]:
    """One standalone chunk, ready for the model's forward."""
    attention.register()
    if not computes_own_attention(base_model(model).config):
        base_model(model).set_attn_implementation(attention.NAME)
    batch = StepBatch(build_chunks([length], length), random_sequences([length], 96, seed=1), np.ones(1))
    return ChunkModel(model, CpuBackend()), StepContext(RunnerSettings(CPU), batch).call(0)


def measured_activation_bytes(model: Any, length: int = 128) -> float:
    """Activation bytes per token by the probe, on the chunk of `chunk_call`."""
    (sample,) = random_sequences([length], 96, seed=1)
    return activation_bytes_per_token(chunk_call(model, length)[0], sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 4, "intermediate_size": 256}),
        ("llama", {"head_dim": 64, "num_hidden_layers": 12}),
    ],
)
def test_activation_bytes_against_the_probe(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    """Memory is what the chunk size is chosen by. 1 to 5 % too few here: the final norm and the rotary angles."""
    model = tiny_model(kind, dtype=dtype, **{**NARROW, **settings})
    uncounted = dataclasses.replace(model_shape(model), layer_activation_bytes=None)
    predicted = kept_bytes_per_token(uncounted, dtype.itemsize, "none")
    assert 0.95 <= predicted / measured_activation_bytes(model) <= 1.0


def test_a_configuration_that_validates_its_values_is_probed(tiny_model: Callable[..., Any]) -> None:
    """ModernBERT's takes no pad_token_id of None."""
    model = tiny_model("modernbert-decoder")
    assert 0.9 <= (model_shape(model).layer_activation_bytes or 0) * 2 / measured_activation_bytes(model) <= 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["gpt_neo, window, short table", "bloom", "falcon, alibi", "deepseek_v32, indexer", "inkling", "inkling2"],
)
def test_scores_grow_as_counted(name: str, dtype: torch.dtype, tiny_model: Callable[..., Any]) -> None:
    """A table of all positions, as gpt_neo keeps, does not grow with the tokens. inkling2's router needs float32."""
    kind, settings = {**RECURRENT, **OWN_ATTENTION}[name]
    settings = {**settings, "vocab_size": 96}
    model = tiny_model(kind, dtype=dtype, **settings)
    shape, measured = model_shape(model), []
    short, long = 40, 100
    for length in (short, long):
        module, call = chunk_call(model, length)
        with kept_for_backward(model) as kept:
            hidden = module.hidden(call)
            measured.append(sum(kept.values()))
        del hidden
    predicted = (long - short) * shape.layers * (shape.layer_activation_bytes or 0)
    predicted += (long**2 - short**2) * shape.score_bytes
    assert 0.98 <= predicted / (measured[1] - measured[0]) <= 1.15  # chunks of a long sequence keep more than these


@pytest.mark.parametrize(
    "name", ["bloom", "falcon, alibi", "falcon, one kv head", "gptj", "diffllama", "deepseek_v32, indexer", "hrm_text"]
)
def test_scores_are_counted_without_a_model(name: str, tiny_model: Callable[..., Any]) -> None:
    """Of models that compute attention themselves, falcon with a kernel of torch, which keeps masks instead."""
    kind, settings = OWN_ATTENTION[name]
    model = tiny_model(kind, **settings)
    shape = model_shape(model)
    sequences = random_sequences([256, 64], 96, seed=1)
    chunks = build_chunks([256, 64], 64)
    step = StepContext(RunnerSettings(CPU), StepBatch(chunks, sequences, np.ones(2)))
    measured = []
    for chunk in sorted(range(4), key=lambda index: chunks[index].is_dependent):  # the short sequence first
        with kept_for_backward(model) as kept:
            hidden = ChunkModel(model, CpuBackend()).hidden(step.call(chunk))
            measured.append(sum(kept.values()))
        del hidden
    # A chunk alone and one of a long sequence keep different views of queries, keys and values.
    predicted = 64 * shape.layers * (shape.layer_activation_bytes or 0) + 64**2 * shape.score_bytes
    assert predicted == pytest.approx(max(measured[:2]), rel=0.01)
    for past, kept_bytes in zip((64, 128), measured[2:], strict=True):
        with_past = predicted + past * (64 * shape.score_bytes + shape.past_key_bytes)
        assert kept_bytes * 0.99 <= with_past <= kept_bytes * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma3_text", {"head_dim": 32}),
        ("olmo2", {}),
        ("phi3", {}),
        ("granite", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_activations_are_counted_without_a_model(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    """Up to 7 % too many: the formula lacks half of gemma3's, which has four norms a layer and two in its attention."""
    model = tiny_model(kind, dtype=dtype, **{**NARROW, **settings})
    with torch.device("meta"):
        empty = type(model)._from_config(model.config, dtype=dtype)
    counted = model_shape(empty).layer_activation_bytes
    assert counted is not None
    measured = measured_activation_bytes(model) / model.config.num_hidden_layers
    assert 0.99 <= counted / measured <= 1.07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_bytes_of_checkpointed_layers(mode: str, dtype: torch.dtype, tiny_model: Callable[..., Any]) -> None:
    """What a layer more keeps after the forward, and besides it the one layer that goes backward."""

    def kept(layers: int) -> float:
        model = tiny_model("llama", dtype=dtype, **{**NARROW, "num_hidden_layers": layers})
        enable_activation_checkpointing(model, ActivationCheckpointing(mode))
        return bytes_kept_by_forward(*chunk_call(model))

    sizes = [{**NARROW, "num_hidden_layers": layers} for layers in (2, 6)]
    shapes = [model_shape(tiny_model("llama", dtype=dtype, **settings)) for settings in sizes]
    two, six = (kept_bytes_per_token(shape, dtype.itemsize, mode) for shape in shapes)
    assert (six - two) / 4 == pytest.approx((kept(6) - kept(2)) / 4, rel=0.02)
    assert 3 * two == pytest.approx(six), "the layer that runs again is not kept"
    two, six = (kept_bytes_per_token(shape, dtype.itemsize, "none") for shape in shapes)
    assert rerun_bytes_per_token(shapes[1], dtype.itemsize, mode) == pytest.approx((six - two) / 4, rel=0.04)


def bytes_kept_by_forward(model: ChunkModel, call: ChunkCall) -> float:
    """A token's share of everything that lives after the forward and did not before, random states excepted.

    Selective checkpointing keeps its tensors where no hook on saved tensors sees them, so all tensors are looked at.
    """

    def living() -> dict[int, int]:
        gc.collect()
        tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
        # Those of other tests on a device that is not there have no memory.
        storages = (tensor.untyped_storage() for tensor in tensors if not isinstance(tensor, FakeTensor))
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    before = living()
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(call)
    kept = {place: size for place, size in {**living(), **saved}.items() if place not in before}
    del hidden
    random_state = torch.get_rng_state().nbytes  # one a checkpointed layer, however many tokens it has
    return sum(size for size in kept.values() if size != random_state) / call.batch.input_ids.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "size", "k"), [(100, 32, 1), (128, 32, 2), (33, 32, 1), (97, 32, 4), (32, 32, 1)])
def test_state_bytes_against_the_state_store(
    dtype: torch.dtype, length: int, size: int, k: int, tiny_model: Callable[..., Any]
) -> None:
    """To the byte: keys and values of all but the last chunk, and their gradients in float32 (float64 in float64).

    Of a layer with a window, only what a later chunk sees. In host memory, whole blocks.
    """
    attention.register()
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12}
    model = tiny_model("gemma3_text", dtype=dtype, head_dim=16, **kinds)
    shape = model_shape(model)
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks([length], size)
    batch = StepBatch(chunks, random_sequences([length], 96, seed=1), np.full(1, 1 / length))
    peaks, in_host_memory = [], host_home(CPU)
    for home in (OnDevice(), in_host_memory):
        settings = RunnerSettings(CPU, torch.promote_types(dtype, torch.float32), state_home=home)
        runner = Runner(DirectEngine(ChunkModel(model, ReferenceBackend())), settings)
        peaks.append(runner.run((plan(chunks, k),), batch).peak_state_bytes)
    stored = (length - 1) // size * size
    blocks = host_bytes(shape, stored, stored / size, element_bytes=dtype.itemsize, chunk_size=size, device_type="cpu")
    assert peaks == [state_bytes(shape, length, size, dtype.itemsize), blocks]
    rounded_up = in_host_memory.host_bytes - blocks  # to whole multiples, buffer by buffer
    assert 0 <= rounded_up < (gradients_of_windows(shape, dtype.itemsize, size) if stored else 1), "more in between"


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5", "kimi_linear", "lfm2", "nemotron_h", "falcon_h1", "zamba2", "jamba", "zaya", "minimax",
        "recurrent_gemma", "rwkv", "xlstm",
    ],
)  # fmt: skip
def test_memory_of_recurrent_layers_without_a_model(name: str) -> None:
    """The state store to the byte, with an edge behind each chunk but the last, and activations within 4 %."""
    attention.register()
    model = recurrent_model(name, torch.bfloat16)
    shape = model_shape(model)
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks([70], 16)
    batch = StepBatch(chunks, random_sequences([70], 67, seed=1), np.full(1, 1 / 70))
    chunk_model = ChunkModel(model, ReferenceBackend())
    runner = Runner(DirectEngine(chunk_model), RunnerSettings(CPU, weight_dtype=torch.float32))
    assert state_bytes(shape, 70, 16, 2) == runner.run((plan(chunks, 1),), batch).peak_state_bytes
    assert shape.recurrent.edge_bytes > 0
    (sample,) = random_sequences([256], 67, seed=1)
    measured = activation_bytes_per_token(chunk_model, sample)
    assert kept_bytes_per_token(shape, 2, "none") == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"dropout": 0.1}, {"use_dora": True, "dropout": 0.1}], ids=str
)
def test_what_dora_and_dropout_keep(settings: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    """Besides what plain adapters keep: of dropout, its result and its mask; of DoRA, the layer's and adapter's results.

    On a CPU, the mask of dropout takes 3 bytes more than on CUDA. But the inputs of frozen layers are counted with the
    model, and dropout leaves no use for them.
    """
    shape = model_shape(tiny_model("llama", **NARROW))

    def adapted(**more: Any) -> Any:
        return add_lora(tiny_model("llama", **NARROW), LoraConfig(enabled=True, r=1, **more))

    more = with_adapters(shape, adapted(**settings))
    predicted = kept_bytes_per_token(more, 4, "none") - kept_bytes_per_token(shape, 4, "none")
    measured = measured_activation_bytes(adapted(**settings)) - measured_activation_bytes(adapted())
    assert predicted / measured == pytest.approx(1, abs=0.1 if "dropout" in settings else 0.15)
    width = max(NARROW["hidden_size"], NARROW["intermediate_size"])
    narrow = min(NARROW["hidden_size"], NARROW["intermediate_size"])
    workspace = 4 * (width * width + 3 * width * narrow) if "use_dora" in settings else 0
    assert more.workspace_bytes == workspace


def test_merged_copies_of_adapted_experts(tiny_model: Callable[..., Any]) -> None:
    """peft makes them in each forward, however few tokens it has: what is kept regardless of the length."""
    model = tiny_model("mixtral", dtype=torch.bfloat16, num_local_experts=4, num_experts_per_tok=2)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    shape = model_shape(model)
    adapted = add_lora(model, LoraConfig(enabled=True, r=2, target_parameters=experts))
    merged = with_adapters(shape, adapted).merged_bytes
    assert merged == 2 * 4 * (64 * 2 * 96 + 64 * 96) * 2, "two layers, four experts, gate, up and down, bfloat16"

    def kept(length: int) -> int:
        chunk_model, call = chunk_call(adapted, length)
        with kept_for_backward(chunk_model) as bytes_of:
            hidden = chunk_model.hidden(call)
        total = sum(bytes_of.values())
        del hidden
        return total

    assert 2 * kept(64) - kept(128) == pytest.approx(merged, rel=0.05)
    assert measured_activation_bytes(adapted) == pytest.approx((kept(128) - kept(64)) / 64), "copies are no activations"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_weights_of_stages_are_those_of_the_real_ones(
    saved: list[str], tied: bool, tiny_model: Callable[..., Any]
) -> None:
    """What is left out of the count by stage: the final norm is counted with the layers."""
    model = tiny_model("qwen2", num_hidden_layers=5, tie_word_embeddings=tied)
    shape = model_shape(model)
    assert shape.is_head_tied is tied
    if saved:
        model = add_lora(model, LoraConfig(enabled=True, r=2, modules_to_save=saved))
        shape = with_adapters(shape, model)
        assert shape.is_head_trained is (tied or "lm_head" in saved)
    for part in [*cut_layers(5, 1), *cut_layers(5, 3, head_in_layers=1.5)]:
        stage = StageModel(copy.deepcopy(model), CpuBackend(), part)
        parameters = list(stage.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        real = sum(parameter.numel() for parameter in parameters)
        assert shape.parameters_of(part) == pytest.approx(real, abs=2 * shape.hidden_size)
        assert shape.trainable_parameters_of(part) == pytest.approx(trained, abs=2 * shape.hidden_size)
