"""The guard's small copies: they are built, they keep what shows mistakes, and what fails is said as what it is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.execution import parity, small_copy
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.guard import guard
from chunkflow_cli.execution.parity import Parity
from chunkflow_cli.execution.precision import float64_throughout, without_kernel_packages
from chunkflow_cli.execution.small_copy import small_config
from chunkflow_cli.execution.small_sizes import REACH
from chunkflow_cli.execution.state import SequenceState

CPU = torch.device("cpu")


def guarded(config: Any) -> Parity:
    return guard(config, requested=Attention.auto, device=CPU, dtype=torch.float32)


def copy_of(model_type: str, **settings: Any) -> Any:
    """Return the small copy of an architecture of its real size."""
    small = small_config(AutoConfig.for_model(model_type, **settings))
    parameters = sum(parameter.numel() for parameter in small_copy._skeleton(small).parameters())
    assert parameters < 40e6, f"{parameters / 1e6:.0f} million parameters train for long"
    return small


# --- What a copy keeps -----------------------------------------------------------------------------------------------


def test_attributes_of_single_layers() -> None:
    """Gemma 4: full layers have heads of 512, sliding ones of 256, and the last layers share keys of earlier ones."""
    small = copy_of("gemma4_text", num_hidden_layers=35, num_kv_shared_layers=20)
    sizes = {kind: layer.head_dim for kind, layer in zip(small.layer_types, small.per_layer_config, strict=True)}
    assert sizes == {"sliding_attention": 256, "full_attention": 512}
    assert {*zip(small.layer_types, small.kv_sharing_modes, strict=True)} == {
        (kind, mode) for kind in sizes for mode in (None, "store", "reuse")
    }
    assert small.sliding_window == REACH


def test_lists_that_must_agree() -> None:
    small = copy_of("gemma3n_text")
    layers = small.num_hidden_layers
    assert len(small.intermediate_size) == len(small.activation_sparsity_pattern) == len(small.layer_types) == layers
    assert {0.0, 0.95} == set(small.activation_sparsity_pattern)
    assert small.num_kv_shared_layers == small.kv_sharing_modes.count("reuse") > 0


def test_experts_in_groups() -> None:
    """DeepSeek picks groups of experts, then experts in them; its first layers have none."""
    small = copy_of("deepseek_v3")
    assert (small.n_group, small.topk_group, small.n_routed_experts, small.num_experts_per_tok) == (2, 1, 8, 2)
    assert small.first_k_dense_replace < small.num_hidden_layers == 4


def test_layers_by_period() -> None:
    small = copy_of("jamba")
    assert set(small.layer_types) == {"linear_attention", "full_attention"}
    assert max(small.layers_num_experts) > 1
    assert min(small.layers_num_experts) == 1


def test_layers_by_index() -> None:
    small = copy_of("bamba", attn_layer_indices=[9, 18, 27])
    assert small.layers_block_type == ["linear_attention", "full_attention"]
    assert small.mamba_n_heads * small.mamba_d_head == small.mamba_expand * small.hidden_size


def test_layers_that_share_weights() -> None:
    """Zamba2: all hybrid layers run the same attention module, so two of them are needed."""
    small = copy_of("zamba2")
    hybrid = [index for index, kind in enumerate(small.layers_block_type) if kind == "hybrid"]
    assert small.hybrid_layer_ids == hybrid
    assert len(hybrid) == 2


def test_four_kinds_of_layers() -> None:
    small = copy_of("nemotron_h")
    assert sorted(small.layers_block_type) == ["full_attention", "linear_attention", "mlp", "moe"]
    assert small.mamba_num_heads % small.n_groups == 0
    assert small.n_groups == 2


@pytest.mark.parametrize("model_type", ["mamba2", "granitemoehybrid", "falcon_h1"])
def test_widths_of_mamba_2(model_type: str) -> None:
    small = copy_of(model_type)
    if model_type == "mamba2":
        assert small.num_heads * small.head_dim == small.expand * small.hidden_size
    elif model_type == "falcon_h1":
        assert small.mamba_n_heads * small.mamba_d_head == small.mamba_d_ssm
    else:
        assert small.mamba_n_heads * small.mamba_d_head == small.mamba_expand * small.hidden_size


def test_gated_delta_rule_inside_a_multimodal_configuration() -> None:
    text = copy_of("qwen3_5").get_text_config()
    assert text.layer_types == ["linear_attention", "full_attention"]
    assert (text.linear_num_key_heads, text.linear_num_value_heads, text.head_dim) == (2, 4, 256)


def test_positions_that_matter() -> None:
    """Llama 4 attends within blocks of 8192, and scales queries from position 8192 on."""
    small = copy_of("llama4_text")
    assert set(small.layer_types) == {"chunked_attention", "full_attention"}
    assert small.attention_chunk_size == small.floor_scale == REACH


def test_heads_that_differ_between_layers() -> None:
    kinds = ["full_attention", "sliding_attention"] * 20
    small = copy_of("laguna", layer_types=kinds, num_attention_heads_per_layer=[48, 64] * 20)
    assert len(small.num_attention_heads_per_layer) == small.num_hidden_layers >= 2
    assert all(heads % small.num_key_value_heads == 0 for heads in small.num_attention_heads_per_layer)


def test_a_model_that_insists_on_more_heads() -> None:
    """CodeGen splits its heads in four."""
    assert copy_of("codegen").num_attention_heads == 4


def test_tokens_with_a_meaning_are_in_the_vocabulary() -> None:
    small = copy_of("cwm", eos_token_id=[128001, 128008], pad_token_id=128004)
    assert (small.vocab_size, small.eos_token_id, small.pad_token_id) == (512, [0, 0], 0)


def test_noise_is_off() -> None:
    assert copy_of("phimoe", router_jitter_noise=0.01).router_jitter_noise == 0.0


# --- What a copy shows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "state"), [("qwen3_5_text", "scan"), ("mamba2", "scan"), ("lfm3", "conv")])
def test_the_guard_sees_a_lost_gradient_of_a_state(
    monkeypatch: pytest.MonkeyPatch, model_type: str, state: str
) -> None:
    """With weights as models begin, states fade so fast that this makes a difference of 4e-3 only."""
    config = AutoConfig.for_model(model_type)
    assert guarded(config).passed
    take = SequenceState.take_edge_gradient
    monkeypatch.setattr(
        SequenceState, "take_edge_gradient", lambda self, key: None if state in repr(key) else take(self, key)
    )
    with pytest.raises(UsageError, match=r"cannot be trained exactly in chunks: .* by [0-9.]+e-0[12]"):
        guarded(config)


def test_the_guard_sees_positions_that_a_model_counts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama4_text")
    assert guarded(config).passed
    monkeypatch.setattr(attention, "counts_positions", lambda module: False)
    with pytest.raises(UsageError, match="cannot be trained exactly in chunks"):
        guarded(config)


def test_a_model_that_hands_no_keywords_on() -> None:
    assert guarded(AutoConfig.for_model("stablelm")).passed


# --- What is said ----------------------------------------------------------------------------------------------------


def test_a_copy_that_cannot_be_built(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing about chunks: the model itself may train well."""
    _fail_to_build(monkeypatch, ValueError("width must be a multiple of 7\nsecond line"))
    with pytest.raises(UsageError) as caught:
        guarded(tiny_config("llama"))
    assert str(caught.value).splitlines() == [
        "train.guard: no small copy of a model of type 'llama' can be built, so it is not proved that the model trains "
        "exactly in chunks",
        "  ValueError: width must be a multiple of 7",
        "  compare the model itself with `chunkflow verify`; if that passes, train with train.guard=false",
    ]


