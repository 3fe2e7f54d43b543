"""Runs of `chunkflow train` in a process of their own, and what they leave in their folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = ("recipe=tiny_random", "train.guard=false", "train.epochs=3", "train.global_batch_size=8", "chunk.size=64",
          "train.output_dir=run")  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "chunkflow_cli", "train", *words]


def train(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return run


def rows(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in rows(run_folder)]
