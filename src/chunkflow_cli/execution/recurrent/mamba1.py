"""Mamba-1's scan with an initial state, and with a last state that has a gradient.

The scan takes no initial state, neither in torch nor in CUDA, and the CUDA kernel gives the last state no gradient. So
a state goes in as tokens and comes out as tokens. A state has N columns (16, usually):

In front, one token for each column. With B = e_n it writes column n. The tokens behind it decay that column by a known
factor, which its input makes good.

Behind, N tokens that last no time, so they change nothing. With C = e_n they read column n.

This is exact with any kernel. It costs 2 N tokens in each chunk of a long sequence, computed in the dtype of A, which
is that of states.

Shapes: x, dt, z (batch, channels, tokens), A (channels, N), B, C (batch, N, tokens), states (batch, channels, N).
"""
# ruff: noqa: N803, N806 - the names of the paper

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STANDSTILL = -80.0
"""softplus of this is 0 in float32."""


def pass_state_as_tokens(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return the scan with two more arguments: `initial_state`, and `return_last_state` with a gradient."""

    @functools.wraps(scan)
    def scan_with_state(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        initial_state: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if initial_state is None and not return_last_state:
            return scan(x, dt, A, B, C, D, z, delta_bias, delta_softplus, **options)
        count, dtype, tokens = A.shape[-1], x.dtype, x.shape[-1]
        x, dt, B, C = (tensor.to(A.dtype) for tensor in (x, dt, B, C))
        batch, channels, _ = x.shape
        identity = torch.eye(count, dtype=A.dtype, device=A.device).expand(batch, -1, -1)
        nothing = torch.zeros_like(identity)
        bias = 0.0 if delta_bias is None else delta_bias[:, None]
        before = 0
        if initial_state is not None:
            step = 1.0 / (count * A.detach().abs().amax(-1, keepdim=True))  # (channels, 1): nothing decays below 1 / e
            later = torch.arange(count - 1, -1, -1, device=A.device)
            raw = (torch.log(torch.expm1(step)) if delta_softplus else step) - bias
            x = torch.cat([initial_state / (step * torch.exp(A * step * later)), x], dim=-1)
            dt = torch.cat([raw.expand(batch, -1, count), dt], dim=-1)
            B, C = torch.cat([identity, B], dim=-1), torch.cat([nothing, C], dim=-1)
            before = count
        if return_last_state:
            still = torch.full((channels, 1), STANDSTILL if delta_softplus else 0.0, dtype=A.dtype, device=A.device)
            x = torch.cat([x, x.new_zeros(batch, channels, count)], dim=-1)
            dt = torch.cat([dt, (still - bias).expand(batch, -1, count)], dim=-1)
            B, C = torch.cat([B, nothing], dim=-1), torch.cat([C, identity], dim=-1)
        # Without z: it gates outputs, and the last tokens are columns of the state.
        out = scan(x, dt, A, B, C, D, None, delta_bias, delta_softplus, **options)
        last, out = out[..., before + tokens :], out[..., before : before + tokens]
        out = (out if z is None else out * nn.functional.silu(z.to(A.dtype))).to(dtype)
        return (out, last) if return_last_state else out

    return scan_with_state
