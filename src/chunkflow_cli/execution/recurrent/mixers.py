"""Modules that let tokens meet in code of their own, over the segments of a chunk.

The piece of a long sequence runs from its state, short segments from none: on a CPU one after the other, on a GPU as
padded batches, as in `scans`. The projections in such a module run for each of them, too, which takes more launches
than an exchanged function. Only a module that sees nothing but the last few inputs runs once for all segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.execution.few_rows import linear_layers_in_blocks
from chunkflow_cli.execution.recurrent.convolution import convolve_segments
from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.execution.recurrent.scans import batches
from chunkflow_cli.execution.recurrent.sharing import Sharing
from chunkflow_cli.model.exchange import Forward, arguments_of, has_gradient
from chunkflow_cli.model.mixers import Mixer


def mix_in_chunks(forward: Forward, mixer: Mixer) -> Forward:
    """Return the forward of a class, made to keep the segments of a running chunk apart."""

    def mix_chunk(module: nn.Module, *args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return forward(module, *args, **options)
        sharing = Sharing(chunk.group, tokens=1, heads=2)  # ranks that share tokens each run the module for all
        arguments = arguments_of(forward, module, args, options)
        here = chunk.tokens // (1 if chunk.group is None else chunk.group.size)
        whole = {name: _of_tokens(sharing.all_tokens, value, here) for name, value in arguments.items()}
        mix = _mix_segments if mixer.reach is None else _mix_once
        output = mix(module, forward, mixer, whole, chunk)
        return _of_tokens(sharing.own_tokens, output, chunk.tokens)

    return mix_chunk


def _mix_segments(
    module: nn.Module, forward: Forward, mixer: Mixer, arguments: dict[str, Any], chunk: RunningChunk
) -> Any:
    outputs: dict[int, Any] = {}
    spans = chunk.spans

    def of_segments(batch: Sequence[slice]) -> dict[str, Any]:
        rows = functools.partial(_rows, batch)
        return {name: _of_tokens(rows, value, chunk.tokens) for name, value in arguments.items()}

    if chunk.has_piece:
        needs_gradient = has_gradient(module, arguments)
        found = {part: chunk.enter(part, needs_gradient=needs_gradient) for part in mixer.parts}
        start = {part: value for part, value in found.items() if value is not None} or None
        with linear_layers_in_blocks(_tokens(spans[0])):
            output, last = mixer.run(module, forward, of_segments(spans[:1]), start)
        for part in mixer.parts if chunk.continues else ():
            output = _leave(chunk, part, last[part], output)
        outputs[0] = output
        spans = spans[1:]
    for batch in batches(spans, chunk.context.packing.device):
        output, _ = mixer.run(module, forward, of_segments(batch), None)
        for row, span in enumerate(batch):
            own = functools.partial(_of_row, row, _tokens(span))
            outputs[span.start] = _of_tokens(own, output, max(map(_tokens, batch)), rows=len(batch))
    return joined([outputs[start] for start in sorted(outputs)])


def _rows(batch: Sequence[slice], tensor: Tensor) -> Tensor:
    """Return segments of a tensor (1, tokens, ...) as rows, with zeros behind those that are shorter."""
    longest = max(map(_tokens, batch))
    rows = [
        nn.functional.pad(tensor[:, span], (0, 0) * (tensor.ndim - 2) + (0, longest - _tokens(span)))
        if _tokens(span) < longest
        else tensor[:, span]
        for span in batch
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _of_row(row: int, tokens: int, tensor: Tensor) -> Tensor:
    return tensor[row : row + 1, :tokens]


def _tokens(span: slice) -> int:
    return int(span.stop - span.start)


def _mix_once(
    module: nn.Module, forward: Forward, mixer: Mixer, arguments: dict[str, Any], chunk: RunningChunk
) -> Tensor:
    """Run the module as a convolution: once, with more rows in front of each segment, whose outputs are dropped."""
    assert mixer.reach is not None
    reach = mixer.reach(module)

    def spread(value: Tensor) -> Tensor:
        return torch.cat([nn.functional.pad(value[:, span], (0, 0, reach, 0)) for span in chunk.spans], dim=1)

    def run(inputs: Tensor) -> Tensor:  # (1, channels, tokens)
        others = {name: _of_tokens(spread, value, chunk.tokens) for name, value in arguments.items()}
        own = {"hidden_states": inputs.transpose(1, 2), "past_key_values": None}
        output: Tensor = forward(module, **{**others, **own})
        return output.transpose(1, 2)

    return convolve_segments(run, arguments["hidden_states"].transpose(1, 2), reach, chunk).transpose(1, 2)


def _leave(chunk: RunningChunk, part: str, value: Tensor, output: Any) -> Any:
    """Leave a part through an output that has a gradient, if there is one: adapters may train values alone."""
    if not isinstance(output, tuple):
        return chunk.leave(part, value, output)
    through = next((i for i, each in enumerate(output) if isinstance(each, Tensor) and each.requires_grad), 0)
    return *output[:through], chunk.leave(part, value, output[through]), *output[through + 1 :]


def _of_tokens(change: Callable[[Tensor], Tensor], value: Any, tokens: int, rows: int = 1) -> Any:
    """Change all tensors (rows, tokens, ...) of an argument or output, within tuples, too."""
    if isinstance(value, tuple):
        return tuple(_of_tokens(change, each, tokens, rows) for each in value)
    is_of_tokens = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (rows, tokens)
    return change(value) if is_of_tokens else value


def joined(outputs: list[Any]) -> Any:
    """Join the outputs of all segments, (1, tokens, ...); what has no tokens is left out."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(joined(list(each)) for each in zip(*outputs, strict=True))
    return torch.cat(outputs, dim=1) if isinstance(first, Tensor) else None
