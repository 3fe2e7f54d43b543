"""The loss of held-out samples, on the layout that trains: of all, by source, and by length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.data.lengths import bucket_names, bucket_of
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.planning.balance import balance
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.training.preferences import GROUP, held_out_outcome
from chunkflow_cli.training.prepared import Prepared
from chunkflow_cli.training.progress import RunState


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean losses per held-out target token."""

    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    """Loss of each source, and of each range of lengths; only where there are several of them."""


def held_out_loss(run: Prepared, state: RunState) -> HeldOutLoss:
    """Return the mean losses per held-out target token, the same on all processes. Every process calls it.

    `train.loss_weighting` has no influence on them. A request to stop is noticed after every group of samples.

    Raises:
        Interrupted: a process was asked to stop.
    """
    if run.preferences is not None:
        return _preference_loss(run, state)
    data = run.data.evaluation
    weight = 1.0 / int(data.target_counts.sum())
    groups = [np.arange(start, min(start + GROUP, len(data))) for start in range(0, len(data), GROUP)]
    names, members = _parts(data)
    run.parts.model.eval()
    sums = sum((_group_losses(run, state, samples, weight, members) for samples in groups), np.zeros(1 + len(names)))
    run.parts.model.train()
    targets = members @ data.target_counts
    return HeldOutLoss(float(sums[0]), dict(zip(names, (sums[1:] / targets).tolist(), strict=True)))


def _preference_loss(run: Prepared, state: RunState) -> HeldOutLoss:
    """Return the mean loss per held-out sample of preferences, and note their metrics."""
    assert run.preferences is not None
    outcome = held_out_outcome(run, state)
    loss = outcome.pop("loss")
    state.held_out_rewards = {f"eval_{name}": value for name, value in outcome.items()}
    accuracy = outcome.get("rewards/accuracies")
    if state.progress.step > 0:
        state.progress.eval_accuracy_end = accuracy
    elif not run.preferences.objective.needs_reference:  # the reference is the model itself still: all pairs are ties
        state.progress.eval_accuracy_start = accuracy
    return HeldOutLoss(loss)


def _parts(data: TokenizedData) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the names of the parts of the held-out data, and the samples of each, (parts, samples)."""
    names: list[str] = []
    members: list[NDArray[np.bool_]] = []
    for kinds, of in ((data.names, data.sources), (bucket_names(), bucket_of(data.lengths))):
        present = np.unique(of).tolist() if kinds else []
        if len(present) > 1:
            names += [kinds[kind] for kind in present]
            members += [of == kind for kind in present]
    return names, np.array(members, bool).reshape(len(names), len(data))


def _group_losses(
    run: Prepared, state: RunState, samples: Any, weight: float, members: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return sums over the samples with these indices and all processes: the weighted loss, and the loss of each part.

    Args:
        weight: of each target.
        members: the samples of each part, (parts, samples).
    """
    data, topology, place = run.data.evaluation, run.topology, run.processes.place
    lengths = data.lengths[samples]
    shares = balance(lengths, topology.data)
    # A sequence-parallel group shares chunks of this size times its ranks.
    chunks = [build_chunks(lengths[share], run.plan.chunk_size * topology.sequence) for share in shares]
    own = samples[shares[place.data_rank]]
    sequences = [data[int(sample)] for sample in own]
    batch = StepBatch(chunks[place.data_rank], sequences, np.full(len(sequences), weight), by_sequence=True)
    forwards = max(map(len, chunks)) if run.plan.is_in_lockstep else 0
    is_whole, loss, parts = True, 0.0, np.zeros(len(members))
    try:
        result = run.parts.runner.evaluate(batch, forwards=forwards)
        assert result.sequence_losses is not None
        loss, parts = result.loss, members[:, own] @ result.sequence_losses
    except Interrupted:
        is_whole = False
    # All stages of a pipeline know its loss: only the first stage counts it. Only the last one knows those of samples.
    counted = loss if place.stage == 0 else 0.0
    return np.array(run.sum_of_whole(counted, *parts.tolist(), is_whole=is_whole and not state.stop_requested))
