"""Plan every optimizer step of a run: its samples, their ranks, chunks and schedules.

`chunkflow plan` prints the plan and `chunkflow train` runs it. Both make a `RunPlan` from the same values, and the plan
of a step is a pure function of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.balance import balance, share_out
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.chunks import Chunks, build_chunks, join_chunks
from chunkflow_cli.planning.costs import CostModel, chunk_tokens
from chunkflow_cli.planning.pipeline import CHOSEN_BY_SECONDS, PipelineLayout, plan_pipeline
from chunkflow_cli.planning.preferences import Answers, preference_tasks
from chunkflow_cli.planning.schedule import (
    IDLE,
    Op,
    OpKind,
    Schedule,
    plan,
    plan_in_lockstep,
    plan_tasks,
    tasks_of,
)
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers


@dataclass(frozen=True)
class RankPlan:
    """A data-parallel rank's share of one optimizer step."""

    samples: NDArray[np.int64]
    """(samples,) indices into the training data."""
    chunks: Chunks
    """The chunks of the sequences of `samples`, in the same order."""
    target_counts: NDArray[np.int64]
    """(sequences,) tokens that the loss counts."""
    schedules: tuple[Schedule, ...]
    """One schedule per stage of the pipeline; exactly one without a pipeline."""
    group_size: int = 1
    """Ranks of the rank's sequence-parallel group."""
    sequence_rank: int = 0
    """Index of the rank in its group."""
    spread: range = range(0)
    """Chunks that the ranks of the group split: always the first ones, and the same on each rank. All ranks run their
    operations in one order, because they communicate. This rank runs the other chunks alone."""
    answers: int = 0
    """Sequences of each sample of preferences; 0 in supervised training, where a sample is one sequence."""
    mismatched: Chunks | None = None
    """Chunks of prompts with other samples' answers, which `kto` forwards without gradient before the schedule."""

    def sample_of(self, sequence: int) -> int:
        """Return the sample that a sequence of the chunks is part of."""
        return int(self.samples[sequence // max(1, self.answers)])

    @property
    def counted(self) -> range:
        """Chunks that this rank counts. Only a group's first rank counts spread ones, so sums over ranks are right."""
        return range(len(self.spread) if self.sequence_rank else 0, len(self.chunks))

    @property
    def room(self) -> NDArray[np.int64]:
        """Most tokens of each chunk, (chunks,); those of a spread chunk over all ranks of the group."""
        room = np.full(len(self.chunks), self.chunks.chunk_size, dtype=np.int64)
        room[: len(self.spread)] *= self.group_size
        return room

    @property
    def lower_bound(self) -> int:
        """Fewest chunks that this rank could count in any plan that spreads the same samples."""
        tokens, spread = chunk_tokens(self.chunks), len(self.spread)
        together = 0 if self.sequence_rank else int(tokens[:spread].sum())
        alone, size = int(tokens[spread:].sum()), self.chunks.chunk_size
        return -(-together // (size * self.group_size)) + -(-alone // size)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the first stage. All stages forward, recompute and go backward through the same chunks."""
        return self.schedules[0]

    @functools.cached_property
    def recomputed(self) -> NDArray[np.int64]:
        """Indices of the chunks that are forwarded twice, (recomputed,)."""
        again = [chunk for op in self.schedule.ops if op.kind is OpKind.recompute for chunk in op.chunks]
        return np.array(again, np.int64)

    @functools.cached_property
    def is_recomputed(self) -> NDArray[np.bool_]:
        """(chunks,)"""
        found = np.zeros(len(self.chunks), dtype=bool)
        found[self.recomputed] = True
        return found

    @functools.cached_property
    def first_passed(self) -> NDArray[np.int64]:
        """Indices of the chunks that are forwarded for their log-probabilities first, (passed,)."""
        if self.answers and len(self.schedules) > 1:
            return np.arange(len(self.chunks))  # a pipeline runs them all before its schedule
        return np.array(
            [op.chunks[0] for op in self.schedule.ops if op.kind is OpKind.first_pass and op.real_chunks], np.int64
        )


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of all ranks."""

    step: int
    """Index of the step, counted from 0 over all epochs."""
    samples: NDArray[np.int64]
    """(samples,) indices into the training data."""
    tokens: int
    target_tokens: int
    ranks: tuple[RankPlan, ...]

    @property
    def run_tokens(self) -> int:
        """Tokens in the chunks: all of the step's, without prompts that one answer of a pair runs for both."""
        return sum(int(chunk_tokens(rank.chunks)[rank.counted.start :].sum()) for rank in self.ranks if rank.counted)

    @property
    def chunks(self) -> int:
        """Number of chunks, each spread one counted once."""
        return sum(len(rank.counted) for rank in self.ranks)

    @property
    def recomputed_chunks(self) -> int:
        """Number of chunks that are forwarded twice."""
        return sum(int((rank.recomputed >= rank.counted.start).sum()) for rank in self.ranks)

    @property
    def room(self) -> int:
        """Tokens that the chunks could hold."""
        return sum(int(rank.room[rank.counted.start :].sum()) for rank in self.ranks)

    @property
    def spread_samples(self) -> int:
        """Number of samples that whole sequence-parallel groups run."""
        return sum(
            len(np.unique(rank.chunks.sequence[: rank.chunks.first_segment[len(rank.spread)]]))
            for rank in self.ranks
            if rank.sequence_rank == 0
        )

    @property
    def dummies(self) -> int:
        """Number of passes of one token that only keep ranks in step."""
        return sum(rank.schedule.dummies for rank in self.ranks)


@dataclass(frozen=True)
class RunPlan:
    """All steps of a run. A step is planned when it is asked for."""

    batches: GlobalBatches
    steps: int
    lengths: NDArray[np.int64]
    """(samples,) tokens of the training samples; of a pair, those of both answers with their prompts."""
    target_counts: NDArray[np.int64]
    """(samples,) tokens that the loss counts."""
    chunk_size: int
    k: int
    """Chunks of a long sequence that keep their activations."""
    fill_tails: bool = True
    equal_time: bool = False
    """Cut long sequences into pieces of equal predicted time instead of equal tokens."""
    is_zero_3: bool = False
    """ZeRO-3 traces one forward for each backward, so the retained chunks of a sequence must share an engine call. It
    communicates within both, so all ranks must run the same operations."""
    pipeline: PipelineLayout | None = None
    ranks: int = 1
    """Data-parallel ranks, those of all sequence-parallel groups together; all hold the same stage."""
    sequence: int = 1
    """Neighboring ranks that form a sequence-parallel group."""
    spread_all: bool = False
    """Spread every chunk over its group, not only those of sequences that others would wait for. ZeRO-3
    and pipelines always do, because their ranks must run alike."""
    costs: CostModel = field(default_factory=CostModel.proportional)
    """Costs that decide which rank runs which sequence."""
    answers: Answers | None = None
    """The sequences of samples of preferences; None in supervised training."""

    def __getitem__(self, step: int) -> StepPlan:
        """Return the plan of a step, counted from 0."""
        samples = self.batches[step]
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        ranks = self._whole_shares(samples) if self.sequence == 1 or self.spreads_all else self._mixed_shares(samples)
        return StepPlan(step, samples, int(lengths.sum()), int(targets.sum()), ranks)

    def __iter__(self) -> Iterator[StepPlan]:
        return (self[step] for step in range(self.steps))

    def _whole_shares(self, samples: NDArray[np.int64]) -> tuple[RankPlan, ...]:
        """Plan groups (single ranks without sequence parallelism) that run all of their samples together."""
        shares = balance(self._sample_seconds(samples), self.ranks // self.sequence)
        chunks = [self._chunks_of(samples[share]) for share in shares]
        targets = [self.targets_of(samples[share]) for share in shares]
        schedules = self._schedules(chunks, targets)
        alone = self._built(self.lengths[:0], self.chunk_size)
        return tuple(
            RankPlan(
                samples[share], join_chunks(together, alone), own_targets, own_schedules,
                group_size=self.sequence, sequence_rank=place, spread=range(len(together) if self.sequence > 1 else 0),
                answers=0 if self.answers is None else self.answers.count, mismatched=self._mismatched(samples[share]),
            )
            for share, together, own_targets, own_schedules in zip(shares, chunks, targets, schedules, strict=True)
            for place in range(self.sequence)
        )  # fmt: skip

    def lengths_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of each sequence of these samples, (sequences,)."""
        return self.lengths[samples] if self.answers is None else self.answers.lengths[samples].ravel()

    def targets_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the targets of each sequence of these samples, (sequences,)."""
        return self.target_counts[samples] if self.answers is None else self.answers.targets[samples].ravel()

    def _sample_seconds(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predict the seconds of each sample, (samples,), if its group runs it together."""
        if self.answers is None:
            return self._seconds_spread(self.lengths[samples], self.target_counts[samples])
        costs = self.costs.spread_over(self.sequence)
        return self.answers.seconds(costs, samples, self.spread_chunk_size, self.k)

    def _chunks_of(self, samples: NDArray[np.int64]) -> Chunks:
        if self.answers is None:
            return self._built(self.lengths[samples], self.spread_chunk_size)
        return self.answers.build_chunks(
            samples,
            self.spread_chunk_size,
            fill_tails=self.fill_tails,
            pair_weight=self.pair_weight,
            share=self.pipeline is None,
        )

    def _mismatched(self, samples: NDArray[np.int64]) -> Chunks | None:
        if self.answers is None or self.answers.mismatched is None:
            return None
        return self._built(self.answers.mismatched[samples], self.spread_chunk_size)

    @functools.cached_property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence of all samples, (sequences,)."""
        return self.lengths_of(np.arange(len(self.lengths)))

    def _mixed_shares(self, samples: NDArray[np.int64]) -> tuple[RankPlan, ...]:
        """Plan groups whose ranks run some sequences together and the others alone."""
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        alone_seconds = self.costs.of_sequences(lengths, self.chunk_size, self.k, targets)
        costs = np.stack([alone_seconds, self._seconds_spread(lengths, targets)])
        least = np.where(lengths > self.longest_alone, self.sequence, 1)
        shares = share_out(costs, (1, self.sequence), self.ranks, least)
        ranks = []
        for first in range(0, self.ranks, self.sequence):
            spread = shares.spread(first)
            together = self._built(lengths[spread], self.spread_chunk_size)
            schedule_together = plan(together, self.k)
            for place in range(self.sequence):
                alone = shares.alone(first + place)
                own = self._built(lengths[alone], self.chunk_size)
                share = np.concatenate([spread, alone])
                schedule = _one_after_the_other(schedule_together, plan(own, self.k), together)
                ranks.append(
                    RankPlan(
                        samples[share], join_chunks(together, own), targets[share], (schedule if len(share) else IDLE,),
                        group_size=self.sequence, sequence_rank=place, spread=range(len(together)),
                    )
                )  # fmt: skip
        return tuple(ranks)

    def _built(self, lengths: NDArray[np.int64], chunk_size: int) -> Chunks:
        return build_chunks(lengths, chunk_size, fill_tails=self.fill_tails, pair_weight=self.pair_weight)

    def _seconds_spread(self, lengths: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predict the seconds of each sequence, (sequences,), if its group runs it together."""
        return self.costs.spread_over(self.sequence).of_sequences(lengths, self.spread_chunk_size, self.k, targets)

    @property
    def spread_chunk_size(self) -> int:
        """Most tokens of a spread chunk; each rank of a group holds `chunk_size` of them."""
        return self.chunk_size * self.sequence

    @property
    def spreads_all(self) -> bool:
        """True if groups run everything together."""
        return self.spread_all or self.pipeline is not None or self.is_zero_3 or self.answers is not None

    @property
    def state_shares(self) -> int:
        """Parts into which a group divides the state of spread chunks; a rank holds at least one whole K/V head."""
        return self.sequence if self.costs.shape is None else min(self.sequence, self.costs.shape.kv_heads)

    @property
    def longest_alone(self) -> int:
        """Most tokens of a sequence that one rank may run alone.

        No rank then holds more state than its part of that of the longest sample, spread. Thus whether a run fits does
        not depend on how its samples happen to balance.
        """
        return max(self.chunk_size, -(-int(self.sequence_lengths.max()) // self.sequence))

    @property
    def pair_weight(self) -> float:
        """Cost of a query-key pair forward and backward, in tokens; 0 if chunks are cut by tokens."""
        if not self.equal_time:
            return 0.0
        costs = (self.costs.forward, self.costs.backward)
        return sum(cost.seconds_per_pair for cost in costs) / sum(cost.seconds_per_token for cost in costs)

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1 without one."""
        return 1 if self.pipeline is None else self.pipeline.stages

    @functools.cached_property
    def head_in_layers(self) -> float:
        """Cost of head and loss in layers, for the data's mean token."""
        shape = self.costs.shape
        if shape is None:
            return 0.0
        tokens = float(self.lengths.sum())
        pairs = float(self.costs.pairs_up_to(self.sequence_lengths.astype(np.float64)).sum())
        layers = sum(
            cost.seconds_per_token * tokens + cost.seconds_per_pair * pairs
            for cost in (self.costs.forward, self.costs.backward)
        )
        return self.costs.seconds_per_target * float(self.target_counts.sum()) / (layers / shape.layers)

    def stage_layers(self, layers: int) -> tuple[StageLayers, ...]:
        """Return the layers that each stage of the pipeline holds, for a model with `layers` layers.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        return cut_layers(layers, self.stages, head_in_layers=self.head_in_layers)

    @functools.cached_property
    def cut(self) -> tuple[StageLayers, ...] | None:
        """The layers that each stage holds; None without a pipeline, or if the costs are of no particular model."""
        if self.pipeline is None or self.costs.shape is None:
            return None
        return self.stage_layers(self.costs.shape.layers)

    def _schedules(self, ranks: Sequence[Chunks], targets: Sequence[NDArray[np.int64]]) -> list[tuple[Schedule, ...]]:
        """Return the schedules of each rank, one per stage."""
        if self.pipeline is not None:
            by_seconds = self.pipeline.schedule in CHOSEN_BY_SECONDS
            return [
                plan_pipeline(
                    chunks,
                    self.k,
                    self.pipeline,
                    self.costs.of_chunks(chunks, own, self.stages, self.cut) if by_seconds else None,
                )
                for chunks, own in zip(ranks, targets, strict=True)
            ]
        tasks = [
            tasks_of(chunks, self.k) if self.answers is None else preference_tasks(chunks, self.k, self.answers.count)
            for chunks in ranks
        ]
        if self.is_in_lockstep:
            return [(schedule,) for schedule in plan_in_lockstep(tasks)]
        # The sums of preferences are complete within the call that forwards the retained chunks.
        join = self.is_zero_3 or self.answers is not None
        return [(plan_tasks(own, join_retained=join) if own else IDLE,) for own in tasks]

    @property
    def is_in_lockstep(self) -> bool:
        """True if all ranks run the same operations at the same time."""
        return self.is_zero_3 and self.ranks > 1 and self.pipeline is None


def _one_after_the_other(first: Schedule, second: Schedule, chunks: Chunks) -> Schedule:
    """Return the operations of `first`, then those of `second`, whose chunks were joined after `chunks`."""
    shifted = (Op(op.kind, tuple(len(chunks) + chunk for chunk in op.chunks)) for op in second.ops)
    return Schedule((*first.ops, *shifted))
