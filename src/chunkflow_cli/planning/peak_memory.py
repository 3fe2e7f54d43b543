"""Predict how many bytes a run needs: those of its fullest rank or pipeline stage, in its fullest step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.chunks import Chunks, cut_points
from chunkflow_cli.planning.costs import chunk_tokens
from chunkflow_cli.planning.memory_parts import (
    MemoryParts,
    activation_bytes,
    kept_bytes_per_token,
    live_tokens,
    memory_parts,
    merged_bytes_of_running,
    merged_bytes_per_chunk,
    rerun_bytes_per_token,
    workspace_beyond_loss,
)
from chunkflow_cli.planning.memory_settings import MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.preferences import Answers
from chunkflow_cli.planning.run_plan import RankPlan, RunPlan
from chunkflow_cli.planning.search import SimulatedStep
from chunkflow_cli.planning.stage_cut import StageLayers
from chunkflow_cli.planning.state_memory import (
    STATE_BLOCK_TOKENS,
    bytes_of_blocks,
    gradients_of_windows,
    host_bytes,
    state_bytes_per_token,
)


class HeldAtOnce(NamedTuple):
    """Tokens and chunks that one rank holds at once, in several cases, (cases,) each. One case is the fullest."""

    live: NDArray[np.float64]
    """Tokens that hold activations."""
    stored: NDArray[np.float64]
    """Tokens in the state store."""
    edges: NDArray[np.float64]
    """Chunk edges in the state store."""
    sharers: NDArray[np.float64]
    """Number of ranks that share the chunks."""
    chunks: NDArray[np.float64]
    """Chunks that hold activations."""

    def state_bytes(self, shape: ModelShape, settings: MemorySettings) -> NDArray[np.float64]:
        """Return the bytes of the state store on the device, (cases,)."""
        if settings.offload_state == "host":
            most = float(self.stored.max(initial=0.0))
            blocks = bytes_of_blocks(shape, settings.element_bytes, settings.device_type, most)
            return np.full(len(self.stored), float(blocks))
        a_token = state_bytes_per_token(shape, settings.element_bytes, settings.chunk_size)
        of_windows = (self.stored > 0) * gradients_of_windows(shape, settings.element_bytes, settings.chunk_size)
        return self.stored * a_token + of_windows + self.edges * shape.recurrent.bytes_between(settings.chunk_size)


def memory_of_fullest(
    shape: ModelShape, settings: MemorySettings, run: RunPlan, steps: Sequence[SimulatedStep]
) -> MemoryParts:
    """Predict the memory of the fullest rank, or of the fullest stage of a pipeline.

    Without a pipeline, the prediction holds for any samples that may share a step. With one, each stage takes what does
    not depend on the schedule (its layers, embedding and head) and the most that it holds at once in the first step, in
    the step that takes the longest sample, if one does, and in the given ones.

    Args:
        shape: the shape of the whole model.
        steps: further steps of a run with a pipeline, which were simulated already.
    """
    if run.pipeline is None:
        cases = activations_and_state(run, is_planned_whole=False)
        parts = _of_fullest_rank(shape, settings, cases)
        return parts if settings.offload_state == "none" else _with_host_state(shape, settings, cases, parts)
    longest_step = run.batches.step_of(int(run.lengths.argmax()), run.steps)
    wanted = {0} if longest_step is None else {0, longest_step}
    more = sorted(wanted - {step.plan.step for step in steps})
    steps = [*steps, *(SimulatedStep(run, run[index]) for index in more)]
    parts = _of_fullest_stage(shape, settings, run, steps)
    return parts if settings.offload_state == "none" else _with_host_state_of_stages(shape, settings, run, steps, parts)


def _with_host_state(shape: ModelShape, settings: MemorySettings, cases: HeldAtOnce, parts: MemoryParts) -> MemoryParts:
    """Add the state of a rank: all of it in host memory, and blocks of it on the device."""
    on_device = cases.state_bytes(shape, settings).max(initial=0.0)
    on_host = host_bytes(
        shape, cases.stored, cases.edges, element_bytes=settings.element_bytes, chunk_size=settings.chunk_size,
        device_type=settings.device_type,
    )  # fmt: skip
    return replace(parts.filled(parts.activations, int(on_device)), host_state=int(np.max(on_host, initial=0.0)))


def _with_host_state_of_stages(
    shape: ModelShape, settings: MemorySettings, run: RunPlan, steps: Sequence[SimulatedStep], parts: MemoryParts
) -> MemoryParts:
    """Add the state of the stage that holds the most, of all sequences in flight, each with a block begun."""
    on_device_too = replace(settings, offload_state="none")
    block = STATE_BLOCK_TOKENS[settings.device_type]
    a_token, most, longest = state_bytes_per_token(shape, settings.element_bytes, settings.chunk_size), 0.0, 0.0
    for step, index, rank in _pipelines(steps):
        tokens = _TokensOfChunks.of(rank, shape.kv_heads)
        tokens = replace(tokens, received=np.zeros(len(tokens.held)))  # that stays on the device
        for layers in run.stage_layers(shape.layers):
            _, kept = tokens.bytes_on(shape, on_device_too, layers)
            begun = np.zeros(len(kept))
            begun[[group.start for group in rank.chunks.dependent_groups()]] = block * a_token
            kept += begun * layers.layers / shape.layers
            _, held = step.timeline(index).live_bytes(0, layers.stage, np.zeros(len(kept)), kept)
            most = max(most, float(held.max(initial=0.0)))
        longest = max(longest, float(tokens.read_later.sum()))
    blocks = bytes_of_blocks(shape, settings.element_bytes, settings.device_type, longest)
    return replace(parts.filled(parts.activations, parts.state + blocks), host_state=int(most))


def _of_fullest_rank(shape: ModelShape, settings: MemorySettings, cases: HeldAtOnce) -> MemoryParts:
    activations = activation_bytes(shape, settings, shape.layers, cases.live, cases.sharers, cases.chunks, cases.stored)
    state = cases.state_bytes(shape, settings)
    fullest = _undominated(activations, state)  # bytes grow with both, so one of these takes the most
    held = [dict(zip(cases._fields, case, strict=True)) for case in np.stack(cases)[:, fullest].T.tolist()]
    return max((memory_parts(shape, settings, **case) for case in held), key=lambda parts: parts.before_step)


def _of_fullest_stage(
    shape: ModelShape, settings: MemorySettings, run: RunPlan, steps: Sequence[SimulatedStep]
) -> MemoryParts:
    held = run.stage_layers(shape.layers)
    at_rest = [memory_parts(shape, settings, layers) for layers in held]
    fullest = _fullest_before_step(shape, settings, at_rest, held, steps)
    stage = max(range(len(held)), key=lambda stage: at_rest[stage].device_total)
    if at_rest[stage].device_total > fullest.device_total:  # the step takes more on another stage
        return _fullest_before_step(shape, settings, at_rest[stage : stage + 1], held[stage : stage + 1], steps)
    return fullest


def _fullest_before_step(
    shape: ModelShape,
    settings: MemorySettings,
    at_rest: Sequence[MemoryParts],
    held: Sequence[StageLayers],
    steps: Sequence[SimulatedStep],
) -> MemoryParts:
    """Return the parts of the fullest of some stages, in forwards and backwards."""
    again = rerun_bytes_per_token(shape, settings.element_bytes, settings.checkpointing)
    is_recurrent = shape.recurrent.activation_bytes_per_token > 0
    fullest = max(at_rest, key=lambda parts: parts.before_step)
    for step, index, rank in _pipelines(steps):
        tokens = _TokensOfChunks.of(rank, shape.kv_heads)
        of_layer = again * float((tokens.held + is_recurrent * tokens.of_others).max())
        of_layer += merged_bytes_of_running(shape, settings)
        # Look at every stage: the first one holds the most chunks, but not always the most state or weights.
        for layers, rest in zip(held, at_rest, strict=True):
            running = of_layer + workspace_beyond_loss(
                shape, settings, layers, tokens=float(tokens.held.max()), past=float(tokens.read_later.sum()),
                sharers=rank.group_size,
            )  # fmt: skip
            activations, state = tokens.bytes_on(shape, settings, layers)
            room = fullest.before_step - rest.before_step - running
            if activations.sum() + state.sum() <= room:
                continue  # not fuller even with all of its chunks at once
            timeline = step.timeline(index)
            _, both = timeline.live_bytes(0, layers.stage, activations, state)
            peak = int(both.argmax())
            if both[peak] <= room:
                continue
            _, live = timeline.live_bytes(0, layers.stage, activations)
            at_peak = rest.filled(int(live[peak] + running), int(both[peak] - live[peak]))
            fullest = max(fullest, at_peak, key=lambda parts: parts.before_step)
    return fullest


def _pipelines(steps: Sequence[SimulatedStep]) -> Iterator[tuple[SimulatedStep, int, RankPlan]]:
    """Yield what each pipeline runs in each step, as the plan of its first rank, which has this index."""
    for step in steps:
        for index in step.first_of_groups:
            rank = step.plan.ranks[index]
            if len(rank.chunks):
                yield step, index, rank


def _undominated(activations: NDArray[np.float64], state: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the cases that no other one exceeds in both, (cases,)."""
    order = np.lexsort((-activations, -state))
    largest_before = np.concatenate([[-1.0], np.maximum.accumulate(activations[order])[:-1]])
    return order[activations[order] > largest_before]


