"""Build the command that resumes a run that was stopped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from chunkflow_cli.config.schema import Config
from chunkflow_cli.processes import environment

RESUME = re.compile(r"\+{0,2}checkpoint\.resume=")
PLAIN = re.compile(r"[\w./+@-]+")
"""A value that Hydra takes as it is."""


def how_to_go_on(config: Config, run_folder: Path, checkpoint: Path, typed: Sequence[str]) -> str:
    """Return how to resume a run from a checkpoint, as a sentence or as a command.

    The same command does, unless it names a checkpoint, starts a new run (`checkpoint.resume`), or is one of a sweep.

    Args:
        typed: the words of this process's command line, after the program.
    """
    is_sweep = environment.is_run_of_sweep()
    if config.checkpoint.resume == "auto" and not is_sweep:
        return f"The same command resumes from {checkpoint}"
    added = ["checkpoint.resume=auto"]
    if config.train.output_dir is None:
        added.append(override("train.output_dir", str(run_folder)))
    if environment.is_started_by_launcher() and environment.worker_folder() is None:
        return f"Saved {checkpoint}\n  To resume, add to the same command: {shlex.join(added)}"
    words = [word for word in typed if RESUME.match(word) is None and word != "--json"]
    return f"Saved {checkpoint}\n  To resume: {shlex.join(['chunkflow', *words, *added])}"


def override(key: str, value: str) -> str:
    """Return an override, with its value in quotes where Hydra would read it as syntax."""
    if PLAIN.fullmatch(value):
        return f"{key}={value}"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{quoted}"'
