"""What a run holds at its fullest: which rank or stage, in which step, and how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.costs import ModelShape, chunk_tokens
from chunkflow_cli.memory import (
    MemoryParts,
    MemorySettings,
    activation_bytes_per_token,
    live_tokens,
    memory_parts,
    state_bytes_per_token,
)
from chunkflow_cli.run_plan import RankPlan, RunPlan
from chunkflow_cli.search import SimulatedStep
from chunkflow_cli.stage_cut import StageLayers


def memory_of_fullest(
    shape: ModelShape, settings: MemorySettings, run: RunPlan, steps: Sequence[SimulatedStep]
) -> MemoryParts:
    """Bytes of the fullest rank, or of the fullest stage of a pipeline.

    Without a pipeline: of the rank with the longest sample of the whole data. With one: for each stage what does not
    depend on the schedule (its layers, embedding and head), and the most that it holds at once in the given steps.

    Args:
        shape: of the whole model.
        settings: of the run.
        run: whose layers are cut into stages.
        steps: of that run; without a pipeline none is looked at.
    """
    if run.pipeline is None:
        return memory_parts(shape, settings)
    held = [run.held_by(stage, shape.layers) for stage in range(run.pipeline.stages)]
    at_rest = [replace(memory_parts(shape, settings, parts), activations=0, state=0) for parts in held]
    fullest = max(at_rest, key=lambda parts: parts.device_total)
    for step in steps:
        for index in step.first_of_groups:
            rank = step.plan.ranks[index]
            if not len(rank.chunks):
                continue
            tokens = _TokensOfChunks.of(rank, shape.kv_heads)
            # Every stage is looked at: the first holds the most chunks, but not always the most state or weights.
            for stage, (parts, rest) in enumerate(zip(held, at_rest, strict=True)):
                activations, state = tokens.bytes_on(shape, settings, parts)
                room = fullest.device_total - rest.device_total
                if activations.sum() + state.sum() <= room:
                    continue  # not even with all of its chunks at once
                timeline = step.timeline(index)
                _, both = timeline.live_bytes(0, stage, activations, state)
                peak = int(both.argmax())
                if both[peak] <= room:
                    continue
                _, live = timeline.live_bytes(0, stage, activations)
                at_peak = replace(rest, activations=int(live[peak]), state=int(both[peak] - live[peak]))
                fullest = max(fullest, at_peak, key=lambda parts: parts.device_total)
    return fullest


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
        self, shape: ModelShape, settings: MemorySettings, held: Sequence[StageLayers]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(parts, chunks) of activations, and of what lies in the state store, in each of a stage's parts of the model.

        The store holds the keys and values that later chunks read, with their gradients, and what was received.
        """
        state_of_layer = state_bytes_per_token(shape, settings.element_bytes) / shape.layers
        received = self.received * shape.hidden_size * settings.element_bytes

        def activations(layers: int) -> float:
            return activation_bytes_per_token(shape, settings.element_bytes, settings.checkpointing, layers)

        return (
            np.stack([self.held * activations(part.layers) for part in held]),
            np.stack(
                [self.read_later * state_of_layer * part.layers + received * (not part.is_first) for part in held]
            ),
        )


def simulated_steps(run: RunPlan, steps: Sequence[int]) -> list[SimulatedStep]:
    """The steps, and that of the longest sample if it is not among them."""
    longest = run.batches.step_of(int(run.lengths.argmax()))
    return [SimulatedStep(run, run[step]) for step in dict.fromkeys([*steps, longest])]


def activations_and_state(run: RunPlan, *, is_planned_whole: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) most tokens that hold activations at once, and (n,) tokens in the state store meanwhile, on one rank.

    Of every chunk and long sample of the run's steps, if all of them are planned anyway; else of each sample with
    whatever others might share its global batch, for then no step may exceed what is said.
    """
    if is_planned_whole:
        pairs = []
        for step in run:
            for rank in step.ranks:
                tokens, groups = chunk_tokens(rank.chunks).astype(np.int64), rank.chunks.dependent_groups()
                k = np.broadcast_to(run.k_of(rank.chunks.lengths), len(rank.chunks.lengths))
                standalone = groups[0].start if groups else len(tokens)
                pairs += [(size, 0) for size in tokens[:standalone].tolist()]
                for group in groups:
                    of_group = tokens[group.start : group.stop]
                    last_stored = rank.chunks.first_segment[group.stop - 2]
                    kept = of_group[-int(k[rank.chunks.sequence[last_stored]]) :].sum()
                    pairs.append((max(of_group.max(), kept), rank.chunks.stop[last_stored]))
        live, stored_tokens = np.array(pairs, dtype=np.int64).T
        return live, stored_tokens
    stored_tokens = (run.lengths - 1) // run.chunk_size * run.chunk_size
    short = np.sort(run.lengths[run.lengths <= run.chunk_size])[::-1]
    others = int(short[: run.batches.global_batch_size - 1].sum())
    if run.equal_time:  # pieces of a long sample are of many sizes
        return np.minimum(run.lengths + others, run.chunk_size * run.k_of(run.lengths)), run.lengths
    return live_tokens(
        run.lengths, run.chunk_size, run.k_of(run.lengths), others, fill_tails=run.fill_tails
    ), stored_tokens
