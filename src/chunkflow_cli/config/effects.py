"""Keys that have an effect only with another one: a key that somebody has set, and that does nothing, is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chunkflow_cli.config.keys import as_written, describe_keys, walk_keys
from chunkflow_cli.config.schema import (
    Config,
    LearningRateSchedule,
    LogBackend,
    OptimizerName,
    PreferenceLoss,
    Task,
)
from chunkflow_cli.errors import UsageError

_ADAMS = (OptimizerName.adamw, OptimizerName.adamw_8bit, OptimizerName.paged_adamw_8bit)
_TRACKERS = {LogBackend.wandb, LogBackend.mlflow, LogBackend.trackio}


@dataclass(frozen=True)
class Need:
    """What some keys need to have an effect."""

    names: tuple[str, ...]
    """The keys, or sections of keys."""
    other: str
    """The key that they need."""
    is_met: Callable[[Config], bool]
    remedy: str


NEEDS = (
    Need(("model.lora",), "model.lora.enabled", lambda c: c.model.lora.enabled, "set model.lora.enabled=true"),
    Need(("preference",), "train.task", lambda c: c.train.task is not Task.sft, "set train.task=dpo, orpo or kto"),
    Need(
        ("preference.desirable_weight", "preference.undesirable_weight"), "train.task",
        lambda c: c.train.task is Task.kto, "set train.task=kto",
    ),
    Need(
        ("preference.gamma",), "preference.loss",
        lambda c: c.preference.loss is PreferenceLoss.simpo, "set preference.loss=simpo",
    ),
    Need(
        ("optim.betas", "optim.eps"), "optim.name",
        lambda c: c.optim.name in (*_ADAMS, OptimizerName.muon), "set optim=adamw",
    ),
    Need(
        ("optim.momentum",), "optim.name",
        lambda c: c.optim.name in (OptimizerName.sgd, OptimizerName.muon), "set optim=sgd or optim=muon",
    ),
    Need(
        ("optim.min_lr_ratio",), "optim.schedule",
        lambda c: c.optim.schedule is not LearningRateSchedule.constant, "set optim.schedule=cosine or linear",
    ),
    Need(
        ("log.project", "log.run_name"), "log.backends",
        lambda c: not _TRACKERS.isdisjoint(c.log.backends), "add wandb, mlflow or trackio to log.backends",
    ),
)  # fmt: skip


def unmet(config: Config, name: str) -> list[Need]:
    """Return what a key lacks to have an effect in this configuration."""
    return [
        need
        for need in NEEDS
        if name != need.other and any(f"{name}.".startswith(f"{of}.") for of in need.names) and not need.is_met(config)
    ]


def check_effects(config: Config, typed: Sequence[str], in_files: Mapping[str, str]) -> None:
    """Refuse keys that have been set, to something else than their default, and have no effect in this configuration.

    The words of the command line may take away what keys of a file need: `recipe=my_lora model.lora.enabled=false`.

    Args:
        typed: names of the keys and groups on the command line.
        in_files: where the keys of YAML files are, by name.

    Raises:
        UsageError: names the key, its value and what it needs.
    """
    values = {name: as_written(getattr(section, entry.name)) for name, section, entry in walk_keys(config)}
    for need in NEEDS:
        is_taken_away = need.other in typed or need.other.partition(".")[0] in typed
        given = [*typed, *(() if is_taken_away else in_files)]
        for name in dict.fromkeys(given):
            if need not in unmet(config, name) or name not in values or values[name] == describe_keys()[name].default:
                continue
            where = "" if name in typed else f"{in_files[name]}: "
            raise UsageError(
                f"{where}{name}={values[name]} has no effect with {need.other}={values[need.other]}\n"
                f"  {need.remedy}, or remove {name}"
            )
