"""The preferences that `parity` compares: pairs that begin alike, and the loss of whole sequences by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.preference_loss import judge
from chunkflow_cli.execution.preferences import Known, PreferenceStep, Sequences
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.execution.whole_sequence import cross_entropies
from chunkflow_cli.planning.chunks import Chunks

Preferences = tuple[Objective, Sequences, Known]
"""What is learned, the sequences, and what is known of them."""


def with_prompts(sequences: Sequence[TokenizedSample]) -> tuple[list[TokenizedSample], NDArray[np.int64]]:
    """Give both sequences of each pair the same beginning, half of the shorter one; return its number of tokens."""
    made, prompts = [], []
    for first, second in zip(sequences[0::2], sequences[1::2], strict=True):
        asked = max(1, min(len(first.input_ids), len(second.input_ids)) // 2)
        for each in (first, second):
            ids, targets = each.input_ids.copy(), each.targets.copy()
            ids[:asked], targets[: asked - 1] = first.input_ids[:asked], IGNORED
            targets[asked - 1] = ids[asked]
            made.append(TokenizedSample(ids, targets))
        prompts.append(asked)
    return made, np.array(prompts, np.int64)


def random_preferences(objective: Objective, sequences: Sequence[TokenizedSample]) -> Preferences:
    """Return the sequences as preferences, with drawn differences to the log-probabilities of a reference model."""
    made = Sequences.of(list(sequences), objective)
    rng = np.random.default_rng(0)
    is_desirable = None if objective.has_pairs else np.arange(len(sequences)) % 2 == 0
    known = Known(
        counts=made.counts,
        reference=rng.uniform(-3, 3, len(made.counts)) if objective.needs_reference else None,
        is_desirable=is_desirable,
        samples=len(sequences) // (2 if objective.has_pairs else 1),
        desirable=0 if is_desirable is None else int(is_desirable.sum()),
        imitated_tokens=made.imitated_tokens if objective.nll_weight else 0,
        divergence=0.1,
    )
    return objective, made, known


def preference_batch(
    chunks: Chunks, objective: Objective, sequences: Sequences, known: Known, device: torch.device
) -> StepBatch:
    """Return the batch of a step of preferences that one process runs alone."""
    step = PreferenceStep(objective, known, sequences, device)
    return StepBatch(chunks, sequences.samples, step.imitated_weights, preferences=step)


def whole_preference_loss(
    model: Any, objective: Objective, sequences: Sequences, known: Known, device: torch.device
) -> tuple[float, Known]:
    """Go backward through the loss of whole sequences by autograd; return it, and what is known with a reference.

    The reference is as far from the model as `known.reference` says: far off, the loss would have no gradient.
    """
    sums, imitated = [], torch.zeros((), dtype=torch.float64, device=device)
    for index, (sequence, start) in enumerate(zip(sequences.samples, sequences.starts, strict=True)):
        entropy = cross_entropies(model, sequence, device)
        sums.append(-entropy[start:].sum())
        if index % 2 == 0:
            imitated = imitated + entropy.sum()

    def tensor(values: Any) -> Tensor | None:
        return None if values is None else torch.as_tensor(values, device=device)

    found = torch.stack(sums)
    if known.reference is not None:
        known = replace(known, reference=found.detach().cpu().numpy() + known.reference)
    counts, reference = torch.as_tensor(known.counts, device=device), tensor(known.reference)
    divergence = torch.tensor(known.divergence, dtype=torch.float64, device=device)
    judged = judge(objective, found, counts, reference, tensor(known.is_desirable), divergence)
    loss = judged.losses.sum() / known.samples
    if known.imitated_tokens:
        loss = loss + objective.nll_weight * imitated / known.imitated_tokens
    loss.backward()
    return float(loss.detach()), known
