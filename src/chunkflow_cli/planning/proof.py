"""Prove that the plan of a step keeps what training promises, before anything of the step runs.

Every process plans the whole step, so every process proves all of it and comes to the same verdict: a broken plan stops
all ranks at once, and none waits for another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.costs import chunk_tokens
from chunkflow_cli.planning.pipeline import activation_bound
from chunkflow_cli.planning.pipeline_proof import validate_pipeline
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan, StepPlan, validate_groups
from chunkflow_cli.planning.schedule import validate, validate_lockstep


def validate_step(step: StepPlan, plan: RunPlan) -> None:
    """Prove that a step trains on each of its tokens once, within the memory bound, and that no rank waits forever.

    Takes time linear in the chunks of the step.

    Args:
        step: a step of `plan`.
        plan: the plan of the run, which says what K is and how ranks work together.

    Raises:
        ValueError: a rule is broken; names the rank, the operation where there is one, and the rule.
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
    taken = [rank.samples if rank.sequence_rank == 0 else rank.samples[~_is_spread(rank)] for rank in step.ranks]
    if not np.array_equal(np.sort(np.concatenate(taken)), np.sort(step.samples)):
        raise ValueError(f"the ranks do not take each of the {len(step.samples)} samples of the step once")


def _validate_chunks(rank: RankPlan, plan: RunPlan) -> None:
    """Prove that the chunks hold each token of the rank's samples once, in order, and none holds more than it may."""
    chunks = rank.chunks
    if not np.array_equal(chunks.lengths, plan.lengths[rank.samples]):
        raise ValueError("its chunks are not made of the lengths of its samples")
    chunk = np.repeat(np.arange(len(chunks)), np.diff(chunks.first_segment))
    order = np.lexsort((chunk, chunks.sequence))
    sequence, start, stop = chunks.sequence[order], chunks.start[order], chunks.stop[order]
    is_first = np.diff(sequence, prepend=-1) != 0
    follows = start == np.where(is_first, 0, np.roll(stop, 1))
    if not (follows & (stop > start)).all():
        broken = int(sequence[np.flatnonzero(~(follows & (stop > start)))[0]])
        raise ValueError(f"the pieces of sample {rank.samples[broken]} do not follow each other")
    if not np.array_equal(np.bincount(sequence, stop - start, minlength=len(chunks.lengths)), chunks.lengths):
        raise ValueError("its chunks do not hold every token of its samples")
    tokens = chunk_tokens(chunks)
    if (tokens > rank.room).any():
        full = int(np.argmax(tokens > rank.room))
        raise ValueError(f"chunk {full} holds {tokens[full]:.0f} tokens and has room for {rank.room[full]}")


def _validate_schedules(rank: RankPlan, plan: RunPlan) -> None:
    """Prove that the schedules compute the whole gradient of the rank's chunks with at most K of them kept."""
    if plan.pipeline is None:
        validate(rank.schedule, rank.chunks, plan.k)
        return
    bound = activation_bound(plan.k, plan.pipeline)
    validate_pipeline(rank.schedules, rank.chunks, plan.k, most_live=bound)


def _is_spread(rank: RankPlan) -> NDArray[np.bool_]:
    """(sequences,) True for each that the rank's whole sequence-parallel group runs together."""
    spread = rank.chunks.sequence[: rank.chunks.first_segment[len(rank.spread)]]
    return np.isin(np.arange(len(rank.chunks.lengths)), spread)
