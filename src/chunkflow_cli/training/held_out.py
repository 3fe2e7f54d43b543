"""The loss of held-out samples, on the layout that trains."""

from __future__ import annotations

from typing import Any

import numpy as np

from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.planning.balance import balance
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.training.preferences import held_out_outcome
from chunkflow_cli.training.prepare import Prepared
from chunkflow_cli.training.progress import RunState

GROUP = 256
"""Number of samples that are planned together."""


def held_out_loss(run: Prepared, state: RunState) -> float:
    """Return the mean loss per held-out target token, the same on all processes. Every process calls it.

    `train.loss_weighting` has no influence on it. A request to stop is noticed after every group of samples.

    Raises:
        Interrupted: a process was asked to stop.
    """
    if run.preferences is not None:
        return _preference_loss(run, state)
    data = run.data.evaluation
    weight = 1.0 / int(data.target_counts.sum())
    groups = [np.arange(start, min(start + GROUP, len(data))) for start in range(0, len(data), GROUP)]
    run.parts.model.eval()
    total = sum(_group_loss(run, state, samples, weight) for samples in groups)
    run.parts.model.train()
    return total


def _preference_loss(run: Prepared, state: RunState) -> float:
    """Return the mean loss per held-out sample of preferences, and note their metrics."""
    outcome = held_out_outcome(run, state)
    loss = outcome.pop("loss")
    state.held_out_rewards = {f"eval_{name}": value for name, value in outcome.items()}
    accuracy = outcome.get("rewards/accuracies")
    if state.progress.step == 0:
        state.progress.eval_accuracy_start = accuracy
    state.progress.eval_accuracy_end = accuracy
    return loss


def _group_loss(run: Prepared, state: RunState, samples: Any, weight: float) -> float:
    """Return the loss of the samples with these indices, summed over all processes, with `weight` per target."""
    data, topology, place = run.data.evaluation, run.topology, run.processes.place
    lengths = data.lengths[samples]
    shares = balance(lengths, topology.data)
    # A sequence-parallel group shares chunks of this size times its ranks.
    chunks = [build_chunks(lengths[share], run.plan.chunk_size * topology.sequence) for share in shares]
    sequences = [data[int(sample)] for sample in samples[shares[place.data_rank]]]
    batch = StepBatch(chunks[place.data_rank], sequences, np.full(len(sequences), weight))
    forwards = max(map(len, chunks)) if run.plan.is_in_lockstep else 0
    is_whole, loss = True, 0.0
    try:
        loss = run.parts.runner.evaluate(batch, forwards=forwards)
    except Interrupted:
        is_whole = False
    # All stages of a pipeline know its loss: only the first stage counts it.
    loss, whole = run.processes.sum(loss if place.stage == 0 else 0.0, is_whole and not state.stop_requested)
    if whole < topology.processes:
        raise Interrupted
    return loss
