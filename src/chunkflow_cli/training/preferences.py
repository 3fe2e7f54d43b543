"""Preferences of a run: facts about its samples, the batches of its steps, and their held-out loss.

The reference model is the model that the run starts from. Its log-probabilities are computed once, before the first
step, and kept next to the tokenized data, so no second model is ever on a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from chunkflow_cli.config.schema import Init, Task
from chunkflow_cli.console import working
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.execution.preferences import Known, PreferenceStep, Sequences
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.model.identity import adapter_files, model_files
from chunkflow_cli.planning.balance import balance
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.run_plan import RankPlan, StepPlan
from chunkflow_cli.training.judgement import Judgement, RunPreferences, sizes_of
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState
from chunkflow_cli.training.reference_cache import read_kept, write_kept


def step_batch(run: Prepared, step: StepPlan, rank: RankPlan) -> StepBatch:
    """Return the batch of this process for a step, after the forwards that come before its schedule.

    Every process calls it.

    Raises:
        Interrupted: a process was asked to stop.
    """
    preferences = run.preferences
    assert preferences is not None
    divergence = 0.0
    if rank.mismatched is not None:
        forwards = max(len(each.mismatched or ()) for each in step.ranks)
        divergence = _divergence(run, preferences.train, rank.samples, rank.mismatched, len(step.samples), forwards)
    known, sequences = _known(preferences, preferences.train, rank.samples, step.samples, divergence)
    weighing = _weighing(run, known, sequences)
    spread = None if run.plan.pipeline is not None else rank.spread
    batch = StepBatch(rank.chunks, sequences.samples, weighing.imitated_weights, spread, preferences=weighing)
    if run.plan.pipeline is not None:
        run.parts.runner.evaluate(batch)  # the schedule of a pipeline has no first pass
        weighing.is_complete = True
    return batch


def _weighing(run: Prepared, known: Known, sequences: Sequences, *, only_sums: bool = False) -> PreferenceStep:
    assert run.preferences is not None
    settings = run.parts.runner.settings
    return PreferenceStep(
        run.preferences.objective, known, sequences, settings.device, settings.sequence_group, only_sums=only_sums
    )


def _known(
    preferences: RunPreferences, part: Judgement, samples: NDArray[np.int64], batch: NDArray[np.int64],
    divergence: float,
) -> tuple[Known, Sequences]:  # fmt: skip
    """Return what is known of some samples of a global batch, and their sequences."""
    objective, sizes = preferences.objective, sizes_of(part.data)
    sequences = Sequences.of(part.sequences(samples), objective)
    is_kto, imitated = objective.task is Task.kto, 0
    if objective.nll_weight:
        chosen = sizes.lengths[batch, 0] - 1 if objective.task is Task.orpo else sizes.targets[batch, 0]
        imitated = int(chosen.sum())
    known = Known(
        counts=sequences.counts,
        reference=None if part.reference is None else part.reference[samples].ravel(),
        is_desirable=part.data.is_good[samples] if is_kto else None,
        samples=len(batch),
        desirable=int(part.data.is_good[batch].sum()) if is_kto else 0,
        imitated_tokens=imitated,
        divergence=divergence,
    )
    return known, sequences


GROUP = 256
"""Number of samples that are planned together where nothing is trained."""


def all_sums(
    run: Prepared,
    state: RunState,
    make: Callable[[NDArray[np.int64]], list[TokenizedSample]],
    lengths: NDArray[np.int64],
) -> tuple[NDArray[np.float64], float]:
    """Return the summed log-probabilities of the answers of many sequences, on all processes. Every process calls it.

    Args:
        make: returns the sequences of some samples.
        lengths: (samples, sequences) their tokens.

    Returns:
        (samples, sequences) the sums, and the sum over all targets outside of answers.

    Raises:
        Interrupted: a process was asked to stop; it is noticed after every group of samples.
    """
    sums, others = np.zeros(lengths.shape), 0.0
    size, place = run.plan.chunk_size * run.topology.sequence, run.processes.place
    for start in range(0, len(lengths), GROUP):
        samples = np.arange(start, min(start + GROUP, len(lengths)))
        shares = balance(lengths[samples].sum(axis=1), run.topology.data)
        chunks = [build_chunks(lengths[samples[share]].ravel(), size) for share in shares]
        own = samples[shares[place.data_rank]]
        found: tuple[NDArray[np.float64], float] | None = None
        with contextlib.suppress(Interrupted):
            found = _sums_of(run, make(own), chunks[place.data_rank], max(map(len, chunks)))
        run.sum_of_whole(is_whole=found is not None and not state.stop_requested)
        assert found is not None
        is_counted = place.sequence_rank == place.stage == 0  # the others of a group or pipeline know the same sums
        for own_samples, own_sums, own_others in run.processes.gather((own, *found) if is_counted else ([], [], 0.0)):
            if len(own_samples):
                sums[own_samples] = own_sums.reshape(len(own_samples), -1)
            others += own_others
    return sums, others


def _sums_of(
    run: Prepared, samples: list[TokenizedSample], chunks: Chunks, forwards: int
) -> tuple[NDArray[np.float64], float]:
    """Return the summed log-probabilities of the answers of sequences of this process, (sequences,), and of the rest.

    Args:
        forwards: the most chunks of any rank.

    Raises:
        Interrupted: this process was asked to stop.
    """
    assert run.preferences is not None
    sequences = Sequences.of(samples, run.preferences.objective)
    known = Known(sequences.counts, None, None, len(samples))
    step = _weighing(run, known, sequences, only_sums=True)
    batch = StepBatch(chunks, sequences.samples, np.zeros(len(samples)), None, preferences=step)
    run.parts.model.eval()
    try:
        run.parts.runner.evaluate(batch, forwards=forwards if run.plan.is_in_lockstep else 0)
    finally:
        run.parts.model.train()
    return step.whole_sums()


def _divergence(
    run: Prepared, part: Judgement, samples: NDArray[np.int64], chunks: Chunks, batch: int, forwards: int
) -> float:
    """Return the mean log ratio of mismatched answers over a global batch, at least 0. Every process calls it.

    Args:
        samples: those of this process.
        batch: samples of the global batch.

    Raises:
        Interrupted: a process was asked to stop.
    """
    assert part.mismatched_reference is not None
    ratios, is_whole = 0.0, True
    try:
        found, _ = _sums_of(run, part.mismatched(samples), chunks, forwards)
        ratios = float((found - part.mismatched_reference[samples]).sum())
    except Interrupted:
        is_whole = False
    # The ranks of a sequence-parallel group and the stages of a pipeline all know the sums.
    copies = run.topology.sequence * run.topology.pipeline
    (total,) = run.sum_of_whole(ratios / copies, is_whole=is_whole)
    return max(0.0, total / batch)


def held_out_outcome(run: Prepared, state: RunState) -> dict[str, float]:
    """Return loss and metrics of the held-out samples, the same on all processes. Every process calls it.

    Raises:
        Interrupted: a process was asked to stop.
    """
    preferences = run.preferences
    assert preferences is not None
    part, everything, divergence = preferences.evaluation, np.arange(len(preferences.evaluation.data)), 0.0
    sums, others = all_sums(run, state, part.sequences, sizes_of(part.data).lengths)
    if part.partners is not None:
        assert part.mismatched_reference is not None
        found, _ = all_sums(run, state, part.mismatched, part.mismatched_lengths)
        divergence = max(0.0, float((found[:, 0] - part.mismatched_reference).mean()))
    known, sequences = _known(preferences, part, everything, everything, divergence)
    step = PreferenceStep(preferences.objective, known, sequences, torch.device("cpu"))
    step.sums[:-2] = torch.as_tensor(sums.ravel())
    step.sums[-2] = others
    return step.outcome()


def with_references(run: Prepared, state: RunState) -> RunPreferences:
    """Return the preferences of a run with the log-probabilities of the reference model: the model as it is now.

    They are kept next to the tokenized data, and read from there if the same model has judged the same data before.
    Every process calls it.

    Raises:
        Interrupted: a process was asked to stop.
    """
    preferences = run.preferences
    assert preferences is not None
    if not preferences.objective.needs_reference:
        return preferences
    parts = []
    for name, part in (("training", preferences.train), ("held-out", preferences.evaluation)):
        state.at(f"reference model on the {name} data")
        path = cache_root(run.config.data.cache_dir).parent / "references" / f"{_key(run, part)}"
        kept = run.processes.gather(read_kept(path) if run.processes.is_first else None)[0]
        if kept is None and len(part.data):
            with working(run.console, f"log-probabilities of the reference model, {name} data"):
                sums, _ = all_sums(run, state, part.sequences, sizes_of(part.data).lengths)
                columns = [sums]
                if part.partners is not None:
                    columns.append(all_sums(run, state, part.mismatched, part.mismatched_lengths)[0])
            kept = np.concatenate(columns, axis=1)
            if run.processes.is_first:
                write_kept(path, kept)
        kept = np.zeros((0, 3)) if kept is None else kept
        count = sizes_of(part.data).lengths.shape[1]
        others = kept[:, count] if part.partners is not None else None
        parts.append(replace(part, reference=kept[:, :count], mismatched_reference=others))
    return RunPreferences(preferences.objective, *parts)


def _key(run: Prepared, part: Judgement) -> str:
    """Return a hash of what decides the log-probabilities: the model, the samples, and the partners of `kto`."""
    model = run.config.model
    facts = {
        "version": 1,
        "model": [run.hf_config.to_json_string(), model_files(model), model.init.value, model.dtype.value],
        "quantization": model.quantization.value,
        "seed": run.config.train.seed if model.init is Init.random or model.new_weights or model.vocab_size else None,
        "adapter": [repr(model.lora), adapter_files(model), run.config.train.seed] if model.lora.path else None,
        "data": part.data.whole.key,
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for values in (part.data.indices, sizes_of(part.data).lengths, part.partners):
        digest.update(b"" if values is None else np.ascontiguousarray(values, np.int64).tobytes())
    return digest.hexdigest()
