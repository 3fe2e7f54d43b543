"""Attention: every backend against a naive softmax with autograd, and chunks with state against the whole sequence.

The CUDA backends are tested for their arithmetic: their kernels are replaced by an emulation that follows the published
semantics of FlashAttention-2, called through the operators' own signatures. The kernels themselves run in tests/gpu.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import cpu, flash
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Output, Packing, Saved, Sight
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.flash import FlashAttnBackend, TorchFlashBackend
from chunkflow_cli.execution.attention.function import ChunkAttention, ChunkAttentionContext, attend
from chunkflow_cli.execution.attention.kernel_check import check_backend, head_dims_of
from chunkflow_cli.execution.attention.layer import LayerAttention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.recurrent import RunningChunk
from chunkflow_cli.execution.state import SequenceState, StatePiece
from chunkflow_cli.execution.state_home import Home, OnDevice, host_home
from chunkflow_cli.model.forward_scope import ForwardScope
from support.models import MLA

CPU = torch.device("cpu")
HEAD_DIM = 8
BOUNDARIES = (0, 7, 8, 20, 33)
WINDOWS = [None, 1, 5, 12, 100]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


# --- The truth: scores, mask, softmax, and autograd for the rest ------------------------------------------------------


def naive_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: AttentionRule, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of softmax attention under a (queries, keys) mask."""
    group = queries.shape[1] // keys.shape[1]
    head_of = torch.arange(queries.shape[1]) // group
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys[:, head_of]) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = torch.where(mask, scores, -math.inf)
    if sinks is not None:  # one more key per head, with this score and a value of zero
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    weights = torch.softmax(scores, dim=3)[..., : keys.shape[2]]
    return torch.einsum("bhqk,bhkd->bhqd", weights, values[:, head_of]), torch.logsumexp(scores, dim=3)


