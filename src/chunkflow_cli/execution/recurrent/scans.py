"""The scans of recurrent layers, over the segments of a chunk.

The piece of a long sequence runs from its state, short segments from none. There are three ways:

- On a CPU, one segment after the other.
- On a GPU, where the number of kernel launches counts: first the piece, then the short segments as padded batches.
  Tokens that are padded on the right change nothing before them.
- With the kernels of flash-linear-attention, the packed chunk in one call. They take one state for each segment, and
  their backward takes the gradients of the last states and returns those of the first ones.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.integrations import hub_kernels

from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.execution.recurrent.sharing import Sharing
from chunkflow_cli.model.recurrent_functions import Scan

FULL_ENOUGH = 0.7
"""A batch takes segments that are at least this long, as a share of its longest."""
SMALLEST_BLOCK = 16
"""Tokens of the smallest block in which a scan of torch is computed."""

Arguments: TypeAlias = dict[int | str, Any]
"""The arguments of a scan by place or name: kernels call them differently from transformers."""


def scan_in_chunks(function: Callable[..., Any], scan: Scan) -> Callable[..., Any]:
    """Return a scan of the model, made to keep the segments of a running chunk apart."""

    @functools.wraps(function)
    def scan_chunk(*args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return function(*args, **options)
        assert options.pop(scan.start, None) is None, "the state comes from the store"
        assert not options.pop(scan.wants_last, False), "the state goes to the store"
        out = _scan_chunk(function, scan, dict(enumerate(args)) | options, chunk)
        return (out, None) if scan.always_pair else out

    return scan_chunk


def _scan_chunk(function: Callable[..., Any], scan: Scan, arguments: Arguments, chunk: RunningChunk) -> Tensor:
    """Run a scan of a chunk; if ranks share its tokens, run this rank's heads for all of them."""
    here = chunk.tokens // (1 if chunk.group is None else chunk.group.size)
    of_tokens = {  # all arguments that have a batch
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor)
        and value.ndim >= 3
        and value.shape[0] == 1
        and value.shape[scan.token_axis] == here
    }
    if chunk.group is None:
        return _Call(function, scan, arguments, list(of_tokens), chunk).over_segments()
    sharing = Sharing(chunk.group, tokens=scan.token_axis, heads=3 - scan.token_axis)
    counts = {name: value.shape[sharing.heads] for name, value in of_tokens.items()}
    split = [name for name, count in counts.items() if count > 1 and name not in scan.of_all_heads]
    if not split or not sharing.divides([counts[name] for name in split]):
        whole = {name: sharing.all_tokens(value) for name, value in of_tokens.items()}
        return sharing.own_tokens(_Call(function, scan, arguments | whole, list(whole), chunk).over_segments())
    own = sharing.to_heads({name: of_tokens[name] for name in split})
    own |= {name: sharing.all_tokens(value) for name, value in of_tokens.items() if name not in split}
    heads = max(counts[name] for name in split)
    weights = {
        name: sharing.own_heads(value)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name not in of_tokens and value.ndim and len(value) == heads
    }
    return sharing.to_tokens(_Call(function, scan, arguments | own | weights, list(own), chunk).over_segments())


class _Call:
    """One call of a scan, for all tokens of a chunk."""

    def __init__(
        self,
        function: Callable[..., Any],
        scan: Scan,
        arguments: Arguments,
        of_tokens: Sequence[int | str],
        chunk: RunningChunk,
    ) -> None:
        """
        Args:
            of_tokens: the arguments with an entry for each token of the chunk.
        """
        self._function, self._scan, self._arguments, self._chunk = function, scan, arguments, chunk
        self._of_tokens: dict[int | str, Tensor] = {name: arguments[name] for name in of_tokens}
        self._device = next(iter(self._of_tokens.values())).device

    def over_segments(self) -> Tensor:
        """Return the output for all tokens."""
        chunk = self._chunk
        name = chunk.begin_call("scan")
        start = None
        if chunk.has_piece:
            needs_gradient = any(isinstance(v, Tensor) and v.requires_grad for v in self._arguments.values())
            start = chunk.enter(name, needs_gradient=needs_gradient)
        out, last = (self._packed if takes_packed_chunks(self._scan, self._device) else self._in_turns)(start)
        return out if last is None else chunk.leave(name, last, out)

    def _packed(self, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run all segments in one call; return the output, and the last state of the piece if it is wanted."""
        packing = self._chunk.context.packing
        if start is not None:
            start = torch.cat([start, start.new_zeros(len(packing.spans) - 1, *start.shape[1:])])
        packed = {**self._of_tokens, "cu_seqlens": packing.cumulative}
        out, last = self._run(packed, start, wants_last=self._chunk.continues)
        return out, None if last is None else last[:1]

    def _in_turns(self, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the piece and then the other segments; return the output, and the last state if it is wanted."""
        spans, axis = self._chunk.spans, self._scan.token_axis
        outputs: dict[int, Tensor] = {}
        last = None
        if self._chunk.has_piece:
            outputs[0], last = self._run(self._slice(spans[0]), start, wants_last=self._chunk.continues)
            spans = spans[1:]
        for batch in batches(spans, self._device):
            longest = max(span.stop - span.start for span in batch)
            rows = [self._slice(span, padded_to=longest) for span in batch]
            out, _ = self._run({key: torch.cat([row[key] for row in rows]) for key in self._of_tokens})
            for row, span in enumerate(batch):
                outputs[span.start] = out[row : row + 1].narrow(axis, 0, span.stop - span.start)
        return torch.cat([outputs[start] for start in sorted(outputs)], dim=axis), last

    def _slice(self, span: slice, padded_to: int = 0) -> dict[int | str, Tensor]:
        """Return the arguments of a segment, with zeros behind it up to a length."""
        axis, tokens = self._scan.token_axis, span.stop - span.start
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
            length = next(iter(tokens.values())).shape[scan.token_axis]
            given["chunk_size"] = block_for(length, given.get("chunk_size", scan.block))
        positional = [given[place] for place in sorted(key for key in given if isinstance(key, int))]
        named = {name: value for name, value in given.items() if isinstance(name, str)}
        result = self._function(*positional, **named)
        return result if isinstance(result, tuple) else (result, None)


def takes_packed_chunks(scan: Scan, device: torch.device) -> bool:
    """Return true if a kernel runs that takes a packed chunk."""
    # Where transformers leaves kernels out, its own function runs, which ignores the segments that it is given.
    if not scan.is_packing or device.type != "cuda" or hub_kernels.is_torchdynamo_exporting():
        return False
    return importlib.util.find_spec(scan.package) is not None


def block_for(tokens: int, block: int) -> int:
    """Return the block for a segment on a CPU: the torch scans pad each segment to whole blocks."""
    while block > SMALLEST_BLOCK and block // 2 >= tokens:
        block //= 2
    return block


def batches(spans: Sequence[slice], device: torch.device) -> list[list[slice]]:
    """Return the segments that run together: on a CPU, where batches gain nothing, each by itself.

    Elsewhere, segments of similar lengths: padding each group to its longest one wastes little.
    """
    if device.type == "cpu":
        return [[span] for span in spans]
    groups: list[list[slice]] = []
    for span in sorted(spans, key=lambda span: span.start - span.stop):
        longest = groups[-1][0].stop - groups[-1][0].start if groups else 0
        if groups and span.stop - span.start >= FULL_ENOUGH * longest:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
