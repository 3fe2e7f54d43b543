"""Checks of the values of a composed configuration: the bounds of each key, and rules that concern several keys."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from chunkflow_cli.config.deepspeed_keys import check_deepspeed
from chunkflow_cli.config.keys import as_written, describe_keys, walk_keys, wrong_value
from chunkflow_cli.config.schema import (
    Attention,
    Config,
    CostModelName,
    Device,
    Dtype,
    Init,
    Quantization,
    Spread,
    TrainOn,
    Turns,
)
from chunkflow_cli.errors import UsageError

_COMPARISONS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
"""How a value compares with each bound that a field of schema.py can have. NaN is outside of every bound."""
LIMIT_SHOWN = 1000
"""Larger limits only keep numbers within what machines can count. They are named when a value exceeds them."""


def check(config: Config) -> None:
    """Reject values that no run can use.

    Raises:
        UsageError: names the key, the value and what it may be.
    """
    for name, section, entry in walk_keys(config):
        value = getattr(section, entry.name)
        bounds = {bound: limit for bound, limit in entry.metadata.items() if bound in _COMPARISONS}
        _check_number(name, value, bounds, can_be_null=entry.default is None)
        if entry.metadata.get("path"):
            _check_path(name, value)
    for check_section in (_check_optim, _check_data, _check_model, _check_engine, _check_parallel, _check_plan):
        check_section(config)


def _check_number(name: str, value: Any, bounds: Mapping[str, float], *, can_be_null: bool) -> None:
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
    is_finite = all(map(math.isfinite, numbers))
    broken = [bound for bound, limit in bounds.items() if not all(_COMPARISONS[bound](n, limit) for n in numbers)]
    if is_finite and not broken:
        return
    words = [] if is_finite else ["a finite number"]
    for bound, limit in bounds.items():
        if bound in broken or limit < LIMIT_SHOWN:
            words.append(f"{bound.replace('_', ' ')} {limit:,}")
    raise UsageError(f"{name}={as_written(value)} must be {' and '.join(words)}{' or null' if can_be_null else ''}")


def _check_path(name: str, value: Any) -> None:
    for path in value if isinstance(value, list) else [value]:
        if isinstance(path, str) and "\0" in path:
            raise UsageError(f"{name}={path!r} has a zero byte, which no path can have")
        if path == "" and describe_keys()[name].default != "":
            raise UsageError(f"{name} is empty\n  name a path, or leave the key out")


def _check_optim(config: Config) -> None:
    betas = config.optim.betas
    if len(betas) != 2:
        raise UsageError(f"optim.betas={as_written(betas)} must be two numbers, such as [0.9,0.999]")


def _check_data(config: Config) -> None:
    data = config.data
    for key, paths in (("data.path", data.path), ("data.eval_path", data.eval_path or "")):
        is_list = isinstance(paths, list) and paths and all(isinstance(path, str) and path for path in paths)
        if not (isinstance(paths, str) or is_list):
            raise UsageError(wrong_value(key, paths))
    is_held_out = data.eval_path is not None or data.eval_split is not None
    if is_held_out and data.eval_fraction > 0:
        key = "data.eval_path" if data.eval_path is not None else "data.eval_split"
        value = as_written(data.eval_path if data.eval_path is not None else data.eval_split)
        raise UsageError(f"{key}={value} and data.eval_fraction={data.eval_fraction} are both set: remove one of them")
    if data.eval_path is None and data.eval_split == data.split:
        raise UsageError(f"data.eval_split={data.eval_split} is the split that is trained on\n  name another split")
    if data.train_on is TrainOn.all and data.turns is Turns.split:
        raise UsageError(
            "data.turns=split with data.train_on=all would count a question once for each answer after it\n"
            "  set data.train_on=assistant, or data.turns=whole"
        )
    if data.train_on is TrainOn.all and not data.train_on_reasoning:
        raise UsageError(
            "data.train_on=all counts every token, and data.train_on_reasoning=false leaves some out\n"
            "  set data.train_on=assistant, or data.train_on_reasoning=true"
        )
    names = list(data.columns.values())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"data.columns={as_written(data.columns)} gives two columns the name {twice}\n  name one column {twice}"
        )


def _check_model(config: Config) -> None:
    attention = config.model.attention
    has_float64 = attention in (Attention.auto, Attention.reference, Attention.cpu)
    if config.model.dtype is Dtype.float64 and not has_float64:
        raise UsageError(
            f"model.attention={attention.value} does not support model.dtype=float64\n  set model.attention=reference"
        )
    lora = config.model.lora
    for key, value in (("vocab_size", config.model.vocab_size), ("new_weights", config.model.new_weights)):
        if lora.enabled and value:
            raise UsageError(
                f"model.{key}={as_written(value)} with model.lora.enabled=true: adapters leave the model as it is, so "
                "its new weights would stay random\n  train them first, with model.lora.enabled=false"
            )
    _check_quantisation(config)
    if lora.path is not None and not lora.enabled:
        raise UsageError(f"model.lora.path={lora.path} with model.lora.enabled=false\n  set model.lora.enabled=true")


def _check_quantisation(config: Config) -> None:
    model = config.model
    if model.quantization is Quantization.none:
        return
    named = f"model.quantization={model.quantization.value}"
    problem = {
        "model.lora.enabled=false: quantised weights cannot be trained themselves\n  set model.lora.enabled=true": (
            not model.lora.enabled
        ),
        "model.init=random: there are no weights to quantise\n  set model.quantization=none": model.init is Init.random,
        "model.dtype=float64: bitsandbytes has no float64\n  set model.dtype=float32": model.dtype is Dtype.float64,
        "a GGUF file, whose weights are converted to floating point\n  set model.path to a folder or an id": (
            model.path.endswith(".gguf")
        ),
        "engine.zero_stage=3, which divides weights and would part them from their scales\n"
        "  set engine.zero_stage=1 or 2: the optimizer state of adapters is small": config.engine.zero_stage == 3,
    }
    for text, is_so in problem.items():
        if is_so:
            raise UsageError(f"{named} with {text}")


def _check_engine(config: Config) -> None:
    check_deepspeed(config.engine)


def _check_parallel(config: Config) -> None:
    processes, stages, sequence = config.launch.processes, config.parallel.pipeline, config.parallel.sequence
    if processes > 1 and processes % (stages * sequence):
        raise UsageError(
            f"launch.processes={processes} cannot be divided into groups of parallel.sequence={sequence} x "
            f"parallel.pipeline={stages} ranks\n"
            f"  set launch.processes to a multiple of {stages * sequence}"
        )
    if config.parallel.spread is Spread.all and sequence == 1:
        raise UsageError(
            "parallel.spread=all with parallel.sequence=1: there is no group to spread over\n"
            "  set parallel.sequence to 2 or more"
        )


def _check_plan(config: Config) -> None:
    device = config.tune.device
    if config.plan.cost_model is CostModelName.measured and device is not Device.measured:
        raise UsageError(
            f"plan.cost_model=measured with tune.device={device.value}: only the device of this machine is measured\n"
            "  set plan.cost_model=profile or tune.device=measured"
        )
