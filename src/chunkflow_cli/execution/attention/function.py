"""Exact attention of a chunk: the only part of a model that chunking changes.

`attend` is registered with transformers under the name "chunkflow", so any model that takes its attention from
`AttentionInterface` runs in chunks unchanged. The description of the chunk is passed as the keyword argument `chunk` of
the model's forward, which Hugging Face hands down to every attention call.

Let `lse` be the log-sum-exp of a row's scores. Attention to own tokens and to the past then merge exactly:

    lse = logaddexp(lse_own, lse_past)
    out = out_own * exp(lse_own - lse) + out_past * exp(lse_past - lse)

Shapes: queries (1, heads, tokens, head_dim), keys and values (1, kv_heads, tokens, head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing, Saved, Sight
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import SequenceState, StatePiece

NAME = "chunkflow"
"""The attention implementation that models are loaded with."""


@dataclass(frozen=True)
class ChunkAttentionContext:
    """The description of one chunk that its attention needs."""

    packing: Packing
    backend: Backend
    piece: StatePiece | None = None
    """The piece of a long sequence that is the first segment; None in a standalone chunk."""
    last_layer_of_state_pass: int | None = None
    """In a state pass, the last layer whose keys and values are stored: its attention is not computed."""
    sequence_group: SequenceGroup | None = None
    """The group whose ranks share the chunk's tokens. `packing` and `piece` still describe all tokens."""

    @property
    def dependent_tokens(self) -> int:
        """Number of tokens in the piece of the long sequence."""
        return self.packing.boundaries[1]


