"""What a run holds at its fullest: which rank or stage, in which step, and how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.costs import ModelShape, chunk_tokens
from chunkflow_cli.planning.memory_parts import (
    MemoryParts,
    MemorySettings,
    kept_bytes_per_token,
    live_tokens,
    memory_parts,
    rerun_bytes_per_token,
    state_bytes_per_token,
)
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan
from chunkflow_cli.planning.search import SimulatedStep
from chunkflow_cli.planning.stage_cut import StageLayers


def memory_of_fullest(
    shape: ModelShape, settings: MemorySettings, run: RunPlan, steps: Sequence[SimulatedStep]
) -> MemoryParts:
    """Bytes of the fullest rank, or of the fullest stage of a pipeline.

    Without a pipeline: whatever samples share a step. With one: for each stage what does not depend on the schedule
    (its layers, embedding and head), and the most that it holds at once in the given steps.

    Args:
        shape: of the whole model.
        settings: of the run.
        run: whose layers are cut into stages.
        steps: of that run; without a pipeline none is looked at.
    """
    if run.pipeline is None:
        live, stored = activations_and_state(run, is_planned_whole=False)
        return max(
            # Whatever a token's activations and state take, one of these is the most.
            (memory_parts(shape, settings, live=tokens, stored=state) for tokens, state in _undominated(live, stored)),
            key=lambda parts: parts.device_total,
        )
    held = run.stage_layers(shape.layers)
    at_rest = [memory_parts(shape, settings, layers) for layers in held]
    again = rerun_bytes_per_token(shape, settings.element_bytes, settings.checkpointing)
    fullest = max(at_rest, key=lambda parts: parts.device_total)
    for step in steps:
        for index in step.first_of_groups:
            rank = step.plan.ranks[index]
            if not len(rank.chunks):
                continue
            tokens = _TokensOfChunks.of(rank, shape.kv_heads)
            running = again * float(tokens.held.max())
            # Every stage is looked at: the first holds the most chunks, but not always the most state or weights.
            for stage, (layers, rest) in enumerate(zip(held, at_rest, strict=True)):
                activations, state = tokens.bytes_on(shape, settings, layers)
                room = fullest.device_total - rest.device_total - running
                if activations.sum() + state.sum() <= room:
                    continue  # not even with all of its chunks at once
                timeline = step.timeline(index)
                _, both = timeline.live_bytes(0, stage, activations, state)
                peak = int(both.argmax())
                if both[peak] <= room:
                    continue
                _, live = timeline.live_bytes(0, stage, activations)
                at_peak = replace(rest, activations=int(live[peak] + running), state=int(both[peak] - live[peak]))
                fullest = max(fullest, at_peak, key=lambda parts: parts.device_total)
    return fullest


def _undominated(live: NDArray[np.float64], stored: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Of pairs of tokens, those that no other pair exceeds in both."""
    order = np.lexsort((-live, -stored))
    live, stored = live[order], stored[order]
    exceeds_all_before = live > np.concatenate([[-1.0], np.maximum.accumulate(live)[:-1]])
    return list(zip(live[exceeds_all_before].tolist(), stored[exceeds_all_before].tolist(), strict=True))