def may_see(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    distance = query_positions[:, None] - key_positions[None, :]
    return (distance >= 0) & (distance < (math.inf if window is None else window))


def packed_mask(boundaries: Sequence[int], window: int | None) -> Tensor:
    segment = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(itertools.pairwise(boundaries))])
    positions = torch.arange(boundaries[-1])
    return may_see(positions, positions, window) & (segment[:, None] == segment[None, :])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random numbers that the dtype holds exactly, so that the float64 comparison has the same input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth_of(
    inputs: Sequence[Tensor], grad_out: Tensor, mask: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [tensor.double().clone().requires_grad_() for tensor in inputs]
    out, lse = naive_attention(*leaves, mask, rule)
    out.backward(grad_out.double())
    return out.detach(), lse.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_close(mine: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == truth.shape
    error = float((mine.double() - truth).norm() / truth.norm().clamp_min(1.0))  # one visible key: no gradient at all
    assert error <= TOLERANCE[dtype], f"{error:.1e} off"


# --- FlashAttention-2, emulated --------------------------------------------------------------------------------------


def flash2_mask(
    queries: int, keys: int, longest_keys: int, causal: bool, window_left: int, window_right: int
) -> Tensor:
    """Return the mask of csrc/flash_attn: the last query is aligned with the last key. A limit below zero means none, but
    if the other side has a limit, it becomes the length of the longest keys."""
    if window_left >= longest_keys:
        window_left = -1
    if window_right >= longest_keys:
        window_right = -1
    if causal:
        window_right = 0
    if window_left < 0 and window_right >= 0:
        window_left = longest_keys
    if window_left >= 0 and window_right < 0:
        window_right = longest_keys
    column = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + keys - queries)
    if window_left < 0:
        return torch.ones(queries, keys, dtype=torch.bool)
    return (column >= -window_left) & (column <= window_right)


class Flash2:
    """The variable-length kernels on (tokens, heads, head_dim)."""

    @staticmethod
    def _each_segment(
        q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, softmax: dict[str, Any]
    ) -> list[tuple[slice, slice, Tensor]]:
        assert q.stride(-1) == 1
        assert k.stride(-1) == 1
        assert cu_q.dtype is torch.int32
        assert cu_k.dtype is torch.int32
        rows, columns = cu_q.tolist(), cu_k.tolist()
        assert rows[-1] == len(q)
        assert columns[-1] == len(k)
        assert max_q == max(b - a for a, b in itertools.pairwise(rows))
        assert max_k == max(b - a for a, b in itertools.pairwise(columns))
        spans = zip(itertools.pairwise(rows), itertools.pairwise(columns), strict=True)
        return [
            (
                slice(*r),
                slice(*c),
                flash2_mask(
                    r[1] - r[0], c[1] - c[0], max_k, softmax["causal"], softmax["window_left"], softmax["window_right"]
                ),
            )
            for r, c in spans
        ]

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mask: Tensor, softmax: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return masked scores (heads, queries, keys), and their derivative with respect to the bare product."""
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax["scale"]
        slope = torch.full_like(scores, softmax["scale"])
        if softmax["softcap"]:
            squashed = torch.tanh(scores / softmax["softcap"])
            scores, slope = squashed * softmax["softcap"], slope * (1 - squashed**2)
        return scores.masked_fill(~mask, -math.inf), slope

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **softmax: Any
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
        for rows, columns, mask in cls._each_segment(q, k, cu_q, cu_k, max_q, max_k, softmax):
            scores, _ = cls._scores(q[rows], k[columns].repeat_interleave(group, 1), mask, softmax)
            # A row that sees nothing gets zeros and an infinite log-sum-exp.
            empty = ~mask.any(1)
            lse[:, rows] = torch.where(empty, math.inf, scores.logsumexp(2))
            weights = torch.exp(scores - lse[:, rows, None])
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v[columns].repeat_interleave(group, 1))
        return out, lse

    @classmethod
    def backward(
        cls, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **softmax: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert lse.shape == (q.shape[1], len(q))
        assert lse.is_contiguous()
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns, mask in cls._each_segment(q, k, cu_q, cu_k, max_q, max_k, softmax):
            all_k, all_v = (t[columns].repeat_interleave(group, 1) for t in (k, v))
            scores, slope = cls._scores(q[rows], all_k, mask, softmax)
            weights = torch.exp(scores - lse[:, rows, None])
            delta = (dout[rows] * out[rows]).sum(2).T[:, :, None]
            dscores = weights * (torch.einsum("qhd,khd->hqk", dout[rows], all_v) - delta) * slope
            dq[rows] = torch.einsum("hqk,khd->qhd", dscores, all_k)
            for grad, full in (
                (dk, torch.einsum("hqk,qhd->khd", dscores, q[rows])),
                (dv, torch.einsum("hqk,qhd->khd", weights, dout[rows])),
            ):
                grad[columns] = full.unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv


def bound(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names in torch's own schema."""
    schema = getattr(torch.ops.aten, operator).default._schema
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert len(args) <= len(positional)
    named = dict(zip(positional, args, strict=False))
    assert set(kwargs) <= {argument.name for argument in schema.arguments} - set(named)
    required = {a.name for a in schema.arguments if not a.has_default_value()}
    assert required <= set(named) | set(kwargs)
    return {**named, **kwargs}


def aten_softmax(named: dict[str, Any]) -> dict[str, Any]:
    assert named["dropout_p"] == 0.0
    return {
        "causal": named["is_causal"], "scale": named["scale"], "softcap": 0.0,
        "window_left": named["window_size_left"], "window_right": named["window_size_right"],
    }  # fmt: skip


@pytest.fixture
def torch_flash(monkeypatch: pytest.MonkeyPatch) -> TorchFlashBackend:
    """The backend of torch's flash operators, with the emulation in their place."""
    names = {"_flash_attention_forward": _emulate_aten_forward, "_flash_attention_backward": _emulate_aten_backward}
    for name, emulation in names.items():
        getattr(torch.ops.aten, name)  # resolved before it is hidden
        bind = _binder(name)
        monkeypatch.setattr(torch.ops.aten, name, _with_names(bind, emulation))
    return TorchFlashBackend()


def _binder(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    operator = getattr(torch.ops.aten, name)

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as unhidden:
            unhidden.setattr(torch.ops.aten, name, operator)
            return bound(name, args, kwargs)

    return bind


def _with_names(bind: Callable[..., dict[str, Any]], emulation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: emulation(bind(args, kwargs))


def _emulate_aten_forward(named: dict[str, Any]) -> tuple[Tensor, ...]:
    out, lse = Flash2.forward(
        named["query"], named["key"], named["value"], named["cum_seq_q"], named["cum_seq_k"],
        named["max_q"], named["max_k"], **aten_softmax(named),
    )  # fmt: skip
    assert named["return_debug_mask"] is False
    return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)


def _emulate_aten_backward(named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    assert named["rng_state"].dtype is torch.uint64
    return Flash2.backward(
        named["grad_out"], named["query"], named["key"], named["value"], named["out"], named["logsumexp"],
        named["cum_seq_q"], named["cum_seq_k"], named["max_q"], named["max_k"], **aten_softmax(named),
    )  # fmt: skip


@pytest.fixture
def torch_efficient(monkeypatch: pytest.MonkeyPatch) -> TorchFlashBackend:
    """The same backend in float32, with torch's memory-efficient operators emulated: (1, tokens, heads, head_dim)."""
    ALIGNMENT = 32

    def mask_of(named: dict[str, Any]) -> Tensor:
        assert named["dropout_p"] == 0.0
        assert named["bias"] is None
        rows, columns = named["query"].shape[1], named["key"].shape[1]
        if named["custom_mask_type"] == 0:
            return torch.ones(rows, columns, dtype=torch.bool)
        assert named["custom_mask_type"] == 1, "causal, aligned to the first key"
        return torch.arange(rows)[:, None] >= torch.arange(columns)[None, :]

    def forward(named: dict[str, Any]) -> tuple[Any, ...]:
        assert named["compute_log_sumexp"] is True
        heads = (named[name].transpose(1, 2).float() for name in ("query", "key", "value"))
        out, lse = naive_attention(*heads, mask_of(named), AttentionRule(named["scale"]))
        out = out.to(named["query"].dtype)
        count = lse.shape[2]
        padded = torch.full((1, lse.shape[1], -(-count // ALIGNMENT) * ALIGNMENT), math.inf)
        padded[:, :, :count] = lse
        return out.transpose(1, 2), padded, torch.empty(0), torch.empty(0), 0, 0

    def backward(named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, None]:
        count = named["query"].shape[1]
        assert named["logsumexp"].shape[2] % ALIGNMENT == 0
        assert named["logsumexp"][:, :, count:].isposinf().all(), "a padded row gives no weight"
        assert (named["max_seqlen_q"], named["max_seqlen_k"]) == (count, named["key"].shape[1])
        q, k, v, dout, out = (named[n].transpose(1, 2).float() for n in ("query", "key", "value", "grad_out_", "out"))
        scores = (q @ k.transpose(2, 3) * named["scale"]).masked_fill(~mask_of(named), -math.inf)
        weights = torch.exp(scores - named["logsumexp"][:, :, :count, None])
        dscores = weights * (dout @ v.transpose(2, 3) - (dout * out).sum(3, keepdim=True)) * named["scale"]
        grads = dscores @ k, dscores.transpose(2, 3) @ q, weights.transpose(2, 3) @ dout
        of_queries, of_keys, of_values = (each.transpose(1, 2).to(named["query"].dtype) for each in grads)
        return of_queries, of_keys, of_values, None

    for name, emulation in (("_efficient_attention_forward", forward), ("_efficient_attention_backward", backward)):
        bind = _binder(name)
        monkeypatch.setattr(torch.ops.aten, name, _with_names(bind, emulation))
    return TorchFlashBackend()


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With the signature of flash-attn 2.8."""
    assert dropout_p == 0.0
    out, lse = Flash2.forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, scale=softmax_scale,
        softcap=softcap, window_left=window_size_left, window_right=window_size_right,
    )  # fmt: skip
    return out, lse, torch.empty(0), torch.empty(0)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """With the signature of flash-attn 2.8: the gradients are written into the tensors that it is given."""
    assert dropout_p == 0.0
    assert alibi_slopes is None
    grads = Flash2.backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        scale=softmax_scale, softcap=softcap, window_left=window_size_left, window_right=window_size_right,
    )  # fmt: skip
    for given, gradient in zip((dq, dk, dv), grads, strict=True):
        assert given is not None
        given.copy_(gradient)
    return torch.empty(0)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttnBackend:
    """The backend of the flash-attn package, with a module of that name that holds the emulation."""
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return FlashAttnBackend()


@pytest.fixture(params=["reference", "cpu", "torch_flash", "flash_attn"])
def exact_backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend, in float64, where nothing but a mistake makes a difference."""
    plain: dict[str, type[Backend]] = {"reference": ReferenceBackend, "cpu": CpuBackend}
    return plain[request.param]() if request.param in plain else request.getfixturevalue(request.param)


# --- One backend call ------------------------------------------------------------------------------------------------


def inputs(group: int, rows: int, columns: int, dtype: torch.dtype, value_dim: int = HEAD_DIM) -> tuple[Tensor, ...]:
    """Return queries, keys, values, and the gradient of the output."""
    shapes = (
        (2 * group, rows, HEAD_DIM),
        (2, columns, HEAD_DIM),
        (2, columns, value_dim),
        (2 * group, rows, value_dim),
    )
    return tuple(draw(1, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes, start=1))


def check_own(
    backend: Backend,
    dtype: torch.dtype,
    group: int,
    rule: AttentionRule,
    boundaries: Sequence[int] = BOUNDARIES,
    value_dim: int = HEAD_DIM,
) -> None:
    tokens = boundaries[-1]
    queries, keys, values, grad_out = inputs(group, tokens, tokens, dtype, value_dim)
    sight = Sight(rule, Packing(tuple(boundaries), CPU))
    out, lse = backend.forward(queries, keys, values, sight)
    grads = backend.backward(grad_out, Saved(queries, keys, values, out, lse), sight)
    true = truth_of((queries, keys, values), grad_out, packed_mask(boundaries, rule.window), rule)
    assert lse.dtype is torch.promote_types(dtype, torch.float32)
    for mine, truth in zip((out, lse, *grads), (*true[:2], *true[2]), strict=True):
        assert_close(mine, truth, dtype)


def check_past(
    backend: Backend,
    dtype: torch.dtype,
    group: int,
    rule: AttentionRule,
    queries_: int,
    keys_: int,
    value_dim: int = HEAD_DIM,
) -> None:
    """Call the backend as the attention does: without the rows that see nothing and the keys that no row sees."""
    reach = queries_ + keys_ if rule.window is None else rule.window - 1
    rows, columns = min(queries_, reach), min(keys_, reach)
    queries, keys, values, grad_out = inputs(group, rows, columns, dtype, value_dim)
    mask = may_see(torch.arange(rows) + columns, torch.arange(columns), rule.window)
    assert mask.any(1).all(), "a backend never sees an empty row"
    out, lse = backend.forward(queries, keys, values, Sight(rule))
    grads = backend.backward(grad_out, Saved(queries, keys, values, out, lse), Sight(rule))
    true = truth_of((queries, keys, values), grad_out, mask, rule)
    for mine, truth in zip((out, lse, *grads), (*true[:2], *true[2]), strict=True):
        assert_close(mine, truth, dtype)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("group", [1, 3])
def test_own_attention(exact_backend: Backend, group: int, window: int | None) -> None:
    """Packed segments must not see each other, and a window of w sees w tokens, not w + 1."""
    check_own(exact_backend, torch.float64, group, AttentionRule(0.3, window))


@pytest.mark.parametrize("window", [None, 2, 5, 12, 18, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 17), (4, 6), (11, 11), (11, 12), (12, 40)])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_to_the_past(exact_backend: Backend, group: int, queries: int, keys: int, window: int | None) -> None:
    """A window ends at another key for each query; the flash kernels align queries to the last key, not to the next."""
    check_past(exact_backend, torch.float64, group, AttentionRule(0.3, window), queries, keys)


@pytest.mark.parametrize("value_dim", [HEAD_DIM - 3, HEAD_DIM + 5])
@pytest.mark.parametrize("window", [None, 5])
def test_values_of_another_head_dim(exact_backend: Backend, window: int | None, value_dim: int) -> None:
    """Latent attention has narrower values than keys, or wider ones. Most kernels take only one width."""
    check_own(exact_backend, torch.float64, 3, AttentionRule(0.3, window), value_dim=value_dim)
    check_past(exact_backend, torch.float64, 3, AttentionRule(0.3, window), 4, 6, value_dim)


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda backend: backend.name)
def test_weights_of_large_scores_sum_to_one(backend: Backend) -> None:
    """A log-sum-exp near 10,000 has an error of 5e-4 in float32, by which exp(score - log_sum_exp) would be off."""
    scores = 10_000 + torch.tensor([0.0, 1.0, 3.0, 2.0])
    queries, keys = torch.ones(1, 1, 1, 1), scores.view(1, 1, 4, 1)
    values = draw(1, 1, 4, 1, dtype=torch.float32)
    out, _ = backend.forward(queries, keys, values, Sight(AttentionRule(1.0)))
    assert_close(out, (scores.double().softmax(0) @ values[0, 0].double()).view(1, 1, 1, 1), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 5, 12])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend()], ids=lambda backend: backend.name)
def test_training_dtypes(backend: Backend, group: int, window: int | None, dtype: torch.dtype) -> None:
    """The CPU kernels take another path in bfloat16: forward in bfloat16, backward through float32, with masks."""
    rule = AttentionRule(0.3, window)
    check_own(backend, dtype, group, rule)
    check_past(backend, dtype, group, rule, 11, 40)


@pytest.mark.parametrize("group", [1, 3])
def test_float32_on_cuda_goes_through_the_efficient_kernel(torch_efficient: TorchFlashBackend, group: int) -> None:
    """Its rows of log-sum-exp are padded, its causal mask starts at the first key, and it takes one segment per call."""
    check_own(torch_efficient, torch.float32, group, AttentionRule(0.3))
    check_past(torch_efficient, torch.float32, group, AttentionRule(0.3), 11, 40)


def test_wide_heads_on_cuda_go_through_the_efficient_kernel(
    torch_efficient: TorchFlashBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash kernels inside torch end at 256 channels, and global layers of Gemma 4 have 512."""
    monkeypatch.setattr(flash, "LARGEST_FLASH_HEAD_DIM", HEAD_DIM - 1)
    check_own(torch_efficient, torch.bfloat16, 3, AttentionRule(0.3))
    check_past(torch_efficient, torch.bfloat16, 3, AttentionRule(0.3), 11, 40)


@pytest.mark.parametrize("boundaries", [(0, 1), (0, 33), (0, 1, 2, 3)], ids=str)
def test_few_and_small_segments(exact_backend: Backend, boundaries: tuple[int, ...]) -> None:
    """One segment takes a shortcut without copies; segments of one token have a softmax of one score."""
    check_own(exact_backend, torch.float64, 3, AttentionRule(0.3), boundaries)
    check_own(exact_backend, torch.float64, 3, AttentionRule(0.3, 4), boundaries)


@pytest.mark.parametrize("backend_name", ["reference", "flash_attn"])
@pytest.mark.parametrize("window", [None, 5])
def test_soft_capped_scores(request: pytest.FixtureRequest, backend_name: str, window: int | None) -> None:
    """gemma2 squashes its scores. A backward without the slope of tanh is only slightly off, which is easy to miss."""
    backend = ReferenceBackend() if backend_name == "reference" else request.getfixturevalue(backend_name)
    rule = AttentionRule(1.5, window, softcap=2.0)
    check_own(backend, torch.float64, 3, rule)
    check_past(backend, torch.float64, 3, rule, 11, 40)


def test_emulation_distinguishes_alignments() -> None:
    """The emulation is only useful if a wrong window fails: it is aligned to the end, and unlimited where requested."""
    assert flash2_mask(2, 4, 4, True, -1, -1).tolist() == [[True, True, True, False], [True] * 4]
    assert flash2_mask(2, 4, 4, False, 1, -1).tolist() == [[False, True, True, True], [False, False, True, True]]
    assert flash2_mask(2, 4, 4, False, -1, -1).all()
    assert flash2_mask(3, 3, 3, True, 1, 0).tolist() == [[True, False, False], [True, True, False], [False, True, True]]


# --- The operators that we call by position --------------------------------------------------------------------------

FLASH_KEYWORDS = ["scale", "window_size_left", "window_size_right"]
OPERATORS = {
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask", FLASH_KEYWORDS,
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused",
        FLASH_KEYWORDS,
    ),
    "_efficient_attention_forward": (
        "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
        "compute_log_sumexp",
        ["scale"],
    ),
    "_efficient_attention_backward": (
        "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p "
        "philox_seed philox_offset custom_mask_type bias_requires_grad",
        ["scale"],
    ),
    "_scaled_dot_product_flash_attention_for_cpu": ("query key value dropout_p is_causal", ["attn_mask", "scale"]),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal", ["attn_mask", "scale"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_the_arguments_we_pass(operator: str) -> None:
    """These operators are torch's own and may change with any release: better to fail here than on a GPU."""
    arguments = getattr(torch.ops.aten, operator).default._schema.arguments
    positional, keywords = OPERATORS[operator]
    assert [argument.name for argument in arguments if not argument.kwarg_only] == positional.split()
    assert set(keywords) <= {argument.name for argument in arguments if argument.kwarg_only}
    new = [a.name for a in arguments if a.kwarg_only and a.name not in keywords and not a.has_default_value()]
    assert not new, "arguments that we do not pass must have defaults"


@pytest.mark.parametrize(
    ("operator", "returns"), [("_flash_attention_forward", 2), ("_efficient_attention_forward", 2)]
)
def test_operators_return_log_sum_exp_second(operator: str, returns: int) -> None:
    """The backends take output and log-sum-exp by position."""
    names = [value.name for value in getattr(torch.ops.aten, operator).default._schema.returns][:returns]
    assert names in (["output", "softmax_logsumexp"], ["output", "logsumexp"])


@pytest.mark.parametrize(
    "emulated", [_flash_attn_varlen_forward, _flash_attn_varlen_backward], ids=lambda f: f.__name__
)
def test_flash_attn_has_the_arguments_we_pass(emulated: Callable[..., Any]) -> None:
    """Where the package is installed, its private functions must still look like the ones that are emulated here."""
    interface = pytest.importorskip("flash_attn.flash_attn_interface", exc_type=ImportError)
    function = getattr(interface, emulated.__name__)
    theirs = inspect.signature(getattr(function, "_init_fn", function)).parameters
    ours = inspect.signature(emulated).parameters
    assert list(theirs)[: len(ours)] == list(ours)


# --- Chunks with state -----------------------------------------------------------------------------------------------

LENGTH, CHUNK, EXTRA = 29, 8, 3
"""A sequence of three full chunks and a tail of 5, which is filled with another sequence of 3."""


class Case:
    """Queries, keys and values of a long sequence and a short one, and their expected attention."""

    def __init__(
        self, rule: AttentionRule, dtype: torch.dtype, group: int = 3, sinks: bool = False, block: int | None = None
    ) -> None:
        self.rule, self.layer = rule, LayerAttention(0, rule, block)
        tokens = LENGTH + EXTRA
        self.queries, self.grad_out = (draw(1, 2 * group, tokens, HEAD_DIM, seed=s, dtype=dtype) for s in (1, 4))
        self.keys, self.values = (draw(1, 2, tokens, HEAD_DIM, seed=s, dtype=dtype) for s in (2, 3))
        self.sinks = draw(2 * group, seed=5, dtype=dtype) if sinks else None

    def truth(self) -> list[Tensor]:
        leaves = [t.double().clone().requires_grad_() for t in (self.queries, self.keys, self.values)]
        sinks = None if self.sinks is None else self.sinks.double().clone().requires_grad_()
        mask = packed_mask((0, LENGTH, LENGTH + EXTRA), self.rule.window)
        if self.layer.block is not None:
            block = torch.cat([torch.arange(LENGTH), torch.arange(EXTRA)]) // self.layer.block
            mask &= block[:, None] == block[None, :]
        out, _ = naive_attention(*leaves, mask, self.rule, sinks)
        out.backward(self.grad_out.double())
        return [out.detach(), *(leaf.grad for leaf in [*leaves, sinks] if leaf is not None and leaf.grad is not None)]

    def chunked(self, backend: Backend, k: int, home: Home | None = None) -> tuple[list[Tensor], SequenceState]:
        """Run ChunkAttention over the chunks: state passes, the last K forwards, descending backwards with recompute."""
        starts = list(range(0, LENGTH, CHUNK))
        state = SequenceState(starts[-1], home or OnDevice())
        leaves: dict[int, list[Tensor]] = {}
        outs: dict[int, Tensor] = {}
        live: dict[int, Tensor] = {}
        grad_sinks = None if self.sinks is None else torch.zeros_like(self.sinks)

        def forward(index: int) -> Tensor:
            start = starts[index]
            last = index == len(starts) - 1
            stop = LENGTH + EXTRA if last else start + CHUNK
            boundaries = (0, LENGTH - start, LENGTH - start + EXTRA) if last else (0, CHUNK)
            context = ChunkAttentionContext(Packing(boundaries, CPU), backend, StatePiece(state, start, not last))
            inputs = [t[:, :, start:stop].clone() for t in (self.queries, self.keys, self.values)]
            sinks = None if self.sinks is None else self.sinks.clone()
            if torch.is_grad_enabled():
                leaves[index] = [tensor.requires_grad_() for tensor in [*inputs, sinks] if tensor is not None]
            out: Tensor = ChunkAttention.apply(*inputs, sinks, context, self.layer)
            return out

        retained_from = max(0, len(starts) - k)
        for index in range(len(starts)):
            if index < retained_from:
                with torch.no_grad():
                    forward(index)
            else:
                live[index] = forward(index)
        for index in reversed(range(len(starts))):
            out = live.pop(index) if index in live else forward(index)
            outs[index] = out.detach()
            start = starts[index]
            out.backward(self.grad_out[:, :, start : start + out.shape[2]])
            if grad_sinks is not None:
                grad_sinks += leaves[index][3].grad
        gathered = [torch.cat([outs[i] for i in range(len(starts))], dim=2)]
        gathered += [torch.cat([leaves[i][part].grad for i in range(len(starts))], dim=2) for part in range(3)]
        return [*gathered, *([] if grad_sinks is None else [grad_sinks])], state


def check_chunks(case: Case, backend: Backend, ks: tuple[int, ...]) -> None:
    """Compare with the whole sequence: the past in one block, and in blocks that chunks straddle, on device and host.

    The same blocks give the same bits, wherever they are kept.
    """
    truth = case.truth()
    for k in ks:
        homes = OnDevice(), OnDevice(block_tokens=5), host_home(CPU, block_tokens=5)
        results = []
        for home in homes:
            mine, state = case.chunked(backend, k, home)
            assert state.nbytes == 0
            results.append(mine)
            for part, true in zip(mine, truth, strict=True):
                assert_close(part, true, torch.float64)
        assert all(map(torch.equal, *results[1:]))


@pytest.mark.parametrize("window", [None, 1, 2, 6, 8, 9, 12, 17, 100])
def test_chunks_equal_the_whole_sequence(exact_backend: Backend, window: int | None) -> None:
    """Output and all gradients, including those that cross chunks, for windows within a chunk and over several."""
    check_chunks(Case(AttentionRule(0.3, window), torch.float64), exact_backend, (1, 2, 4))


@pytest.mark.parametrize("block", [1, 3, 8, 10, 16, 100])
def test_chunks_with_attention_in_blocks(exact_backend: Backend, block: int) -> None:
    """Blocks that divide chunks, that chunks divide, that straddle them, and one that holds everything."""
    check_chunks(Case(AttentionRule(0.3), torch.float64, block=block), exact_backend, (1, 4))


@pytest.mark.parametrize("window", [None, 6])
def test_chunks_with_sinks_and_soft_caps(window: int | None) -> None:
    """A sink takes weight from the merged softmax: it must be applied once, after the merge, and get its gradient."""
    case = Case(AttentionRule(0.9, window, softcap=1.5), torch.float64, sinks=True)
    truth = case.truth()
    for k in (1, 4):
        mine, _ = case.chunked(ReferenceBackend(), k)
        assert len(mine) == len(truth) == 5
        for part, true in zip(mine, truth, strict=True):
            assert_close(part, true, torch.float64)


def test_chunks_in_bfloat16() -> None:
    """Merging in bfloat16 would round each part: the merged output must stay within bfloat16 of the exact one."""
    case = Case(AttentionRule(0.3), torch.bfloat16)
    for part, truth in zip(case.chunked(CpuBackend(), 2)[0], case.truth(), strict=True):
        assert part.dtype is torch.bfloat16
        assert_close(part, truth, torch.bfloat16)


def test_window_hides_the_past_from_late_rows_only() -> None:
    """With a window of 5, row 4 of a chunk sees no earlier chunk and row 3 sees exactly one key of it."""
    seen = []

    class Spy(ReferenceBackend):
        def forward(self, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Output:
            if sight.packing is None:
                seen.append((queries.shape[2], keys.shape[2]))
            return super().forward(queries, keys, values, sight)

    Case(AttentionRule(0.3, 5), torch.float64).chunked(Spy(), k=4)
    assert seen == [(4, 4), (4, 4), (4, 4)]


def test_state_pass_ends_at_the_last_layer() -> None:
    """A state pass needs nothing after the last layer's keys and values: the last attention is not computed."""

    class Unused(ReferenceBackend):
        def forward(self, *_: Any, **__: Any) -> Output:
            raise AssertionError("attention was computed")

    state = SequenceState(CHUNK)
    piece = StatePiece(state, 0, True)
    context = ChunkAttentionContext(Packing((0, CHUNK), CPU), Unused(), piece, last_layer_of_state_pass=1)
    queries, keys, values = (draw(1, heads, CHUNK, HEAD_DIM, seed=heads) for heads in (6, 2, 2))
    out = ChunkAttention.apply(queries, keys, values, None, context, LayerAttention(1, AttentionRule(0.3)))
    assert out.shape == (1, 6, CHUNK, HEAD_DIM)
    (stored,) = state.past(1, CHUNK)
    assert torch.equal(stored.values["keys"], keys[0].transpose(0, 1))
    with pytest.raises(AssertionError, match="attention was computed"):
        ChunkAttention.apply(queries, keys, values, None, context, LayerAttention(0, AttentionRule(0.3)))


# --- What transformers calls -----------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, layer_idx: int | None = 0) -> None:
        super().__init__()
        if layer_idx is not None:
            self.layer_idx = layer_idx


def called(module: nn.Module | None = None, *, tokens: int = 6, batch: int = 1, **options: Any) -> Tensor:
    queries, keys, values = (draw(batch, heads, tokens, HEAD_DIM, seed=heads) for heads in (6, 2, 3))
    context = ChunkAttentionContext(Packing((0, 6), CPU), options.pop("backend", ReferenceBackend()))
    mask = options.pop("attention_mask", None)
    scope = ForwardScope(RunningChunk(context) if options.pop("in_chunk", True) else None)
    with scope:
        return attend(module or Layer(), queries, keys, values[:, :2], mask, **options)[0]


def test_keywords_that_change_nothing_are_taken() -> None:
    """transformers passes positions and switches on to every attention call: refusing them would refuse all models."""
    plain = called()
    assert torch.equal(plain, called(position_ids=torch.arange(6)[None], use_cache=False, output_attentions=False))
    assert torch.equal(plain, called(indices=None, position_bias=None, tilt=None))


def test_attend_returns_tokens_before_heads() -> None:
    """transformers reshapes (1, tokens, heads, head_dim) to the hidden size: heads first would mix them up."""
    assert called().shape == (1, 6, 6, HEAD_DIM)


def test_scaling_defaults_to_the_head_dim_and_is_used() -> None:
    """Some models (granite, gemma) set another scale. If it were ignored, another model would be trained."""
    assert torch.equal(called(), called(scaling=HEAD_DIM**-0.5))
    assert not torch.allclose(called(), called(scaling=1.0))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no chunk": ({"in_chunk": False}, "Layer runs outside of a chunk, whose attention"),
    "dropout": ({"dropout": 0.1}, "attention dropout is 0.1.*\n.*set attention_dropout to 0"),
    "no layer index": ({"module": Layer(None)}, "Layer does not know its layer"),
    "batch of two": ({"batch": 2}, "Layer reshapes its tokens before attention"),
    "other tokens": ({"tokens": 5}, "Layer reshapes its tokens before attention"),
    "own mask": ({"attention_mask": torch.zeros(6, 6)}, r"Layer uses a mask of its own \(attention_mask\)"),
    "position bias": ({"position_bias": torch.zeros(6, 6)}, "Layer uses a bias on its scores that depends on pos"),
    "indexer": ({"indices": torch.zeros(1, 6, 2)}, r"Layer uses sparse attention to the keys that an indexer picks \(DSA"),
    "unknown keyword": ({"tilt": 0.5}, "Layer passes 'tilt' to its attention, which chunkflow does not know"),
    "later tokens": ({"is_causal": False}, "Layer attends to later tokens"),
    "soft cap on the CPU": (
        {"softcap": 30.0, "backend": CpuBackend()}, "model.attention=cpu does not support soft-capped attention scores",
    ),
    "soft cap in torch's flash": (
        {"softcap": 30.0, "backend": TorchFlashBackend()}, "model.attention=torch_flash does not support soft-capped",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_exact_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    """The error names the cause and a remedy; attention is never computed in some other way instead."""
    with pytest.raises(UsageError, match=message):
        called(options.get("module"), **{name: value for name, value in options.items() if name != "module"})


def test_window_in_float32_on_cuda_is_refused() -> None:
    """The efficient kernel would ignore the window."""
    queries = draw(1, 2, 5, 8, dtype=torch.float32)
    sight = Sight(AttentionRule(1.0, window=3), Packing((0, 5), CPU))
    with pytest.raises(UsageError, match="torch_flash does not support sliding windows in torch"):
        TorchFlashBackend().forward(queries, queries, queries, sight)


CUDA_CHOICES: dict[str, tuple[str, dict[str, Any], torch.dtype, str, str]] = {
    "latent, head_dim only of the rotated part": (
        "deepseek_v3", {**MLA, "v_head_dim": 16}, torch.bfloat16, "torch_flash", "not installed",
    ),
    "wide heads without a window": (
        "gemma4_text", {"head_dim": 16}, torch.bfloat16, "torch_flash", "and the model has layers of 512",
    ),
    "wide heads with a window": (
        "mistral", {"head_dim": 320, "sliding_window": 9}, torch.bfloat16, "reference",
        "torch_flash: it supports sliding windows only up to head_dim 256",
    ),
    "odd heads": ("llama", {"head_dim": 20}, torch.bfloat16, "reference", "in steps of 8, and the model's is 20"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "dtype", "name", "why"), CUDA_CHOICES.values(), ids=CUDA_CHOICES)
def test_choice_on_a_gpu(
    tiny_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    name: str,
    why: str,
) -> None:
    """The fastest backend that supports all of a model's layers; the reason names what the faster ones lack."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice = choose_backend(Attention.auto, tiny_config(kind, **settings), torch.device("cuda"), dtype)
    assert choice.backend.name == name
    assert why in choice.reason


def test_kernels_are_checked_at_the_widths_of_the_model(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is wrong, or does not run, at one width alone is named before training begins."""
    assert head_dims_of(tiny_config("gemma4_text", head_dim=16)) == {(16, 16), (512, 512)}
    widths = head_dims_of(tiny_config("deepseek_v3", **MLA, v_head_dim=16))
    assert widths == {(24, 16)}
    check_backend(CpuBackend(), CPU, torch.float32, widths)
    monkeypatch.setattr(cpu, "narrowed", lambda tensor, width: tensor[..., -width:])
    check_backend(CpuBackend(), CPU, torch.float32)
    with pytest.raises(UsageError, match=r"model\.attention=cpu computes wrong results on this device: .*head_dim 24"):
        check_backend(CpuBackend(), CPU, torch.float32, widths)
    monkeypatch.setattr(CpuBackend, "_forward", lambda *_: torch.empty(1) @ torch.empty(2))
    with pytest.raises(UsageError, match=r"model\.attention=cpu cannot run on this device in .* at head_dim 24"):
        check_backend(CpuBackend(), CPU, torch.float32, widths)


def test_registered_without_a_mask() -> None:
    """A mask tensor would be quadratic in the chunk: the mask function must give None."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attention.register()
    assert AttentionInterface()[attention.NAME] is attend
    assert AttentionMaskInterface()[attention.NAME](1, 2, three=3) is None
