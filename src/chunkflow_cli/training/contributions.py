"""Compute what each source of the data contributes to the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.planning.run_plan import RunPlan


@dataclass(frozen=True)
class Contribution:
    """What a source contributes. A sample counts as often as it is trained on. Shares are between 0 and 1."""

    samples: int
    tokens: int
    targets: int
    share_of_samples: float
    share_of_tokens: float
    share_of_targets: float
    passes: float
    """How often the run goes through the source."""


def contributions(plan: RunPlan, data: TokenizedData, steps: int | None = None) -> dict[str, Contribution]:
    """Return what each source contributes to the first `steps` steps, by its name; to all of them by default.

    It is empty without `data.sources`.
    """
    if not data.names:
        return {}
    times = np.zeros(len(data), np.int64)
    for step in range(plan.steps if steps is None else steps):
        np.add.at(times, plan.batches[step], 1)
    sums = np.stack(
        [np.bincount(data.sources, times * each, len(data.names)) for each in (1, data.lengths, data.target_counts)]
    )
    shares = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)
    sizes = np.bincount(data.sources, minlength=len(data.names))
    found = {}
    for number, name in enumerate(data.names):
        samples, tokens, targets = map(int, sums[:, number])
        of_samples, of_tokens, of_targets = map(float, shares[:, number])
        passes = samples / int(sizes[number])
        found[name] = Contribution(samples, tokens, targets, of_samples, of_tokens, of_targets, passes)
    return found
