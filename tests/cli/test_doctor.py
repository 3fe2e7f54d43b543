"""`chunkflow doctor`: packages that are broken in every way are lines in its table, and never its end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chunkflow_cli.cli import doctor
from chunkflow_cli.cli.doctor import PIECES, ask, examine

SEGFAULT = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
BROKEN_LINK = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')\n"


def install(folder: Path, module: str, source: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are found before the installed ones."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def quietly(overrides: list[str]) -> dict[str, Any]:
    return examine(overrides, config_dir=None, seconds=120, console=Console(quiet=True))


def what(findings: dict[str, Any], *, required: bool) -> str:
    return "\n".join(problem["what"] for problem in findings["problems"] if problem["required"] is required)


@pytest.mark.slow
def test_this_machine_can_train(tmp_path: Path) -> None:
    """The tests train on it, so doctor must say so; and say it in one JSON object."""
    command = [
        sys.executable,
        "-m",
        "chunkflow_cli",
        "doctor",
        "recipe=tiny_random",
        f"data.cache_dir={tmp_path}/cache",
    ]
    run = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    findings = json.loads(run.stdout)
    assert run.returncode == 0, findings["problems"]
    assert findings["ready"] is True
    assert findings["torch"] == importlib.metadata.version("torch")
    assert findings["deepspeed"] == importlib.metadata.version("deepspeed")
    assert findings["python"].startswith("3.")
    processor = findings["devices"][-1]
    assert processor["kind"] == "cpu"
    assert processor["cores"] >= 1
    assert processor["memory_bytes"] > 2**28
    assert set(findings["backends"]) == {"flash_attn", "torch_flash", "cpu", "reference"}
    assert findings["backends"]["reference"]["works"]
    assert findings["attention"]["dtype"] == "float32"
    assert findings["backends"][findings["attention"]["takes"]]["works"]
    assert findings["cache"]["path"] == f"{tmp_path}/cache/tokens"
    assert not (tmp_path / "cache").exists()
    for problem in findings["problems"]:
        assert problem["what"]
        assert problem["remedy"]


@pytest.mark.slow
def test_a_broken_flash_attn_and_a_package_that_crashes_are_lines(broken: Path) -> None:
    """transformers imports flash_attn if it is there at all: a broken one stops training even without a GPU."""
    install(broken, "flash_attn", BROKEN_LINK)
    install(broken, "tensorboard", SEGFAULT)
    findings = quietly([])
    packages = findings["packages"]
    assert packages["flash_attn"]["state"] == "broken"
    assert "undefined symbol" in packages["flash_attn"]["error"]
    assert packages["tensorboard"]["state"] == "broken"
    assert "Segmentation fault" in packages["tensorboard"]["error"]
    assert packages["torch"]["state"] == "ok"
    assert not findings["ready"]
    assert what(findings, required=True).splitlines() == [
        "flash_attn does not import: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa "
        "(needed for the fastest attention on NVIDIA GPUs)"
    ]
    assert "tensorboard does not import: it crashed" in what(findings, required=False)


def test_what_follows_from_a_missing_package_is_no_second_problem(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without torch nothing works: one problem, not ten."""
    install(broken, "torch", "raise ModuleNotFoundError(\"No module named 'torch._C'\", name='torch._C')\n")
    few = ("torch", "transformers", "deepspeed")
    monkeypatch.setattr(doctor, "PIECES", tuple(piece for piece in PIECES if piece.module in few))
    findings = quietly([])
    assert not findings["ready"]
    assert len(what(findings, required=True).splitlines()) == 1
    assert "torch does not import" in what(findings, required=True)
    doctor._print(Console(width=80), findings)
    printed = capsys.readouterr().out
    assert "Training cannot work here before this is solved" in printed
    assert "takes none" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_package_that_hangs(broken: Path) -> None:
    install(broken, "hanging", "import time\ntime.sleep(600)\n")
    answer = ask("package", ("hanging",), 2)
    assert answer["raised"] == "no answer in 2 seconds"
    assert answer["packages"][0] == "hanging"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("import os\nprint('one', flush=True)\nos._exit(4)\n", "exit code 4"),
        ("print('{}')\n", None),
    ],
)
def test_packages_that_end_the_process_or_print(source: str, expected: str | None, broken: Path) -> None:
    install(broken, "strange", source)
    answer = ask("package", ("strange",), 60)
    assert answer == {"missing": False, "version": None} if expected is None else expected in answer["raised"]


def test_a_missing_package_and_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = next(piece for piece in PIECES if piece.module == "peft")
    assert doctor._package(piece, {"missing": True})["state"] == "missing"
    monkeypatch.setattr(doctor, "_minimums", lambda: {"peft": "99.1"})
    assert doctor._package(piece, {"missing": False, "version": "0.1"})["state"] == "too old"
    assert piece.install == "pip install 'peft>=99.1'"


