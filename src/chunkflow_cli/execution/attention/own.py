"""Attention that a model computes itself, over keys that it takes from its cache.

Such a model hands its keys and values to a cache, gets back all that its queries may see, and adds a mask that
transformers makes. In a chunk, the cache returns the past of the long sequence in front of the chunk's own keys and
values, and keeps the piece of that sequence in the state store. The mask also keeps the segments of the chunk apart.
The scores of all tokens of the chunk and all these keys are in memory at once.

Keys are numbered from the start of the long sequence, through its piece and the segments behind it. Distances within a
segment are then right, for windows and for biases that only differ by a constant in a row, which softmax ignores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.function import ChunkAttentionContext, add_from_later_chunks, flat
from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.execution.state import FirstVisible, StatePiece
from chunkflow_cli.model.exchange import exchanged
from chunkflow_cli.model.forward_scope import forward_value
from chunkflow_cli.model.key_blocks import NO_MASKS
from chunkflow_cli.model.own_attention import KeyCache
from chunkflow_cli.model.scan_shapes import modeling_files
from chunkflow_cli.model.special_types import POSITIONS_FROM_CACHE, attends_to_blocks

_WIDENED = "_widens_its_table"
"""Attribute of modules with a hook, so that none gets two."""
ALIBI, ALIBI_FROM_LENGTH = "build_alibi_tensor", "build_mpt_alibi_tensor"
"""Functions of modeling files that make the bias of distances: for each token of a mask, or for a number of tokens."""


class ChunkCache(KeyCache):
    """What a model gets as its cache in one chunk: the keys and values of the long sequence's earlier chunks."""

    def __init__(self, chunk: ChunkAttentionContext) -> None:
        super().__init__(chunk.past)
        self._chunk = chunk

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store what later chunks read, and return all keys and values of the chunk, each (1, heads, keys, channels).

        Raises:
            UsageError: the model has other tokens here than those of the chunk.
        """
        chunk = self._chunk
        if keys.shape[0] != 1 or keys.shape[2] != chunk.packing.boundaries[-1]:
            raise UsageError("the model reshapes its tokens before attention, so it cannot be trained in chunks")
        if chunk.piece is None:
            return keys, values
        whole = with_past(self._of_layer(layer_idx), {"keys": flat(keys), "values": flat(values)})
        return whole["keys"].transpose(0, 1)[None], whole["values"].transpose(0, 1)[None]

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Do the same for the keys by which an indexer picks others, (1, tokens, channels), which get no gradient."""
        if self._chunk.piece is None:
            return keys
        found = behind_past(self._of_layer(-1 - layer_idx), {"keys": keys[0].unsqueeze(1)})  # a layer of its own
        return found["keys"].transpose(0, 1)

    def _of_layer(self, layer: int) -> Past:
        piece = self._chunk.piece
        assert piece is not None
        return Past(piece, layer, piece.past, self._chunk.dependent_tokens)


class PositionCache(ChunkCache):
    """A cache that numbers queries and keys by their positions in their own sequences, as offsets of each token."""

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return what to add to the place of each query in the chunk, (queries,)."""
        return _offsets(self._chunk.positions)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, Any]:
        """Return the number of keys, and what to add to the place of each, (keys,)."""
        return self._past + query_length, _offsets(_positions_of_keys(self._chunk))


def _offsets(positions: Tensor) -> Tensor:
    return positions - torch.arange(len(positions), device=positions.device)


@dataclass(frozen=True)
class Past:
    """What the chunks of a long sequence write to one layer of the state store, row by row."""

    piece: StatePiece
    layer: int
    """The number under which the store keeps it."""
    rows: int
    """Rows of earlier chunks: tokens, or something else that the layer has fewer of."""
    own: int
    """Rows of this chunk that later ones may see: its first ones."""
    in_all: int | None = None
    """Rows of all chunks at most; by default, one for each token."""
    first_visible: FirstVisible = lambda past: 0

    @property
    def seen(self) -> slice:
        """The rows of earlier chunks that this one sees."""
        return slice(self.first_visible(self.rows), self.rows)


def behind_past(past: Past, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store a chunk's tensors, each (rows, heads, channels); return them behind what it sees, without gradient."""
    state, seen = past.piece.state, past.seen
    own = {name: tensor.detach() for name, tensor in own.items()}
    if past.piece.continues:
        pieces = {name: tensor[: past.own] for name, tensor in own.items()}
        state.write(past.layer, past.rows, pieces, past.first_visible, past.in_all)
    count = seen.stop - seen.start
    whole = {name: t.new_empty(count + len(t), *t.shape[1:]) for name, t in own.items()}
    for block in state.past(past.layer, past.rows) if count else ():
        for name, values in block.values.items():
            whole[name][block.start - seen.start : block.stop - seen.start] = values
    for name, tensor in own.items():
        whole[name][count:] = tensor
    state.look_ahead(past.rows)
    return whole


