"""The learning rate of each step, by the schedules of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from chunkflow_cli.config.schema import LearningRateSchedule, OptimConfig


def learning_rate_schedule(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """Return a function from the step, counted from 0, to its learning rate.

    It takes step + 1 of a schedule of steps + 1 steps, so that neither the first step nor the last has a rate of zero.
    After the warm-up the rates are scaled to end at `optim.min_lr_ratio` of the peak, as transformers' own floors do.
    """
    idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = math.ceil(optim.warmup_ratio * steps)
    if optim.schedule is LearningRateSchedule.wsd:
        # The decay begins at the full rate: one step more puts the whole last tenth below it.
        decay = math.ceil(0.1 * steps) + 1
        scheduler = get_scheduler(
            "warmup_stable_decay", idle, num_warmup_steps=warmup, num_training_steps=steps + 1,
            scheduler_specific_kwargs={"num_decay_steps": decay},
        )  # fmt: skip
    elif optim.schedule is LearningRateSchedule.constant:
        scheduler = get_scheduler("constant_with_warmup", idle, num_warmup_steps=warmup)
    else:
        scheduler = get_scheduler(optim.schedule.value, idle, num_warmup_steps=warmup, num_training_steps=steps + 1)
    factor = scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    floor = optim.min_lr_ratio

    def rate(step: int) -> float:
        of_peak = factor(step + 1)
        return float(optim.lr * (of_peak if step + 1 < warmup else floor + (1 - floor) * of_peak))

    return rate
