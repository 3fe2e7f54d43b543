"""The state store: what later chunks of long sequences read of earlier ones, layer by layer, and its gradients.

Attention leaves keys and values, which all later chunks read. Recurrent layers leave edges, which the next chunk reads:
the state after a chunk's last token, and the last inputs of a convolution.

The forward of a chunk writes its state, and later chunks read it. Going backward, later chunks add the gradients that
they compute, and the backward of the chunk that wrote the state takes them from the store.

Keys and values are kept in blocks of a fixed number of tokens, in the store's home (`state_home`): on the device, or in
host memory, from where they are brought a block at a time, one block ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.execution.state_home import Arrival, Home, OnDevice, Rows
from chunkflow_cli.model.forward_scope import is_recompute

FirstVisible = Callable[[int], int]
"""Gives the first position that a chunk may see, from the number of tokens before the chunk. It never decreases."""


@dataclass
class _Block:
    """Consecutive tokens of one layer."""

    start: int
    """Position of the first row."""
    values: dict[str, Tensor]  # each (rows, heads, head_dim), in the home
    device: torch.device
    stop: int
    """Position after the last row that was written."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """The same shapes; float32 (float64 in float64): sums over up to hundreds of chunks. Empty before the first one."""
    summed_from: int = 0
    """First position whose gradient later chunks have added to. They add to all from there to `summed_to`: each sees
    the positions right before it, and they come in descending order."""
    summed_to: int = 0

    @property
    def room(self) -> int:
        return self.start + len(next(iter(self.values.values()))) - self.stop

    def rows(self, start: int, stop: int) -> slice:
        return slice(start - self.start, stop - self.start)

    def gradient_rows(self, start: int, stop: int) -> list[Rows]:
        """Return the gradients of these positions; those that were never added to are unset."""
        unset = stop - start
        if self.summed_to > self.summed_from:
            assert self.summed_from <= stop <= self.summed_to, "chunks go backward in descending order"
            unset = self.summed_from - start
        return [Rows(tensor[self.rows(start, stop)], max(0, unset)) for tensor in self.gradients.values()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.values.values(), *self.gradients.values()))


@dataclass
class _Layer:
    """The blocks of one layer."""

    first_visible: FirstVisible
    rows: int
    """Rows that it stores at most."""
    written: int = 0
    """Position after the last chunk that was written."""
    blocks: list[_Block] = field(default_factory=list)


class _Read(NamedTuple):
    """Positions of a block that a chunk reads."""

    block: _Block
    start: int
    stop: int


class _Place(NamedTuple):
    """Identify one read in a pass of a chunk."""

    layer: int
    with_gradients: bool
    is_recompute: bool
    """Whether activation checkpointing runs the layer again, and so reads the same in its backward next."""


@dataclass(frozen=True)
class PastBlock:
    """A block of the past on the device: positions from `start` to `stop`."""

    start: int
    stop: int
    values: dict[str, Tensor]
    """Each (stop - start, heads, head_dim)."""
    _gradients: dict[str, Tensor]
    _keep: Callable[[], None]

    def add_gradient(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a later chunk's gradients of `values` to the store."""
        for name, gradient in gradients.items():
            self._gradients[name].add_(gradient)
        self._keep()


class EdgeKey(NamedTuple):
    """The name of an edge."""

    layer: str
    """Module name of the recurrent layer."""
    part: str
    """For example "conv0", for the last inputs of its first convolution."""
    position: int
    """Tokens of the sequence before the edge."""


@dataclass
class _Edge:
    """An edge from the forward of the chunk before it to the backward of that chunk.

    First it has a value. The backward of the chunk behind it replaces that by the gradient, and the backward of the
    chunk before it takes the gradient. It then stays without either: the recompute of activation checkpointing may
    write the edge once more, which must not bring it back.
    """

    device: torch.device
    value: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.value, self.gradient) if tensor is not None)