def with_past(past: Past, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Do the same with gradients, which pass through the store."""
    return dict(zip(own, _WithPast.apply(past, tuple(own), *own.values()), strict=True))


class _WithPast(torch.autograd.Function):
    """Tensors of a long sequence's past in front of a chunk's own."""

    @staticmethod
    def forward(ctx: Any, past: Past, names: tuple[str, ...], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.past, ctx.names = past, names
        return tuple(behind_past(past, dict(zip(names, own, strict=True))).values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        past: Past = ctx.past
        state, seen = past.piece.state, past.seen
        count = seen.stop - seen.start
        of_all = dict(zip(ctx.names, grads, strict=True))
        own = {name: grad[count:].to(accumulation_dtype(grad.dtype), copy=True) for name, grad in of_all.items()}
        if past.piece.continues:
            add_from_later_chunks(own, state, past.layer, past.rows, past.own)
        state.release(past.layer, past.rows)
        for block in state.past(past.layer, past.rows, with_gradients=True) if count else ():
            rows = slice(block.start - seen.start, block.stop - seen.start)
            block.add_gradient({name: grad[rows] for name, grad in of_all.items()})
        state.look_ahead(past.rows)
        return None, None, *(own[name].to(grad.dtype) for name, grad in of_all.items())


def prepare_own_attention(model: nn.Module) -> None:
    """Make a model that computes attention itself run in chunks. A model that was prepared stays as it is."""
    masks = AttentionMaskInterface._global_mapping
    for name in ("eager", "sdpa"):
        masks[name] = exchanged(masks[name], _apart)
    for file in {file for module in model.modules() for file in modeling_files(type(module))}:
        for name, wrap in ((ALIBI, _by_position), (ALIBI_FROM_LENGTH, _for_all_keys)):
            if hasattr(file, name):
                setattr(file, name, exchanged(getattr(file, name), wrap))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True  # a recompute stores the same again, which changes nothing
        table = getattr(module, "bias", None)
        if isinstance(table, Tensor) and table.ndim == 4 and not hasattr(module, _WIDENED):  # gpt_neo
            module.register_forward_pre_hook(_widen_table)
            setattr(module, _WIDENED, True)


def cache_inputs(decoder: Any, chunk: ChunkAttentionContext) -> dict[str, Any]:
    """Return what the decoder of a prepared model takes in a chunk besides its usual input."""
    if attends_to_blocks(decoder.config):
        return {"attention_mask": NO_MASKS}  # each segment makes its own
    kind = PositionCache if decoder.config.model_type in POSITIONS_FROM_CACHE else ChunkCache
    inputs: dict[str, Any] = {"past_key_values": kind(chunk)}
    if hasattr(inspect.getmodule(type(decoder)), ALIBI):  # it counts the tokens of a mask
        keys = chunk.past + chunk.packing.boundaries[-1]
        inputs["attention_mask"] = torch.ones(1, keys, dtype=torch.long, device=chunk.packing.device)
    return inputs


def _running() -> ChunkAttentionContext | None:
    return getattr(forward_value(), "context", None)


def _positions_of_keys(chunk: ChunkAttentionContext) -> Tensor:
    """Return the position of each key in its sequence, (keys,): those of the past, then of the chunk."""
    return torch.cat([torch.arange(chunk.past, device=chunk.packing.device), chunk.positions])


def _apart(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """Make a mask (1, 1, queries, keys), boolean or added to the scores, hide the keys of other segments."""

    def make(*args: Any, **options: Any) -> Any:
        chunk = _running()
        if chunk is None:
            return make_mask(*args, **options)
        mask = make_mask(*args, **{**options, "allow_is_causal_skip": False})
        segments = torch.cat([torch.full((span.stop - span.start,), i) for i, span in enumerate(chunk.packing.spans)])
        keys = torch.cat([segments.new_zeros(chunk.past), segments]).to(mask.device)
        is_other = keys != keys[chunk.past :, None]
        return mask.masked_fill(is_other, False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min)

    return make


def _by_position(make_bias: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give each key the bias (heads, 1, keys) of its position in its sequence, as rounded as in that sequence."""

    def make(*args: Any, **options: Any) -> Tensor:
        bias, chunk = make_bias(*args, **options), _running()
        if chunk is None:
            return bias
        return bias[..., _positions_of_keys(chunk)]

    return make


def _for_all_keys(make_bias: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a bias long enough for the past and the whole chunk, which may have more tokens than the longest sample."""

    def make(heads: int, length: int, *args: Any, **options: Any) -> Tensor:
        chunk = _running()
        keys = 0 if chunk is None else chunk.past + chunk.packing.boundaries[-1]
        return make_bias(heads, max(length, keys), *args, **options)

    return make


def _widen_table(module: Any, _: Any) -> None:
    """Make a table (1, 1, places, places) of what each place sees long enough for the past and the whole chunk."""
    chunk, table = _running(), module.bias
    keys = 0 if chunk is None else chunk.past + chunk.packing.boundaries[-1]
    if keys <= len(table[0, 0]):
        return
    places = torch.arange(keys, device=table.device)
    distance = places[:, None] - places
    is_seen = table[0, 0, -1].flip(0)  # by distance; none in a sample is larger
    module.bias = (is_seen[distance.clamp(0, len(is_seen) - 1)] & (distance >= 0))[None, None]
