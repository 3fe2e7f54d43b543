"""Calls of operators that exist on CUDA only, bound to their schemas: here, their kernels never run.

They run on the meta device, with the schemas and result shapes of torch and of flash-attn. `test_attention.py` compares
what the calls mean with the kernels' documentation, by emulation; `tests/gpu` runs the kernels.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import chunkflow_cli
from chunkflow_cli.config.schema import ActivationCheckpointing, Attention
from chunkflow_cli.execution.attention import flash
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing, Saved, Sight
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.flash import FlashAttnBackend, TorchFlashBackend
from chunkflow_cli.execution.attention.function import ChunkAttention, ChunkAttentionContext
from chunkflow_cli.execution.attention.layer import LayerAttention
from chunkflow_cli.execution.state import SequenceState, StatePiece
from chunkflow_cli.execution.state_home import OnDevice
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing

META = torch.device("meta")
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, TOKENS, PAST, SCALE = 6, 2, 64, 48, 49, 70, 0.3
CONTRACTS: dict[str, dict[str, Any]] = {
    "aten::_flash_attention_forward": {
        "shapes": {"query": "q", "key": "k", "value": "v", "cum_seq_q": "segments_q", "cum_seq_k": "segments_k"},
        "lengths": ("max_q", "max_k"), "causal": "is_causal", "scale": "scale", "returns": 5,
        "plain": {"dropout_p": 0.0, "return_debug_mask": False},
    },
    "aten::_flash_attention_backward": {
        "shapes": {
            "grad_out": "q", "query": "q", "key": "k", "value": "v", "out": "q", "logsumexp": "lse",
            "cum_seq_q": "segments_q", "cum_seq_k": "segments_k",
        },
        "lengths": ("max_q", "max_k"), "causal": "is_causal", "scale": "scale", "returns": 3,
        "plain": {"dropout_p": 0.0},
    },
    "flash_attn::_flash_attn_varlen_forward": {
        "shapes": {"q": "q", "k": "k", "v": "v", "cu_seqlens_q": "segments_q", "cu_seqlens_k": "segments_k"},
        "lengths": ("max_seqlen_q", "max_seqlen_k"), "causal": "causal", "scale": "softmax_scale", "returns": 4,
        "plain": {"dropout_p": 0.0, "return_softmax": False, "softcap": 0.0},
    },
    "flash_attn::_flash_attn_varlen_backward": {
        "shapes": {
            "dout": "q", "q": "q", "k": "k", "v": "v", "out": "q", "softmax_lse": "lse", "dq": "q", "dk": "k", "dv": "v",
            "cu_seqlens_q": "segments_q", "cu_seqlens_k": "segments_k",
        },
        "lengths": ("max_seqlen_q", "max_seqlen_k"), "causal": "causal", "scale": "softmax_scale", "returns": 1,
        "plain": {"dropout_p": 0.0, "softcap": 0.0}, "deterministic": "deterministic",
    },
    "aten::_efficient_attention_forward": {
        "shapes": {"query": "1q", "key": "1k", "value": "1v"}, "mask": "custom_mask_type", "scale": "scale",
        "returns": 6, "plain": {"dropout_p": 0.0, "compute_log_sumexp": True, "bias": None},
    },
    "aten::_efficient_attention_backward": {
        "shapes": {"grad_out_": "1q", "query": "1q", "key": "1k", "value": "1v", "out": "1q", "logsumexp": "padded lse"},
        "lengths": ("max_seqlen_q", "max_seqlen_k"), "mask": "custom_mask_type", "scale": "scale", "returns": 4,
        "plain": {"dropout_p": 0.0, "bias_requires_grad": False, "bias": None},
    },
}  # fmt: skip
"""Operator -> what each of its arguments is given, by the names in its schema, and how many results it has."""
ON_EVERY_DEVICE = {
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_unsafe_view",
}  # fmt: skip


@pytest.fixture
def flash_attn() -> Iterator[None]:
    """The package, or its operators as recorded."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    from support import flash_attn_2_8_3

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attn_2_8_3)
        yield