@dataclass(frozen=True)
class _TokensOfChunks:
    """What takes memory on every stage of a rank, in tokens: (chunks,) of each."""

    held: NDArray[np.float64]
    """On this rank: of a spread chunk its share."""
    read_later: NDArray[np.float64]
    """Whose keys and values later chunks read: of a spread chunk those in the rank's share of the heads."""
    received: NDArray[np.float64]
    """Whose hidden states are kept as they came in from the stage before, for a chunk that is forwarded twice."""

    @classmethod
    def of(cls, rank: RankPlan, kv_heads: int) -> _TokensOfChunks:
        held = chunk_tokens(rank.chunks)
        held[: len(rank.spread)] /= rank.group_size
        read_later = np.zeros(len(held))
        for group in rank.chunks.dependent_groups():
            first = rank.chunks.first_segment[group.start : group.stop - 1]
            read_later[group.start : group.stop - 1] = (rank.chunks.stop - rank.chunks.start)[first]
        read_later[: len(rank.spread)] /= min(rank.group_size, kv_heads)
        received = np.zeros(len(held))
        received[rank.recomputed] = held[rank.recomputed]
        return cls(held, read_later, received)

    def bytes_on(
        self, shape: ModelShape, settings: MemorySettings, held: StageLayers
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(chunks,) bytes of activations, and of what lies in the state store, on a stage.

        The store holds the keys and values that later chunks read, with their gradients, and what was received.
        """
        state_of_layer = state_bytes_per_token(shape, settings.element_bytes) / shape.layers
        received = self.received * shape.hidden_size * settings.element_bytes
        kept = kept_bytes_per_token(shape, settings.element_bytes, settings.checkpointing, held.layers)
        return self.held * kept, self.read_later * state_of_layer * held.layers + received * (not held.is_first)


def simulated_steps(run: RunPlan, steps: Sequence[int]) -> list[SimulatedStep]:
    """The steps, and that of the longest sample if it is not among them."""
    longest = run.batches.step_of(int(run.lengths.argmax()))
    return [SimulatedStep(run, run[step]) for step in dict.fromkeys([*steps, longest])]


def activations_and_state(run: RunPlan, *, is_planned_whole: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) most tokens that hold activations at once, and (n,) tokens in the state store meanwhile, on one rank.

    Of every chunk and long sample of the run's steps, if all of them are planned anyway (by one rank); else of each
    sample with whatever others might share its global batch, for then no step may exceed what is said. Of what a
    sequence-parallel group runs together, a rank has its share.
    """
    if is_planned_whole:
        return _of_planned_chunks(run)
    if run.sequence == 1:
        return _of_any_batch(run, run.lengths)
    together = _of_any_batch(run, run.lengths, spread=True)
    if run.spreads_all:
        return together
    alone = _of_any_batch(run, run.lengths[run.lengths <= run.longest_alone])
    return np.concatenate([together[0], alone[0]]), np.concatenate([together[1], alone[1]])


def _of_planned_chunks(run: RunPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = []
    for step in run:
        for rank in step.ranks:
            tokens, groups = chunk_tokens(rank.chunks), rank.chunks.dependent_groups()
            standalone = groups[0].start if groups else len(tokens)
            pairs += [(size, 0.0) for size in tokens[:standalone].tolist()]
            for group in groups:
                of_group = tokens[group.start : group.stop]
                last_stored = rank.chunks.first_segment[group.stop - 2]
                kept = of_group[-run.k :].sum()
                pairs.append((max(of_group.max(), kept), float(rank.chunks.stop[last_stored])))
    live, stored = np.array(pairs, dtype=np.float64).T
    return live, stored


def _of_any_batch(
    run: RunPlan, lengths: NDArray[np.int64], *, spread: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    size, ranks = (run.spread_chunk_size, run.sequence) if spread else (run.chunk_size, 1)
    counts = np.bincount(lengths)
    lengths = np.flatnonzero(counts)  # a million samples have some thousand lengths
    others = _sum_of_longest(lengths[lengths <= size], counts, run.batches.global_batch_size - 1)
    if run.equal_time:  # pieces of a long sample are of many sizes, the last one the smallest
        live, stored = np.minimum(lengths + others, size * run.k), np.where(lengths > size, lengths, 0)
    else:
        live = live_tokens(lengths, size, run.k, others, fill_tails=run.fill_tails)
        stored = (lengths - 1) // size * size
    return live / ranks, stored / (run.state_shares if spread else 1)


def _sum_of_longest(lengths: NDArray[np.int64], counts: NDArray[np.int64], samples: int) -> int:
    """Tokens of so many samples, the longest ones.

    Args:
        lengths: ascending, each once.
        counts: how many samples have each length, from 0 on.
        samples: how many are taken.
    """
    longest_first = lengths[::-1]
    of_length = counts[longest_first]
    taken = np.clip(samples - (np.cumsum(of_length) - of_length), 0, of_length)
    return int((taken * longest_first).sum())