GPU_MACHINE: dict[str, dict[str, Any]] = {
    "devices": {
        "gpus": [
            {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_000_000_000, "free_bytes": 84_000_000_000,
             "compute_capability": "9.0", "bfloat16": True},
        ],
        "cuda": "12.8",
        "cpu_bfloat16": True,
    },
    "attention": {
        "takes": "flash_attn", "reason": "the fastest there is", "model_error": None,
        "objections": {"flash_attn": None, "torch_flash": None, "cpu": "it runs on the CPU only", "reference": None},
    },
    "cache": {"path": "/cache/tokens", "free_bytes": 2**20, "error": None},
    "hub": {"endpoint": "https://huggingface.co", "token": True, "reachable": True},
}  # fmt: skip


def test_a_gpu_whose_fastest_kernel_crashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` would take it, so training fails until another one is named."""

    def answer(question: str, arguments: Any, seconds: float) -> dict[str, Any]:
        if question == "backend flash_attn":
            return {"raised": "it crashed: Segmentation fault", "packages": ["flash_attn"]}
        return GPU_MACHINE.get(question, {"missing": False, "version": "1"} if question.startswith("package") else {})

    monkeypatch.setattr(doctor, "ask", answer)
    monkeypatch.setattr(
        "chunkflow_cli.cli.doctor.shutil.which", lambda name: None if name == "ninja" else f"/usr/bin/{name}"
    )
    findings = quietly([])
    assert [device["kind"] for device in findings["devices"]] == ["cuda", "cpu"]
    assert [problem for problem in findings["problems"] if problem["required"]] == [
        {
            "what": "attention flash_attn does not work here: it crashed: Segmentation fault",
            "remedy": "model.attention=torch_flash",
            "required": True,
        }
    ]
    optional = what(findings, required=False)
    assert "there is no ninja" in optional
    assert "only 1.0 MiB are free" in optional
    doctor._print(Console(width=80), findings)
    printed = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, 79.16 GiB (78.23 GiB free), sm 9.0" in printed
    assert "logged in" in printed


def test_offloading_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe for a GPU node cannot run on a CPU whatever is installed, and the model may be another obstacle."""
    model_error = "model.path=x: not found\n  with network: check the name\n  without: copy it"
    answers = GPU_MACHINE | {
        "settings": {"path": "x", "trust_remote_code": False, "dtype": "bfloat16", "attention": "auto", "cache_dir": None,
                     "offload": "optimizer", "hardware": "one GPU of 80 GB"},
        "devices": {"gpus": [], "cuda": None, "cpu_bfloat16": True},
        "attention": {**GPU_MACHINE["attention"], "model_error": model_error},
    }  # fmt: skip
    monkeypatch.setattr(doctor, "ask", lambda question, arguments, seconds: answers.get(question, {"missing": False}))
    problems = [problem for problem in quietly(["recipe=qwen7b"])["problems"] if problem["required"]]
    assert "engine.offload=optimizer" in problems[0]["what"]
    assert "one GPU of 80 GB" in problems[0]["what"]
    assert problems[1]["what"] == "model.path=x: not found"
    assert problems[1]["remedy"] == "with network: check the name; without: copy it"


def test_flash_attn_is_missed_only_where_it_could_run() -> None:
    piece = next(piece for piece in PIECES if piece.module == "flash_attn")
    answers = {f"package {piece.module}": {"missing": False} for piece in PIECES}
    answers["package flash_attn"] = {"missing": True}
    packages = {name.module: doctor._package(name, answers[f"package {name.module}"]) for name in PIECES}
    assert doctor._package_findings(packages, answers, has_gpu=False) == []
    (finding,) = doctor._package_findings(packages, answers, has_gpu=True)
    assert finding.problem.remedy == piece.install == "pip install 'chunkflow-cli[flash]'"
    assert not finding.problem.required


def test_every_dependency_is_looked_at() -> None:
    """A dependency that doctor does not know is one that it will not miss."""
    requirements = importlib.metadata.requires("chunkflow-cli") or []
    used = {
        match.group(0).lower()
        for requirement in requirements
        if "dev" not in requirement.partition("extra ==")[2] and (match := re.match(r"[\w.-]+", requirement))
    }
    assert used == {piece.distribution for piece in PIECES}


def test_the_users_mistakes_exit_2_and_an_unusable_cache_is_required(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chunkflow_cli", "doctor"]
    run = subprocess.run([*command, "chunk.sise=4"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "did you mean chunk.size?" in run.stderr
    (tmp_path / "file").write_text("")
    answer = ask("cache", (f"{tmp_path}/file/cache",), 60)
    findings = doctor._cache_findings(answer, {})
    assert [finding.problem.required for finding in findings] == [True]
    assert "data.cache_dir=" in findings[0].problem.remedy


def test_doctor_itself_imports_no_torch() -> None:
    """It must start where torch crashes."""
    code = (
        "import sys; from chunkflow_cli.cli import doctor\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert run.returncode == 0, run.stderr
