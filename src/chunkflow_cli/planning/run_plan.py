"""What every optimizer step of a run will do: its samples, their ranks, chunks and schedules.

`chunkflow plan` prints it and `chunkflow train` runs it: both make a `RunPlan` from the same values, and a step's plan
is a pure function of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.balance import balance, rank_loads, share_out
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.chunks import Chunks, build_chunks, join_chunks
from chunkflow_cli.planning.costs import CostModel, chunk_targets, chunk_tokens
from chunkflow_cli.planning.pipeline import CHOSEN_BY_SECONDS, PipelineLayout, plan_pipeline
from chunkflow_cli.planning.schedule import IDLE, Layout, Op, OpKind, Schedule, plan, plan_in_lockstep
from chunkflow_cli.planning.simulate import OperationSeconds, Timeline, simulate_lockstep, simulate_ranks
from chunkflow_cli.planning.stage_cut import StageLayers, cut_layers, layer_shares


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

    def seconds_of_whole_samples(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """(ranks,) predicted of a step, if no sample were spread."""
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        costs = self.costs.of_sequences(lengths, self.chunk_size, self.k, targets)
        return rank_loads(costs, balance(costs, self.ranks))

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
            seconds = operation_seconds(chunks, targets, self.costs, self.pipeline, self.cut)
        return plan_pipeline(chunks, self.k, self.pipeline, seconds)

    def operation_seconds(self, rank: RankPlan) -> OperationSeconds:
        """Predicted, of every operation of a rank."""
        alone = operation_seconds(rank.chunks, rank.target_counts, self.costs, self.pipeline, self.cut)
        if not rank.spread:
            return alone
        spread = operation_seconds(
            rank.chunks, rank.target_counts, self.costs.spread_over(rank.group_size), self.pipeline, self.cut
        )
        count = len(rank.spread)
        return OperationSeconds(
            **{
                kind.name: np.hstack([getattr(spread, kind.name)[:, :count], getattr(alone, kind.name)[:, count:]])
                for kind in fields(OperationSeconds)
            }
        )

    def stage_seconds(self, rank: RankPlan) -> NDArray[np.float64]:
        """(stages,) for how long each stage of a rank runs something, as predicted."""
        head = 0.0
        if len(rank.chunks):
            targets, spread = chunk_targets(rank.chunks, rank.target_counts), len(rank.spread)
            head = self.costs.seconds_per_target * float(targets[spread:].sum())
            if spread:
                head += self.costs.spread_over(rank.group_size).seconds_per_target * float(targets[:spread].sum())
        of_stages = _shares(self.pipeline, self.costs, self.cut) * (rank_seconds(rank, self.costs) - head)
        of_stages[-1] += head
        return of_stages

    def timeline(self, step: StepPlan) -> Timeline:
        """When each operation of a step runs on each rank and stage, as predicted."""
        if not self.is_in_lockstep:
            return simulate_ranks([(rank.schedules, self.operation_seconds(rank)) for rank in step.ranks])
        one_token = operation_seconds(build_chunks([1], 1), np.ones(1, dtype=np.int64), self.costs)
        return simulate_lockstep([(rank.schedule, self.operation_seconds(rank)) for rank in step.ranks], one_token)

    def step_seconds(self, step: StepPlan) -> float:
        """Predicted, of a step without a pipeline: until its last rank is done; the optimizer step is left out."""
        if self.is_in_lockstep:
            return self.timeline(step).makespan
        return max(rank_seconds(rank, self.costs) for rank in step.ranks)

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


def operation_seconds(
    chunks: Chunks,
    targets: NDArray[np.int64],
    costs: CostModel,
    pipeline: PipelineLayout | None = None,
    cut: tuple[StageLayers, ...] | None = None,
) -> OperationSeconds:
    """Predicted seconds of every operation on these chunks.

    Each stage of a pipeline takes its layers' share of the model's seconds, the last one also head and loss.

    Args:
        targets: (sequences,) tokens that the loss counts.
        cut: the layers of each stage; equal shares if not given.
    """
    stages = 1 if pipeline is None else pipeline.stages
    shares = _shares(pipeline, costs, cut)
    tokens, pairs = chunk_tokens(chunks), costs.chunk_pairs(chunks)
    head = np.zeros((stages, len(chunks)))
    head[-1] = costs.seconds_per_target * chunk_targets(chunks, targets)

    def shared(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        return shares[:, None] * seconds

    backward = shared(costs.backward(tokens, pairs))
    return OperationSeconds(
        forward=shared(costs.forward(tokens, pairs)) + head,
        backward=backward,
        recompute=shared(costs.recompute(tokens, pairs)) + head,
        state_pass=shared(costs.state_pass(tokens, pairs)),
        # The two products of a backward are of the same size.
        input_gradient=backward / 2,
        weight_gradient=backward / 2,
        transfer=np.broadcast_to(
            costs.transfer_latency_seconds + costs.transfer_seconds_per_token * tokens, (stages - 1, len(chunks))
        ).copy(),
    )


def _shares(
    pipeline: PipelineLayout | None, costs: CostModel, cut: tuple[StageLayers, ...] | None
) -> NDArray[np.float64]:
    """(stages,) what each takes of the model's seconds, head and loss apart; 1 where costs are those of a stage."""
    stages = 1 if pipeline is None else pipeline.stages
    if costs.is_of_one_stage:
        return np.ones(stages)
    return np.full(stages, 1.0 / stages) if cut is None else layer_shares(cut)


