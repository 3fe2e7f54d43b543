"""The shape of a model, which all costs are counted from, against torch's own counts and the model's real weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import Init, LoraConfig, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model import shape_probe
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import empty_model, load_model
from chunkflow_cli.model.recurrent_functions import KERNEL_PACKAGES
from chunkflow_cli.model.scan_shapes import recurrent_functions_on_meta
from chunkflow_cli.model.shape import model_shape, shape_without_weights, with_adapters
from chunkflow_cli.model.shape_probe import kept_for_backward
from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.model_shape import training_flops
from support.models import RECURRENT, RECURRENT_TINY, TINY, recurrent_model
from support.models import SHAPES as KINDS_OF_ATTENTION


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}),
    ],
)
@pytest.mark.parametrize("length", [32, 200])
def test_operations_against_torchs_own_count(
    kind: str, settings: dict[str, Any], length: int, tiny_model: Callable[..., Any]
) -> None:
    """MFU is a claim: a head counted twice, an embedding taken for a product or idle experts would flatter it.

    torch counts whole squares of attention; ours leaves out the half of the square that is masked.
    """
    model = tiny_model(kind, **settings)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = torch.randint(3, 96, (1, length))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids).logits.sum().backward()
    shape = model_shape(model)
    masked = shape.attention_flops_per_pair * length**2 / 2
    ours = training_flops([length], shape)
    assert forward.get_total_flops() - masked == pytest.approx(ours / 3)
    assert both.get_total_flops() - 3 * masked == pytest.approx(ours)


SHAPES = [
    ("llama", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "settings"), SHAPES, ids=[kind for kind, _ in SHAPES])
def test_shape_without_weights_is_that_of_the_model(
    kind: str, settings: dict[str, Any], lora: bool, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """`plan` must count what `train` will hold, tied heads once and adapters too."""
    tiny_config(kind, **settings).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), init=Init.random, lora=LoraConfig(enabled=lora, r=4))
    hf_config = load_config(config)
    dtype = getattr(torch, config.dtype.value)
    model: Any = load_model(config, hf_config, dtype=dtype, attention="sdpa", seed=0)
    expected = model_shape(model)
    if lora:
        expected = with_adapters(expected, add_lora(model, config.lora))
        assert 0 < expected.trainable_parameters < expected.parameters
    found = shape_without_weights(config, hf_config)
    assert found == expected
    assert expected.parameters == sum(parameter.numel() for parameter in model.parameters())


# What recurrent layers hand on, and what attention keeps, in models of real size

GATED_DELTA = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_value_heads": 16, "linear_num_key_heads": 16,
}  # fmt: skip
NEMOTRON = {
    "hidden_size": 4096, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}  # fmt: skip
LATENT = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 64, "n_routed_experts": 8}
SHARED = {"num_hidden_layers": 10, "num_kv_shared_layers": 5}


@pytest.mark.parametrize(
    ("kind", "settings", "attention", "edge_bytes"),
    [
        # Qwen3.5-0.8B. 18 layers: 3 columns of queries, keys and values in bfloat16, and 16 states of 128 x 128.
        ("qwen3_5_text", GATED_DELTA, [(6, 8, 2, 256, 256)], 18 * (3 * 3 * 16 * 128 * 2 + 16 * 128 * 128 * 4)),
        # LFM2-1.2B. 10 layers with 2 columns of the hidden size.
        (
            "lfm2", {"hidden_size": 2048, "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]},
            [(6, 32, 8, 64, 64)], 10 * 2 * 2048 * 2,
        ),
        # Nemotron-H-8B. 24 layers of 128 heads of 64 channels with 128 numbers each; 8 groups of B and C.
        (
            "nemotron_h", NEMOTRON, [(4, 32, 8, 128, 128)],
            24 * (3 * (128 * 64 + 2 * 8 * 128) * 2 + 128 * 64 * 128 * 4),
        ),
        # Kimi-Linear-48B. 20 of 27 layers, and latent attention with keys of 128 + 64 channels.
        ("kimi_linear", {}, [(6, 32, 32, 192, 128)], 21 * (3 * 3 * 32 * 128 * 2 + 32 * 128 * 128 * 4)),
        ("mamba2", {"num_hidden_layers": 2}, [], 2 * (3 * (8192 + 2 * 8 * 128) * 2 + 128 * 64 * 128 * 4)),
        # ZAYA1-8B. Two columns of queries and keys, and half of the last token's values.
        ("zaya", {}, [(40, 8, 2, 128, 128)], 40 * (2 * (8 + 2) * 128 + 128) * 2),
        # MiniMax-Text-01 in small. A state of 128 x 128 for each head, in bfloat16.
        ("minimax", {"num_hidden_layers": 4, "num_local_experts": 2}, [(2, 32, 8, 128, 128)], 2 * 32 * 128 * 128 * 2),
        # RecurrentGemma-2B. Every third layer attends. Three columns in bfloat16, and a state in float32.
        (
            "recurrent_gemma", {"num_key_value_heads": 1, "num_hidden_layers": 3},
            [(1, 10, 1, 256, 256, 2048)], 2 * (3 * 2560 * 2 + 2560 * 4),
        ),
        # RWKV-4-169M. The last inputs of two modules, and three numbers for each channel.
        ("rwkv", {"hidden_size": 768, "num_hidden_layers": 12}, [], 12 * (2 * 768 * 2 + 3 * 768 * 4)),
        # xLSTM-7B in small. For each of 8 heads 256 x 512 numbers, their normalizer and their largest exponent.
        ("xlstm", {"num_hidden_layers": 2}, [], 2 * 8 * (256 * 512 + 256 + 1) * 4),
        ("deepseek_v3", LATENT, [(4, 128, 128, 192, 128)], 0),
        (
            "gemma3n_text", SHARED,
            [(4, 8, 2, 256, 256, 512), (1, 8, 2, 256, 256), (4, 8, 2, 256, 256, 512, None, False),
             (1, 8, 2, 256, 256, None, None, False)], 0,
        ),
        (
            "gemma4_text", {"num_hidden_layers": 6},
            [(5, 8, 4, 256, 256, 512), (1, 8, 4, 512, 512)], 0,
        ),
        (
            "llama4_text", {"num_hidden_layers": 4, "num_local_experts": 2, "attention_chunk_size": 4096},
            [(3, 40, 8, 128, 128, None, 4096), (1, 40, 8, 128, 128)], 0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_the_layers_of_known_families_keep(
    kind: str, settings: dict[str, Any], attention: list[tuple[Any, ...]], edge_bytes: int
) -> None:
    """By hand from the published sizes: `head_dim` of a configuration often says something else."""
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape = model_shape(model)
    assert shape.attention == tuple(AttentionLayers(*sizes) for sizes in attention)
    assert shape.recurrent.edge_bytes == edge_bytes


def test_a_layer_that_takes_a_view_of_what_attention_returns_is_counted() -> None:
    """afmoe does. Its forward failed on the meta device, and planning fell back to a formula without a word."""
    kind, settings = KINDS_OF_ATTENTION["afmoe, a view of the output"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **settings}))
    assert model_shape(model).layer_activation_bytes


@pytest.mark.parametrize(
    ("kind", "scan", "shapes", "options", "bytes_per_token"),
    [
        # FLA saves copies of queries, keys and values, 2 x 8 + 2 x 8 + 4 x 16 channels, four betas and decays (float32),
        # two norms of each of two key heads, and a row of 64 for each of four heads.
        (
            "qwen3_5_text", "torch_chunk_gated_delta_rule",
            [(2, 8), (2, 8), (4, 16), (4,), (4,)], {}, 2 * (16 + 16 + 64 + 4) + 4 * 4 + 2 * 2 * 4 + 2 * 4 * 64,
        ),
        # The same with four heads of 8, a decay for each channel, before and after it is summed up, and two rows.
        (
            "kimi_linear", "chunk_kimi_delta_attention", [(4, 8), (4, 8), (4, 8), (4, 8), (4,)], {},
            2 * (3 * 32 + 4) + 4 * 32 + 2 * 32 + 2 * 4 * 4 + 2 * 2 * 4 * 64,
        ),
        # mamba_ssm saves its inputs (4 heads of 8, steps, B and C of two groups), its output and the summed decays.
        (
            "nemotron_h", "mamba2_chunk_scan", [(4, 8), (4,), None, (2, 16), (2, 16)], {"chunk_size": 16},
            2 * (32 + 4 + 32 + 32) + 4 * 4 + 4 * 32,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_the_kernels_of_scans_keep(
    kind: str, scan: str, shapes: list[Any], options: dict[str, Any], bytes_per_token: int
) -> None:
    """By hand from the tensors that the packages save (FLA, mamba_ssm); their torch counterparts keep far more."""
    with torch.device("meta"):
        sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        decays = torch.empty(4)
    kept = {}
    for kernels in (frozenset(), KERNEL_PACKAGES):
        arguments = [
            decays
            if shape is None
            else torch.empty(1, 64, *shape, dtype=torch.bfloat16, device="meta").requires_grad_()
            for shape in shapes
        ]
        with kept_for_backward(nn.Module()) as bytes_of, recurrent_functions_on_meta(model, kernels, bytes_of) as tally:
            output = getattr(sys.modules[type(model).__module__], scan)(*arguments, **options)
        kept[kernels] = sum(bytes_of.values()) / 64
        del output
    assert (
        tally.edge_bytes == 4 * {"qwen3_5_text": 4 * 8 * 16, "kimi_linear": 4 * 8 * 8, "nemotron_h": 4 * 8 * 16}[kind]
    )
    assert kept[KERNEL_PACKAGES] == bytes_per_token == tally.activation_bytes / 64
    assert kept[frozenset()] > 2 * bytes_per_token


@pytest.mark.parametrize(("name", "where", "method"), [
    ("lfm2", "model.layers.2.feed_forward", "forward"),
    ("rwkv", "rwkv.blocks.0.attention", "extract_key_value"),  # before any recurrent layer has run to its end
])  # fmt: skip
def test_recurrent_layers_that_cannot_be_read_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, where: str, method: str
) -> None:
    """Formulas know no recurrent layers, so a plan without the forward would be wrong."""
    model_type, changes = RECURRENT[name]
    settings = {key: value for key, value in {**RECURRENT_TINY, **changes}.items() if value is not None}
    model = empty_model(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    monkeypatch.setattr(type(model.get_submodule(where)), method, lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(
        UsageError, match=rf"a model of type '{name}' cannot be planned: .*\n  another model\.dtype may work"
    ):
        model_shape(model)


@pytest.mark.parametrize(("kind", "settings"), [
    ("modernbert-decoder", {}),  # its configuration refuses no padding
    ("dots3_note_text", {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 9,
        "index_n_heads": 2, "index_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
    }),  # heads that may differ by layer
])  # fmt: skip
def test_unusual_configurations_are_read(kind: str, settings: dict[str, Any], tiny_config: Callable[..., Any]) -> None:
    config = tiny_config(kind, **settings)
    assert model_shape(empty_model(config, dtype=torch.float32)).layer_activation_bytes


class _Launches(TorchDispatchMode):
    """Counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        is_view = any(
            each.alias_info is not None and not each.alias_info.is_write for each in operation._schema.returns
        )
        self.count += not (is_view or operation.name() in ("aten::_unsafe_view", "aten::empty_like"))
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("rwkv", {}), ("xlstm", {"chunk_size": 64}), ("recurrent_gemma", {}), ("minimax", {"block_size": 256})],
)
def test_launches_of_modules_that_go_through_tokens(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they take nearly all of the time. What all tokens share is launched once, and not counted."""
    counts = []
    for tokens in (256, 512):
        monkeypatch.setattr(shape_probe, "PROBE_TOKENS", tokens)
        with _Launches() as launches:
            shape = model_shape(empty_model(recurrent_model(name, **settings).config, dtype=torch.bfloat16))
        counts.append(launches.count)
    assert shape.recurrent.launches_per_token == pytest.approx((counts[1] - counts[0]) / 256, rel=0.05, abs=0.2)
