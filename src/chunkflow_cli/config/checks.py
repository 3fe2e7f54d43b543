"""Checks of the values of a composed configuration: the bounds of each key, and rules that concern several keys."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

from chunkflow_cli.config.deepspeed_keys import check_deepspeed
from chunkflow_cli.config.keys import as_written, described, walk_keys
from chunkflow_cli.config.schema import (
    Attention,
    Config,
    CostModelName,
    DataFormat,
    Device,
    Dtype,
    Init,
    LossWeighting,
    OptimizerName,
    PreferenceLoss,
    Quantization,
    Spread,
    Task,
    TrainOn,
    Turns,
)
from chunkflow_cli.config.sources import check_paths, check_sources, name_sources
from chunkflow_cli.config.weight_names import check_names
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
    _check_values(config)
    for check_section in (
        _check_task,
        _check_optim,
        _check_data,
        _check_train,
        _check_eval,
        _check_model,
        _check_engine,
        _check_parallel,
        _check_plan,
    ):
        check_section(config)


def _check_values(of: Any, prefix: str = "") -> None:
    """Check each value on its own, also in the elements of a list."""
    for name, section, entry in walk_keys(of, prefix):
        value = getattr(section, entry.name)
        bounds = {bound: limit for bound, limit in entry.metadata.items() if bound in _COMPARISONS}
        _check_number(name, value, bounds, can_be_null=entry.default is None)
        if entry.metadata.get("path"):
            _check_path(name, value)
        for index, element in enumerate(value) if isinstance(value, list) else ():
            if isinstance(element, Enum) and element in value[:index]:
                raise UsageError(f"{name}={as_written(value)} has {element.value} twice\n  name it once")
            if is_dataclass(element):
                _check_values(element, f"{name}[{index}].")


def _check_number(name: str, value: Any, bounds: Mapping[str, float], *, can_be_null: bool) -> None:
    several = list(value.values()) if isinstance(value, dict) else value
    numbers = [each for each in (several if isinstance(several, list) else [several]) if isinstance(each, (int, float))]
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
        key = described(name)
        if path == "" and (key is None or key.default != ""):
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
    for name, is_set in (
        ("data.sources", data.sources),
        ("train.global_batch_tokens", config.train.global_batch_tokens),
    ):
        if is_set:
            remedy = "name all files in data.path" if name == "data.sources" else "set train.global_batch_size"
            raise UsageError(f"{name} is for train.task=sft, not train.task={task.value}\n  {remedy}")
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
        "train.neftune_noise_alpha": config.train.neftune_noise_alpha > 0,
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


def settle(config: Config) -> None:
    """Name the sources of the data, and let the task name the format of the rows, which need not be found then."""
    name_sources(config.data)
    if config.data.format is DataFormat.auto and config.train.task is not Task.sft:
        config.data.format = FORMAT_OF_TASK[config.train.task]


def _check_optim(config: Config) -> None:
    betas = config.optim.betas
    if len(betas) != 2:
        raise UsageError(f"optim.betas={as_written(betas)} must be two numbers, such as [0.9,0.999]")
    optim = config.optim
    if optim.name is OptimizerName.muon and optim.momentum == 0:
        raise UsageError("optim.name=muon with optim.momentum=0 is not Muon\n  set optim=muon, which sets 0.95")
    check_names("optim.freeze", optim.freeze)
    check_names("optim.lr_factors", optim.lr_factors)


def _check_data(config: Config) -> None:
    data = config.data
    check_paths("data.path", data.path)
    check_paths("data.eval_path", data.eval_path or "")
    check_sources(data)
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
    every = [("data", data.columns)] + [(f"data.sources[{i}]", each.columns) for i, each in enumerate(data.sources)]
    for key, columns in every:
        names = list(columns.values())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(
                f"{key}.columns={as_written(columns)} gives two columns the name {twice}\n  name one column {twice}"
            )


def _check_train(config: Config) -> None:
    size, tokens = config.train.global_batch_size, config.train.global_batch_tokens
    if size is not None and tokens is not None:
        raise UsageError(
            f"train.global_batch_size={size} and train.global_batch_tokens={tokens} are both set\n"
            "  remove one of them; to overrule a recipe, set the other one to null"
        )
    if size is None and tokens is None:
        raise UsageError("train.global_batch_size=null needs train.global_batch_tokens\n  set one of them")


def _check_eval(config: Config) -> None:
    data, evaluation, engine = config.data, config.eval, config.engine
    if not all(prompt.strip() for prompt in evaluation.prompts):
        raise UsageError(
            f"eval.prompts={as_written(evaluation.prompts)} has an empty prompt\n  write a text for the model to answer"
        )
    for prompt in evaluation.prompts:
        if re.search(r"[\ud800-\udfff]", prompt):
            raise UsageError(f"eval.prompts: {prompt!r} is not valid UTF-8\n  write it in UTF-8")
    has_held_out = data.eval_path is not None or data.eval_split is not None or data.eval_fraction > 0
    for key, value in (
        ("early_stopping_patience", evaluation.early_stopping_patience),
        ("keep_best", evaluation.keep_best),
    ):
        if value and not has_held_out:
            raise UsageError(
                f"eval.{key}={as_written(value)} needs held-out data\n  set data.eval_fraction, or data.eval_path"
            )
        if value and evaluation.every is None:
            raise UsageError(f"eval.{key}={as_written(value)} needs eval.every: the steps between evaluations")
    for key, value, most in (
        ("engine.zero_stage", engine.zero_stage, 2),
        ("parallel.pipeline", config.parallel.pipeline, 1),
    ):
        if evaluation.prompts and value > most:
            raise UsageError(
                f"eval.prompts with {key}={value}: no rank holds the whole model\n"
                f"  set {key} to at most {most}, or remove eval.prompts"
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


def _check_quantisation(config: Config) -> None:
    model = config.model
    if model.quantization is Quantization.none:
        return
    named = f"model.quantization={model.quantization.value}"
    problem = {
        "model.lora.enabled=false: quantized weights cannot be trained themselves\n  set model.lora.enabled=true": (
            not model.lora.enabled
        ),
        "model.init=random: there are no weights to quantize\n  set model.quantization=none": model.init is Init.random,
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
