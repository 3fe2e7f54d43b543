"""Nothing is lost silently: every sample and every target of a run is somewhere, or the run has failed."""

from __future__ import annotations

from typing import Any

from chunkflow_cli.config.schema import DataConfig
from chunkflow_cli.errors import RunError
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.training.inputs import RunData


def samples_account(data: RunData, config: DataConfig) -> dict[str, int]:
    """What became of the rows that were read; those of `data.eval_path` are not among those of `data.path`."""
    account = {
        "samples_read": data.read.samples_read,
        "samples_rejected": data.read.samples_rejected,
        "samples_dropped": data.read.samples_dropped,
        "samples_truncated": data.read.samples_truncated,
        "samples_held_out": 0 if config.eval_path is not None else len(data.evaluation),
        "samples_to_train": len(data.train),
    }
    if config.eval_path is not None:
        account |= {
            "eval_samples_read": data.evaluation.samples_read,
            "eval_samples_rejected": data.evaluation.samples_rejected,
            "eval_samples_dropped": data.evaluation.samples_dropped,
            "eval_samples_truncated": data.evaluation.samples_truncated,
        }
    return account


def check_accounting(report: dict[str, Any], batches: GlobalBatches) -> None:
    """
    Raises:
        RunError: names each sum that does not come out.
    """
    accounted = sum(
        report[key] for key in ("samples_rejected", "samples_dropped", "samples_held_out", "samples_to_train")
    )
    planned = sum(len(batches[step]) for step in range(report["steps"]))
    problems = []
    if accounted != report["samples_read"]:
        problems.append(f"{report['samples_read']} samples were read, {accounted} are accounted for")
    if planned != report["samples_trained"]:
        problems.append(f"{planned} samples were planned, {report['samples_trained']} trained on")
    if report["target_tokens_planned"] != report["target_tokens_trained"]:
        problems.append(
            f"{report['target_tokens_planned']} targets were planned, {report['target_tokens_trained']} trained on"
        )
    if problems:
        raise RunError("the accounting does not add up: " + "; ".join(problems))
