"""The sequences of samples of preferences, and what is known of them before training. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Config, Task
from chunkflow_cli.data.preferences import AnswerSizes, mismatched
from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.preferences import Answers


def sizes_of(data: TokenizedData) -> AnswerSizes:
    assert data.answers is not None
    return data.answers


@dataclass(frozen=True)
class Judgement:
    """What is known of a part of the data before training on it."""

    data: TokenizedData
    partners: NDArray[np.int64] | None
    """(samples,) of `kto`."""
    reference: NDArray[np.float64] | None = None
    """(samples, answers) sums of log-probabilities under the reference model."""
    mismatched_reference: NDArray[np.float64] | None = None
    """(samples,) those of each sample's prompt with its partner's answer."""

    @classmethod
    def of(cls, objective: Objective, data: TokenizedData, batches: GlobalBatches) -> Judgement:
        return cls(data, partners(batches) if objective.task is Task.kto else None)

    @property
    def mismatched_lengths(self) -> NDArray[np.int64]:
        """(samples, 1) tokens of what `mismatched` returns."""
        assert self.partners is not None
        sizes = sizes_of(self.data)
        others: NDArray[np.int64] = sizes.prompts + sizes.targets[self.partners, 0]
        return (others if sizes.limit is None else np.minimum(others, sizes.limit))[:, None]

    def sequences(self, samples: NDArray[np.int64]) -> list[TokenizedSample]:
        """Return all sequences of samples, in order."""
        return [sequence for sample in samples.tolist() for sequence in self.data.sequences(sample)]

    def mismatched(self, samples: NDArray[np.int64]) -> list[TokenizedSample]:
        """Return the prompt of each sample with the answer of its partner, cut to the longest that a sample may be."""
        assert self.partners is not None
        others, limit = self.partners[samples].tolist(), sizes_of(self.data).limit
        return [
            mismatched(self.data.sequences(sample)[0], self.data.sequences(other)[0], limit)
            for sample, other in zip(samples.tolist(), others, strict=True)
        ]


@dataclass(frozen=True)
class RunPreferences:
    """The preferences that a run learns."""

    objective: Objective
    train: Judgement
    evaluation: Judgement


def answers_of(config: Config, data: TokenizedData, batches: GlobalBatches, *, can_share: bool) -> Answers | None:
    """Return the sequences of samples of preferences, as planning needs them; None in supervised training.

    Args:
        can_share: the model can run the prompt of a pair once for both answers.
    """
    objective = Objective.of(config)
    if objective is None:
        return None
    sizes = sizes_of(data)
    targets = sizes.targets.copy()
    if objective.task is Task.orpo:
        targets[:, 0] = sizes.lengths[:, 0] - 1
    if objective.task is not Task.kto:
        prompts = sizes.prompts if config.preference.share_prompts and can_share else None
        return Answers(sizes.lengths, targets, prompts, trunk_is_chosen=objective.task is Task.orpo)
    return Answers(sizes.lengths, targets, mismatched=Judgement.of(objective, data, batches).mismatched_lengths[:, 0])


def partners(batches: GlobalBatches) -> NDArray[np.int64]:
    """Return for each sample the one whose answer is measured behind its prompt, (samples,).

    As in TRL, it is the sample before it in its global batch, in turn; with shuffling, in that of the first epoch.
    """
    found = np.empty(batches.samples, np.int64)
    for step in range(batches.steps_per_epoch):
        samples = batches[step]
        # A last batch of one sample takes another's answer: behind its own prompt, an answer is not mismatched.
        found[samples] = np.roll(samples, 1) if len(samples) > 1 else (samples + 1) % batches.samples
    return found
