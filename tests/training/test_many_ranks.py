"""A run of two ranks survives kills, stops and a move to another layout, with the commands that users type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli.processes.heartbeat import read_place
from chunkflow_cli.processes.watch_folder import WatchFolder

pytestmark = pytest.mark.ranks

STEPS = 16
WORDS = (
    "recipe=tiny_random", f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=2", "train.guard=false",
    "train.global_batch_size=8", "optim.schedule=constant", "engine.zero_stage=2", "data.eval_fraction=0.2",
    "eval.every=5", "data.num_workers=1", "optim=adamw",
)  # fmt: skip
TWO_RANKS = ("launch.processes=2",)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    command = [sys.executable, "-m", "chunkflow_cli", "train", *WORDS, *words, f"train.output_dir={folder}"]
    return subprocess.Popen(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(run: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (done := rows(folder)) or done[-1]["step"] < step:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, "no such step"
        time.sleep(0.02)


def wait_until(run: subprocess.Popen[str], folder: Path, rank: int, doing: str) -> None:
    """Wait until the rank itself reports that it does this."""
    deadline = time.monotonic() + 240
    while not read_place(WatchFolder(folder).heartbeat(rank)).doing.startswith(doing):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, f"rank {rank} never was at {doing!r}"
        time.sleep(0.0005)


def stop(folder: Path, *words: str, after: int, says: str = "") -> int:
    """Start the run, send SIGTERM to the launcher after a step, and return the step of the checkpoint it saved."""
    done = rows(folder)[-1]["step"]  # by a run that was killed, which may have gone further
    run = start(folder, *words)
    wait_for_step(run, folder, max(after, done + 1))
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert "The same command resumes from" in err
    assert says in err.replace("\n", " ")
    stopped_at = int(rows(folder)[-1]["step"])
    assert (folder / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    return stopped_at


def process_of_rank(launcher: int, rank: int) -> int:
    """Return the process id of a rank: the kernel knows the launcher's child with this RANK in its environment."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is no child of {launcher}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """The losses and the report of the same run without a disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = start(folder, *TWO_RANKS)
    out, err = run.communicate(timeout=400)
    assert run.returncode == 0, out + err
    assert "Traceback" not in err
    return [row["loss"] for row in rows(folder)], json.loads((folder / "report.json").read_text())


def test_a_run_survives_its_ranks_and_its_layout(
    undisturbed: tuple[list[float], dict[str, Any]], tmp_path: Path
) -> None:
    """Ranks are killed and the launcher is stopped, and still the run ends with the losses of an undisturbed one.

    A rank is killed within a step, while it saves, evaluates and starts. The launcher is stopped with two ranks and with
    two stages, and one process finishes the run. (benchmarks/kills.py kills at random moments, many times over.) On one
    layout the losses are equal to the bit; on another one they differ by the order of sums.
    """
    folder = tmp_path / "run"
    for victim, step, doing in (
        (1, 3, ""), (0, 4, "saving a checkpoint"), (1, 4, "held-out chunk"), (0, 0, "loading the model"),
    ):  # fmt: skip
        run = start(folder, *TWO_RANKS)
        if step:
            wait_for_step(run, folder, step)
        wait_until(run, folder, victim, doing)
        os.kill(process_of_rank(run.pid, victim), signal.SIGKILL)
        _, err = run.communicate(timeout=120)
        assert run.returncode == 1, err
        assert f"rank {victim} was killed by SIGKILL" in err
        assert "Traceback" not in err

    stopped_at = stop(folder, *TWO_RANKS, after=9)
    moved = "saved on data 2, ZeRO-2, continued on pipeline 2, ZeRO-1"
    stop(folder, *TWO_RANKS, "parallel.pipeline=2", "engine.zero_stage=1", after=12, says=moved)
    run = start(folder, "engine.zero_stage=0")
    _, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    assert "saved on pipeline 2, ZeRO-1, continued on one process, ZeRO-0" in err.replace("\n", " ")
    losses = [row["loss"] for row in rows(folder)]
    assert len(losses) == STEPS
    expected, report = undisturbed
    assert losses[:stopped_at] == expected[:stopped_at]
    assert losses[stopped_at:] == pytest.approx(expected[stopped_at:], rel=1e-5)
    for key in ("samples_trained", "target_tokens_trained", "samples_held_out"):
        assert json.loads((folder / "report.json").read_text())[key] == report[key] > 0
