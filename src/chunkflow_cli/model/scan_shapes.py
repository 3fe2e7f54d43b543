"""What the functions of recurrent layers compute, keep and hand on, found on torch's meta device.

A kernel of a package keeps much less for backward than the torch function that it replaces (`recurrent_functions`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.model.exchange import arguments_of
from chunkflow_cli.model.mixers import Mixer, mixer_of
from chunkflow_cli.model.recurrent_functions import (
    CONVOLUTION,
    CONVOLUTION_PACKAGE,
    FUSED,
    SCANS,
    SELECTIVE_SCAN,
)
from chunkflow_cli.planning.recurrent_layers import RecurrentLayers

FLOPS_PER_STATE_ELEMENT = 8
"""Operations of a scan's forward for one token. Megatron-LM counts 8 for Gated DeltaNet and 7 for Mamba."""
DELTA_RULE_BLOCK = 64
"""Tokens of a block of FLA's kernels, which keep a row of this length per token and head."""
SELECTIVE_SCAN_BLOCK = 2048
"""Tokens between the states that the kernel of Mamba-1 keeps."""

Kept = Callable[[dict[str, Any], Tensor], list[Tensor]]
"""Returns the tensors that a kernel keeps, from its arguments and its output."""


def _of_delta_rule(arguments: dict[str, Any], _: Tensor) -> list[Tensor]:
    """Return what FLA's ChunkGatedDeltaRuleFunction saves: normalized copies, cumulated decays, a row of a block."""
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


KEPT_BY_KERNELS: dict[str, Kept] = {
    "torch_chunk_gated_delta_rule": _of_delta_rule,
    "chunk_kimi_delta_attention": _of_kimi_delta,
    "mamba2_chunk_scan": _of_mamba2,
    SELECTIVE_SCAN: _of_selective_scan,
}
"""Name of a scan -> what its kernel keeps."""


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
    weights: int = 0
    """Weights of modules that run for the tokens of all ranks."""
    launches_per_token: float = 0.0
    """Kernels that modules which go through tokens in Python launch for each."""

    def layers(
        self, tokens: int, other_edge_bytes: int = 0, incomplete: tuple[tuple[int, float], ...] = ()
    ) -> RecurrentLayers:
        """Return what they do together in a forward of so many tokens."""
        return RecurrentLayers(
            self.edge_bytes + other_edge_bytes,
            incomplete,
            self.flops_per_token,
            self.input_elements_per_token,
            self.activation_bytes / tokens,
            self.block,
            self.weights,
            self.launches_per_token,
        )

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
    classes = {type(module) for module in model.modules()}
    files = {file for cls in classes for file in modeling_files(cls)}
    originals = [
        (file, name, getattr(file, name))
        for file in files
        for name in (CONVOLUTION, *SCANS, *FUSED)
        if hasattr(file, name)
    ]
    mixers: list[tuple[Any, Any, Mixer]] = [
        (cls, cls.forward, mixer) for cls in classes if (mixer := mixer_of(cls)) is not None
    ]
    for file, name, original in originals:
        setattr(file, name, _on_meta(name, inspect.unwrap(original), kernels, tally))
    for cls, forward, mixer in mixers:
        cls.forward = functools.partialmethod(_mix, inspect.unwrap(forward), mixer, tally)
    try:
        yield tally
    finally:
        for file, name, original in originals:
            setattr(file, name, original)
        for cls, forward, _ in mixers:
            cls.forward = forward


def _on_meta(
    name: str, in_torch: Callable[..., Any], kernels: frozenset[str], tally: RecurrentTally
) -> Callable[..., Any]:
    if name in FUSED:
        return lambda *_, **__: None
    if name == CONVOLUTION:
        return functools.partial(_convolve, in_torch, CONVOLUTION_PACKAGE in kernels, tally)
    return functools.partial(_scan, name, in_torch, SCANS[name].package in kernels, tally)


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
    name: str, in_torch: Callable[..., Any], is_fused: bool, tally: RecurrentTally, *args: Any, **options: Any
) -> Any:
    scan = SCANS[name]
    bound = inspect.signature(in_torch).bind(*args, **options)
    wants_last = bound.arguments.get(scan.wants_last, False)
    bound.arguments[scan.wants_last] = True
    bound.apply_defaults()
    tally.block = bound.arguments.get("chunk_size")
    inputs = [value for value in bound.arguments.values() if isinstance(value, Tensor)]
    with tally.counting():
        with torch.set_grad_enabled(not is_fused):
            output, last = in_torch(*bound.args, **bound.kwargs)
        if is_fused:
            output = KernelOnMeta.apply(output, KEPT_BY_KERNELS[name](bound.arguments, output), *inputs)
    tally.edge_bytes += last.nbytes
    tally.flops_per_token += FLOPS_PER_STATE_ELEMENT * last.numel()
    tokens = output.shape[scan.token_axis]
    tally.input_elements_per_token += sum(value.numel() for value in inputs if value.ndim >= 3) // tokens
    return (output, last if wants_last else None) if scan.always_pair or wants_last else output


def _mix(
    module: nn.Module, in_torch: Callable[..., Any], mixer: Mixer, tally: RecurrentTally, *args: Any, **options: Any
) -> Any:
    """Run a module that lets tokens meet in code of its own."""
    arguments = arguments_of(in_torch, module, args, options)
    looked_up = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}  # qwen4_exp's n-grams
    tally.weights += sum(parameter.numel() for parameter in module.parameters() if parameter not in looked_up)
    tally.launches_per_token += mixer.launches_per_token
    with tally.counting():
        output, last = mixer.run(module, in_torch, arguments, None)
    tally.edge_bytes += sum(part.nbytes for part in last.values())
    tally.flops_per_token += FLOPS_PER_STATE_ELEMENT * sum(part.numel() for part in last.values())
    given = [value for value in arguments.values() if isinstance(value, Tensor) and value.ndim >= 3]
    tally.input_elements_per_token += sum(value.numel() // value.shape[1] for value in given)
    return output