def rank_seconds(rank: RankPlan, costs: CostModel) -> float:
    """Predicted seconds of all operations of a rank without a pipeline, one after the other."""
    if not len(rank.chunks):
        return 0.0
    tokens, pairs = chunk_tokens(rank.chunks), costs.chunk_pairs(rank.chunks)
    targets = chunk_targets(rank.chunks, rank.target_counts)
    is_recomputed = np.zeros(len(rank.chunks), dtype=bool)
    is_recomputed[rank.recomputed] = True

    def seconds(costs: CostModel, chunks: slice) -> float:
        again = is_recomputed[chunks]
        once, twice = (tokens[chunks], pairs[chunks]), (tokens[chunks][again], pairs[chunks][again])
        second = costs.state_pass(*twice) + costs.recompute(*twice) - costs.forward(*twice)
        head = costs.seconds_per_target * targets[chunks].sum()
        return float(costs.forward(*once).sum() + costs.backward(*once).sum() + second.sum() + head)

    spread = len(rank.spread)
    alone = seconds(costs, slice(spread, None))
    return alone + seconds(costs.spread_over(rank.group_size), slice(spread)) if spread else alone


def validate_groups(ranks: Sequence[RankPlan]) -> None:
    """Prove of the ranks of a step that those of each sequence-parallel group can run together.

    The operations on spread chunks communicate within the group: each of its ranks must run the same ones in one order,
    on the same chunks of the same samples. What a rank runs alone does not, and no operation is both.

    Args:
        ranks: group by group.

    Raises:
        ValueError: names the rank that differs from the first of its group, and where.
    """
    for index, rank in enumerate(ranks):
        first = ranks[index - rank.sequence_rank]
        if rank.sequence_rank != index % rank.group_size or rank.group_size != first.group_size:
            raise ValueError(f"rank {index} is not where its sequence-parallel group has place {rank.sequence_rank}")
        count = len(rank.spread)
        if rank.spread != range(count) or count > len(rank.chunks) or rank.spread != first.spread:
            raise ValueError(f"rank {index}: spread chunks must be the first ones, and as many as on its group's first")
        if _spread_tokens(rank) != _spread_tokens(first):
            raise ValueError(f"rank {index}: its spread chunks are not those of its group's first rank")
        for stage, (schedule, expected) in enumerate(zip(rank.schedules, first.schedules, strict=True)):
            own, others = _spread_operations(rank, schedule), _spread_operations(first, expected)
            if own != others:
                differs = next((i for i, pair in enumerate(zip(own, others, strict=False)) if pair[0] != pair[1]),
                               min(len(own), len(others)))  # fmt: skip
                raise ValueError(
                    f"rank {index}, stage {stage}: spread operation {differs} is not that of its group's first rank"
                )


def _spread_tokens(rank: RankPlan) -> list[list[tuple[int, int, int]]]:
    """Of each spread chunk the samples, starts and stops of its segments."""
    return [
        [(int(rank.samples[part.sequence]), part.start, part.stop) for part in rank.chunks[chunk].segments]
        for chunk in rank.spread
    ]


def _spread_operations(rank: RankPlan, schedule: Schedule) -> list[Op]:
    operations = []
    for op in schedule.ops:
        together = {chunk in rank.spread for chunk in op.real_chunks}
        if len(together) > 1:
            raise ValueError(f"operation {op} joins chunks that are spread and chunks that are not")
        if True in together:
            operations.append(op)
    return operations
