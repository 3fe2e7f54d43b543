"""The functions with which recurrent layers cross tokens, on torch's meta device: what they compute, keep and hand on.

transformers writes them under the same names in the modeling files of all recurrent layers: one convolution, and scans
of four kinds. Each has a torch function and, if a package is installed, a kernel that keeps much less for backward.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTION, CONVOLUTION_PACKAGE = "causal_conv1d_fn", "causal_conv1d"
FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Convolution, scan and projection in one kernel. In a chunk they return None, and models go on without."""
FLOPS_PER_STATE_ELEMENT = 8
"""Operations of a scan's forward for one token. Megatron-LM counts 8 for Gated DeltaNet and 7 for Mamba."""
DELTA_RULE_BLOCK = 64
"""Tokens of a block of FLA's kernels, which keep a row of this length per token and head."""
SELECTIVE_SCAN_BLOCK = 2048
"""Tokens between the states that the kernel of Mamba-1 keeps."""

Kept = Callable[[dict[str, Any], Tensor], list[Tensor]]
"""Returns the tensors that a kernel keeps, from its arguments and its output."""


def _of_delta_rule(arguments: dict[str, Any], _: Tensor) -> list[Tensor]:
    """Return what FLA's ChunkGatedDeltaRuleFunction saves: normalised copies, cumulated decays, a row of a block."""
    key, beta = arguments["key"], arguments["beta"]
    own = [arguments[name].clone() for name in ("query", "key", "value", "beta")]
    norms = key.new_empty(2, *key.shape[:3], dtype=torch.float32)
    return [*own, norms, arguments["g"].float().clone(), key.new_empty(*beta.shape, DELTA_RULE_BLOCK)]


def _of_kimi_delta(arguments: dict[str, Any], output: Tensor) -> list[Tensor]:
    """Return what FLA's ChunkKDAFunction saves: as `_of_delta_rule`, with decays per channel, twice, and two rows."""
    row = arguments["key"].new_empty(*arguments["beta"].shape, DELTA_RULE_BLOCK)
    return [*_of_delta_rule(arguments, output), arguments["g"], row]


def _of_mamba2(arguments: dict[str, Any], output: Tensor) -> list[Tensor]:
    """Return what mamba_ssm's MambaChunkScanCombinedFn saves: its inputs and output, and cumulated decays."""
    named = [arguments[name] for name in ("hidden_states", "dt", "B", "C")]
    return [*named, arguments["dt"].float().clone(), output]


def _of_selective_scan(arguments: dict[str, Any], output: Tensor) -> list[Tensor]:
    """Return what mamba_ssm's SelectiveScanFn saves: its inputs and output, and the states between blocks."""
    given = [arguments[name] for name in ("hidden_states", "dt", "B", "C", "z") if arguments.get(name) is not None]
    batch, channels, tokens = output.shape
    pieces = tokens / SELECTIVE_SCAN_BLOCK * 2 * arguments["A"].shape[-1]
    states = output.new_empty(batch, channels, max(1, round(pieces)), dtype=torch.float32)
    return [*given, states, output]


@dataclass(frozen=True)
class Scan:
    """A function that scans tokens."""

    wants_last: str
    """The argument that asks for the state after the last token."""
    package: str
    """The package whose kernel transformers calls, where it is installed."""
    kept_by_kernel: Kept
    token_axis: int = 1
    """Axis of the tokens in its output, and in its inputs that have them."""


SCANS = {
    "torch_chunk_gated_delta_rule": Scan("output_final_state", "fla", _of_delta_rule),
    "chunk_kimi_delta_attention": Scan("output_final_state", "fla", _of_kimi_delta),
    "mamba2_chunk_scan": Scan("return_final_states", "mamba_ssm", _of_mamba2),
    "mamba_selective_scan": Scan("return_last_state", "mamba_ssm", _of_selective_scan, token_axis=2),
}
KERNEL_PACKAGES = frozenset({CONVOLUTION_PACKAGE, *(scan.package for scan in SCANS.values())})
"""All packages with kernels of these functions."""


def installed_kernels() -> frozenset[str]:
    """Return those of `KERNEL_PACKAGES` that are installed."""
    return frozenset(name for name in KERNEL_PACKAGES if importlib.util.find_spec(name) is not None)


def modeling_files(cls: type) -> set[ModuleType]:
    """Return the Python modules that hold the code of a class: its own, and those of the classes it inherits from."""
    return {sys.modules[base.__module__] for base in cls.__mro__}


