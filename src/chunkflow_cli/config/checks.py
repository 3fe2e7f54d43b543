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
    DataFormat,
    Device,
    Dtype,
    LossWeighting,
    PreferenceLoss,
    Spread,
    Task,
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
    for check_section in (
        _check_task,
        _check_optim,
        _check_data,
        _check_model,
        _check_engine,
        _check_parallel,
        _check_plan,
    ):
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


FORMAT_OF_TASK = {
    Task.dpo: DataFormat.preference,
    Task.orpo: DataFormat.preference,
    Task.kto: DataFormat.feedback,
}


def _check_task(config: Config) -> None:
    task, data, preference = config.train.task, config.data, config.preference
    if task is Task.sft:
        if data.format in FORMAT_OF_TASK.values():
            tasks = " or ".join(f"train.task={each.value}" for each, of in FORMAT_OF_TASK.items() if of is data.format)
            raise UsageError(
                f"data.format={data.format.value} with train.task=sft, which imitates answers\n  set {tasks}"
            )
        return
    if data.format not in (DataFormat.auto, FORMAT_OF_TASK[task]):
        keys = "prompt, completion and label" if task is Task.kto else "prompt, chosen and rejected"
        raise UsageError(
            f"data.format={data.format.value} with train.task={task.value}, whose rows have {keys}\n"
            f"  leave data.format out"
        )
    if task is Task.kto and config.train.global_batch_size == 1:
        raise UsageError(
            "train.global_batch_size=1 with train.task=kto, which reads each prompt with another sample's answer, too\n"
            "  set train.global_batch_size to 2 or more"
        )
    without_effect = {
        "data.train_on": data.train_on is not TrainOn.assistant,
        "data.turns": data.turns is not Turns.whole,
        "data.train_on_reasoning": not data.train_on_reasoning,
        "train.loss_weighting": config.train.loss_weighting is not LossWeighting.token,
        "model.lora.dropout": config.model.lora.enabled and config.model.lora.dropout > 0,
        "preference.nll_weight": task is not Task.dpo and preference.nll_weight > 0,
        "preference.loss": task is not Task.dpo and preference.loss is not PreferenceLoss.sigmoid,
        "preference.label_smoothing": preference.label_smoothing > 0
        and (task is not Task.dpo or preference.loss is PreferenceLoss.ipo),
    }
    for name, is_set in without_effect.items():
        if is_set:
            values = {each: getattr(section, entry.name) for each, section, entry in walk_keys(config)}
            how = task.value if task is not Task.dpo else f"{task.value} and preference.loss={preference.loss.value}"
            raise UsageError(f"{name}={as_written(values[name])} has no place in train.task={how}\n  leave {name} out")


def settle_format(config: Config) -> None:
    """Let the task name the format of the rows, which need not be found then."""
    if config.data.format is DataFormat.auto and config.train.task is not Task.sft:
        config.data.format = FORMAT_OF_TASK[config.train.task]


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
    if lora.path is not None and not lora.enabled:
        raise UsageError(f"model.lora.path={lora.path} with model.lora.enabled=false\n  set model.lora.enabled=true")


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