class Calls(TorchDispatchMode):
    """Records calls of the operators above: name, arguments by the names of the schema, and results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficient_attention_backward.default:
            # torch's own function for the meta device lacks an argument that the schema and the kernel have.
            results = (*map(torch.empty_like, args[1:4]), args[0].new_empty(()))
        else:
            results = func(*args, **(kwargs or {}))
        if func.name() in CONTRACTS:
            schema = func._schema.arguments
            bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
            bound |= {argument.name: value for argument, value in zip(schema, args, strict=False)} | (kwargs or {})
            self.found.append((func.name(), bound, results))
        return results


def calls_of(backend: Backend, dtype: torch.dtype, *, past: bool, key_dim: int = KEY_DIM) -> list[Any]:
    """Run a forward and a backward and check the shapes of what they return."""
    count = PAST if past else TOKENS

    def tensor(heads: int, tokens: int, channels: int) -> Tensor:
        return torch.empty(1, heads, tokens, channels, dtype=dtype, device=META)

    queries, grad_out = tensor(HEADS, TOKENS, key_dim), tensor(HEADS, TOKENS, VALUE_DIM)
    keys, values = tensor(KV_HEADS, count, key_dim), tensor(KV_HEADS, count, VALUE_DIM)
    sight = Sight(AttentionRule(SCALE), None if past else Packing((0, 30, TOKENS), META))
    with Calls() as calls:
        out, lse = backend.forward(queries, keys, values, sight)
        grads = backend.backward(grad_out, Saved(queries, keys, values, out, lse), sight)
    assert lse.shape == (1, HEADS, TOKENS)
    assert [each.shape for each in (out, *grads)] == [each.shape for each in (grad_out, queries, keys, values)]
    return calls.found


BACKENDS: list[tuple[type[Backend], torch.dtype, int]] = [
    (TorchFlashBackend, torch.bfloat16, KEY_DIM),
    (FlashAttnBackend, torch.bfloat16, KEY_DIM),
    (TorchFlashBackend, torch.float32, KEY_DIM),
    (TorchFlashBackend, torch.bfloat16, 512),
]


@pytest.mark.parametrize("past", [False, True], ids=["own", "past"])
@pytest.mark.parametrize(("backend", "dtype", "key_dim"), BACKENDS)
@pytest.mark.usefixtures("flash_attn")
def test_calls_fit_the_schemas(backend: type[Backend], dtype: torch.dtype, key_dim: int, past: bool) -> None:
    """Each argument is what the schema calls it; each result is used as what it is."""
    spans = [(TOKENS, PAST)] if past else [(30, 30), (19, 19)]
    is_varlen = dtype is not torch.float32 and key_dim <= 256
    torch.use_deterministic_algorithms(past)  # torch's own kernels ask torch
    try:
        calls = calls_of(backend(), dtype, past=past, key_dim=key_dim)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == (2 if is_varlen else 2 * len(spans))
    for index, (name, given, results) in enumerate(calls):
        contract = CONTRACTS[name]
        rows, columns = (TOKENS, spans[-1][1] if past else TOKENS) if is_varlen else spans[index % len(spans)]
        heads, group = HEADS, HEADS // KV_HEADS
        if past and not is_varlen:  # without a mask, the queries that share a key head can be rows of one
            heads, rows = KV_HEADS, rows * group
        shapes = {
            "q": (rows, HEADS, key_dim), "k": (columns, KV_HEADS, key_dim), "v": (columns, KV_HEADS, key_dim),
            "segments_q": (len(spans) + 1,), "segments_k": (len(spans) + 1,), "lse": (HEADS, rows),
            "1q": (1, rows, heads, key_dim), "1k": (1, columns, heads, key_dim), "1v": (1, columns, heads, key_dim),
            "padded lse": (1, heads, -(-rows // 32) * 32),
        }  # fmt: skip
        assert {argument: tuple(given[argument].shape) for argument in contract["shapes"]} == {
            argument: shapes[kind] for argument, kind in contract["shapes"].items()
        }
        longest = max(spans) if is_varlen else (rows, columns)
        if "lengths" in contract:
            assert tuple(given[argument] for argument in contract["lengths"]) == longest
        assert given[contract["scale"]] == SCALE
        if "causal" in contract:
            assert given[contract["causal"]] is not past
            assert (given["window_size_left"], given["window_size_right"]) == (-1, -1 if past else 0)
        else:
            assert given[contract["mask"]] == (0 if past else 1)
        if "deterministic" in contract:
            assert given[contract["deterministic"]] is past
        for argument, value in contract["plain"].items():
            assert given[argument] == value
        assert (1 if isinstance(results, Tensor) else len(results)) == contract["returns"]


def test_no_call_goes_unchecked() -> None:
    """Every operator that src/ calls by name has a contract here."""
    called = set()
    for path in Path(chunkflow_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                words = ast.unparse(node.func)
                if words.startswith("torch.ops."):
                    called.add(words.removeprefix("torch.ops.").replace(".", "::"))
                elif words.startswith("_flash_attn"):
                    called.add(f"flash_attn::{words}")
    assert called - ON_EVERY_DEVICE == set(CONTRACTS)


@pytest.mark.parametrize(("backend", "dtype", "key_dim"), BACKENDS)
@pytest.mark.usefixtures("flash_attn")
def test_selective_checkpointing_does_not_recompute_attention(
    backend: type[Backend], dtype: torch.dtype, key_dim: int
) -> None:
    """A backward calls the forward kernels once more, unless their result was kept: of own tokens, and two blocks."""

    def forward(mode: ActivationCheckpointing) -> Callable[[], int]:
        contexts: list[Callable[..., Any]] = []
        model = types.SimpleNamespace(
            activation_checkpointing_enable=lambda activation_checkpointing_kwargs: contexts.append(
                activation_checkpointing_kwargs["context_fn"]
            ),
            disable_input_require_grads=lambda: None,
        )
        enable_activation_checkpointing(model, mode)

        def attend(inputs: Tensor) -> Tensor:
            state = SequenceState(TOKENS, OnDevice(TOKENS - 1))
            past = torch.empty(TOKENS, KV_HEADS, key_dim, dtype=dtype, device=META)
            state.write(0, 0, {"keys": past, "values": past})
            packing, piece = Packing((0, TOKENS), META), StatePiece(state, TOKENS, False)
            chunk, layer = ChunkAttentionContext(packing, backend(), piece), LayerAttention(0, AttentionRule(SCALE))
            out: Tensor = ChunkAttention.apply(inputs, inputs, inputs, None, chunk, layer)
            return out

        def count() -> int:
            inputs = torch.empty(1, KV_HEADS, TOKENS, key_dim, dtype=dtype, device=META, requires_grad=True)
            with Calls() as calls:
                out = checkpoint(attend, inputs, use_reentrant=False, context_fn=contexts[0])
                out.sum().backward()
            return sum(name.endswith("forward") for name, *_ in calls.found)

        return count

    assert forward(ActivationCheckpointing.full)() == 2 * forward(ActivationCheckpointing.selective)() == 6


def test_old_gpus_are_told(tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels and bfloat16 need compute capability 8.0; torch's error about it names neither."""
    from chunkflow_cli.errors import UsageError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    config, device = tiny_config("llama", head_dim=64), torch.device("cuda", 0)
    for name in (Attention.torch_flash, Attention.flash_attn):
        with pytest.raises(UsageError, match=rf"{name.value}: .* compute capability 8\.0 .* this GPU has 7\.5"):
            choose_backend(name, config, device, torch.bfloat16)
    assert choose_backend(Attention.auto, config, device, torch.bfloat16).backend.name == "reference"
    assert choose_backend(Attention.torch_flash, config, device, torch.float32).backend.name == "torch_flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_backend(Attention.torch_flash, config, device, torch.bfloat16).backend.name == "torch_flash"


