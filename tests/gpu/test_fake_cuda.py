"""Whole steps with tensors of a CUDA device that does not exist: all on one device, and nothing waits for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
CASES = [
    "llama:bfloat16:host:selective", "gpt_oss, sinks:bfloat16:none:none", "deepseek_v3, narrow values:bfloat16:none:none",
    "mixtral:float32:host:none", "qwen3_5:bfloat16:host:full",
]  # fmt: skip


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for torch's CUDA library is compiled by g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's CUDA library is there itself")
def test_a_step_stays_on_its_device_and_waits_once(tmp_path: Path) -> None:
    """A tensor that is made elsewhere is an error of torch here, as on a GPU. Only the losses are read, at the end."""
    root, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    subprocess.run(
        ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(TESTS / "support/fake_cuda.cpp"),
         "-o", str(library), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"], check=True,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "support.fake_cuda", *CASES], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
             "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(root / "lib")},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [case for case, _ in results] == CASES
    for case, waits in results:
        assert set(waits) == {"item in runner.py result"}, case
