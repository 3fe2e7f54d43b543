"""What every optimizer step of a run will do: its samples, their ranks, chunks and schedules.

`chunkflow plan` prints it and `chunkflow train` runs it: both make a `RunPlan` from the same values, and a step's plan
is a pure function of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.balance import balance
from chunkflow_cli.batches import GlobalBatches
from chunkflow_cli.chunks import Chunks, build_chunks
from chunkflow_cli.costs import CostModel, chunk_targets, chunk_tokens
from chunkflow_cli.pipeline_schedules import CHOSEN_BY_SECONDS, PipelineLayout, plan_pipeline
from chunkflow_cli.schedule import Layout, OpKind, Schedule, plan
from chunkflow_cli.simulate import OperationSeconds


@dataclass(frozen=True)
class RankPlan:
    """What one data-parallel rank does in a step."""

    samples: NDArray[np.int64]  # (samples,) indices into the training data
    chunks: Chunks
    """Of the lengths of `samples`, in their order."""
    target_counts: NDArray[np.int64]  # (samples,)
    schedules: tuple[Schedule, ...]
    """One for each stage of the pipeline; just one without a pipeline."""

    @property
    def schedule(self) -> Schedule:
        """Of the first stage. All stages forward, recompute and go backward through the same chunks."""
        return self.schedules[0]

    @property
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
        return sum(len(rank.chunks) for rank in self.ranks)

    @property
    def recomputed_chunks(self) -> int:
        return sum(rank.schedule.recomputed_chunks for rank in self.ranks)


@dataclass(frozen=True)
class RunPlan:
    """All steps of a run; a step is planned when it is asked for."""

    batches: GlobalBatches
    steps: int
    lengths: NDArray[np.int64]  # (samples,) tokens of the training samples
    target_counts: NDArray[np.int64]  # (samples,)
    chunk_size: int
    k: int
    fill_tails: bool = True
    equal_time: bool = False
    """Cut long sequences into pieces of equal predicted time instead of equal tokens."""
    layout: Layout = field(default_factory=Layout)
    pipeline: PipelineLayout | None = None
    ranks: int = 1
    """Data-parallel ranks."""
    costs: CostModel = field(default_factory=CostModel.proportional)
    """By which whole sequences are given to ranks."""

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> StepPlan:
        samples = self.batches[step]
        lengths, targets = self.lengths[samples], self.target_counts[samples]
        ranks: list[RankPlan] = []
        idle: RankPlan | None = None  # with more ranks than samples, many of them: they are all alike
        for share in balance(self.costs.of_sequences(lengths, self.chunk_size, self.k, targets), self.ranks):
            if idle is not None and not len(share):
                ranks.append(idle)
                continue
            chunks = build_chunks(
                lengths[share], self.chunk_size, fill_tails=self.fill_tails, pair_weight=self.pair_weight
            )
            ranks.append(RankPlan(samples[share], chunks, targets[share], self._schedules(chunks, targets[share])))
            idle = idle if len(share) else ranks[-1]
        return StepPlan(step, samples, int(lengths.sum()), int(targets.sum()), tuple(ranks))

    @property
    def pair_weight(self) -> float:
        """What a query-key pair costs forward and backward, in tokens; 0 where chunks are cut by tokens."""
        if not self.equal_time:
            return 0.0
        costs = (self.costs.forward, self.costs.backward)
        return sum(cost.seconds_per_pair for cost in costs) / sum(cost.seconds_per_token for cost in costs)

    def _schedules(self, chunks: Chunks, targets: NDArray[np.int64]) -> tuple[Schedule, ...]:
        if self.pipeline is None:
            return (plan(chunks, self.k, self.layout),)
        seconds = None
        if self.pipeline.schedule in CHOSEN_BY_SECONDS:
            seconds = operation_seconds(chunks, targets, self.costs, self.pipeline)
        return plan_pipeline(chunks, self.k, self.pipeline, seconds)

    def operation_seconds(self, rank: RankPlan) -> OperationSeconds:
        """Predicted, of every operation of a rank."""
        return operation_seconds(rank.chunks, rank.target_counts, self.costs, self.pipeline)

    def __iter__(self) -> Iterator[StepPlan]:
        return (self[step] for step in range(self.steps))


def operation_seconds(
    chunks: Chunks, targets: NDArray[np.int64], costs: CostModel, pipeline: PipelineLayout | None = None
) -> OperationSeconds:
    """Predicted seconds of every operation on these chunks; the parts of a pipeline get equal shares of the model.

    Args:
        targets: (sequences,) tokens that the loss counts.
    """
    stages, of_a_stage = (1, 1) if pipeline is None else (pipeline.stages, pipeline.parts)
    parts = stages * of_a_stage
    share = 1.0 / (of_a_stage if costs.is_of_one_stage else parts)
    tokens, pairs = chunk_tokens(chunks), costs.chunk_pairs(chunks)
    head = costs.seconds_per_target * chunk_targets(chunks, targets)

    def on_all_parts(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.broadcast_to(seconds * share, (parts, len(chunks))).copy()

    backward = on_all_parts(costs.backward(tokens, pairs))
    return OperationSeconds(
        forward=on_all_parts(costs.forward(tokens, pairs) + head),
        backward=backward,
        recompute=on_all_parts(costs.recompute(tokens, pairs) + head),
        state_pass=on_all_parts(costs.state_pass(tokens, pairs)),
        # The two products of a backward are of the same size.
        input_gradient=backward / 2,
        weight_gradient=backward / 2,
        transfer=np.broadcast_to(
            costs.transfer_latency_seconds + costs.transfer_seconds_per_token * tokens, (parts - 1, len(chunks))
        ).copy(),
    )


def rank_seconds(rank: RankPlan, costs: CostModel) -> float:
    """Predicted seconds of all operations of a rank without a pipeline, one after the other."""
    if not len(rank.chunks):
        return 0.0
    tokens, pairs = chunk_tokens(rank.chunks), costs.chunk_pairs(rank.chunks)
    again = rank.recomputed
    twice = (
        costs.state_pass(tokens[again], pairs[again])
        + costs.recompute(tokens[again], pairs[again])
        - costs.forward(tokens[again], pairs[again])
    )
    head = costs.seconds_per_target * int(rank.target_counts.sum())
    return float(costs.forward(tokens, pairs).sum() + costs.backward(tokens, pairs).sum() + twice.sum() + head)
