"""Exact attention of a chunk: the only part of a model that chunking changes.

`attend` is registered with transformers under the name "chunkflow", so any model that takes its attention from
`AttentionInterface` runs in chunks unchanged. The chunk is that of the running forward (`model.forward_scope`), so a
model does not pass anything on.

Let `lse` be the log-sum-exp of a row's scores. Attention to two sets of keys then merges exactly:

    lse = logaddexp(lse_1, lse_2)
    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse)

So the past is taken in blocks, as the state store brings them: own tokens first, then block after block, summed in
float32 and rounded once. In backward, the merged `out` and `lse` give each block's exact share of the gradients.

Shapes: queries (1, heads, tokens, head_dim), keys and values (1, kv_heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing, Saved, Sight
from chunkflow_cli.execution.attention.layer import (
    LayerAttention,
    check_call,
    correct_temperature,
    counts_positions,
    describe_layer,
)
from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import PastBlock, SequenceState, StatePiece
from chunkflow_cli.model.forward_scope import computed_once, forward_value

NAME = "chunkflow"
"""The attention implementation that models are loaded with."""
DROPOUT_KEYS = ("attention_dropout", "attn_pdrop")
"""Names of attention dropout in a config.json: of most models, and of gpt2 and openai-gpt."""


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

    @property
    def past(self) -> int:
        """Number of tokens of the long sequence in earlier chunks."""
        return 0 if self.piece is None else self.piece.past

    @property
    def positions(self) -> Tensor:
        """The position of each token in its sequence, (tokens,)."""
        device = self.packing.device
        parts = [torch.arange(span.stop - span.start, device=device) for span in self.packing.spans]
        parts[0] += self.past
        return torch.cat(parts)

    def packing_of(self, layer: LayerAttention) -> Packing:
        """Return the segments that a layer's own attention stays within: finer ones if it attends within blocks."""
        if layer.block is None:
            return self.packing
        edges = {0, *self.packing.boundaries}
        for index, span in enumerate(self.packing.spans):
            to_next_block = layer.block - self.past % layer.block if index == 0 else layer.block
            edges.update(range(span.start + to_next_block, span.stop, layer.block))
        return Packing(tuple(sorted(edges)), self.packing.device)

    def is_output_unused(self, layer: LayerAttention) -> bool:
        """Return whether nothing uses the layer's output: in a state pass, no later layer stores keys.

        Layers that share keys are the last ones of a model.
        """
        last = self.last_layer_of_state_pass
        return last is not None and (layer.index == last or not layer.owns_keys)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it; return (1, tokens, heads, head_dim).

    Raises:
        UsageError: the model does something that chunks cannot reproduce.
    """
    chunk = getattr(forward_value(), "context", None)
    if not isinstance(chunk, ChunkAttentionContext):
        raise UsageError(f"{type(module).__name__} runs outside of a chunk, whose attention it was loaded with")
    if dropout != 0.0:
        config = getattr(module, "config", None)
        key = next((name for name in DROPOUT_KEYS if getattr(config, name, None) == dropout), DROPOUT_KEYS[0])
        raise UsageError(
            f"attention dropout is {dropout}: fused attention cannot replay it when a chunk is recomputed\n"
            f"  set {key} to 0 in the model's config.json"
        )
    check_call(module, {"attention_mask": attention_mask, **others})
    group = chunk.sequence_group
    tokens = chunk.packing.boundaries[-1] // (1 if group is None else group.size)
    if queries.shape[0] != 1 or queries.shape[2] != tokens or keys.shape[2] != tokens:
        raise UsageError(
            f"{type(module).__name__} reshapes its tokens before attention, so it cannot be trained in chunks"
        )
    scale = queries.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = describe_layer(module, AttentionRule(scale, sliding_window, softcap))
    if counts_positions(module):
        positions = chunk.positions if group is None else chunk.positions[group.slice_of(len(chunk.positions))]
        queries = correct_temperature(module, queries, positions)
    if group is not None:
        queries, keys, values = group.tokens_to_heads(queries, keys, values)
        s_aux = None if s_aux is None else s_aux[group.slice_of(len(s_aux))]
    out = ChunkAttention.apply(queries, keys, values, s_aux, chunk, layer)
    if group is not None:
        out = group.heads_to_tokens(out)
    return out.transpose(1, 2).contiguous(), None  # some models take a view of it


_registered: Callable[..., Any] = attend


def register(*, wrap: Callable[..., Any] | None = None) -> None:
    """Register "chunkflow" with transformers as an attention implementation.

    Args:
        wrap: makes the function that transformers gets of `attend`, from now on; by default, it stays as it is.
    """
    global _registered
    if wrap is not None:
        _registered = wrap(attend)
    AttentionInterface.register(NAME, _registered)
    AttentionMaskInterface.register(NAME, _no_mask)


def require_attention_interface(model: Any) -> None:
    """Check that a Hugging Face model takes its attention from `AttentionInterface`, where `attend` is registered.

    Raises:
        UsageError: it computes its attention itself, and is not known to take its keys from a cache.
    """
    if not model._can_set_attn_implementation():
        raise UsageError(
            f"{type(model).__name__} computes its attention itself, not through transformers' AttentionInterface: keys "
            "of earlier chunks cannot be added there, nor packed samples kept apart"
        )


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
        layer: LayerAttention,
    ) -> Tensor:
        piece = chunk.piece
        if piece is not None and piece.continues and layer.owns_keys:
            own = slice(0, chunk.dependent_tokens)
            pieces = {"keys": flat(keys[:, :, own]), "values": flat(values[:, :, own])}
            piece.state.write(layer.index, piece.past, pieces, layer.first_visible)
        if chunk.is_output_unused(layer):
            return queries.new_zeros(*queries.shape[:3], values.shape[3])
        kept = computed_once(lambda: _attend(queries, keys, values, chunk, layer))
        out, log_sum_exp = (each.detach() for each in kept)  # autograd changes what it is given
        if sinks is not None:
            # A sink is one more key per head with a learned score and no value: it takes weight and gives nothing.
            with_sink = torch.logaddexp(log_sum_exp, sinks.to(log_sum_exp.dtype).view(1, -1, 1))
            out = (out * torch.exp(log_sum_exp - with_sink).unsqueeze(-1)).to(queries.dtype)
            log_sum_exp = with_sink
        ctx.save_for_backward(queries, keys, values, out, log_sum_exp, sinks)
        ctx.chunk, ctx.layer = chunk, layer
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, sinks = ctx.saved_tensors
        saved = Saved(*tensors)
        chunk: ChunkAttentionContext = ctx.chunk
        layer: LayerAttention = ctx.layer
        own_sight = Sight(layer.rule, chunk.packing_of(layer))
        grad_queries, grad_keys, grad_values = chunk.backend.backward(grad_out, saved, own_sight)
        piece = chunk.piece
        if piece is not None and layer.owns_keys:  # its backward comes after those of the layers that share its keys
            if piece.continues:
                own = {"keys": flat(grad_keys), "values": flat(grad_values)}
                add_from_later_chunks(own, piece.state, layer.index, piece.past, chunk.dependent_tokens)
            piece.state.release(layer.index, piece.past)  # first: under a window, one chunk has gradients at a time
        for part in _past_in_sight(chunk, layer, with_gradients=True):
            queries, out, log_sum_exp = (
                each[:, :, part.rows] for each in (saved.queries, saved.out, saved.log_sum_exp)
            )
            of_part = Saved(queries, part.keys, part.values, out, log_sum_exp)
            from_part = chunk.backend.backward(grad_out[:, :, part.rows], of_part, part.sight)
            grad_queries = grad_queries.to(accumulation_dtype(grad_queries.dtype))  # a sum over many blocks
            grad_queries[:, :, part.rows] += from_part[0]
            part.block.add_gradient({"keys": flat(from_part[1]), "values": flat(from_part[2])})
        if piece is not None:
            piece.state.look_ahead(piece.past)
        grad_sinks = None
        if sinks is not None:
            dtype = saved.log_sum_exp.dtype
            lost = torch.exp(sinks.to(dtype).view(1, -1, 1) - saved.log_sum_exp)  # weight that went to the sink
            delta = (grad_out.to(dtype) * saved.out.to(dtype)).sum(-1)
            grad_sinks = -(lost * delta).sum((0, 2)).to(sinks.dtype)
        return (
            grad_queries.to(saved.queries.dtype), grad_keys.to(saved.keys.dtype), grad_values.to(saved.values.dtype),
            grad_sinks, None, None,
        )  # fmt: skip


def add_from_later_chunks(own: Mapping[str, Tensor], state: SequenceState, layer: int, start: int, count: int) -> None:
    """Add what later chunks have put into the store to the gradients of a chunk's first `count` rows.

    Args:
        own: gradients by name, each (rows, heads, channels); changed in place.
        start: the first row's number in the store.
    """
    for rows, from_later in state.own_gradients(layer, start, start + count):
        for name, gradient in from_later.items():
            own[name][rows] += gradient


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, chunk: ChunkAttentionContext, layer: LayerAttention
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of attention to own tokens and the past, without sinks."""
    out, log_sum_exp = chunk.backend.forward(queries, keys, values, Sight(layer.rule, chunk.packing_of(layer)))
    merged: tuple[Tensor, Tensor] | None = None
    for part in _past_in_sight(chunk, layer):
        if merged is None:  # under a window, the last block is seen by the most queries
            rows = slice(0, layer.queries_that_see(chunk.past, chunk.past, chunk.dependent_tokens))
            merged = out[:, :, rows].to(log_sum_exp.dtype, copy=True), log_sum_exp[:, :, rows].clone()
        _merge(*merged, *chunk.backend.forward(queries[:, :, part.rows], part.keys, part.values, part.sight), part.rows)
    if merged is None:
        return out, log_sum_exp
    assert chunk.piece is not None
    chunk.piece.state.look_ahead(chunk.past)
    return _with_first_rows(out, merged[0].to(out.dtype)), _with_first_rows(log_sum_exp, merged[1])


