"""Build a small copy of an architecture that trains in a second and exposes mistakes.

All sizes of the configuration are reduced. If no model can be built from the result, one kind of size is left
unchanged, and so on. The features that expose mistakes are always there: windows shorter than the test sequences,
layers of each kind, and weights so large that scores matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from chunkflow_cli.errors import is_out_of_memory
from chunkflow_cli.execution.dropout import remove_dropout
from chunkflow_cli.execution.layer_kinds import keep_layer_kinds
from chunkflow_cli.execution.parity import use_implementation, whole_implementation
from chunkflow_cli.execution.small_sizes import FEW_HEADS, HIDDEN, MORE_HEADS, SHRINKINGS, Before, number, shorten_reach
from chunkflow_cli.model.hf_config import with_parts
from chunkflow_cli.model.language_part import text_only
from chunkflow_cli.model.loading import empty_model, random_model

MOST_PARAMETERS = 400_000_000
"""Maximum number of parameters. A larger copy could take all memory, and minutes."""
PROJECTION_STD = 1.6
"""Spread of a projection of a normalized input: weights are drawn with this over sqrt(hidden_size), 0.2 at 64. Scores
are far from zero then, so a missing soft cap or multiplier shows, but not so large that rounding drowns everything."""


class CannotBuildError(Exception):
    """Raised if no small model can be built from a configuration. The text is the library's reason on one line."""


def small_config(hf_config: Any) -> Any:
    """Return a configuration of the same architecture, of which a model was made that runs.

    Kept: head_dim, whether several queries share keys, every multiplier and flag. Changed: few layers, one or more of
    each kind; a small vocabulary; windows and attention chunks shorter than the test sequences; initial weights large
    enough for scores to matter; no dropout, because two forwards could not agree under it.

    Raises:
        CannotBuildError: transformers makes no model of it, whichever sizes are left as they are, or only a large one.
        ImportError: its modeling file needs a package that is not installed.
    """
    errors: list[Exception] = []
    with torch.random.fork_rng([]):
        for left_out, key_heads in _attempts():
            try:
                small = _shrunk(hf_config, left_out, key_heads)
                _try_out(small)
                return small
            except Exception as error:  # whatever a modeling file raises at sizes that it was not made for
                if isinstance(error, ImportError) or is_out_of_memory(error):
                    raise
                errors.append(error)
    own = [error for error in errors if not isinstance(error, CannotBuildError)]
    if not own:
        raise errors[-1]
    lines = str(own[-1]).strip().splitlines()
    raise CannotBuildError(": ".join([type(own[-1]).__name__, *lines[:1]])) from own[-1]


def build_small(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a small model in train mode, with random weights that keep recurrent states for many tokens."""
    # On the CPU, so that a small model has the same weights on every device.
    model = random_model(config, dtype=dtype, trust_remote_code=_is_custom(config))
    model.config.use_cache = False
    _stir(model)
    return model.to(device).train()


def _attempts() -> Iterator[tuple[frozenset[str], int]]:
    """Yield the kinds of sizes to leave unchanged, and the number of key heads to keep.

    First none; then one kind, and the kinds that hang together most; at last all but the number of layers, and all.
    """
    yield frozenset(), FEW_HEADS
    yield frozenset(), MORE_HEADS
    kinds = [*SHRINKINGS, "layers"]
    for name in reversed(kinds):
        yield frozenset({name}), FEW_HEADS
    yield frozenset({"heads", "hidden"}), FEW_HEADS
    yield frozenset({"heads", "hidden", "recurrent"}), FEW_HEADS
    yield frozenset(SHRINKINGS), FEW_HEADS
    yield frozenset(kinds), FEW_HEADS


def _shrunk(hf_config: Any, left_out: frozenset[str] = frozenset(), key_heads: int = FEW_HEADS) -> Any:
    small = copy.deepcopy(hf_config)
    for config in with_parts(small):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    config = small.get_text_config()
    shorten_reach(config)
    remove_dropout(config)
    before = Before(copy.deepcopy(config), key_heads)
    for name, shrink in SHRINKINGS.items():
        if name not in left_out:
            shrink(config, before)
    if "layers" not in left_out:
        kept = keep_layer_kinds(config, lambda changed: _skeleton(_with_text(small, changed)))
        small = _with_text(small, kept)
    config = small.get_text_config()
    for name in ("initializer_range", "init_std"):
        if isinstance(getattr(config, name, None), float):
            width = number(config, "hidden_size") or HIDDEN
            setattr(config, name, max(float(getattr(config, name)), PROJECTION_STD / width**0.5))
    return small


def _with_text(whole: Any, text: Any) -> Any:
    """Return a configuration with another text part; the part itself if it is the whole."""
    part = whole.get_text_config()
    if part is whole:
        return text
    changed = copy.copy(whole)
    name = next(name for name, value in vars(whole).items() if value is part)
    setattr(changed, name, text)
    return changed


def _skeleton(config: Any) -> Any:
    """Return the model without weights."""
    return empty_model(config, dtype=torch.float32, trust_remote_code=_is_custom(config))


def _is_custom(config: Any) -> bool:
    """Return true for a configuration that was loaded with model.trust_remote_code=true."""
    return type(config).__module__.startswith("transformers_modules")


def _try_out(config: Any) -> None:
    """Build the model and run it on a few tokens: many sizes that do not fit show in the forward only."""
    parameters = sum(parameter.numel() for parameter in _skeleton(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise CannotBuildError(f"the smallest one that can be built has {parameters / 1e9:.1f} billion parameters")
    with torch.no_grad():
        model = build_small(copy.deepcopy(config), torch.device("cpu"), torch.float32)
        with use_implementation(model, whole_implementation(model)):
            ids = torch.zeros(1, 8, dtype=torch.int64)
            model(input_ids=ids, use_cache=False, **text_only(model, ids))


DECAYS = ("A_log", "dt_bias", "dt_proj.bias", "dt_proj_bias")
"""Ends of the names of parameters that decide how fast a recurrent state fades."""


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Draw weights anew: as models begin, norms, biases and sinks are neutral, and recurrent states fade at once."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=PROJECTION_STD / module.in_features**0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(DECAYS):
            parameter.uniform_(-1.5, 0.5)
        elif parameter.ndim <= 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif not parameter.any():
            parameter.normal_(std=PROJECTION_STD / parameter.shape[-1] ** 0.5)
