"""A run that was stopped or killed goes on to the bit, in the same layout or another one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from support.training import RECIPE, command, losses, rows, train

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(*RECIPE, "checkpoint.every=10", "checkpoint.keep=9", cwd=folder)
    return folder / "run"


def wait_for_rows(process: subprocess.Popen[str], run_folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (run_folder / "metrics.jsonl").exists() and len(
            (run_folder / "metrics.jsonl").read_text().splitlines()
        ) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended with {process.poll()} before {count} rows")


def test_kill_and_same_command_give_the_same_losses(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run continues to the bit: weights, optimizer states, random numbers and position in the data.

    The command finds the run without an output_dir and starts no second one. While the run lives, the command is
    refused. A half-written checkpoint is never taken.
    """
    words = [word for word in RECIPE if not word.startswith("train.output_dir")] + ["checkpoint.every=2"]
    outputs, rng = tmp_path / "outputs" / "tiny_random", np.random.default_rng()
    for count in (int(rng.integers(2, 8)), 9):
        with subprocess.Popen(
            command(*words), cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
        ) as process:
            while not (folders := list(outputs.glob("*"))):
                assert process.poll() is None
                time.sleep(0.01)
            (folder,) = folders
            wait_for_rows(process, folder, count)
            process.send_signal(signal.SIGSTOP)
            monkeypatch.chdir(tmp_path)
            second = CliRunner().invoke(app, ["train", *words, f"train.output_dir={folder}"])
            process.send_signal(signal.SIGKILL)
        assert second.exit_code == 2
        assert "another process" in second.stderr
        half = folder / "checkpoints" / ".step-00000099.writing"
        half.mkdir(parents=True, exist_ok=True)
        (half / "state.json").write_text("{}")
    run = train(*words, cwd=tmp_path)
    assert "Continuing after step" in run.stderr
    assert list(outputs.iterdir()) == [folder]
    assert losses(folder) == losses(uninterrupted)
    assert [row["step"] for row in rows(folder)] == list(range(1, len(losses(uninterrupted)) + 1))
    mine, theirs = (load_file(each / "final" / "model.safetensors") for each in (folder, uninterrupted))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    reports = [json.loads((each / "report.json").read_text()) for each in (folder, uninterrupted)]
    for key in ("samples_trained", "target_tokens_trained", "eval_loss_start", "eval_loss_end", "chunks"):
        assert reports[0][key] == reports[1][key]
    assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("how", ["Ctrl-C", "a connection that is lost"])
def test_a_signal_saves_and_exits_130(how: str, uninterrupted: Path, tmp_path: Path) -> None:
    """A checkpoint is saved even if checkpoint.every is not set: users expect to keep what they stop by hand."""
    with subprocess.Popen(command(*RECIPE), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_rows(process, tmp_path / "run", 3)
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            _, printed = process.communicate(timeout=300)
        else:
            assert process.stderr is not None
            process.stderr.close()
            for _ in range(2):  # from the shell, and from the kernel
                process.send_signal(signal.SIGHUP)
            process.wait(timeout=300)
            printed = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert process.returncode == 130, printed
    assert "Stopped after step" in printed
    assert "Traceback" not in printed
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
    assert not (tmp_path / "run" / "final").exists()
    page = tmp_path / "run" / "report.html"
    assert re.search(r"stopped after step \d+ of 24<", page.read_text())
    train(*RECIPE, cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert ">finished<" in page.read_text()


def test_resume_from_a_named_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    words = [word for word in RECIPE if not word.startswith("train.output_dir")]
    named = uninterrupted / "checkpoints" / "step-00000010"
    train(*words, "train.output_dir=second", f"checkpoint.resume={named}", cwd=tmp_path)
    assert losses(tmp_path / "second") == losses(uninterrupted)[10:]
    nowhere = CliRunner().invoke(
        app, ["train", *words, f"train.output_dir={tmp_path / 'third'}", "checkpoint.resume=nowhere"]
    )
    assert nowhere.exit_code == 2, nowhere.output
    assert "checkpoint.resume=nowhere" in nowhere.stderr


def test_a_run_goes_on_in_another_layout_with_other_chunks(uninterrupted: Path, tmp_path: Path) -> None:
    """With fewer devices or too little memory, the same command with other keys continues the run, and says so."""
    words = [*RECIPE, "checkpoint.every=10", "engine.zero_stage=0", "chunk.k=2"]
    with subprocess.Popen(
        command(*words), cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
    ) as process:
        wait_for_rows(process, tmp_path / "run", 12)
        process.send_signal(signal.SIGKILL)
    other = ["chunk.size=48", "engine.zero_stage=3", "model.activation_checkpointing=full"]
    run = train(*RECIPE, *other, cwd=tmp_path)
    assert "saved on one process, ZeRO-0, continued on one process, ZeRO-3" in run.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "run", uninterrupted))
    assert all(float((mine[name] - theirs[name]).abs().max()) < 1e-4 for name in theirs)
    refused = train(*RECIPE, "optim.lr=0.5", cwd=tmp_path, code=2)
    assert "optim.lr was 0.001 and is 0.5" in refused.stderr


def test_dropout_resumes_to_the_bit_too(tmp_path: Path) -> None:
    """Dropout draws random numbers: a resumed run draws the same ones, even after an interrupted step."""
    words = [*RECIPE, "model.lora.enabled=true", "model.lora.dropout=0.3", "optim.lr=0.01", "train.epochs=1",
             "model.lora.use_dora=true", "model.lora.modules_to_save=[embed_tokens,.*norm]"]  # fmt: skip
    train(*words, cwd=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with subprocess.Popen(
        command(*words), cwd=other, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
    ) as process:
        wait_for_rows(process, other / "run", 3)
        process.send_signal(signal.SIGINT)
    train(*words, cwd=other)
    assert losses(other / "run") == losses(tmp_path / "run")
