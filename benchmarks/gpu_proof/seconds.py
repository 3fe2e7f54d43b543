"""Seconds of a chunk's forward and backward after longer and longer pasts, against the profile of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from chunkflow_cli.config.load import load
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.cpu_quirks import settle_vector_math
from chunkflow_cli.execution.parity import random_sequences
from chunkflow_cli.execution.runner import Interrupted
from chunkflow_cli.execution.step import StepBatch
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.calibration import OperationSample
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.costs import CostModel, chunk_tokens
from chunkflow_cli.planning.schedule import Op, OpKind, plan
from chunkflow_cli.training.assembly import Assembly, assemble
from chunkflow_cli.training.setup import read_setup
from gpu_proof.cases import Case
from gpu_proof.models import model_folder
from gpu_proof.rows import Values, attempt
from gpu_proof.training import Place, run_words


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    settle_vector_math()
    model = model_folder(place.work, "8B", dry=place.dry, layers=cases[0].facts["layers"])
    config = load(run_words(place, "seconds", model, place.work)).config
    hf_config, device = load_config(config.model), training_device()
    backend = choose_backend(config.model.attention, hf_config, device, torch.bfloat16).backend
    timed: list[OperationSample] = []
    # The chunks before the last one also go backward in a step, which would take minutes: it ends after the last one.
    parts = assemble(
        config, hf_config, backend, device,
        stop_requested=lambda: bool(timed) and timed[-1].kind == OpKind.backward.value,
    )  # fmt: skip
    profile = present_device()
    costs = read_setup(config, hf_config, profile).costs
    try:
        for case in cases:
            row = attempt(partial(_measured, case.facts, parts, costs, timed), may_be_refused=False)
            row["values"]["profile"] = {
                "forward": asdict(costs.forward),
                "backward": asdict(costs.backward),
                "matmul_efficiency": profile.matmul_efficiency,
                "attention_efficiency": profile.attention_efficiency,
            }
            yield row
    finally:
        close_process_group()


def _measured(facts: dict[str, Any], parts: Assembly, costs: CostModel, timed: list[OperationSample]) -> Values:
    length = facts["past"] + facts["size"]
    chunks = build_chunks([length], facts["block"])
    (sequence,) = random_sequences([length], parts.shape.vocab_size)
    batch = StepBatch(chunks, [sequence], np.full(1, 1.0 / length))
    targets = _targets(chunks, sequence.targets)
    tokens, pairs = chunk_tokens(chunks), costs.chunk_pairs(chunks)

    def record(op: Op, seconds: float) -> None:
        (chunk,) = op.chunks
        timed.append(OperationSample(op.kind.value, tokens[chunk], pairs[chunk], targets[chunk], seconds))

    operations: list[OperationSample] = []
    for _ in range(facts["repeats"] + 1):  # kernels of a new size are chosen in the first one
        timed.clear()
        with suppress(Interrupted):
            parts.runner.run((plan(chunks, 1),), batch, record=record)
        parts.engine.discard_gradients()
        operations = [*timed] if not operations else list(map(_faster, operations, timed))
    forward, backward = operations[-2:]
    predicted_forward = float(costs.forward(tokens[-1:], pairs[-1:])[0]) + costs.seconds_per_target * targets[-1]
    predicted_backward = float(costs.backward(tokens[-1:], pairs[-1:])[0])
    return {
        "forward_seconds": forward.seconds,
        "predicted_forward_seconds": predicted_forward,
        "forward_ratio": forward.seconds / predicted_forward,
        "backward_seconds": backward.seconds,
        "predicted_backward_seconds": predicted_backward,
        "backward_ratio": backward.seconds / predicted_backward,
        "operations": [asdict(operation) for operation in operations],
    }


def _faster(one: OperationSample, other: OperationSample) -> OperationSample:
    return min(one, other, key=lambda operation: operation.seconds)


def _targets(chunks: Chunks, targets: Any) -> list[float]:
    """Return the targets of each chunk of one sequence."""
    spans = zip(chunks.start, chunks.stop, strict=True)
    return [float(np.count_nonzero(targets[start:stop] >= 0)) for start, stop in spans]