@dataclass
class SequenceState:
    """The state of one long sequence. A position is a token's index in its sequence."""

    stored_tokens: int
    """Tokens whose state later chunks read: all before the last chunk."""
    home: Home = field(default_factory=OnDevice)
    is_shared: bool = False
    """True if another sequence continues from a part of it. Then nothing is dropped that this sequence does not see,
    and gradients begin as zeros, because two sequences add theirs."""
    _layers: dict[int, _Layer] = field(default_factory=dict)
    _edges: dict[EdgeKey, _Edge] = field(default_factory=dict)

    def write(
        self,
        layer: int,
        start: int,
        pieces: Mapping[str, Tensor],
        first_visible: FirstVisible = lambda past: 0,
        in_all: int | None = None,
    ) -> None:
        """Store the pieces of a chunk, each (tokens, heads, head_dim), for positions from `start`.

        What no later chunk sees is dropped. A chunk that was written before, as in a recompute, stays as it is.

        Args:
            in_all: rows that the layer stores at most, if it has fewer than the sequence has tokens.
        """
        stored = self._layers.setdefault(layer, _Layer(first_visible, self.stored_tokens if in_all is None else in_all))
        stop = start + len(next(iter(pieces.values())))
        if stop <= stored.written:
            return
        position = start if self.is_shared else max(start, first_visible(stop))
        # Behind tokens that are dropped, a block holds only those of this chunk: others will be dropped, too.
        end = stop if position > start else None
        while position < stop:
            block = self._block_for(stored, position, end, pieces)
            count = min(stop - position, block.room)
            target, source = block.rows(position, position + count), slice(position - start, position - start + count)
            self.home.put([(block.values[name][target], piece[source]) for name, piece in pieces.items()])
            position += count
            block.stop = position
        stored.written = stop

    def _block_for(self, layer: _Layer, position: int, end: int | None, pieces: Mapping[str, Tensor]) -> _Block:
        """Return the last block if it goes on at this position and has room, otherwise a new one.

        Args:
            end: position after the last one that a new block holds; None if it goes on with later chunks.
        """
        if layer.blocks and layer.blocks[-1].stop == position and layer.blocks[-1].room:
            return layer.blocks[-1]
        device = next(iter(pieces.values())).device
        rows = self.home.block_tokens(device)
        if end is not None or self.home.look_ahead is None:
            rows = min(rows, (end or layer.rows) - position)
        # Blocks of the host that later chunks go on with all have one size, to be used again.
        values = {name: self.home.room((rows, *piece.shape[1:]), piece.dtype, device) for name, piece in pieces.items()}
        layer.blocks.append(_Block(position, values, device, position))
        return layer.blocks[-1]

    def past(self, layer: int, past: int, *, with_gradients: bool = False) -> Iterator[PastBlock]:
        """Yield the blocks that a chunk with `past` tokens before it sees, in order; each must be used up at once.

        While one is used, the next one is on its way.

        Args:
            with_gradients: the chunk adds gradients to each block.
        """
        reads = self._reads(layer, past)
        if not reads:
            return
        # Nothing else may hold the first block while the next ones are used.
        yield from self._brought(
            reads, self._first(layer, past, reads[0], with_gradients=with_gradients), with_gradients=with_gradients
        )

    def shared_past(
        self, layer: int, past: int, shared_tokens: int, *, with_gradients: bool = False
    ) -> Iterator[PastBlock]:
        """Yield what a chunk of a sequence that continues from the first `shared_tokens` sees of them, as `past`."""
        reads = self._reads(layer, past, shared_tokens)
        if reads:
            yield from self._brought(
                reads, self._fetch(reads[0], with_gradients=with_gradients), with_gradients=with_gradients
            )

    def _first(self, layer: int, past: int, read: _Read, *, with_gradients: bool) -> Arrival:
        """Return the first block, which may be on its way already."""
        look, arriving = self.home.look_ahead, None
        if look is not None:
            arriving = look.take((id(self), past), _Place(layer, with_gradients, is_recompute()))
        return self._fetch(read, with_gradients=with_gradients) if arriving is None else arriving

    def _brought(self, reads: list[_Read], arriving: Arrival, *, with_gradients: bool) -> Iterator[PastBlock]:
        for index, read in enumerate(reads):
            here = arriving
            if index + 1 < len(reads):
                arriving = self._fetch(reads[index + 1], with_gradients=with_gradients)
            yield self._arrived(read, here.wait(), with_gradients=with_gradients)

    def _reads(self, layer: int, past: int, stop: int | None = None) -> list[_Read]:
        """Return what a chunk with `past` tokens before it sees, up to `stop`."""
        stored = self._layers[layer]
        start, stop = stored.first_visible(past), past if stop is None else min(past, stop)
        if start >= stop:  # all that a window sees is behind a shared prompt
            return []
        reads = [
            _Read(block, max(start, block.start), min(stop, block.stop))
            for block in stored.blocks
            if block.start < stop and block.stop > start
        ]
        found = sum(read.stop - read.start for read in reads)
        assert found == stop - start, f"layer {layer}: a part was dropped"
        return reads

    def _fetch(self, read: _Read, *, with_gradients: bool) -> Arrival:
        block, rows = read.block, []
        if with_gradients:
            if not block.gradients:
                block.gradients = {
                    name: self.home.room(values.shape, accumulation_dtype(values.dtype), block.device)
                    for name, values in block.values.items()
                }
                if self.is_shared:  # not in host memory itself, to which copies of its last use may still be under way
                    zeros = [torch.zeros_like(each, device=block.device) for each in block.gradients.values()]
                    self.home.put(list(zip(block.gradients.values(), zeros, strict=True)))
                    block.summed_from, block.summed_to = block.start, block.stop + block.room
            rows = block.gradient_rows(read.start, read.stop)
        kept = [Rows(values[block.rows(read.start, read.stop)]) for values in block.values.values()]
        return self.home.fetch([*kept, *rows], block.device)

    def _arrived(self, read: _Read, tensors: list[Tensor], *, with_gradients: bool) -> PastBlock:
        block, names = read.block, list(read.block.values)
        values = dict(zip(names, tensors, strict=False))
        gradients = dict(zip(names, tensors[len(names) :], strict=True)) if with_gradients else {}

        def keep() -> None:
            rows = block.rows(read.start, read.stop)
            self.home.put([(block.gradients[name][rows], gradient) for name, gradient in gradients.items()])
            is_first = block.summed_to <= block.summed_from
            block.summed_from = read.start if is_first else min(read.start, block.summed_from)
            block.summed_to = read.stop if is_first else block.summed_to

        return PastBlock(read.start, read.stop, values, gradients, keep)

    def look_ahead(self, past: int) -> None:
        """Start to copy what the chunk with `past` tokens before it is expected to read next, if state has to move."""
        look, of_pass = self.home.look_ahead, (id(self), past)
        place = None if look is None else look.guess(of_pass)
        if look is None or place is None or place.layer not in self._layers:
            return
        reads = self._reads(place.layer, past)
        # Gradients that begin with this read get their room when those of the chunk itself have left theirs.
        if reads and not (place.with_gradients and not reads[0].block.gradients):
            look.put(of_pass, place, self._fetch(reads[0], with_gradients=place.with_gradients))

    def own_gradients(self, layer: int, start: int, stop: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield the sums that later chunks have added for a chunk's own positions, with the places of these tokens.

        Nothing of positions that later chunks do not see.
        """
        for block in self._layers[layer].blocks:
            first, last = max(start, block.summed_from), min(stop, block.summed_to)
            if first < last:
                arrival = self.home.fetch(block.gradient_rows(first, last), block.device)
                yield slice(first - start, last - start), dict(zip(block.gradients, arrival.wait(), strict=True))

    def release(self, layer: int, start: int) -> None:
        """Free the blocks of positions at or past `start`, which nothing reads any more."""
        if layer in self._layers:
            blocks = self._layers[layer].blocks
            while blocks and blocks[-1].start >= start:
                blocks.pop()

    def write_edge(self, key: EdgeKey, value: Tensor) -> None:
        """Store a copy of the value. An edge that was written before, as a recompute does, stays as it is."""
        if key not in self._edges:
            self._edges[key] = _Edge(value.device, value=self._kept(value.detach()))

    def read_edge(self, key: EdgeKey, *, for_the_last_time: bool = False) -> Tensor:
        """Return the value; free it for the last time, when neither recompute nor backward follows."""
        edge = self._edges[key]
        assert edge.value is not None, f"{key} is read after its last use"
        (value,) = self.home.fetch([Rows(edge.value)], edge.device).wait()
        if for_the_last_time:
            edge.value = None
        return value

    def put_edge_gradient(self, key: EdgeKey, gradient: Tensor) -> None:
        """Store the gradient, and free the value: only one chunk reads an edge, and it has gone backward."""
        self._edges[key] = _Edge(gradient.device, gradient=self._kept(gradient))

    def take_edge_gradient(self, key: EdgeKey) -> Tensor | None:
        """Return the gradient and free it; None if the chunk behind the edge gave none."""
        edge = self._edges[key]
        self._edges[key] = _Edge(edge.device)
        return None if edge.gradient is None else self.home.fetch([Rows(edge.gradient)], edge.device).wait()[0]

    def _kept(self, value: Tensor) -> Tensor:
        kept = self.home.room(value.shape, value.dtype, value.device)
        self.home.put([(kept, value)])
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes in the home."""
        return self.edge_nbytes + sum(block.nbytes for layer in self._layers.values() for block in layer.blocks)

    @property
    def edge_nbytes(self) -> int:
        """Bytes of the edges and their gradients."""
        return sum(edge.nbytes for edge in self._edges.values())


@dataclass(frozen=True)
class StatePiece:
    """A chunk's piece of a long sequence, and the state of that sequence."""

    state: SequenceState
    past: int
    """Tokens of the sequence in earlier chunks."""
    continues: bool
    """True if later chunks read the state of this piece."""


class StateStore:
    """The state of the long sequences in flight: several on a pipeline stage, otherwise one at a time."""

    def __init__(self, home: Home | None = None) -> None:
        self._home = home or OnDevice()
        self._home.settle()  # what a step has left that was interrupted, or ran out of memory
        self._sequences: dict[int, SequenceState] = {}

    def open(self, sequence: int, stored_tokens: int) -> SequenceState:
        """Return the state of a sequence; its first chunk creates it."""
        if sequence not in self._sequences:
            self._sequences[sequence] = SequenceState(stored_tokens, self._home)
        return self._sequences[sequence]

    def put(self, sequence: int, state: SequenceState) -> None:
        """Take the state of a sequence that was made elsewhere."""
        self._sequences[sequence] = state

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def close(self, sequence: int) -> None:
        """Drop the state of a sequence whose first chunk has gone backward."""
        self._home.settle()
        del self._sequences[sequence]

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._sequences.values())
