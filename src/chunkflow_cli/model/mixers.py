"""Modules that let tokens meet in code of their own: how each takes a state and returns the one behind its last token.

Most recurrent layers call functions that all modeling files share (`recurrent_functions`). The modules here do not.
`execution.recurrent.mixers` runs them in chunks, once for each segment; `scan_shapes` counts what they hand on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.exchange import Forward
from chunkflow_cli.model.rwkv_scan import scan

Arguments: TypeAlias = Mapping[str, Any]
"""The arguments of a module's forward by name, (rows, tokens, ...): a row for each sequence, and zeros behind it if
it is shorter than others. From a state, and where the returned state is used, there is one row and nothing behind."""
State: TypeAlias = dict[str, Tensor]
"""What a module hands on to the tokens behind, by part."""


@dataclass(frozen=True)
class Mixer:
    """How to run a module that lets tokens meet."""

    parts: tuple[str, ...]
    """The names of what it hands on."""
    run: Callable[[Any, Forward, Arguments, State | None], tuple[Any, State]]
    """Runs the module from a state, or from none at the beginning of a sequence; returns its output and its state."""
    reach: Callable[[Any], int] | None = None
    """Counts the inputs before a token that it sees, if it sees no others: such a module runs once for all segments.
    Its inputs are `hidden_states`, and zeros have no effect."""
    launches_per_token: float = 0.0
    """Kernels that its forward launches for each token, if it goes through tokens, or short blocks of them, in Python
    (tests/model/test_shape.py counts them)."""


class _StateCache:
    """What such a module takes for transformers' cache: the state to begin with, then the state that it leaves."""

    def __init__(self, start: State | None) -> None:
        self._start = start or {}
        self.last: State = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._start.get(f"conv{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._start.get(f"state{state_idx}")

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Take inputs, and return all that there are; if their size is given, together with those to begin with."""
        name = f"conv{state_idx}"
        if conv_kernel_size is not None:
            before = self._start.get(name)
            if before is None:
                before = inputs.new_zeros(*inputs.shape[:-1], max(0, conv_kernel_size - inputs.shape[-1]))
            inputs = torch.cat([before, inputs], dim=-1)
        self.last[name] = inputs if conv_kernel_size is None else inputs[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> None:
        self.last[f"state{state_idx}"] = state


def _with_cache(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run a module that takes its state from a cache for however many tokens, and leaves it there."""
    cache = _StateCache(start)
    output = forward(module, **{**arguments, "past_key_values": cache})
    return output, cache.last


def _inkling2(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run a convolution from the beginning of a sequence. It never runs from a state (`Mixer.reach`)."""
    assert start is None
    inputs = arguments["hidden_states"]
    return forward(module, **arguments), {"conv0": inputs[:, inputs.shape[1] - module.conv_kernel_size + 1 :]}


def _minimax(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run linear attention, whose blocks begin with no state, and add before its norm what a token reads of a state.

    From a state, transformers runs it token by token.
    """
    tokens = arguments["hidden_states"].shape[1]
    without_cache = {**arguments, "past_key_values": None}
    if start is None:
        output, state = forward(module, **without_cache)
        return (output, None), {"state0": state}
    rate = module.slope_rate.float()
    activated: list[Tensor] = []
    steps = torch.arange(1, tokens + 1, device=rate.device)[:, None]
    fading = torch.exp(-rate * steps).to(start["state0"].dtype)  # (heads, tokens, 1)

    def add_past(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        by_head = activated[0].unflatten(-1, (len(rate), -1)).transpose(1, 2)
        query = by_head.tensor_split(3, dim=-1)[0]  # (1, heads, tokens, head_dim)
        past: Tensor = (query * fading) @ start["state0"]
        return inputs[0] + past.transpose(1, 2).flatten(2)

    with _hooked(
        module.act_fn.register_forward_hook(lambda *called: activated.append(called[-1])),
        module.norm.register_forward_pre_hook(add_past),
    ):
        output, state = forward(module, **without_cache)
    return (output, None), {"state0": start["state0"] * fading[:, -1:] + state}


def _recurrent_gemma(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run a convolution and a scan, with the last inputs and the state put in front of them.

    transformers keeps both in the module, and takes them for one token at a time.
    """
    reach, scan = module.conv1d_width - 1, module.rg_lru
    start = start or {}
    last: State = {}

    def join(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        before = start.get("conv0")
        joined = nn.functional.pad(inputs[0], (reach, 0)) if before is None else torch.cat([before, inputs[0]], dim=-1)
        last["conv0"] = joined[..., joined.shape[-1] - reach :]
        return joined

    def begin(*_: Any) -> None:
        scan.recurrent_states = start.get("state0")

    def end(*_: Any) -> None:
        last["state0"], scan.recurrent_states = scan.recurrent_states, None

    with _hooked(
        module.conv_1d.register_forward_pre_hook(join),
        module.conv_1d.register_forward_hook(lambda *called: called[-1][..., reach:]),
        scan.register_forward_pre_hook(begin),
        scan.register_forward_hook(end),
    ):
        output = forward(module, **{**arguments, "use_cache": False})
    return output, last


@contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _OfOneLayer:
    """What rwkv's modules take for the states of all layers: what one writes replaces what was there."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __getitem__(self, _: Any) -> Tensor:
        return self.value

    def __setitem__(self, _: Any, value: Tensor) -> None:
        self.value = value


_RWKV_SCAN = {"numerator": 0.0, "denominator": 0.0, "largest": -1e38}
"""Parts of the state of rwkv's scan -> what they are at the beginning of a sequence."""


def _rwkv_attention(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run rwkv's attention with another scan: in its kernel, states have no gradient, and its loop is slow."""
    hidden = arguments["hidden"]
    if start is None:
        shape = (len(hidden), module.attention_hidden_size)
        parts = {part: hidden.new_full(shape, value, dtype=torch.float32) for part, value in _RWKV_SCAN.items()}
        start = {"conv0": torch.zeros_like(hidden[:, 0]), **parts}
    layers = {part: _OfOneLayer(value) for part, value in start.items()}
    with mock.patch.object(sys.modules[forward.__module__], "rwkv_linear_attention", _rwkv_scan):
        output, _ = forward(module, hidden, [None, *layers.values()])
    return (output, None), {part: layer.value for part, layer in layers.items()}


def _rwkv_scan(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Any, return_state: bool
) -> tuple[Tensor, Any]:
    return scan(time_decay, time_first, key, value, state)


def _rwkv_feed_forward(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    hidden = arguments["hidden"]
    layer = _OfOneLayer(torch.zeros_like(hidden[:, 0]) if start is None else start["conv0"])
    output, _ = forward(module, hidden, [layer])
    return (output, None), {"conv0": layer.value}


_XLSTM_STATE = ("memory", "normalizer", "largest")


def _xlstm(module: Any, forward: Forward, arguments: Arguments, start: State | None) -> tuple[Any, State]:
    """Run xlstm's scan in float32: in bfloat16, transformers' has no backward."""
    backend, hidden = module.mlstm_backend, arguments["x"]
    own = backend.forward

    def in_float32(**given: Tensor | None) -> tuple[Tensor, Any]:
        output, last = own(**{name: value if value is None else value.float() for name, value in given.items()})
        return output.to(hidden.dtype), last

    with mock.patch.object(backend, "forward", in_float32):
        output, last = forward(module, hidden, None if start is None else tuple(start[part] for part in _XLSTM_STATE))
    return (output, None), dict(zip(_XLSTM_STATE, last, strict=True))


MIXERS = {
    "Inkling2DynamicShortConvolution": Mixer(("conv0",), _inkling2, lambda module: module.conv_kernel_size - 1),
    "MiniMaxLightningAttention": Mixer(("state0",), _minimax),
    "RecurrentGemmaRecurrentBlock": Mixer(("conv0", "state0"), _recurrent_gemma, launches_per_token=6.0),
    "Qwen4ExpTextPLELayer": Mixer(("conv1", "conv2"), _with_cache),  # inputs of a convolution; the last ids
    "RwkvFeedForward": Mixer(("conv0",), _rwkv_feed_forward),  # inputs of the last token
    "RwkvSelfAttention": Mixer(("conv0", *_RWKV_SCAN), _rwkv_attention, launches_per_token=2.2),
    "xLSTMLayer": Mixer(_XLSTM_STATE, _xlstm, launches_per_token=0.27),  # in blocks of 64
    "ZayaCCAProjection": Mixer(("conv0", "state0"), _with_cache),  # inputs of convolutions; the last token's values
}
"""Name of a class -> how to run it."""


def mixer_of(cls: type) -> Mixer | None:
    """Return how to run the modules of a class of transformers; None if it is no such class.

    Raises:
        UsageError: it is the class of a package, whose kernels leave out the gradient of a part of the state.
    """
    if cls.__name__ == "mLSTMLayer" and cls.__module__.startswith("xlstm."):
        raise UsageError(
            "models of type 'xlstm' cannot be trained in chunks with the package xlstm, whose kernels leave out a part "
            "of the gradient\n  uninstall it (pip uninstall xlstm): transformers has layers of its own"
        )
    is_of_transformers = cls.__module__.startswith("transformers.")
    return MIXERS.get(cls.__name__) if is_of_transformers else None


def forget_states(model: nn.Module) -> None:
    """Drop what modules keep of their last forward, and with it that forward's graph, which cannot be copied."""
    module: Any
    for module in model.modules():
        if "recurrent_states" in vars(module):  # recurrent_gemma
            module.recurrent_states = None