@dataclass(frozen=True)
class _PartOfPast:
    """A block of the past, and the queries that see any of it."""

    block: PastBlock
    rows: slice
    sight: Sight

    @property
    def keys(self) -> Tensor:
        """(1, kv_heads, tokens, head_dim)"""
        return self.block.values["keys"].transpose(0, 1).unsqueeze(0)

    @property
    def values(self) -> Tensor:
        """(1, kv_heads, tokens, value_dim)"""
        return self.block.values["values"].transpose(0, 1).unsqueeze(0)


def _past_in_sight(
    chunk: ChunkAttentionContext, layer: LayerAttention, *, with_gradients: bool = False
) -> Iterator[_PartOfPast]:
    """Yield the blocks of the past of which at least one query sees some."""
    if chunk.piece is None or chunk.past == 0 or layer.first_visible(chunk.past) == chunk.past:
        return
    for block in chunk.piece.state.past(layer.index, chunk.past, with_gradients=with_gradients):
        seeing = layer.queries_that_see(block.stop, chunk.past, chunk.dependent_tokens)
        yield _PartOfPast(block, slice(0, seeing), Sight(layer.rule, gap=chunk.past - block.stop))


def _merge(out: Tensor, log_sum_exp: Tensor, part_out: Tensor, part_log_sum_exp: Tensor, rows: slice) -> None:
    """Merge attention to one more set of keys, seen by the first rows, into float32 output and log-sum-exp."""
    out, log_sum_exp = out[:, :, rows], log_sum_exp[:, :, rows]
    merged = torch.logaddexp(log_sum_exp, part_log_sum_exp)
    share = torch.exp(part_log_sum_exp - merged).unsqueeze(-1)  # the rest is what was merged before
    out.lerp_(part_out.to(out.dtype), share)
    log_sum_exp.copy_(merged)


def _with_first_rows(rows: Tensor, first: Tensor) -> Tensor:
    """Return a new tensor of `rows`, (1, heads, tokens, ...), with its first ones replaced."""
    count = first.shape[2]
    return first if count == rows.shape[2] else torch.cat([first, rows[:, :, count:]], dim=2)


def flat(tensor: Tensor) -> Tensor:
    """Turn (1, heads, tokens, head_dim) into (tokens, heads, head_dim), the layout of the store."""
    return tensor[0].transpose(0, 1)
