"""Encoding in worker processes: they leave the user's program alone, and their failures are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli.data import parallel
from chunkflow_cli.data.parallel import encode_source
from chunkflow_cli.data.source import Source, open_source
from chunkflow_cli.errors import RunError

pytestmark = pytest.mark.processes

SRC = Path(__file__).parents[2] / "src"
PROGRAM = """
print("started", flush=True)
from chunkflow_cli.config.schema import DataConfig
from chunkflow_cli.data import parallel
from chunkflow_cli.data.dataset import tokenize
parallel.BYTES_PER_WORKER = 1
config = DataConfig(path={data!r}, cache_dir={cache!r}, num_workers=2)
data = tokenize(config, model_path="none", model_limit=None, vocab_size=None, trust_remote_code=False)
print(len(data))
"""


class Killed:
    """An encoder whose process dies, as when memory runs out."""

    def encode(self, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Failing:
    """An encoder with a bug."""

    def encode(self, batch: Any) -> Any:
        raise ZeroDivisionError(f"at line {batch.lines[0]}")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n' * 1000)
    return open_source(str(path))


@pytest.mark.parametrize("from_stdin", [False, True], ids=["file", "stdin"])
def test_workers_do_not_run_the_users_program_again(from_stdin: bool, source: Source, tmp_path: Path) -> None:
    """Processes of `multiprocessing` would: the program has no `if __name__ == "__main__"`."""
    code = PROGRAM.format(data=source.names[0], cache=str(tmp_path / "cache"))
    program = tmp_path / "program.py"
    program.write_text(code)
    run = subprocess.run(
        [sys.executable, "-" if from_stdin else str(program)], input=code, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "started\n1000\n"), run.stderr


def test_a_killed_worker_fails_the_run(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch is lost: the run must neither hang nor go on without it."""
    monkeypatch.setattr(parallel, "BYTES_PER_WORKER", 1)
    with pytest.raises(RunError, match=r"was killed \(exit status -9(.|\n)*data\.num_workers=1"):
        list(encode_source(source, Killed(), num_workers=2))  # type: ignore[arg-type]


def test_an_error_in_a_worker_is_raised_with_its_traceback(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BYTES_PER_WORKER", 1)
    with pytest.raises(ZeroDivisionError, match="at line 1") as raised:
        list(encode_source(source, Failing(), num_workers=2))  # type: ignore[arg-type]
    assert "in encode" in "".join(raised.value.__notes__)
