"""Prove that the plan of a step keeps what training promises, before any of the step runs.

Every process plans and proves the whole step, so all come to the same verdict: a broken plan stops all ranks at once,
and none waits for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks
from chunkflow_cli.planning.costs import chunk_tokens
from chunkflow_cli.planning.pipeline import activation_bound
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan
from chunkflow_cli.planning.schedule import Op, Schedule
from chunkflow_cli.planning.schedule_proof import validate, validate_lockstep, validate_pipeline


def validate_step(step: StepPlan, plan: RunPlan) -> None:
    """Prove that a step trains on each of its tokens once, within the memory bound, and that no rank waits forever.

    Takes time linear in the chunks of the step.

    Raises:
        ValueError: a rule is broken; names the rank, the rule, and the operation if there is one.
    """
    if plan.sequence > 1:
        validate_groups(step.ranks)
    _validate_samples(step)
    for index, rank in enumerate(step.ranks):
        try:
            _validate_chunks(rank, plan)
            _validate_schedules(rank, plan)
        except ValueError as error:
            raise ValueError(f"rank {index}: {error}") from error
    if plan.is_in_lockstep:
        validate_lockstep([rank.schedule for rank in step.ranks])


def _validate_samples(step: StepPlan) -> None:
    """Prove that the ranks together take each sample of the step once; a sequence-parallel group counts as one."""
    taken = [rank.samples if rank.sequence_rank == 0 else rank.samples[~_are_spread(rank)] for rank in step.ranks]
    if not np.array_equal(np.sort(np.concatenate(taken)), np.sort(step.samples)):
        raise ValueError(f"the ranks do not take each of the {len(step.samples)} samples of the step once")


def _validate_chunks(rank: RankPlan, plan: RunPlan) -> None:
    """Prove that the chunks hold each token of the rank's samples once, in order, and that each chunk has room."""
    chunks = rank.chunks
    if not np.array_equal(chunks.lengths, plan.lengths_of(rank.samples)):
        raise ValueError("its chunks are not made of the lengths of its samples")
    chunk = np.repeat(np.arange(len(chunks)), np.diff(chunks.first_segment))
    order = np.lexsort((chunk, chunks.sequence))
    sequence, start, stop = chunks.sequence[order], chunks.start[order], chunks.stop[order]
    is_first = np.diff(sequence, prepend=-1) != 0
    branches = chunks.branches()
    begins = np.zeros(len(chunks.lengths), dtype=np.int64)
    for branch, begin in branches.items():
        begins[branch] = begin
        _validate_branch(chunks, plan, rank.sample_of(branch), branch, begin)
    follows = (start == np.where(is_first, begins[sequence], np.roll(stop, 1))) & (stop > start)
    if not follows.all():
        raise ValueError(
            f"the pieces of sample {rank.sample_of(int(sequence[np.argmin(follows)]))} do not follow each other"
        )
    if not np.array_equal(np.bincount(sequence, stop - start, minlength=len(begins)), chunks.lengths - begins):
        raise ValueError("its chunks do not hold every token of its samples")
    tokens = chunk_tokens(chunks)
    if (tokens > rank.room).any():
        full = int(np.argmax(tokens > rank.room))
        raise ValueError(f"chunk {full} holds {tokens[full]:.0f} tokens and has room for {rank.room[full]}")


def _validate_branch(chunks: Chunks, plan: RunPlan, sample: int, branch: int, begin: int) -> None:
    """Prove that an answer which begins at the end of its prompt finds the prompt in the state of the other answer."""
    if plan.answers is None or plan.answers.prompts is None or begin >= plan.answers.prompts[sample]:
        raise ValueError(f"an answer of sample {sample} begins at token {begin}, which its prompt does not reach")
    if begin > chunks.stored_tokens(branch ^ 1):
        raise ValueError(f"sample {sample}: the state of one answer does not hold the prompt that the other one reads")


def _validate_schedules(rank: RankPlan, plan: RunPlan) -> None:
    """Prove that the schedules compute the whole gradient of the rank's chunks with at most K of them kept."""
    if plan.pipeline is None:
        validate(rank.schedule, rank.chunks, plan.k, answers=rank.answers)
        return
    bound = activation_bound(plan.k, plan.pipeline)
    validate_pipeline(rank.schedules, rank.chunks, plan.k, most_live=bound)


def _are_spread(rank: RankPlan) -> NDArray[np.bool_]:
    """Return True for each sample that the rank's whole sequence-parallel group runs together, (samples,)."""
    spread = rank.chunks.sequence[: rank.chunks.first_segment[len(rank.spread)]]
    are_spread = np.isin(np.arange(len(rank.chunks.lengths)), spread)
    return are_spread[:: max(1, rank.answers)]  # all answers of a sample, or none


def validate_groups(ranks: Sequence[RankPlan]) -> None:
    """Prove that the ranks of each sequence-parallel group can run together.

    Operations on spread chunks communicate within the group. So all of its ranks must run the same ones in the same
    order, on the same chunks of the same samples. No operation may join a spread chunk and one that a rank runs alone.

    Args:
        ranks: all ranks of a step, group by group.

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
            ops = itertools.zip_longest(_spread_operations(rank, schedule), _spread_operations(first, expected))
            differs = next((position for position, (own, other) in enumerate(ops) if own != other), None)
            if differs is not None:
                raise ValueError(
                    f"rank {index}, stage {stage}: spread operation {differs} is not that of its group's first rank"
                )


def _spread_tokens(rank: RankPlan) -> list[list[tuple[int, int, int]]]:
    """Return the sample, start and stop of each segment of each spread chunk."""
    return [
        [(rank.sample_of(part.sequence), part.start, part.stop) for part in rank.chunks[chunk].segments]
        for chunk in rank.spread
    ]


def _spread_operations(rank: RankPlan, schedule: Schedule) -> list[Op]:
    """Return the operations of a schedule on spread chunks."""
    operations = []
    for op in schedule.ops:
        together = {chunk in rank.spread for chunk in op.real_chunks}
        if len(together) > 1:
            raise ValueError(f"operation {op} joins chunks that are spread and chunks that are not")
        if True in together:
            operations.append(op)
    return operations