def attend(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    chunk: ChunkAttentionContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it; return (1, tokens, heads, head_dim).

    Raises:
        UsageError: the model does something that chunks cannot reproduce.
    """
    if chunk is None:
        raise UsageError(
            f"{type(module).__name__} does not pass keyword arguments to its attention: it cannot be trained in chunks"
        )
    if dropout != 0.0:
        raise UsageError(
            f"attention dropout is {dropout}: fused attention cannot replay it when a chunk is recomputed\n"
            "  set attention_dropout to 0 in the model's config.json"
        )
    group = chunk.sequence_group
    if queries.shape[0] != 1 or queries.shape[2] * (1 if group is None else group.size) != chunk.packing.boundaries[-1]:
        raise UsageError(
            f"{type(module).__name__} reshapes its tokens before attention, so it cannot be trained in chunks"
        )
    scale = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = AttentionRule(scale, sliding_window, softcap)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UsageError(
            f"{type(module).__name__} does not know its layer, so the state of its layers cannot be kept apart"
        )
    if group is not None:
        queries, keys, values = group.tokens_to_heads(queries, keys, values)
        s_aux = None if s_aux is None else s_aux[group.slice_of(len(s_aux))]
    out = ChunkAttention.apply(queries, keys, values, s_aux, chunk, layer, rule)
    if group is not None:
        out = group.heads_to_tokens(out)
    return out.transpose(1, 2), None


def register() -> None:
    """Register "chunkflow" with transformers as an attention implementation."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: the attention function knows the segments, and a mask tensor would be quadratic."""
    return


class ChunkAttention(torch.autograd.Function):
    """Attention of one chunk in one layer: to own tokens, merged with the past.

    In backward, gradient reaches keys and values of earlier chunks through the state store.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        chunk: ChunkAttentionContext,
        layer: int,
        rule: AttentionRule,
    ) -> Tensor:
        piece = chunk.piece
        if piece is not None and piece.continues:
            own = slice(0, chunk.dependent_tokens)
            piece.state.write(layer, piece.past, {"keys": _flat(keys[:, :, own]), "values": _flat(values[:, :, own])})
        if chunk.last_layer_of_state_pass == layer:
            return queries.new_zeros(*queries.shape[:3], values.shape[3])
        out, log_sum_exp = chunk.backend.forward(queries, keys, values, Sight(rule, chunk.packing))
        seen = _PastInSight.of(chunk, rule)
        if seen is not None:
            rows = slice(0, seen.queries)
            past_out, past_lse = chunk.backend.forward(queries[:, :, rows], *seen.read(layer), Sight(rule))
            merged_out, merged_lse = _merge(out[:, :, rows], log_sum_exp[:, :, rows], past_out, past_lse)
            # New tensors: under selective checkpointing the kernel's own outputs are kept and must not change.
            out = _with_first_rows(out, merged_out)
            log_sum_exp = _with_first_rows(log_sum_exp, merged_lse)
        if sinks is not None:
            # A sink is one more key per head with a learned score and no value: it takes weight and gives nothing.
            with_sink = torch.logaddexp(log_sum_exp, sinks.to(log_sum_exp.dtype).view(1, -1, 1))
            out = (out * torch.exp(log_sum_exp - with_sink).unsqueeze(-1)).to(queries.dtype)
            log_sum_exp = with_sink
        ctx.save_for_backward(queries, keys, values, out, log_sum_exp, sinks)
        ctx.chunk, ctx.layer, ctx.rule = chunk, layer, rule
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, sinks = ctx.saved_tensors
        saved = Saved(*tensors)
        chunk, layer, rule = ctx.chunk, ctx.layer, ctx.rule
        grad_queries, grad_keys, grad_values = chunk.backend.backward(grad_out, saved, Sight(rule, chunk.packing))
        seen = _PastInSight.of(chunk, rule)
        if seen is not None:
            rows = slice(0, seen.queries)
            queries, out, log_sum_exp = (each[:, :, rows] for each in (saved.queries, saved.out, saved.log_sum_exp))
            of_past = Saved(queries, *seen.read(layer), out, log_sum_exp)
            from_past = chunk.backend.backward(grad_out[:, :, rows], of_past, Sight(rule))
            grad_queries[:, :, rows] += from_past[0]
            seen.state.add_gradient(layer, "keys", seen.start, _flat(from_past[1]))
            seen.state.add_gradient(layer, "values", seen.start, _flat(from_past[2]))
        piece, tokens = chunk.piece, chunk.dependent_tokens
        if piece is not None:
            if piece.continues:
                for name, gradient in (("keys", grad_keys), ("values", grad_values)):
                    from_later = piece.state.gradient(layer, name, piece.past, piece.past + tokens)
                    if from_later is not None:
                        gradient[:, :, :tokens] += from_later.transpose(0, 1).unsqueeze(0)
            piece.state.release(layer, piece.past)
        grad_sinks = None
        if sinks is not None:
            dtype = saved.log_sum_exp.dtype
            lost = torch.exp(sinks.to(dtype).view(1, -1, 1) - saved.log_sum_exp)  # weight that went to the sink
            delta = (grad_out.to(dtype) * saved.out.to(dtype)).sum(-1)
            grad_sinks = -(lost * delta).sum((0, 2)).to(sinks.dtype)
        return (
            grad_queries.to(saved.queries.dtype), grad_keys.to(saved.keys.dtype), grad_values.to(saved.values.dtype),
            grad_sinks, None, None, None,
        )  # fmt: skip


@dataclass(frozen=True)
class _PastInSight:
    """The part of the past that at least one query sees, and the number of queries that see any of it."""

    state: SequenceState
    queries: int
    start: int
    stop: int

    @classmethod
    def of(cls, chunk: ChunkAttentionContext, rule: AttentionRule) -> _PastInSight | None:
        """Return None if no query sees any of the past."""
        piece, tokens = chunk.piece, chunk.dependent_tokens
        if piece is None or piece.past == 0 or rule.window == 1:
            return None
        reach = piece.past + tokens if rule.window is None else rule.window - 1
        return cls(piece.state, min(tokens, reach), max(0, piece.past - reach), piece.past)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (1, kv_heads, tokens, head_dim)."""
        keys = self.state.read(layer, "keys", self.start, self.stop)
        values = self.state.read(layer, "values", self.start, self.stop)
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)


def _merge(own_out: Tensor, own_lse: Tensor, past_out: Tensor, past_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention to both sets of keys, from attention to each; rounded once."""
    merged = torch.logaddexp(own_lse, past_lse)
    own_part = own_out * torch.exp(own_lse - merged).unsqueeze(-1)
    past_part = past_out * torch.exp(past_lse - merged).unsqueeze(-1)
    return (own_part + past_part).to(own_out.dtype), merged


def _with_first_rows(rows: Tensor, first: Tensor) -> Tensor:
    """Return a new tensor of `rows`, (1, heads, tokens, ...), with its first ones replaced."""
    count = first.shape[2]
    return first if count == rows.shape[2] else torch.cat([first, rows[:, :, count:]], dim=2)


def _flat(tensor: Tensor) -> Tensor:
    """Turn (1, heads, tokens, head_dim) into (tokens, heads, head_dim), the layout of the store."""
    return tensor[0].transpose(0, 1)
