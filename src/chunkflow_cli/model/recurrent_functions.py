"""The functions in which tokens of a recurrent layer meet, as the modeling files of transformers name and call them.

transformers writes each under the same name in the modeling files of all recurrent layers: one convolution, and scans
of four kinds. Each has a torch function and calls the kernel of a package instead where that is installed.

`execution.recurrent` makes them run in chunks; `scan_shapes` counts what they compute and keep.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

CONVOLUTION, CONVOLUTION_PACKAGE = "causal_conv1d_fn", "causal_conv1d"
FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Convolution, scan and projection in one kernel. Where one returns None, models call convolution and scan."""


@dataclass(frozen=True)
class Scan:
    """How a function that scans tokens is called."""

    token_axis: int
    """Axis of tokens in the arguments and the output: 1 for (1, tokens, heads, ...), 2 for (1, channels, tokens)."""
    start: str
    """The argument for the state to begin with."""
    wants_last: str
    """The argument that asks for the state after the last token."""
    package: str
    """The package whose kernel transformers calls, where it is installed."""
    always_pair: bool = False
    """True if it returns a pair also when no last state is wanted."""
    block: int | None = None
    """Default of `chunk_size`, the tokens that it computes at once; None if it has no such argument."""
    of_all_heads: tuple[int, ...] = ()
    """Places of arguments with tokens but without heads."""
    is_packing: bool = False
    """True if the kernel takes a packed chunk (`cu_seqlens`)."""


_DELTA_RULE = Scan(1, "initial_state", "output_final_state", "fla", always_pair=True, block=64, is_packing=True)
SELECTIVE_SCAN = "mamba_selective_scan"
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": Scan(1, "initial_states", "return_final_states", "mamba_ssm", block=256),
    SELECTIVE_SCAN: Scan(2, "initial_state", "return_last_state", "mamba_ssm", of_all_heads=(3, 4)),  # B, C
}
KERNEL_PACKAGES = frozenset({CONVOLUTION_PACKAGE, *(scan.package for scan in SCANS.values())})
"""All packages with kernels of these functions."""


def installed_kernels() -> frozenset[str]:
    """Return those of `KERNEL_PACKAGES` that are installed."""
    return frozenset(name for name in KERNEL_PACKAGES if importlib.util.find_spec(name) is not None)
