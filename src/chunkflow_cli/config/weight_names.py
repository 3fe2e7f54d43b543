"""Match names in the configuration with the weights of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.errors import UsageError


def is_named(weight: str, name: str) -> bool:
    """Return whether a name in the configuration matches a weight.

    It is one or more whole parts of the weight's name, or a regular expression for all of it: `layers.1` means
    `model.layers.1.mlp.up_proj.weight` and no weight of layer 10.

    Args:
        weight: its name in the Hugging Face (or peft) model.
    """
    return f".{name}." in f".{weight}." or re.fullmatch(name, weight) is not None


def factor_of(weight: str, factors: Mapping[str, float]) -> float:
    """Return the factor of a weight's learning rate under `optim.lr_factors`."""
    return next((factor for name, factor in reversed(list(factors.items())) if is_named(weight, name)), 1.0)


def check_names(key: str, names: Iterable[str]) -> None:
    """Check that each name can be read.

    Raises:
        UsageError: a name is empty, or no regular expression.
    """
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise UsageError(f"{key}: {name!r} is not a regular expression: {error}") from error
        if not name:
            raise UsageError(f"{key}={as_written([name])} has an empty name\n  name a weight, or leave the key out")
