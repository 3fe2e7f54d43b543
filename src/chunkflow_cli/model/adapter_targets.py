"""Find the modules and parameters that get an adapter. A name that matches nothing is refused.

The rules are peft's: a name matches a module that is called so, or whose name ends with it after a dot. A word with
characters that no name has, such as `*`, is a regular expression for whole names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.config.schema import LoraConfig
from chunkflow_cli.errors import UsageError

ALL_LINEAR = "all-linear"
MODULES_KEY, PARAMETERS_KEY = "model.lora.target_modules", "model.lora.target_parameters"
SAVED_KEY = "model.lora.modules_to_save"
_PATTERN_CHARACTERS = frozenset("*+?[](){}|^$\\")
_LAYER_NUMBER = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class Targets:
    """What gets an adapter and what is trained whole, by whole names."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...] = ()


def find_targets(model: Any, lora: LoraConfig) -> Targets:
    """Return what the names of `model.lora` match in a whole Hugging Face model; on the meta device, too.

    Raises:
        UsageError: a name matches nothing, or something that cannot have an adapter.
    """
    if not lora.target_modules and not lora.target_parameters:
        raise UsageError(f"{MODULES_KEY}=[] names nothing to train\n  set it to [{ALL_LINEAR}], or name modules")
    saved = _saved(model, lora.modules_to_save)
    modules, parameters = _modules(model, lora.target_modules, saved), _parameters(model, lora.target_parameters)
    for name in parameters:
        owner = name.rpartition(".")[0]
        for key, owners in ((MODULES_KEY, modules), (SAVED_KEY, saved)):
            if owner in owners:
                raise UsageError(
                    f"{PARAMETERS_KEY}: {name} belongs to {owner}, which {key} names, too\n"
                    "  leave it out of one of them"
                )
    return Targets(tuple(sorted(modules)), tuple(sorted(parameters)), tuple(sorted(saved)))


def linear_layers(model: Any) -> list[str]:
    """Return the names of all linear layers but the head, in the order of the model."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if _is_linear(module) and module is not head]


def fused_parameters(model: Any) -> list[str]:
    """Return the names of large weights that no linear layer holds: experts, stacked as one tensor of three axes."""
    return [
        name for name, parameter, owner in _owned_parameters(model) if parameter.ndim == 3 and not _is_recurrent(owner)
    ]


def in_any_layer(names: Iterable[str]) -> list[str]:
    """Return names without the number of their layer, each once: `mlp.experts.down_proj`."""
    return list(dict.fromkeys(_LAYER_NUMBER.sub("", name) for name in names))


def shortest(names: Collection[str], all_names: Iterable[str]) -> list[str]:
    """Return the shortest endings that match these names and none of the others, in sorted order."""
    wanted = set(names)
    taken = {ending for name in all_names if name not in wanted for ending in _endings(name)}
    return sorted({next(ending for ending in _endings(name) if ending not in taken) for name in wanted})


def _endings(name: str) -> list[str]:
    """Return the endings of a name from the shortest to the name itself: `q_proj`, `self_attn.q_proj`, ..."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def shortest_as_text(names: Collection[str], all_names: Collection[str]) -> list[str]:
    """Return the shortest endings that no other name ends with, not even within a word, in sorted order.

    That is how peft finds `modules_to_save`: `norm` would find `input_layernorm`, too.
    """
    others = set(all_names) - set(names)
    by_ending: dict[str, bool] = {}
    found = set()
    for name in names:
        for ending in _endings(name):
            if ending not in by_ending:
                by_ending[ending] = any(other.endswith(ending) for other in others)
            if not by_ending[ending]:
                found.add(ending)
                break
        else:
            raise UsageError(f"{SAVED_KEY}: peft cannot train {name} whole, because other names end with it")
    return sorted(found)


def _saved(model: Any, words: Sequence[str]) -> set[str]:
    modules = dict(model.named_modules())
    modules.pop("", None)
    found: set[str] = set()
    missing: list[str] = []
    for word in words:
        matched = [name for name in modules if _matcher(SAVED_KEY, word)(name)]
        holding = [name for name in matched if _holds_weights(modules[name])]
        if not holding and (not matched or _is_pattern(word)):
            missing.append(word)
        elif len(holding) < len(matched) and not _is_pattern(word):
            other = next(name for name in matched if name not in holding)
            raise UsageError(
                f"{SAVED_KEY}={as_written(list(words))}: {word} matches {other}, a {type(modules[other]).__name__}, "
                "which has no weights of its own\n  name the modules in it, or a regular expression for them, such as "
                f".*{re.escape(word)}.*"
            )
        found.update(holding)
    if missing:
        leaves = [name for name, module in modules.items() if _holds_weights(module)]
        names = [".".join(name.split(".")[-word.count(".") - 1 :]) for word in missing for name in leaves]
        kinds = sorted({name.rpartition(".")[2] for name in leaves})
        told = f"  its modules with weights: {', '.join(kinds)}"
        raise UsageError(_nothing_matches(told, SAVED_KEY, words, missing, "module with weights", names))
    return found


def _holds_weights(module: nn.Module) -> bool:
    """Return whether a module has weights, and no module within it has any."""
    own, all_weights = (list(module.parameters(recurse)) for recurse in (False, True))
    return bool(own) and len(own) == len(all_weights)


