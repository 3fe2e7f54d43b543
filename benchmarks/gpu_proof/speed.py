"""Tokens a second, MFU and memory of an 8B model with LoRA by the length of a sample, state on the device or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

from chunkflow_cli.cli.plan import PlannedRun, make_plan
from chunkflow_cli.planning.peak_memory import memory_of_fullest
from gpu_proof.cases import Case
from gpu_proof.models import model_folder, write_samples
from gpu_proof.rows import NotHere, Values, attempt, reraise
from gpu_proof.training import Place, prepared, run_words, words_of_state

LORA = ("model.lora.enabled=true", "model.activation_checkpointing=selective")


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    for index, (run, group) in enumerate(groupby(cases, key=lambda case: case.facts["run"])):
        yield from _run(f"speed-{len(cases)}-{index}", run, list(group), place)


def _run(name: str, run: dict[str, Any], cases: list[Case], place: Place) -> Iterator[Values]:
    """Yield a row for each case. All are steps of one run, whose first step only warms up."""
    data = place.work / f"{name}.jsonl"
    write_samples(data, [run["lengths"][0], *(run["lengths"][case.facts["step"]] for case in cases)], 256)
    done = 0
    try:
        words = [
            *run_words(place, name, model_folder(place.work, "8B", dry=place.dry, layers=run["layers"]), data), *LORA,
            *words_of_state(run["state"]), "train.global_batch_size=1", f"chunk.size={32 if place.dry else 8192}",
        ]  # fmt: skip
        with prepared(words) as (loaded, steps):
            planned = make_plan(loaded, step=1)
            next(steps)
            for done in range(1, len(cases) + 1):
                yield attempt(partial(_step, steps, planned, done))
    except Exception as error:
        yield from (attempt(partial(reraise, error)) for _ in cases[done:])


def _step(steps: Iterator[dict[str, Any]], planned: PlannedRun, number: int) -> Values:
    row = next(steps, None)
    if row is None:
        raise NotHere("a shorter sample of the same run failed")
    # The peak is that of all steps so far.
    so_far = dataclasses.replace(planned.plan, lengths=planned.plan.lengths[: number + 1])
    assert planned.setup.shape is not None
    parts = memory_of_fullest(planned.setup.shape, planned.setup.memory, so_far, [])
    columns = ("tokens_per_second", "mfu", "step_seconds", "page_lock_seconds", "loss", "chunks")
    return {
        **{key: row[key] for key in columns},
        "peak_bytes": row["peak_memory_bytes"],
        "predicted_bytes": parts.device_total,
        "predicted_host_bytes": parts.host,
    }
