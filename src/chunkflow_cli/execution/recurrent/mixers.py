"""Modules that let tokens meet in code of their own, over the segments of a chunk.

Each segment runs by itself, the piece of a long sequence from its state and the others from none. So what such a module
projects is projected once for each segment: it costs more launches than an exchanged function, and knows none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.execution.recurrent.sharing import Sharing
from chunkflow_cli.model.mixers import Forward, Mixer, arguments_of, has_gradient


def mix_in_chunks(forward: Forward, mixer: Mixer) -> Forward:
    """Return the forward of a class, made to keep the segments of a running chunk apart."""

    @functools.wraps(forward)
    def mix_chunk(module: nn.Module, *args: Any, **options: Any) -> Any:
        chunk = running_chunk()
        if chunk is None:
            return forward(module, *args, **options)
        sharing = Sharing(chunk.group, tokens=1, heads=2)  # ranks that share tokens each run the module for all
        arguments = arguments_of(forward, module, args, options)
        here = chunk.tokens // (1 if chunk.group is None else chunk.group.size)
        whole = {name: _of_tokens(sharing.all_tokens, value, here) for name, value in arguments.items()}
        output = _mix_segments(module, forward, mixer, whole, chunk)
        return _of_tokens(sharing.own_tokens, output, chunk.tokens)

    return mix_chunk


def _mix_segments(
    module: nn.Module, forward: Forward, mixer: Mixer, arguments: dict[str, Any], chunk: RunningChunk
) -> Any:
    start = None
    needs_gradient = has_gradient(module, arguments)
    if chunk.has_piece:
        found = {part: chunk.enter(part, needs_gradient=needs_gradient) for part in mixer.parts}
        start = {part: value for part, value in found.items() if value is not None} or None
    outputs = []
    for index, span in enumerate(chunk.spans):
        own = {name: _of_tokens(lambda t, s=span: t[:, s], value, chunk.tokens) for name, value in arguments.items()}
        output, last = mixer.run(module, forward, own, start if index == 0 else None)
        if index == 0 and chunk.continues:
            for part in mixer.parts:
                output = _leave(chunk, part, last[part], output)
        outputs.append(output)
    return _joined(outputs)


def _leave(chunk: RunningChunk, part: str, value: Tensor, output: Any) -> Any:
    """Leave a part through an output that has a gradient, if there is one: adapters may train values alone."""
    if not isinstance(output, tuple):
        return chunk.leave(part, value, output)
    through = next((i for i, each in enumerate(output) if isinstance(each, Tensor) and each.requires_grad), 0)
    return *output[:through], chunk.leave(part, value, output[through]), *output[through + 1 :]


def _of_tokens(change: Callable[[Tensor], Tensor], value: Any, tokens: int) -> Any:
    """Change all tensors (1, tokens, ...) of an argument or output, within tuples, too."""
    if isinstance(value, tuple):
        return tuple(_of_tokens(change, each, tokens) for each in value)
    is_of_tokens = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (1, tokens)
    return change(value) if is_of_tokens else value


def _joined(outputs: list[Any]) -> Any:
    """Join the outputs of all segments, (1, tokens, ...); what has no tokens is left out."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(each)) for each in zip(*outputs, strict=True))
    return torch.cat(outputs, dim=1) if isinstance(first, Tensor) else None