def _modules(model: Any, words: Sequence[str], saved: Collection[str]) -> set[str]:
    modules = dict(model.named_modules())
    modules.pop("", None)
    found: set[str] = set()
    missing: list[str] = []
    for word in words:
        if word.lower() == ALL_LINEAR:
            found.update(name for name in linear_layers(model) if name not in saved)
            continue
        matched = [name for name in modules if _matcher(MODULES_KEY, word)(name)]
        fitting = [name for name in matched if _is_linear(modules[name]) or isinstance(modules[name], nn.Embedding)]
        if _is_pattern(word):
            matched = fitting  # a pattern for whole blocks means the layers in them
        if not matched:
            missing.append(word)
        elif len(fitting) < len(matched):
            other = next(name for name in matched if name not in fitting)
            raise UsageError(
                f"{MODULES_KEY}={as_written(list(words))}: {word} matches {other}, a {type(modules[other]).__name__}, "
                f"which cannot have an adapter\n{_layers_of(model)}"
            )
        found.update(fitting)
    if missing:
        names = [".".join(name.split(".")[-word.count(".") - 1 :]) for word in missing for name in modules]
        raise UsageError(_nothing_matches(_layers_of(model), MODULES_KEY, words, missing, "module", names))
    if twice := sorted(found.intersection(saved)):
        raise UsageError(f"{SAVED_KEY}: {twice[0]} is in {MODULES_KEY}, too\n  leave it out of one of them")
    return found


def _parameters(model: Any, words: Sequence[str]) -> set[str]:
    parameters = {name: (parameter, owner) for name, parameter, owner in _owned_parameters(model)}
    found: set[str] = set()
    missing: list[str] = []
    for word in words:
        matched = [name for name in parameters if _matcher(PARAMETERS_KEY, word)(name)]
        if not matched:
            missing.append(word)
        for name in matched:
            parameter, owner = parameters[name]
            if isinstance(owner, nn.Embedding) or owner is model.get_output_embeddings():
                module = name.rpartition(".")[0].rpartition(".")[2]
                raise UsageError(
                    f"{PARAMETERS_KEY}: {name} is an embedding or the head\n  name {module} in {MODULES_KEY}"
                )
            if _is_recurrent(owner):
                raise UsageError(
                    f"{PARAMETERS_KEY}: {name} belongs to a recurrent layer, whose own parameters cannot have adapters"
                    f"\n  name linear layers in {MODULES_KEY}"
                )
            if parameter.ndim not in (2, 3):
                raise UsageError(
                    f"{PARAMETERS_KEY}={as_written(list(words))}: {word} matches {name}, which has one axis: only "
                    f"matrices and stacks of matrices can have an adapter\n{_layers_of(model)}"
                )
        found.update(matched)
    if missing:
        names = in_any_layer(parameters)
        raise UsageError(_nothing_matches(_layers_of(model), PARAMETERS_KEY, words, missing, "parameter", names))
    return found


def _nothing_matches(
    there: str, key: str, words: Sequence[str], missing: Sequence[str], kind: str, names: Sequence[str]
) -> str:
    listed = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} or {missing[-1]}"
    near = dict.fromkeys(match for word in missing for match in difflib.get_close_matches(word, names, n=1, cutoff=0.5))
    hint = f"\n  did you mean {' or '.join(near)}?" if near else ""
    return f"{key}={as_written(list(words))}: this model has no {kind} {listed}{hint}\n{there}"


def _layers_of(model: Any) -> str:
    """Return the lines that name what can have an adapter."""
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
    lines = f"  its linear layers: {', '.join(linear)}; {ALL_LINEAR} takes all but the head"
    if fused := in_any_layer(fused_parameters(model)):
        lines += f"\n  its experts are parameters: {PARAMETERS_KEY}=[{','.join(fused)}]"
    return lines


def _owned_parameters(model: Any) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """Return each parameter with its name and the module that holds it; one with several names under each of them."""
    return [
        (f"{prefix}.{name}" if prefix else name, parameter, module)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a convolution or a recurrent layer, all of which begin with one.

    Chunks hand the weights of a convolution to a function of their own, so peft's wrapper around it never runs. Some
    layers (zamba) are called with keywords, which peft's wrapper around a layer's parameters does not take.
    """
    convolution = nn.modules.conv._ConvNd
    return isinstance(module, convolution) or any(isinstance(child, convolution) for child in module.children())


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        # Some of a modeling file have a forward of their own: llama4's router returns a tuple, which peft cannot wrap,
        # and deepseek_v4 has one that multiplies each group of channels by a part of the weight.
        forward, is_of_model = type(module).forward, type(module).__module__.startswith("transformers")
        return not hasattr(module, "n_groups") and (
            forward is nn.Linear.forward or not is_of_model or forward.__annotations__.get("return") is Tensor
        )
    return isinstance(module, Conv1D)


def _is_pattern(word: str) -> bool:
    return not _PATTERN_CHARACTERS.isdisjoint(word)


def _is_or_ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _matcher(key: str, word: str) -> Callable[[str], bool]:
    if not _is_pattern(word):
        return lambda name: _is_or_ends_with(name, word)
    try:
        pattern = re.compile(word)
    except re.error as error:
        raise UsageError(f"{key}: {word} is not a regular expression: {error}") from error
    return lambda name: pattern.fullmatch(name) is not None
