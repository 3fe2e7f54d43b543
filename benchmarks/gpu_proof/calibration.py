"""What `tune-chunk-size` measures of an 8B model with LoRA, kept where `plan.cost_model=measured` looks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from chunkflow_cli.cli.plan import make_plan
from chunkflow_cli.config.load import load
from chunkflow_cli.engine import close_process_group
from chunkflow_cli.model.device import present_device
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.prediction import step_seconds
from chunkflow_cli.training.measure import calibrate
from chunkflow_cli.training.setup import calibration_path, described_device
from gpu_proof.cases import Case
from gpu_proof.models import model_folder, write_samples
from gpu_proof.rows import Values, attempt
from gpu_proof.speed import LORA
from gpu_proof.training import Place, run_words

BUDGET_SECONDS = 20.0


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    for case in cases:
        yield attempt(partial(_measured, case.facts, place), may_be_refused=False)


def _measured(facts: dict[str, Any], place: Place) -> Values:
    data = place.work / "calibration.jsonl"
    write_samples(data, [facts["length"]], 256)
    words = [*run_words(place, "calibration", model_folder(place.work, "8B", dry=place.dry), data), *LORA]
    words += ["train.global_batch_size=1", f"chunk.size={facts['sizes'][-1]}"]
    config = load(words).config
    try:
        calibration = calibrate(config, facts["sizes"], budget_seconds=BUDGET_SECONDS)
    finally:
        close_process_group()
    path = calibration_path(config, load_config(config.model), described_device(config, present_device()))
    calibration.save(path)
    shutil.copy(path, place.out / "calibration.json")
    by_profile = make_plan(load(words), step=1)
    measured = make_plan(load([*words, "plan.cost_model=measured"]), step=1)
    return {
        "worst_error": calibration.worst_error,
        "predicted_seconds": step_seconds(measured.plan, measured.step),
        "profile_seconds": step_seconds(by_profile.plan, by_profile.step),
        "file": path.name,
        "source": measured.plan.costs.source,
    }
