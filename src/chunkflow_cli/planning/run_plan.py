"""What every optimizer step of a run will do: its samples, their ranks, chunks and schedules.

`chunkflow plan` prints it and `chunkflow train` runs it: both make a `RunPlan` from the same values, and a step's plan
is a pure function of them.
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
from chunkflow_cli.planning.operation_seconds import chunk_operation_seconds
from chunkflow_cli.planning.pipeline import CHOSEN_BY_SECONDS, PipelineLayout, plan_pipeline
from chunkflow_cli.planning.schedule import IDLE, Layout, Op, OpKind, Schedule, plan, plan_in_lockstep
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers


@dataclass(frozen=True)
class RankPlan:
    """What one data-parallel rank does in a step."""

    samples: NDArray[np.int64]  # (samples,) indices into the training data
    chunks: Chunks
    """Of the lengths of `samples`, in their order."""
    target_counts: NDArray[np.int64]  # (samples,)
    schedules: tuple[Schedule, ...]
    """One for each stage of the pipeline; just one without a pipeline."""
    group_size: int = 1
    """Ranks of its sequence-parallel group."""
    sequence_rank: int = 0
    """Its place in that group."""
    spread: range = range(0)
    """Chunks whose tokens are divided among the ranks of the group: always the first ones, the same on each rank, and
    each rank runs their operations in one order, for they communicate. The others this rank runs alone."""

    @property
    def counted(self) -> range:
        """Chunks that this rank counts, so that sums over ranks count each once: the first of a group those spread."""
        return range(len(self.spread) if self.sequence_rank else 0, len(self.chunks))

    @property
    def room(self) -> NDArray[np.int64]:
        """(chunks,) most tokens of each: of a spread one, so many on each rank."""
        room = np.full(len(self.chunks), self.chunks.chunk_size, dtype=np.int64)
        room[: len(self.spread)] *= self.group_size
        return room

    @property
    def lower_bound(self) -> int:
        """No plan that spreads the same samples has fewer chunks for this rank to count."""
        tokens, spread = chunk_tokens(self.chunks), len(self.spread)
        together = 0 if self.sequence_rank else int(tokens[:spread].sum())
        alone, size = int(tokens[spread:].sum()), self.chunks.chunk_size
        return -(-together // (size * self.group_size)) + -(-alone // size)

    @property
    def schedule(self) -> Schedule:
        """Of the first stage. All stages forward, recompute and go backward through the same chunks."""
        return self.schedules[0]

    @functools.cached_property
    def recomputed(self) -> NDArray[np.int64]:
        """(recomputed,) the chunks that are forwarded twice."""
        return np.array(
            [chunk for op in self.schedule.ops if op.kind is OpKind.recompute for chunk in op.chunks], np.int64
        )


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    step: int
    """Counted from 0 over all epochs."""
    samples: NDArray[np.int64]  # (samples,) of all ranks, indices into the training data
    tokens: int
    target_tokens: int
    ranks: tuple[RankPlan, ...]

    @property
    def chunks(self) -> int:
        return sum(len(rank.counted) for rank in self.ranks)

    @property
    def recomputed_chunks(self) -> int:
        return sum(int((rank.recomputed >= rank.counted.start).sum()) for rank in self.ranks)

    @property
    def room(self) -> int:
        """Tokens that the chunks could hold."""
        return sum(int(rank.room[rank.counted.start :].sum()) for rank in self.ranks)

    @property
    def spread_samples(self) -> int:
        """Samples that whole sequence-parallel groups run."""
        return sum(
            len(np.unique(rank.chunks.sequence[: rank.chunks.first_segment[len(rank.spread)]]))
            for rank in self.ranks
            if rank.sequence_rank == 0
        )

    @property
    def dummies(self) -> int:
        """Passes of one token that only keep ranks in step."""
        return sum(rank.schedule.dummies for rank in self.ranks)


@dataclass(frozen=True)
class RunPlan:
    """All steps of a run; a step is planned when it is asked for."""

    batches: GlobalBatches
    steps: int
    lengths: NDArray[np.int64]  # (samples,) tokens of the training samples
    target_counts: NDArray[np.int64]  # (samples,)
    chunk_size: int
    k: int
    """Chunks of a long sequence that keep their activations."""
    fill_tails: bool = True
    equal_time: bool = False
    """Cut long sequences into pieces of equal predicted time instead of equal tokens."""
    layout: Layout = field(default_factory=Layout)
    pipeline: PipelineLayout | None = None
    ranks: int = 1
    """That hold the same stage: data-parallel ranks, of all sequence-parallel groups together."""
    sequence: int = 1
    """Neighbouring ranks that form a sequence-parallel group."""
    spread_all: bool = False
    """Spread every chunk over its group, not only those of sequences that would otherwise be waited for. With ZeRO-3
    (`layout.join_retained`) and with a pipeline that is so in any case: there all ranks must run alike."""
    costs: CostModel = field(default_factory=CostModel.proportional)
    """By which whole sequences are given to ranks."""

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> StepPlan:
        samples = self.batches[step]
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        if self.sequence > 1:
            return StepPlan(step, samples, int(lengths.sum()), int(targets.sum()), self._groups(samples))
        shares = balance(self.costs.of_sequences(lengths, self.chunk_size, self.k, targets), self.ranks)
        chunks = [self._built(lengths[share], self.chunk_size) for share in shares]
        ranks = tuple(
            RankPlan(samples[share], own, targets[share], schedules)
            for share, own, schedules in zip(
                shares, chunks, self._schedules(chunks, [targets[share] for share in shares]), strict=True
            )
        )
        return StepPlan(step, samples, int(lengths.sum()), int(targets.sum()), ranks)

    def _groups(self, samples: NDArray[np.int64]) -> tuple[RankPlan, ...]:
        """Of the ranks of all sequence-parallel groups, group by group."""
        if self.spreads_all:
            return self._all_spread(samples)
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        costs = np.stack(
            [
                self.costs.of_sequences(lengths, self.chunk_size, self.k, targets),
                self._seconds_spread(lengths, targets),
            ]
        )
        least = np.where(lengths > self.longest_alone, self.sequence, 1)
        shares = share_out(costs, (1, self.sequence), self.ranks, least)
        ranks = []
        for first in range(0, self.ranks, self.sequence):
            spread = shares.spread(first)
            together = self._built(lengths[spread], self.spread_chunk_size)
            schedule_together = plan(together, self.k, self.layout)
            for place in range(self.sequence):
                alone = shares.alone(first + place)
                own = self._built(lengths[alone], self.chunk_size)
                share = np.concatenate([spread, alone])
                schedule = _one_after_the_other(schedule_together, plan(own, self.k, self.layout), together)
                ranks.append(
                    RankPlan(
                        samples[share], join_chunks(together, own), targets[share], (schedule if len(share) else IDLE,),
                        group_size=self.sequence, sequence_rank=place, spread=range(len(together)),
                    )
                )  # fmt: skip
        return tuple(ranks)

    def _all_spread(self, samples: NDArray[np.int64]) -> tuple[RankPlan, ...]:
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        shares = balance(self._seconds_spread(lengths, targets), self.ranks // self.sequence)
        chunks = [self._built(lengths[share], self.spread_chunk_size) for share in shares]
        none = self._built(lengths[:0], self.chunk_size)
        return tuple(
            RankPlan(
                samples[share], join_chunks(together, none), targets[share], schedules,
                group_size=self.sequence, sequence_rank=place, spread=range(len(together)),
            )
            for share, together, schedules in zip(
                shares, chunks, self._schedules(chunks, [targets[share] for share in shares]), strict=True
            )
            for place in range(self.sequence)
        )  # fmt: skip

    def _built(self, lengths: NDArray[np.int64], chunk_size: int) -> Chunks:
        return build_chunks(lengths, chunk_size, fill_tails=self.fill_tails, pair_weight=self.pair_weight)

    @property
    def spread_chunk_size(self) -> int:
        """Of a chunk of which each rank of a group holds `chunk_size` tokens."""
        return self.chunk_size * self.sequence

    def _seconds_spread(self, lengths: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """(sequences,) of each, if its group ran it together."""
        return self.costs.spread_over(self.sequence).of_sequences(lengths, self.spread_chunk_size, self.k, targets)

    @property
    def spreads_all(self) -> bool:
        """Whether groups run everything together."""
        return self.spread_all or self.pipeline is not None or self.layout.join_retained

    @property
    def state_shares(self) -> int:
        """Into how many parts a group divides the state of what it runs together: of K/V heads that are fewer than its
        ranks, each rank holds one."""
        return self.sequence if self.costs.shape is None else min(self.sequence, self.costs.shape.kv_heads)

    @property
    def longest_alone(self) -> int:
        """Tokens that a sequence may have to be one rank's alone: then no rank holds more state than its part of that
        of the longest sample, spread. Whether a run fits does not depend on what happens to be balanced."""
        return max(self.chunk_size, -(-int(self.lengths.max()) // self.sequence))

    @property
    def pair_weight(self) -> float:
        """What a query-key pair costs forward and backward, in tokens; 0 where chunks are cut by tokens."""
        if not self.equal_time:
            return 0.0
        costs = (self.costs.forward, self.costs.backward)
        return sum(cost.seconds_per_pair for cost in costs) / sum(cost.seconds_per_token for cost in costs)

    @functools.cached_property
    def head_in_layers(self) -> float:
        """What head and loss cost, in layers: seconds of the data's mean token."""
        shape = self.costs.shape
        if shape is None:
            return 0.0
        tokens = float(self.lengths.sum())
        pairs = float(self.costs.pairs_up_to(self.lengths.astype(np.float64)).sum())
        layers = sum(
            cost.seconds_per_token * tokens + cost.seconds_per_pair * pairs
            for cost in (self.costs.forward, self.costs.backward)
        )
        return self.costs.seconds_per_target * float(self.target_counts.sum()) / (layers / shape.layers)

    def stage_layers(self, layers: int) -> tuple[StageLayers, ...]:
        """Which layers of a model each stage of the pipeline holds.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        stages = 1 if self.pipeline is None else self.pipeline.stages
        return cut_layers(layers, stages, head_in_layers=self.head_in_layers)

    @functools.cached_property
    def cut(self) -> tuple[StageLayers, ...] | None:
        """The stages of the model whose costs are known; None without one, or without a pipeline."""
        if self.pipeline is None or self.costs.shape is None:
            return None
        return self.stage_layers(self.costs.shape.layers)

    def _schedules(self, ranks: Sequence[Chunks], targets: Sequence[NDArray[np.int64]]) -> list[tuple[Schedule, ...]]:
        """Of the stages of each rank."""
        if self.pipeline is None:
            if self.is_in_lockstep:
                return [(schedule,) for schedule in plan_in_lockstep(ranks, self.k)]
            return [(plan(chunks, self.k, self.layout) if len(chunks) else IDLE,) for chunks in ranks]
        return [self._pipeline_schedules(chunks, own) for chunks, own in zip(ranks, targets, strict=True)]

    def _pipeline_schedules(self, chunks: Chunks, targets: NDArray[np.int64]) -> tuple[Schedule, ...]:
        assert self.pipeline is not None
        seconds = None
        if self.pipeline.schedule in CHOSEN_BY_SECONDS:
            seconds = chunk_operation_seconds(chunks, targets, self.costs, self.pipeline, self.cut)
        return plan_pipeline(chunks, self.k, self.pipeline, seconds)

    @property
    def is_in_lockstep(self) -> bool:
        return self.layout.lockstep and self.ranks > 1 and self.pipeline is None

    def __iter__(self) -> Iterator[StepPlan]:
        return (self[step] for step in range(self.steps))


def _one_after_the_other(first: Schedule, second: Schedule, chunks: Chunks) -> Schedule:
    """
    Args:
        first: on `chunks`.
        second: on the chunks that were joined to them.
    """
    shifted = (Op(op.kind, tuple(len(chunks) + chunk for chunk in op.chunks)) for op in second.ops)
    return Schedule((*first.ops, *shifted))
