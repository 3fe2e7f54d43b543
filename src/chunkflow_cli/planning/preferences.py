"""Plan preferences: which answers share a chunk, and which forwards come first so that weights are known in time.

The weights of a sample's targets follow from the summed log-probabilities of all of its answers (one sequence under
`kto`, otherwise a pair). So each chunk of the sample must have been forwarded once before any goes backward.

- A pair that fits into a chunk is placed as a whole. Its sums are known within the one forward of that chunk.
- Of a pair whose prompt is long, one answer runs the prompt, and the other one begins where the prompt ends: it reads
  the keys and values of the first one, and adds its gradients to theirs. To run the prompt twice always costs more.
- Otherwise each answer begins a chunk, or several, and only whole pairs fill up what room is left. So at most two units
  depend on each other. The first is passed over without gradient (P). Then come the early chunks of the second, which
  would have a state pass anyway, and with its retained ones all sums are known. It goes backward, then the first one
  is forwarded and goes backward. Of the whole pair, only the retained chunks of the first answer are forwarded once
  more than in supervised training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks, Unit, build_chunks, cut_points
from chunkflow_cli.planning.costs import FIRST_PASS_OF_HEAD, CostModel
from chunkflow_cli.planning.schedule import Job, JobSequence, OpKind, split_unit

LEAST_SHARED = 1 / 4
"""Share of a chunk that a prompt must have to be run once for both answers: attention then takes two calls a layer."""


def build_pair_chunks(
    lengths: NDArray[np.int64],
    chunk_size: int,
    *,
    fill_tails: bool = True,
    pair_weight: float = 0.0,
    prompts: NDArray[np.int64] | None = None,
    trunk_is_chosen: bool = False,
) -> Chunks:
    """Return chunks of pairs, as `build_chunks` does of sequences.

    Args:
        lengths: (sequences,) tokens of each, the two answers of a pair one after the other.
        prompts: (pairs,) tokens that both answers begin with; None runs them for each answer.
        trunk_is_chosen: the chosen answer runs a shared prompt; otherwise, the longer one.
    """
    pairs = lengths.reshape(-1, 2)
    joined = pairs.sum(axis=1) <= chunk_size
    apart = np.flatnonzero(~joined)
    shared = np.zeros_like(pairs)
    if prompts is not None:
        trunk = np.zeros(len(pairs), np.int64) if trunk_is_chosen else pairs.argmax(axis=1)
        found = _shared_tokens(pairs[np.arange(len(pairs)), trunk], prompts, chunk_size, pair_weight)
        shared[np.arange(len(pairs)), 1 - trunk] = np.where(joined, 0, found)
    # Items: whole pairs that fit, and the single answers of the others. A short one of these takes a bin of its own.
    # What continues from another answer's prompt comes last, because its chunks are dependent, however short it is.
    singles = np.stack([apart * 2, apart * 2 + 1], 1).ravel()
    singles = singles[np.argsort(shared.ravel()[singles] > 0, kind="stable")]
    item_sequence = np.concatenate([np.flatnonzero(joined) * 2, singles])
    item_lengths = np.concatenate([pairs[joined].sum(axis=1), lengths[singles] - shared.ravel()[singles]])
    is_base = np.arange(len(item_lengths)) >= int(joined.sum())
    built = build_chunks(item_lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight, is_base=is_base)
    # A whole pair's segment becomes those of its two answers.
    twice = np.where(is_base[built.sequence], 1, 2)
    first = np.concatenate([[0], np.cumsum(twice)]).astype(np.int64)
    index = np.repeat(np.arange(len(twice)), twice)
    is_second = np.arange(len(index)) - first[index]
    sequence = item_sequence[built.sequence[index]] + is_second
    is_whole = twice[index] == 2
    begins = shared.ravel()[sequence]
    return Chunks(
        chunk_size,
        first[built.first_segment],
        sequence,
        begins + np.where(is_whole, 0, built.start[index]),
        begins + np.where(is_whole, lengths[sequence], built.stop[index]),
        lengths,
    )


def _shared_tokens(
    trunks: NDArray[np.int64], prompts: NDArray[np.int64], chunk_size: int, pair_weight: float
) -> NDArray[np.int64]:
    """Return how many tokens of its prompt the other answer of each pair need not run, (pairs,).

    It runs the prompt's last token, which predicts its first own one, and what is not in the state of the trunk.
    """
    if pair_weight > 0:
        stored = np.array([cut_points(length, chunk_size, pair_weight)[-2] for length in trunks.tolist()], np.int64)
    else:
        stored = (trunks - 1) // chunk_size * chunk_size
    found = np.minimum(prompts - 1, stored)
    return np.where(found >= LEAST_SHARED * chunk_size, found, 0)


def preference_tasks(chunks: Chunks, k: int, answers: int) -> list[JobSequence]:
    """Return what a rank has to do: a job for each unit, or two for two answers that are apart.

    Args:
        answers: sequences of a sample, 1 or 2.
    """
    units = chunks.units()
    bases = {chunks.first_sequence(unit[0]): unit for unit in units}
    tasks: list[JobSequence] = []
    for base, unit in bases.items():
        other = bases.get(base ^ 1) if answers == 2 else None
        if other is None:
            early, retained = split_unit(unit, k)
            tasks.append((Job(early, early, retained, OpKind.first_pass),))
        elif base % 2 == 0:
            first, last = sorted((unit, other), key=lambda each: (chunks.begin(each[0]), *_order(each, chunks, k)))
            early, retained = split_unit(last, k)
            rest_early, rest_retained = split_unit(first, k)
            tasks.append(
                (
                    Job((*first, *early), early, retained, OpKind.first_pass),
                    Job((), rest_early, rest_retained, OpKind.first_pass),
                )
            )
    return tasks


def _order(unit: Unit, chunks: Chunks, k: int) -> tuple[int, int]:
    """Return what sorts the answer to the front whose retained chunks cost less to forward once more."""
    pieces = chunks.first_segment[np.array(unit)]
    sizes = chunks.stop[pieces] - chunks.start[pieces]
    return int(sizes[-k:].sum()), -int(sizes.sum())


@dataclass(frozen=True)
class Answers:
    """The sequences of each sample of preferences."""

    lengths: NDArray[np.int64]
    """(samples, answers) tokens: of the chosen and the rejected sequence of a pair, or of one labeled sequence."""
    targets: NDArray[np.int64]
    """(samples, answers) tokens that the loss counts."""
    prompts: NDArray[np.int64] | None = None
    """(samples,) tokens that both answers begin with, if long ones are run once for both."""
    trunk_is_chosen: bool = False
    """The chosen answer runs a shared prompt, because the loss counts it; otherwise, the longer one."""
    mismatched: NDArray[np.int64] | None = None
    """(samples,) tokens of the prompt with another sample's answer, which `kto` forwards without gradient."""

    @property
    def count(self) -> int:
        """Sequences of a sample."""
        return int(self.lengths.shape[1])

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def build_chunks(
        self, samples: NDArray[np.int64], chunk_size: int, *, fill_tails: bool, pair_weight: float, share: bool
    ) -> Chunks:
        """Return the chunks of these samples, whose sequences follow each other.

        Args:
            share: run long prompts once, if `prompts` are known.
        """
        lengths = self.lengths[samples].ravel()
        if self.count == 1:
            return build_chunks(lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight)
        prompts = None if self.prompts is None or not share else self.prompts[samples]
        return build_pair_chunks(
            lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight, prompts=prompts,
            trunk_is_chosen=self.trunk_is_chosen,
        )  # fmt: skip

    def seconds(self, costs: CostModel, samples: NDArray[np.int64], chunk_size: int, k: int) -> NDArray[np.float64]:
        """Predict the seconds of all operations of these samples, (samples,)."""
        lengths, targets = self.lengths[samples], self.targets[samples]
        flat = costs.of_sequences(lengths.ravel(), chunk_size, k, targets.ravel()).reshape(lengths.shape)
        seconds: NDArray[np.float64] = flat.sum(axis=1) + FIRST_PASS_OF_HEAD * costs.seconds_per_target * targets.sum(
            axis=1
        )
        if self.count == 2:  # of a pair that is apart, the last chunks of one answer are forwarded once more
            sizes = lengths.astype(np.float64)
            first = np.where(sizes <= chunk_size, sizes, np.minimum(sizes, k * chunk_size)).argmin(axis=1)
            size = np.take_along_axis(sizes, first[:, None], 1)[:, 0]
            before = np.maximum(size - k * chunk_size, 0)
            again = costs.forward(size - before, costs.pairs_up_to(size) - costs.pairs_up_to(before))
            seconds += np.where(lengths.sum(axis=1) > chunk_size, again, 0)
        if self.prompts is not None:  # what the other answer need not run
            shared = _shared_tokens(lengths.max(axis=1), self.prompts[samples], chunk_size, 0.0)
            is_run = np.flatnonzero((shared > 0) & (lengths.sum(axis=1) > chunk_size))
            seconds[is_run] -= costs.of_sequences(shared[is_run], chunk_size, k, np.zeros(len(is_run), np.int64))
        if self.mismatched is not None:
            sizes = self.mismatched[samples].astype(np.float64)
            seconds += costs.forward(sizes, costs.pairs_up_to(sizes)) - costs.forward.fixed_seconds
        return seconds
