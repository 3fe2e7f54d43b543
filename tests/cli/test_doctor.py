"""`chunkflow doctor`: however a package is broken, it is a line in the table and does not stop the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from chunkflow_cli.cli import doctor
from chunkflow_cli.cli.doctor import PACKAGES, ask, cache_problems, describe_package, examine
from chunkflow_cli.cli.screens.doctor import print_findings
from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import Config

pytestmark = pytest.mark.processes

SEGFAULT = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
BROKEN_LINK = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')\n"


def install(folder: Path, module: str, source: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose packages are found before the installed ones."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def what(findings: dict[str, Any], *, required: bool) -> str:
    return "\n".join(problem["what"] for problem in findings["problems"] if problem["required"] is required)


@pytest.mark.slow
def test_this_machine_can_train(tmp_path: Path) -> None:
    """The tests train on this machine, so doctor must report that it is ready, in one JSON object."""
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
    """transformers imports an installed flash_attn, so a broken one stops training even without a GPU."""
    install(broken, "flash_attn", BROKEN_LINK)
    install(broken, "tensorboard", SEGFAULT)
    findings = examine(Config(), 120)
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


def test_the_consequences_of_a_broken_package_are_not_listed_as_problems(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing works without torch: that is one problem, not ten."""
    install(broken, "torch", "raise ModuleNotFoundError(\"No module named 'torch._C'\", name='torch._C')\n")
    few = ("torch", "transformers", "deepspeed")
    monkeypatch.setattr(doctor, "PACKAGES", tuple(package for package in PACKAGES if package.module in few))
    findings = examine(Config(), 120)
    assert not findings["ready"]
    assert len(what(findings, required=True).splitlines()) == 1
    assert "torch does not import" in what(findings, required=True)
    print_findings(Console(width=80), findings)
    printed = capsys.readouterr().out
    assert "Training cannot work until you fix this" in printed
    assert "uses none" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_package_that_hangs(broken: Path) -> None:
    install(broken, "hanging", "import time\ntime.sleep(600)\n")
    assert ask("package", ("hanging",), 2)["raised"] == "no answer in 2 seconds"


def test_a_crash_is_reported_with_its_place(broken: Path) -> None:
    install(broken, "crashing", SEGFAULT)
    assert ask("package", ("crashing",), 60)["raised"] == "it crashed in crashing/__init__.py: Segmentation fault"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("import os\nprint('one', flush=True)\nos._exit(4)\n", "exit code 4"),
        ("print('{}')\n", None),
    ],
)
def test_packages_that_exit_or_print(source: str, expected: str | None, broken: Path) -> None:
    install(broken, "strange", source)
    answer = ask("package", ("strange",), 60)
    assert answer == {"missing": False} if expected is None else expected in answer["raised"]


@pytest.mark.parametrize(
    ("versions", "state"),
    [(">=0.1", "ok"), (">=99.1", "too old"), (">=0.1,<0.2", "too new"), (">=99.1,<100", "too old"), ("", "ok")],
)
def test_versions_are_compared_with_the_requirements(
    versions: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = next(package for package in PACKAGES if package.module == "peft")
    monkeypatch.setattr(doctor, "required_versions", lambda distribution: SpecifierSet(versions))
    assert describe_package(peft, {"missing": False})["state"] == state
    assert describe_package(peft, {"missing": True})["state"] == "missing"
    assert SpecifierSet(peft.pip_name.strip("'").removeprefix("peft")) == SpecifierSet(versions)


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
}  # fmt: skip


def test_a_gpu_whose_fastest_kernel_crashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` would choose it, so training fails until you name another one."""

    def answer(question: str, arguments: Any, seconds: float) -> dict[str, Any]:
        if question == "backend flash_attn":
            return {"raised": "it crashed: Segmentation fault", "root": "it crashed: Segmentation fault"}
        return GPU_MACHINE.get(question, {"missing": False} if question.startswith("package") else {})

    monkeypatch.setattr(doctor, "ask", answer)
    monkeypatch.setattr("chunkflow_cli.cli.doctor.shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    findings = examine(Config(), 120)
    assert [device["kind"] for device in findings["devices"]] == ["cuda", "cpu"]
    assert [problem for problem in findings["problems"] if problem["required"]] == [
        {
            "what": "attention flash_attn does not work here: it crashed: Segmentation fault",
            "remedy": "set model.attention=torch_flash",
            "required": True,
        }
    ]
    optional = what(findings, required=False)
    assert "there is no C compiler: triton needs one" in optional
    assert "only 1.0 MiB are free" in optional
    print_findings(Console(width=80), findings)
    printed = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, 79.16 GiB (78.23 GiB free), sm 9.0" in printed


def test_offloading_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that offloads needs a GPU, and a missing model is a problem of its own."""
    model_error = "model.path=x: not found\n  with network: check the name\n  without: copy it"
    answers = GPU_MACHINE | {
        "devices": {"gpus": [], "cuda": None, "cpu_bfloat16": True},
        "attention": {**GPU_MACHINE["attention"], "model_error": model_error},
    }  # fmt: skip
    monkeypatch.setattr(doctor, "ask", lambda question, arguments, seconds: answers.get(question, {"missing": False}))
    problems = [problem for problem in examine(load(["recipe=qwen7b"]).config, 120)["problems"] if problem["required"]]
    assert "engine.offload=optimizer" in problems[0]["what"]
    assert "one GPU of 80 GB" in problems[0]["what"]
    assert problems[1]["what"] == "model.path=x: not found"
    assert problems[1]["remedy"] == "with network: check the name; without: copy it"


@pytest.mark.parametrize(("module", "extra"), [("flash_attn", "flash"), ("fla", "fla")])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_missing_kernels_are_a_problem_only_with_a_gpu(
    module: str, extra: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {**GPU_MACHINE, f"package {module}": {"missing": True}}
    if not has_gpu:
        answers["devices"] = {"gpus": [], "cuda": None, "cpu_bfloat16": True}
    monkeypatch.setattr(doctor, "ask", lambda check, arguments, seconds: answers.get(check, {"missing": False}))
    found = [problem for problem in examine(Config(), 120)["problems"] if f"{module} is not" in problem["what"]]
    assert [(problem["remedy"], problem["required"]) for problem in found] == (
        [(f"pip install 'chunkflow-cli[{extra}]'", False)] if has_gpu else []
    )


def test_every_dependency_is_checked() -> None:
    """doctor cannot miss a dependency that it does not know. It imports packaging itself.

    It leaves out what one key asks for, whose absence a run names before it starts.
    """
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = [
        lines for extra, lines in project["optional-dependencies"].items() if extra not in ("dev", "trackers", "liger")
    ]
    names = {Requirement(line).name.lower() for lines in (project["dependencies"], *extras) for line in lines}
    assert names | {"packaging"} == {package.distribution for package in PACKAGES}


def test_a_wrong_override_exits_with_2_and_an_unusable_cache_is_a_problem(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chunkflow_cli", "doctor"]
    run = subprocess.run([*command, "chunk.sise=4"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "did you mean chunk.size?" in run.stderr
    (tmp_path / "file").write_text("")
    answer = ask("cache", (f"{tmp_path}/file/cache",), 60)
    (problem,) = cache_problems(answer)
    assert problem.required
    assert "data.cache_dir=" in problem.remedy


def test_doctor_itself_imports_no_torch() -> None:
    """It must start where importing torch crashes."""
    code = (
        "import sys; from chunkflow_cli.cli import doctor\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert run.returncode == 0, run.stderr