@dataclass(frozen=True)
class _TokensOfChunks:
    """The tokens of each chunk of a rank that take memory on every stage, (chunks,) each."""

    held: NDArray[np.float64]
    """Tokens on this rank: of a spread chunk, the rank's share."""
    of_others: NDArray[np.float64]
    """Tokens of the other ranks of a spread chunk, which recurrent layers of this rank run, too."""
    read_later: NDArray[np.float64]
    """Tokens whose keys and values later chunks read: of a spread chunk, those in the rank's share of the heads."""
    continues: NDArray[np.float64]
    """1 where a later chunk continues from the state of the recurrent layers, otherwise 0."""
    received: NDArray[np.float64]
    """Tokens whose hidden states from the previous stage are kept, because the chunk is forwarded twice."""

    @classmethod
    def of(cls, rank: RankPlan, kv_heads: int) -> _TokensOfChunks:
        held = chunk_tokens(rank.chunks)
        held[: len(rank.spread)] /= rank.group_size
        of_others = np.zeros(len(held))
        of_others[: len(rank.spread)] = held[: len(rank.spread)] * (rank.group_size - 1)
        read_later = np.zeros(len(held))
        for group in rank.chunks.dependent_groups():
            first = rank.chunks.first_segment[group.start : group.stop - 1]
            read_later[group.start : group.stop - 1] = (rank.chunks.stop - rank.chunks.start)[first]
        continues = (read_later > 0).astype(np.float64)
        read_later[: len(rank.spread)] /= min(rank.group_size, kv_heads)
        received = np.zeros(len(held))
        received[rank.recomputed] = held[rank.recomputed]
        return cls(held, of_others, read_later, continues, received)

    def bytes_on(
        self, shape: ModelShape, settings: MemorySettings, held: StageLayers
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the bytes of activations and of the state store on a stage, (chunks,) each.

        The store holds the keys and values that later chunks read, their gradients, the states of recurrent layers, and
        received hidden states.
        """
        of_layers = self.read_later * state_bytes_per_token(shape, settings.element_bytes, settings.chunk_size)
        of_layers += self.continues * shape.recurrent.bytes_between(settings.chunk_size)
        of_layers *= settings.offload_state == "none"
        received = self.received * shape.hidden_size * settings.element_bytes
        kept = kept_bytes_per_token(shape, settings.element_bytes, settings.checkpointing, held.layers)
        activations = self.held * kept + merged_bytes_per_chunk(shape, settings, held.layers)
        if settings.checkpointing == "none":
            activations += self.of_others * (shape.recurrent.activation_bytes_per_token / shape.layers * held.layers)
        return activations, of_layers / shape.layers * held.layers + received * (not held.is_first)


def activations_and_state(run: RunPlan, *, is_planned_whole: bool) -> HeldAtOnce:
    """Return what one rank holds at once.

    Args:
        is_planned_whole: True to read every chunk and long sample off the plan of all steps (of one rank). Otherwise
            each sample is combined with any others that might share its global batch, so that no step exceeds the
            result; of what a sequence-parallel group runs together, a rank has its share.
    """
    if is_planned_whole:
        return _of_planned_chunks(run)
    if run.sequence == 1:
        return _of_any_batch(run, run.sequence_lengths)
    together = _of_any_batch(run, run.sequence_lengths, spread=True)
    if run.spreads_all:
        return together
    alone = _of_any_batch(run, run.lengths[run.lengths <= run.longest_alone])
    return HeldAtOnce(*(np.concatenate(each) for each in zip(together, alone, strict=True)))


def _of_planned_chunks(run: RunPlan) -> HeldAtOnce:
    cases = []
    for step in run:
        for rank in step.ranks:
            tokens, groups = chunk_tokens(rank.chunks), rank.chunks.dependent_groups()
            standalone = groups[0].start if groups else len(tokens)
            cases += [(size, 0.0, 0.0, 1.0, 1.0) for size in tokens[:standalone].tolist()]
            stored = {rank.chunks.first_sequence(group.start): _stored_tokens(rank.chunks, group) for group in groups}
            for group in groups:
                of_group, base = tokens[group.start : group.stop], rank.chunks.first_sequence(group.start)
                kept = of_group[-run.k :]
                of_partner = stored.get(base ^ 1, 0.0) if rank.answers == 2 else 0.0
                held = stored[base] + VALUES_OF_STATE * of_partner
                cases.append((max(of_group.max(), kept.sum()), held, len(of_group) - 1.0, 1.0, float(len(kept))))
    return HeldAtOnce(*np.array(cases, dtype=np.float64).T)


def _stored_tokens(chunks: Chunks, group: range) -> float:
    if len(group) == 1:  # an answer that continues from another one's prompt
        return 0.0
    return float(chunks.stop[chunks.first_segment[group.stop - 2]])


def _of_any_batch(run: RunPlan, lengths: NDArray[np.int64], *, spread: bool = False) -> HeldAtOnce:
    size, ranks = (run.spread_chunk_size, run.sequence) if spread else (run.chunk_size, 1)
    batches = run.batches
    counts = np.bincount(lengths) * batches.most_repeats
    lengths = np.flatnonzero(counts)  # a million samples have only some thousand lengths
    most_sequences = batches.most_samples * (1 if run.answers is None else run.answers.count)
    others: int | NDArray[np.int64] = _sum_of_longest(lengths[lengths <= size], counts, most_sequences - 1)
    if batches.tokens is not None:
        others = np.clip(batches.tokens - lengths, 0, others)
    if run.equal_time:  # pieces of a long sample are of many sizes, the last one the smallest
        live, stored = np.minimum(lengths + others, size * run.k), np.where(lengths > size, lengths, 0)
        pieces = [len(cut_points(length, size, run.pair_weight)) - 1 for length in lengths[lengths > size].tolist()]
        edges = np.zeros(len(lengths), dtype=np.int64)
        edges[lengths > size] = np.array(pieces, dtype=np.int64) - 1
    else:
        live = live_tokens(lengths, size, run.k, others, fill_tails=run.fill_tails)
        edges = (lengths - 1) // size
        stored = edges * size
    if run.answers is not None and run.answers.count == 2:
        stored = stored + VALUES_OF_STATE * ((_longest_partners(run.answers, lengths) - 1) // size * size)
    stored = stored / (run.state_shares if spread else 1)
    return HeldAtOnce(
        live / ranks,
        stored.astype(np.float64),
        edges.astype(np.float64),
        sharers=np.full(len(lengths), float(ranks)),
        chunks=np.minimum(edges + 1.0, run.k),
    )


VALUES_OF_STATE = 0.5
"""Share of a sequence's state that its keys and values are, at most: float32, with gradients in float32."""


def _longest_partners(answers: Answers, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each length of an answer the longest other answer of a pair with it, (lengths,).

    While the one answer goes backward, the keys and values of the other wait.
    """
    longest = np.zeros(int(lengths.max()) + 1, dtype=np.int64)
    for own in (0, 1):
        np.maximum.at(longest, answers.lengths[:, own], answers.lengths[:, 1 - own])
    return longest[lengths]


def _sum_of_longest(lengths: NDArray[np.int64], counts: NDArray[np.int64], samples: int) -> int:
    """Return the tokens of the longest `samples` samples.

    Args:
        lengths: (lengths,) ascending and distinct.
        counts: number of samples of each length, counted from 0.
    """
    longest_first = lengths[::-1]
    of_length = counts[longest_first]
    taken = np.clip(samples - (np.cumsum(of_length) - of_length), 0, of_length)
    return int((taken * longest_first).sum())
