"""Check that the weights of a loaded model are those of its files: all of them, finite, and nothing drawn at random.

transformers fills in random numbers for tensors that it does not find, and leaves out tensors that it does not know.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.console import counted
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import moving
from chunkflow_cli.model.folder import listed
from chunkflow_cli.model.language_part import left_out
from chunkflow_cli.model.progress_bars import bars_as_signs_of_life
from chunkflow_cli.processes.notices import warn_once

CONSTANTS = re.compile(
    r"rotary_emb\.|(^|\.)(inv_freq|position_ids|rope_freqs\.weight|decoder\.version|_extra_state)$"
    r"|(attn|attention)\.(bias|masked_bias|causal_mask)$"
)
"""Names of what old files hold besides weights: rotary tables, masks and version numbers, which models now compute."""
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|weight_scale(_inv)?|weight_packed|absmax|quant_map|SCB|\w+_(blocks|scales))$"
)
"""Ends of the names of tensors that only quantized weights have."""


def check_loaded(model: Any, info: dict[str, Any], named: str, *, new: Sequence[str]) -> None:
    """Check what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` has loaded.

    Tied weights that a file holds once are no fault, nor are tensors that the model's class declares to be left out.
    Whole parts that the model does not have (a value head) are left out with a warning; those that the language part of
    a multimodal model leaves out are expected.

    Args:
        named: the key and its value, for messages.
        new: `model.new_weights`: names of tensors, or of the modules that hold them, which may be missing.

    Raises:
        UsageError: names the tensors that are missing, have other shapes, are unknown or are not finite.
    """
    towers = left_out(model)
    unknown = {name for name in info["unexpected_keys"] if not CONSTANTS.search(name) and name not in towers}
    if info["mismatched_keys"]:
        raise UsageError(_other_shapes(info["mismatched_keys"], named))
    drawn = {name: {key for key in info["missing_keys"] if f".{key}.".find(f".{name}.") >= 0} for name in new}
    for name, keys in drawn.items():
        if not keys:
            raise UsageError(
                f"model.new_weights={as_written(list(new))}: no weight that the checkpoint lacks has the name {name}\n"
                "  leave it out: weights that are there are loaded"
            )
    missing = set(info["missing_keys"]).difference(*drawn.values())
    if missing:
        raise UsageError(_missing(model, missing, unknown, named))
    if new:
        warn_once(f"{named}: new, drawn with train.seed: {listed(set().union(*drawn.values()))}")
    inside = {name for name in unknown if _is_inside(model, name)}
    if inside:
        raise UsageError(
            f"{named}: {type(model).__name__} has no place for {counted(len(inside), 'tensor')} of its files: "
            f"{listed(inside)}\n  {_why_unknown(inside)}"
        )
    _check_tied(model, named)
    _check_finite(model, named)
    if unknown and not towers.parts:
        warn_once(
            f"{named}: not trained and not saved, because {type(model).__name__} has no such part: {listed(unknown)}"
        )


@contextmanager
def loading_report() -> Iterator[list[str]]:
    """Collect what transformers reports about loading within the block; it raises errors that name no tensor.

    Each weight that is loaded is a sign of life.
    """
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with bars_as_signs_of_life():
            yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def incomplete_groups(report: Iterable[str]) -> list[str]:
    """Return the tensors of a loading report that could not be put together from those of the files."""
    cells = (line.split("|") for line in report)
    return [cell[0].strip() for cell in cells if len(cell) > 1 and cell[1].strip() == "CONVERSION"]


def _missing(model: Any, missing: set[str], unknown: set[str], named: str) -> str:
    total = len(model.state_dict())
    what = f"{named}: {len(missing)} of the model's {total} tensors are not in its files: {listed(missing)}"
    if any(QUANTISED.search(name) for name in unknown):
        return f"{what}\n  {_why_unknown(unknown)}"
    prefixes = {name.removesuffix(wanted) for wanted in missing for name in unknown if name.endswith(f".{wanted}")}
    if prefixes:
        return (
            f"{what}\n  the files hold them with the prefix {min(prefixes)!r}, which a wrapper around the model left: "
            "rename them, or save the unwrapped model with save_pretrained"
        )
    remedy = "they would start from random numbers: download the model again, or name them in model.new_weights"
    head = model.get_output_embeddings()
    if head is not None and any(model.get_submodule(name.rpartition(".")[0]) is head for name in missing):
        remedy += "; if its head is tied to the embedding, set tie_word_embeddings=true in config.json"
    elif unknown:
        remedy += f". The files hold others instead: {listed(unknown)}"
    return f"{what}\n  {remedy}"


def _other_shapes(mismatched: set[tuple[str, Any, Any]], named: str) -> str:
    shapes = [f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in mismatched]
    return (
        f"{named}: {counted(len(shapes), 'tensor')} with another shape than its config.json says: {listed(shapes)}\n"
        "  config.json and the weights belong to different models, or one of them was changed (a resized embedding "
        "needs its vocab_size)"
    )


def _is_inside(model: Any, name: str) -> bool:
    """Return whether a tensor would belong into a part that the model has, where it would change what is computed.

    Layers that predict several tokens ahead, after the last layer, are a part of their own.
    """
    text = model.config.get_text_config()
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    ahead = int(getattr(text, "num_nextn_predict_layers", None) or 0)
    if layer and 0 <= int(layer[1]) - text.num_hidden_layers < ahead:
        return False
    top, _, rest = name.removeprefix(f"{model.base_model_prefix}.").partition(".")
    if name.startswith(f"{model.base_model_prefix}.") and "." not in rest:
        return True  # a norm or the like, next to the layers
    return top in {child for part in (model, model.base_model) for child, _ in part.named_children()}


def _why_unknown(names: set[str]) -> str:
    if any(QUANTISED.search(name) for name in names):
        return "the weights are quantized: set model.path to the model that they were made from"
    return (
        "without them the model computes something else: config.json does not describe these files (layers, biases or "
        "the architecture differ)"
    )


def _check_tied(model: Any, named: str) -> None:
    """Refuse weights that config.json ties and the files do not: transformers 5 unties them, 4 drops one of them."""
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in sorted(declared.keys() - model.all_tied_weights_keys.keys()):
        raise UsageError(
            f"{named}: its config.json ties {name} to {declared[name]}, but its files hold both, and they differ\n"
            "  set tie_word_embeddings=false in config.json to train both"
        )


def _check_finite(model: Any, named: str) -> None:
    # aminmax passes NaN on and makes no copy: 0.06 s for 0.5 GB of bfloat16 on one core, isfinite takes 3.8 s.
    spoilt = [
        name
        for name, weight in moving(model.named_parameters())  # mapped files are read here
        if weight.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(weight.detach()))
    ]
    if spoilt:
        raise UsageError(
            f"{named}: {counted(len(spoilt), 'tensor')} with numbers that are not finite (nan, inf): {listed(spoilt)}\n"
            "  the training that made them failed, or the files are damaged: take an earlier checkpoint"
        )
