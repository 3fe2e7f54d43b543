"""Bytes of activations per token: measured on the model, not estimated."""

from __future__ import annotations

import numpy as np
import torch

from chunkflow_cli.data.sample import TokenizedSample
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.step import RunnerSettings, StepBatch, StepContext
from chunkflow_cli.model.shape import merged_bytes
from chunkflow_cli.model.shape_probe import kept_for_backward
from chunkflow_cli.planning.chunks import build_chunks


def activation_bytes_per_token(model: ChunkModel, sample: TokenizedSample) -> float:
    """Return the bytes per token that the layers keep for backward, from one forward of the sample as one chunk.

    Head and loss are left out, and so are merged copies of adapted experts, which do not depend on the tokens: then a
    second forward, of half of the sample, tells the two apart.
    """
    tokens = len(sample.input_ids)
    kept = _kept_bytes(model, sample)
    if tokens == 1 or not merged_bytes(model):
        return kept / tokens
    half = tokens // 2
    return (kept - _kept_bytes(model, TokenizedSample(sample.input_ids[:half], sample.targets[:half]))) / (
        tokens - half
    )


def _kept_bytes(model: ChunkModel, sample: TokenizedSample) -> int:
    tokens, device = len(sample.input_ids), next(model.parameters()).device
    batch = StepBatch(build_chunks([tokens], tokens), [sample], np.ones(1))
    call = StepContext(RunnerSettings(device), batch).call(0)
    # Only the state of this device: torch warns if the states of all devices are saved, and none is needed.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), kept_for_backward(model) as kept:
        hidden = model.hidden(call)
    total = sum(kept.values())
    del hidden
    return total


def whole_sequence_bytes(
    peak_bytes: int, activation_bytes: float, chunk_tokens: int, longest: int, vocab_size: int, element_bytes: int
) -> int:
    """Predict the peak memory of the same training with the longest sample as one forward, logits included.

    Takes the measured peak, replaces the chunk's activations by the sample's, and adds the logits that a plain loss
    computes for every token: in the model's dtype, in float32, their log-softmax and its gradient. benchmarks/LOG.md
    compares the prediction with measurements.
    """
    logits = longest * vocab_size * (element_bytes + 3 * 4)
    more_tokens = max(0, longest - chunk_tokens)
    return int(peak_bytes + more_tokens * activation_bytes + (logits if more_tokens else 0))
