"""The scan of rwkv's attention in blocks of tokens.

transformers has a loop over single tokens, which takes seconds for a thousand of them, and a CUDA kernel whose backward
gives the state no gradient. Each token's output is the mean of all values up to its own, weighted by
exp(key - age * decay), so the tokens of a block are computed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Tokens computed at once. For each of them and each channel, as many weights are kept for backward."""
State = tuple[Tensor, Tensor, Tensor]
"""Sums of weighted values and of weights, both divided by exp(the third), (samples, channels) each."""


def scan(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: State) -> tuple[Tensor, State]:
    """Return the weighted means, (samples, tokens, channels), and the state behind the last token.

    Args:
        time_decay: the logarithm of the decay per token, (channels,).
        time_first: what is added to the key of a token for its own output, (channels,).
        key: (samples, tokens, channels), as `value`.
    """
    decay, time_first = -torch.exp(time_decay).float(), time_first.float()
    steps = torch.arange(BLOCK, device=key.device)[:, None]
    age = (steps - 1 - steps.T)[..., None]  # of the second token at the first, (tokens, tokens, 1)
    faded = torch.where(age < 0, time_first, age * decay).masked_fill(age < -1, -torch.inf)
    outputs = []
    for keys, values in zip(key.float().split(BLOCK, 1), value.float().split(BLOCK, 1), strict=True):
        tokens = keys.shape[1]
        logs = keys[:, None] + faded[:tokens, :tokens]  # (samples, tokens, tokens, channels)
        (numerator, denominator), _ = _added(logs, values[:, None], state, steps[:tokens] * decay)
        outputs.append(numerator / denominator)
        logs = keys + (tokens - 1 - steps[:tokens]) * decay
        sums, largest = _added(logs[:, None], values[:, None], state, tokens * decay[None])
        state = sums[0][:, 0], sums[1][:, 0], largest[:, 0]
    return torch.cat(outputs, 1).to(key.dtype), state


def _added(logs: Tensor, values: Tensor, state: State, faded: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Add weighted values to those of a state.

    Args:
        logs: logarithms of weights, (samples, times, tokens, channels).
        values: (samples, 1, tokens, channels).
        faded: what is added to the logarithms of the state's weights, (times, channels).

    Returns:
        Sums of values and of weights, and the logarithm that both are divided by, (samples, times, channels) each. The
        logarithm has no gradient: whatever it is, the quotient of the sums is the same.
    """
    numerator, denominator, before = state
    of_state = before.detach()[:, None] + faded
    largest = torch.maximum(logs.detach().amax(2), of_state.detach())
    weights, kept = torch.exp(logs - largest[:, :, None]), torch.exp(of_state - largest)
    sums = (weights * values).sum(2) + kept * numerator[:, None], weights.sum(2) + kept * denominator[:, None]
    return sums, largest
