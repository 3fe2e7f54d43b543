"""The short causal convolution of recurrent layers, over the segments of a chunk.

Shapes: inputs (1, channels, tokens), weight (channels, width).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.execution.recurrent.running import RunningChunk, running_chunk
from chunkflow_cli.execution.recurrent.sharing import Sharing

Convolution = Callable[..., Tensor]


def convolve_in_chunks(convolve: Convolution) -> Convolution:
    """Return the model's convolution, made to keep the segments of a running chunk apart."""

    @functools.wraps(convolve)
    def convolve_chunk(
        inputs: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **others: Any
    ) -> Tensor:
        chunk = running_chunk()
        if chunk is None:
            return convolve(inputs, weight, bias, activation=activation, **others)
        sharing = Sharing(chunk.group, tokens=2, heads=1)
        is_split = sharing.divides([inputs.shape[1]])
        if is_split:  # channels are independent
            (inputs,) = sharing.to_heads({0: inputs}).values()
            weight, bias = sharing.own_heads(weight), None if bias is None else sharing.own_heads(bias)
        else:
            inputs = sharing.all_tokens(inputs)
        run = functools.partial(convolve, weight=weight, bias=bias, activation=activation)
        out = convolve_segments(run, inputs, weight.shape[-1] - 1, chunk)
        return sharing.to_tokens(out) if is_split else sharing.own_tokens(out)

    return convolve_chunk


def convolve_segments(run: Convolution, inputs: Tensor, reach: int, chunk: RunningChunk) -> Tensor:
    """Convolve once, with `reach` more columns in front of each segment, whose outputs are dropped.

    They are the last inputs of the chunk before, for a piece that has a past, and zeros for other segments.
    """
    name = chunk.begin_call("conv")
    before = chunk.enter(name, needs_gradient=inputs.requires_grad)
    nothing = inputs.new_zeros(1, inputs.shape[1], reach)
    columns: list[Tensor] = []
    for index, span in enumerate(chunk.spans):
        columns += [before if index == 0 and before is not None else nothing, inputs[..., span]]
    padded = torch.cat(columns, dim=-1)
    convolved = run(padded)
    shifts = [(index + 1) * reach for index in range(len(chunk.spans))]
    parts = [convolved[..., s.start + shift : s.stop + shift] for s, shift in zip(chunk.spans, shifts, strict=True)]
    out = torch.cat(parts, dim=-1)
    if chunk.continues:
        tokens = chunk.context.dependent_tokens
        out = chunk.leave(name, padded[..., tokens : tokens + reach], out)
    return out