def test_a_flash_attn_that_cannot_be_imported_is_told(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was often compiled for another torch: `auto` then takes torch's kernels, and a request is refused."""
    from chunkflow_cli.errors import UsageError

    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config, device = tiny_config("llama", head_dim=64), torch.device("cuda", 0)
    choice = choose_backend(Attention.auto, config, device, torch.bfloat16)
    assert (choice.backend.name, choice.reason) == (
        "torch_flash",
        "flash_attn: the package flash-attn cannot be imported (undefined symbol: _ZN3c10): install one that was built "
        "for this PyTorch",
    )
    with pytest.raises(UsageError, match="undefined symbol"):
        choose_backend(Attention.flash_attn, config, device, torch.bfloat16)
    sys.modules.pop("flash_attn", None)


def test_no_block_of_the_past_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of segments go to a GPU once, from pinned memory: other copies wait for all that was computed before."""
    sent: list[tuple[bool, Any]] = []

    class OnHost:
        def numel(self) -> int:
            return 2

        def pin_memory(self) -> OnHost:
            sent.append((True, None))
            return self

        def to(self, device: Any, non_blocking: bool = False) -> Tensor:
            sent.append((non_blocking, device))
            return torch.zeros(2, dtype=torch.int32)

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: OnHost())
    queries: Any = types.SimpleNamespace(shape=(1, 1, 12345, 8), device=device)
    for _ in range(3):
        _ = flash._Kernel.of(queries, queries, Sight(AttentionRule(SCALE))).bounds
    assert sent == [(True, None), (True, device)]
