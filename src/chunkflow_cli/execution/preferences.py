"""The preferences of one optimizer step on one rank: from sums of log-probabilities to the weights of targets.

The first forward of each chunk adds the log-probabilities of its answers to the sums of their sequences. When all
chunks of a pair have had theirs, the weights of its targets follow (`preference_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Task
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.preference_loss import Judged, judge
from chunkflow_cli.execution.sequence_parallel import SequenceGroup

OTHERS, NOTHING = 0, 1
"""Places after the sums of the sequences: for targets outside of the answers, and for targets that do not count."""


@dataclass(frozen=True)
class Known:
    """Facts about the sequences of a rank and about the whole step that are known before the step."""

    counts: NDArray[np.int64]
    """(sequences,) number of tokens in each answer."""
    reference: NDArray[np.float64] | None
    """(sequences,) sum of the log-probabilities of each answer under the reference model."""
    is_desirable: NDArray[np.bool_] | None
    """(sequences,) labels under `kto`."""
    samples: int
    """Pairs, or labeled answers, in the global batch."""
    desirable: int = 0
    """Labeled answers in the global batch that are good."""
    imitated_tokens: int = 0
    """Targets in the global batch that the additional cross entropy is the mean of."""
    divergence: float = 0.0
    """Under `kto`, the mean log ratio of mismatched answers, at least 0."""


class PreferenceStep:
    """The sums of a step's sequences, and what follows from them."""

    def __init__(
        self,
        objective: Objective,
        known: Known,
        sequences: Sequences,
        device: torch.device,
        group: SequenceGroup | None = None,
        *,
        only_sums: bool = False,
    ) -> None:
        """
        Args:
            group: the ranks that share the tokens of all chunks; their sums are shares.
            only_sums: only the sums are wanted: there is no loss.
        """
        self._only_sums = only_sums
        self.objective, self.known, self.starts = objective, known, sequences.starts
        self.sums = torch.zeros(len(known.counts) + 2, dtype=torch.float64, device=device)
        self._group, self._device = group, device
        self._weights: Tensor | None = None
        self._whole: Tensor | None = None
        self.is_complete = False
        """True once all sums are known before the chunks train: their forwards then add nothing."""

    def add(self, places: Tensor, log_probabilities: Tensor) -> None:
        """Add the log-probabilities of targets to the sums at their places, (targets,) each.

        Places may count from the end, as that of an idle target does (`with_idle_target`).
        """
        self.sums.index_add_(0, places.remainder(len(self.sums)), log_probabilities.double())
        self._weights = self._whole = None

    def weights(self) -> Tensor:
        """Return the weight of the cross entropy of a target at each place, (sequences + 2,).

        Those of a pair are right once both of its sums are complete.
        """
        if self._weights is None:
            with torch.enable_grad():
                sums = self._whole_sums().clone().requires_grad_()
                loss = self._judge(sums).losses.sum() / self.known.samples
            gradient = torch.autograd.grad(loss, sums)[0] if len(sums) else sums.detach()
            self._weights = torch.cat([-gradient, gradient.new_zeros(2)])
        return self._weights

    @property
    def imitated_weights(self) -> NDArray[np.float64]:
        """Weight of each target of a sequence besides, (sequences,): that of the mean loss of chosen answers."""
        tokens = self.known.imitated_tokens
        weights = np.zeros(len(self.known.counts))
        weights[0::2] = self.objective.nll_weight / tokens if tokens else 0.0
        return weights

    def _whole_sums(self) -> Tensor:
        """Return the sums of the sequences, (sequences,), and keep those of all places."""
        if self._whole is None:
            self._whole = self.sums
            if self._group is not None:
                self._whole = self.sums.clone()
                torch.distributed.all_reduce(self._whole, group=self._group.process_group)
        return self._whole[:-2]

    def whole_sums(self) -> tuple[NDArray[np.float64], float]:
        """Return the sums of the sequences over all ranks that share their tokens, (sequences,), and that of other
        targets."""
        self._whole_sums()
        assert self._whole is not None
        whole: NDArray[np.float64] = self._whole.cpu().numpy()
        return whole[:-2], float(whole[-2 + OTHERS])

    def _judge(self, sums: Tensor) -> Judged:
        known = self.known

        def tensor(values: NDArray[np.generic] | None) -> Tensor | None:
            return None if values is None else torch.as_tensor(values, device=self._device)

        counts = torch.as_tensor(known.counts, dtype=torch.float64, device=self._device)
        divergence = torch.tensor(known.divergence, dtype=torch.float64, device=self._device)
        return judge(self.objective, sums, counts, tensor(known.reference), tensor(known.is_desirable), divergence)

    def outcome(self) -> dict[str, float]:
        """Return the loss and TRL's metrics, as this rank's share of sums over the global batch; none if only sums are
        wanted. As in TRL, a batch without good answers has no reward of them, nor one without bad ones."""
        if self._only_sums:
            return {}
        sums, known = self._whole_sums(), self.known
        judged = self._judge(sums)
        rewards = judged.rewards.cpu().numpy()
        loss = float(judged.losses.sum()) / known.samples
        first = np.arange(len(rewards)) % 2 == 0 if known.is_desirable is None else known.is_desirable
        chosen, rejected = known.samples, known.samples
        if not self.objective.has_pairs:
            chosen, rejected = known.desirable, known.samples - known.desirable
        values = {}
        if chosen:
            values["rewards/chosen"] = float(rewards[first].sum()) / chosen
        if rejected:
            values["rewards/rejected"] = float(rewards[~first].sum()) / rejected
        if chosen and rejected:
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        if not self.objective.has_pairs:
            values["kl"] = known.divergence * len(rewards) / known.samples
        else:
            values["rewards/accuracies"] = float((rewards[0::2] > rewards[1::2]).sum()) / known.samples
        if known.imitated_tokens:
            assert self._whole is not None
            imitated = float(sums[0::2].sum() + self._whole[-2 + OTHERS])
            values["nll_loss"] = -imitated / known.imitated_tokens
            loss += self.objective.nll_weight * values["nll_loss"]
        share = 1 if self._group is None else self._group.size
        return {name: value / share for name, value in {"loss": loss, **values}.items()}


@dataclass(frozen=True)
class Sequences:
    """The sequences of samples, in order, as they are trained on."""

    samples: tuple[TokenizedSample, ...]
    starts: NDArray[np.int64]
    """(sequences,) the first position whose target is part of the answer."""
    counts: NDArray[np.int64]
    """(sequences,) number of tokens in each answer."""

    @property
    def imitated_tokens(self) -> int:
        """Targets of the chosen sequences."""
        return sum(int(np.count_nonzero(sample.targets != IGNORED)) for sample in self.samples[0::2])

    @classmethod
    def of(cls, samples: list[TokenizedSample], objective: Objective) -> Sequences:
        """Return the sequences; under `orpo`, those of chosen answers have their prompts as targets, too."""
        starts = np.array([int(np.argmax(sample.targets != IGNORED)) for sample in samples], np.int64)
        counts = np.array([int(np.count_nonzero(sample.targets != IGNORED)) for sample in samples], np.int64)
        if objective.task is Task.orpo:
            samples = [whole_as_target(one) if i % 2 == 0 else one for i, one in enumerate(samples)]
        return cls(tuple(samples), starts, counts)


def whole_as_target(sample: TokenizedSample) -> TokenizedSample:
    """Return the sample with each of its tokens but the first as a target."""
    targets = np.append(sample.input_ids[1:], np.int32(IGNORED)).astype(np.int32)
    return TokenizedSample(sample.input_ids, targets)
