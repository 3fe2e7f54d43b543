"""The scans of recurrent layers, over the segments of a chunk.

The piece of a long sequence runs by itself, from its state. Short segments run from no state: on a CPU one after the
other, on a GPU as padded batches, because there the number of kernel launches counts. Tokens that are padded on the
right change nothing before them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from chunkflow_cli.execution.recurrent.running import RunningChunk, all_tokens, own_tokens, running_chunk

FULL_ENOUGH = 0.7
"""A batch takes segments that are at least this long, as a share of its longest."""
SMALLEST_BLOCK = 16
"""Tokens of the smallest block in which a scan of torch is computed."""

Arguments: TypeAlias = dict[int | str, Any]
"""The arguments of a scan by place or name: kernels call them differently from transformers."""


@dataclass(frozen=True)
class Scan:
    """How a function that scans tokens is called."""

    axis: int
    """Of the tokens, in all arguments that have them: 1 for (1, tokens, ...), 2 for (1, channels, tokens)."""
    start: str
    """The argument for the state to begin with."""
    wants_last: str
    """The argument that asks for the last state."""
    always_pair: bool = False
    """True if it returns a pair also when no last state is wanted."""
    block: int | None = None
    """Default of `chunk_size`, the tokens that it computes at once; None if it has no such argument."""


def scan_in_chunks(function: Callable[..., Any], scan: Scan) -> Callable[..., Any]:
    """Return a scan of the model, made to keep the segments of a running chunk apart."""

    @functools.wraps(function)
    def scan_chunk(*args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return function(*args, **options)
        assert options.pop(scan.start, None) is None, "the state comes from the store"
        assert not options.pop(scan.wants_last, False), "the state goes to the store"
        options.pop("chunk", None)
        call = _Call(function, scan, dict(enumerate(args)) | options, chunk)
        out = own_tokens(call.over_segments(), chunk.group, scan.axis)
        return (out, None) if scan.always_pair else out

    return scan_chunk


class _Call:
    """One call of a scan, for all tokens of a chunk."""

    def __init__(self, function: Callable[..., Any], scan: Scan, arguments: Arguments, chunk: RunningChunk) -> None:
        self._function, self._scan, self._chunk = function, scan, chunk
        self._arguments = arguments
        group, axis = chunk.group, scan.axis
        here = chunk.tokens // (1 if group is None else group.size)
        self._of_tokens = {
            name: all_tokens(value, group, axis)
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == 1 and value.shape[axis] == here
        }
        """The arguments with an entry for each token: all that have a batch."""
        self._device = next(iter(self._of_tokens.values())).device

    def over_segments(self) -> Tensor:
        """Return the output for all tokens."""
        chunk, spans = self._chunk, self._chunk.spans
        name = chunk.begin_scan()
        outputs: dict[int, Tensor] = {}
        last = None
        if chunk.has_piece:
            needs_gradient = any(isinstance(v, Tensor) and v.requires_grad for v in self._arguments.values())
            start = chunk.enter(name, needs_gradient=needs_gradient)
            outputs[0], last = self._run(self._slice(spans[0]), start, wants_last=chunk.continues)
            spans = spans[1:]
        for batch in similar_lengths(spans) if self._device.type == "cuda" else [[span] for span in spans]:
            longest = max(span.stop - span.start for span in batch)
            rows = [self._slice(span, padded_to=longest) for span in batch]
            out, _ = self._run({key: torch.cat([row[key] for row in rows]) for key in self._of_tokens})
            for row, span in enumerate(batch):
                outputs[span.start] = out[row : row + 1].narrow(self._scan.axis, 0, span.stop - span.start)
        joined = torch.cat([outputs[start] for start in sorted(outputs)], dim=self._scan.axis)
        return joined if last is None else chunk.leave(name, last, joined)

    def _slice(self, span: slice, padded_to: int = 0) -> dict[int | str, Tensor]:
        """Return the arguments of a segment, with zeros behind it up to a length."""
        axis, tokens = self._scan.axis, span.stop - span.start
        cut = {name: value.narrow(axis, span.start, tokens) for name, value in self._of_tokens.items()}
        if padded_to <= tokens:
            return cut
        return {
            name: nn.functional.pad(value, (0, 0) * (value.ndim - 1 - axis) + (0, padded_to - tokens))
            for name, value in cut.items()
        }

    def _run(
        self, tokens: dict[int | str, Tensor], start: Tensor | None = None, *, wants_last: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Call the function for these tokens; return its output and, if wanted, the last state."""
        scan = self._scan
        given = self._arguments | tokens
        if start is not None:
            given[scan.start] = start
        if wants_last:
            given[scan.wants_last] = True
        if scan.block is not None and self._device.type == "cpu":
            length = next(iter(tokens.values())).shape[scan.axis]
            given["chunk_size"] = block_for(length, given.get("chunk_size", scan.block))
        positional = [given[place] for place in sorted(key for key in given if isinstance(key, int))]
        named = {name: value for name, value in given.items() if isinstance(name, str)}
        result = self._function(*positional, **named)
        return result if isinstance(result, tuple) else (result, None)


def block_for(tokens: int, block: int) -> int:
    """Return the block for a segment on a CPU: the torch scans pad each segment to whole blocks."""
    while block > SMALLEST_BLOCK and block // 2 >= tokens:
        block //= 2
    return block


def similar_lengths(spans: Sequence[slice]) -> list[list[slice]]:
    """Group segments so that padding each group to its longest one wastes little."""
    groups: list[list[slice]] = []
    for span in sorted(spans, key=lambda span: span.start - span.stop):
        longest = groups[-1][0].stop - groups[-1][0].start if groups else 0
        if groups and span.stop - span.start >= FULL_ENOUGH * longest:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
