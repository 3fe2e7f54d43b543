"""The kinds of layers of an architecture, and a configuration that keeps one layer of each kind.

A configuration says in many ways what its layers are: lists with one entry a layer, lists of indices, periods and
offsets, properties, overrides of single layers. So the kinds are read from the model itself, built without weights: two
layers are alike if their modules are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

MOST_LAYERS = 8
"""Layers of a small copy. Architectures have up to seven kinds; others differ in numbers that matter little."""

Build = Callable[[Any], nn.Module]
"""Build the model of a configuration without weights, on the meta device."""


def keep_layer_kinds(config: Any, build: Build) -> Any:
    """Return a configuration with one layer of each kind, and with two layers at least.

    It keeps the first layer of each kind where the configuration can say so, else the shortest beginning that has all
    kinds. It returns `config` itself if the model has no list of layers, or if neither can be built.
    """
    layers = _layers(build(config), config)
    if layers is None:
        return config
    kinds = _kinds(layers)
    first: dict[int, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    keep = sorted(first.values())[:MOST_LAYERS]
    if len(keep) == 1 and len(layers) > 1:
        keep = [0, 1]  # state and gradient must pass through more than one layer
    for chosen in (keep, list(range(keep[-1] + 1))):
        if len(chosen) == len(layers):
            break
        small = with_layers(config, chosen, len(layers))
        try:
            found = _layers(build(small), small)
        except Exception:  # whatever a modeling file raises: this choice of layers does not fit it
            continue
        if found is not None and _kinds(found) == _renumbered([kinds[index] for index in chosen]):
            return small
    return config


def with_layers(config: Any, keep: Sequence[int], layers: int) -> Any:
    """Return a copy of a configuration of `layers` layers that has only some of them, in the same order."""
    small = copy.deepcopy(config)
    overrides = take_overrides(small)
    sharing = getattr(config, "kv_sharing_modes", None)
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)):
            cut = _cut_list(name, value, keep, layers)
            if cut is not None:
                setattr(small, name, cut)
        elif _counts_layers(name, value, layers):
            setattr(small, name, value // layers * len(keep))
    if sharing is not None:
        small.num_kv_shared_layers = sum(sharing[index] == "reuse" for index in keep)
    give_overrides(small, {keep.index(index): each for index, each in overrides.items() if index in keep})
    return small


def take_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Remove what a configuration sets for single layers (`per_layer_config`), and return it by layer.

    While it is there, its attributes cannot be read from the configuration, for no value holds for all layers.
    """
    if not getattr(config, "is_heterogeneous", False):
        return {}
    overrides = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    return {int(index): each for index, each in overrides.items()}


def give_overrides(config: Any, overrides: dict[int, dict[str, Any]]) -> None:
    """Set attributes for single layers, as `take_overrides` returns them."""
    if overrides:
        config.per_layer_config = overrides


def _layers(model: nn.Module, config: Any) -> nn.ModuleList | None:
    """Return the list of layers: the longest one whose length counts the configuration's layers."""
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0 and count % len(m) == 0]
    return max(lists, key=len, default=None)


def _kinds(layers: nn.ModuleList) -> list[int]:
    """Return the kind of each layer, numbered as they appear. Fractions do not count if nearly all layers differ."""
    for with_floats in (True, False):
        kinds = _renumbered(_descriptions(layers, with_floats))
        if len(set(kinds)) <= MOST_LAYERS:
            break
    return kinds


def _descriptions(layers: nn.ModuleList, with_floats: bool) -> list[Any]:
    simple = (bool, int, str, type(None)) + ((float,) if with_floats else ())
    seen: set[int] = set()
    descriptions = []
    for layer in layers:
        modules = [
            (name, type(module).__name__, tuple(sorted(
                (key, repr(value)) for key, value in vars(module).items()
                if isinstance(value, simple) and not key.startswith("_") and not _is_index(key)
            )))
            for name, module in layer.named_modules()
        ]  # fmt: skip
        own = {id(parameter) for parameter in layer.parameters()}
        is_shared = not own.isdisjoint(seen)  # weights of an earlier layer run again
        seen |= own
        shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
        descriptions.append(repr((modules, shapes, is_shared)))
    return descriptions


def _is_index(name: str) -> bool:
    return any(part in name for part in ("idx", "index", "layer_id", "layer_n"))


def _renumbered(values: Sequence[Any]) -> list[int]:
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _cut_list(name: str, value: Sequence[Any], keep: Sequence[int], layers: int) -> Sequence[Any] | None:
    """Return what is left of a list with an entry for each layer, or of one of indices of layers; None for others."""
    is_of_indices = any(part in name for part in ("idx", "indices", "ids", "layers")) and "token" not in name
    first = int(name == "ple_layer_ids")  # qwen4_exp counts these from 1
    is_rising = all(type(each) is int and 0 <= each - first < layers for each in value)
    if value and is_of_indices and is_rising and list(value) == sorted(set(value)):
        return [keep.index(each - first) + first for each in value if each - first in keep]
    if len(value) == layers > 1:
        kept = [value[index] for index in keep]
        return tuple(kept) if isinstance(value, tuple) else kept
    return None


def _counts_layers(name: str, value: Any, layers: int) -> bool:
    is_count = ("layer" in name or name == "num_blocks") and type(value) is int and value > 0 and value % layers == 0
    return is_count and not any(part in name for part in ("interval", "_every_", "period", "shared", "window"))