class KernelOnMeta(torch.autograd.Function):
    """A fused kernel without numbers: its output has a shape, and backward keeps the given tensors."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        """Return the output. Tensors among the inputs connect it with what comes before."""
        ctx.save_for_backward(*kept)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("a model on the meta device has no gradient")


@dataclass
class RecurrentTally:
    """What the convolutions and scans of a forward do, added up."""

    kept: dict[int, int]
    """What autograd has saved so far, as `shape_probe.kept_for_backward` counts it."""
    edge_bytes: int = 0
    """Bytes of the state behind the last token: last inputs of convolutions, and states of scans."""
    flops_per_token: int = 0
    input_elements_per_token: int = 0
    activation_bytes: int = 0
    """Bytes that are kept for backward, of all tokens."""
    block: int | None = None
    """Tokens that scans compute at once; None if they do not compute in blocks."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept for backward within the block."""
        before = sum(self.kept.values())
        yield
        self.activation_bytes += sum(self.kept.values()) - before


@contextmanager
def recurrent_functions_on_meta(
    model: nn.Module, kernels: frozenset[str], kept: dict[int, int]
) -> Iterator[RecurrentTally]:
    """Exchange the functions of the model's modeling files within the block, and add up what is called.

    Args:
        kernels: installed packages; the functions of others run in torch, and keep what these operations keep.
        kept: what autograd saves, as `shape_probe.kept_for_backward` counts it.
    """
    tally = RecurrentTally(kept)
    files = {file for cls in {type(module) for module in model.modules()} for file in modeling_files(cls)}
    originals = [
        (file, name, getattr(file, name))
        for file in files
        for name in (CONVOLUTION, *SCANS, *FUSED)
        if hasattr(file, name)
    ]
    for file, name, original in originals:
        setattr(file, name, _on_meta(name, inspect.unwrap(original), kernels, tally))
    try:
        yield tally
    finally:
        for file, name, original in originals:
            setattr(file, name, original)


def _on_meta(
    name: str, in_torch: Callable[..., Any], kernels: frozenset[str], tally: RecurrentTally
) -> Callable[..., Any]:
    if name in FUSED:
        return lambda *_, **__: None
    if name == CONVOLUTION:
        return functools.partial(_convolve, in_torch, CONVOLUTION_PACKAGE in kernels, tally)
    return functools.partial(_scan, SCANS[name], in_torch, SCANS[name].package in kernels, tally)


def _convolve(
    in_torch: Callable[..., Tensor], is_fused: bool, tally: RecurrentTally,
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Convolve inputs, (1, channels, tokens), each channel with its own weights, (channels, size)."""
    channels, size = weight.shape
    tally.input_elements_per_token += channels
    tally.edge_bytes += (size - 1) * channels * x.element_size()
    tally.flops_per_token += 2 * size * channels
    with tally.counting():
        if is_fused:
            output: Tensor = KernelOnMeta.apply(torch.empty_like(x), [x.clone()], x)
            return output
        return in_torch(x, weight, bias, activation=activation)


def _scan(
    scan: Scan, in_torch: Callable[..., Any], is_fused: bool, tally: RecurrentTally, *args: Any, **options: Any
) -> Any:
    signature = inspect.signature(in_torch)
    bound = signature.bind(*args, **options)
    wants_last = bound.arguments.get(scan.wants_last, False)
    bound.arguments[scan.wants_last] = True
    bound.apply_defaults()
    tally.block = bound.arguments.get("chunk_size")
    inputs = [value for value in bound.arguments.values() if isinstance(value, Tensor)]
    with tally.counting():
        with torch.set_grad_enabled(not is_fused):
            output, last = in_torch(*bound.args, **bound.kwargs)
        if is_fused:
            output = KernelOnMeta.apply(output, scan.kept_by_kernel(bound.arguments, output), *inputs)
    tally.edge_bytes += last.nbytes
    tally.flops_per_token += FLOPS_PER_STATE_ELEMENT * last.numel()
    tokens = output.shape[scan.token_axis]
    tally.input_elements_per_token += sum(value.numel() for value in inputs if value.ndim >= 3) // tokens
    is_pair = scan.wants_last == "output_final_state"  # these return a pair always
    return (output, last if wants_last else None) if is_pair or wants_last else output