def test_a_copy_that_would_be_large(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_copy, "MOST_PARAMETERS", 1000)
    with pytest.raises(UsageError, match=r"no small copy(.|\n)*the smallest one that can be built has 0\.0 billion"):
        guarded(tiny_config("llama"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _fail_to_build(monkeypatch, error)
    with pytest.raises(RunError, match=r"^out of memory: (.|\n)*small copy(.|\n)*train\.guard=false"):
        guarded(tiny_config("llama"))


def test_a_comparison_sums_in_any_order(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no deterministic cumulative sum on CUDA: the scans of a small hybrid model would fail."""
    seen = []

    def compared(*_: Any, **__: Any) -> Parity:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise RuntimeError("enough")

    monkeypatch.setattr("chunkflow_cli.execution.guard.compare", compared)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UsageError, match="enough"):
            guarded(tiny_config("llama"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False]


def test_a_missing_package(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_build(monkeypatch, ModuleNotFoundError("No module named 'xlstm'", name="xlstm"))
    with pytest.raises(UsageError, match=r"need a package that is not installed\n  pip install xlstm$"):
        guarded(tiny_config("llama"))


@pytest.mark.parametrize(("model_type", "reason"), [
    ("cpmant", "its tokens see later ones"),
])  # fmt: skip
def test_reasons(model_type: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^models of type '{model_type}' cannot be trained in chunks\n  .*{reason}"):
        guarded(AutoConfig.for_model(model_type))


def _fail_to_build(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(small_copy, "empty_model", _raising(error))
    monkeypatch.setattr(small_copy, "random_model", _raising(error))


def _raising(error: Exception) -> Callable[..., Any]:
    def build(*_: Any, **__: Any) -> Any:
        raise error

    return build


# --- Arithmetic ------------------------------------------------------------------------------------------------------


def test_float64_throughout() -> None:
    """Kernels compute in float32 whatever the model's dtype is, which hides differences below 1e-6."""
    single = torch.float32
    third = torch.ones(1, dtype=torch.float64) / 3

    def fail_within() -> None:
        with float64_throughout():
            assert third.float() == third.to(torch.float32) == third
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_within()
    assert torch.float32 is single
    assert third.float() != third


def test_without_kernel_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's kernel takes no float32: the small copy would fail where the model itself does not."""
    package = ModuleType("kernels_of_a_package")
    package.scan = functools.partial(_raising(AssertionError("no float32")))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)

    @use_kernel_func_from_hub_with_fallback("scan", package=package.__name__)
    def scan(x: int) -> int:
        return x + 1

    with without_kernel_packages():
        assert scan(1) == 2
    with pytest.raises(AssertionError, match="no float32"):
        scan(1)


def test_float32_is_not_rounded_to_tensorfloat32(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's containers let products round to ten bits: the guard's float32 would be 1e-3 off, and refuse a model."""
    found = []

    def compared(*_: Any) -> Any:
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        raise RuntimeError("seen")

    monkeypatch.setattr(parity, "_train_whole", compared)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with pytest.raises(UsageError, match="seen"):
            guarded(tiny_config("llama"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert found == [("highest", False)]
