"""Losses of preferences as functions of one number per sequence: the sum of its answer's log-probabilities.

The loss depends on the model only through these sums, so its gradient is that of a weighted sum of the targets' cross
entropies. The weight of a target is minus the derivative of the loss with respect to the sum that it is part of. Once
the sums are known, the chunks of a step train with these weights as they train with those of a supervised loss.

Every pair of a global batch counts the same, and under `kto` every answer. Sequences come pair by pair, the chosen one
first. Sources:

    sigmoid  DPO, arXiv 2305.18290, equation 7; with label smoothing, equation 3 of "A note on DPO with noisy
             preferences" (Mitchell, 2023)
    ipo      arXiv 2310.12036, equation 17, with sums divided by their number of tokens as TRL and the authors have it
    simpo    arXiv 2405.14734, equation 6, without a reference; smoothed as `sigmoid`
    orpo     arXiv 2403.07691, equations 4 to 7, from mean log-probabilities
    kto      arXiv 2402.01306, equation 7
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import PreferenceLoss, Task


@dataclass(frozen=True)
class Judged:
    """Losses and rewards that follow from the sums of a step's sequences. A rank has a part of the sequences."""

    losses: Tensor
    """(pairs,) or, under `kto`, (sequences,)."""
    rewards: Tensor
    """(sequences,)"""


def judge(
    objective: Objective,
    sums: Tensor,
    counts: Tensor,
    reference: Tensor | None,
    is_desirable: Tensor | None = None,
    divergence: Tensor | None = None,
) -> Judged:
    """Return losses and rewards, differentiable with respect to the sums.

    Args:
        sums: (sequences,) sum of the log-probabilities of each answer.
        counts: (sequences,) number of tokens in each answer.
        reference: (sequences,) the sums under the reference model, if the loss needs them.
        is_desirable: (sequences,) label of each answer under `kto`.
        divergence: scalar, `kto`'s estimate of how far the model is from the reference, at least 0.
    """
    preference, beta = objective.preference, objective.preference.beta
    if objective.task is Task.kto:
        assert reference is not None
        assert is_desirable is not None
        assert divergence is not None
        ratios = sums - reference
        sign = torch.where(is_desirable, 1.0, -1.0)
        share = torch.where(is_desirable, preference.desirable_weight, preference.undesirable_weight)
        return Judged(share * (1 - torch.sigmoid(beta * sign * (ratios - divergence))), beta * ratios)
    if objective.task is Task.orpo:
        means = sums / counts
        odds = means - torch.log(-torch.expm1(means))
        return Judged(-beta * logsigmoid(_margin(odds)), beta * means)
    if preference.loss is PreferenceLoss.simpo:
        means = sums / counts
        return Judged(_smoothed(beta * _margin(means) - preference.gamma, preference.label_smoothing), beta * means)
    assert reference is not None
    ratios = sums - reference
    if preference.loss is PreferenceLoss.ipo:
        return Judged((_margin(ratios / counts) - 1 / (2 * beta)).square(), beta * ratios)
    return Judged(_smoothed(beta * _margin(ratios), preference.label_smoothing), beta * ratios)


def _margin(values: Tensor) -> Tensor:
    """Return chosen minus rejected, (pairs,), of values by sequence."""
    return values[0::2] - values[1::2]


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
