"""Peak memory of `train` under six settings, against what `plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from chunkflow_cli.cli.plan import make_plan
from gpu_proof.cases import Case
from gpu_proof.models import model_folder, write_samples
from gpu_proof.rows import Values, attempt
from gpu_proof.training import Place, prepared, run_words


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    for number, case in enumerate(cases):
        yield attempt(partial(_measured, f"memory-{len(cases) - number}", case.facts, place), may_be_refused=place.dry)


def _measured(name: str, facts: dict[str, Any], place: Place) -> Values:
    data = place.work / "memory.jsonl"
    if not data.exists():
        write_samples(data, facts["lengths"], 256)
    words = [
        *run_words(place, name, model_folder(place.work, "1B", dry=place.dry), data), *facts["words"],
        f"chunk.size={facts['chunk_size']}", "train.global_batch_size=2", "optim.lr=1e-6",
    ]  # fmt: skip
    with prepared(words) as (loaded, steps):
        peak = max(row["peak_memory_bytes"] for row in steps)
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak
    parts = make_plan(loaded, step=1).memory
    assert parts is not None
    return {
        "peak_bytes": peak,
        "reserved_bytes": reserved,  # what the allocator took from the device: chunks of many sizes leave gaps
        "predicted_bytes": parts.device_total,
        "predicted_host_bytes": parts.host,
        "ratio": peak / parts.device_total,
    }
