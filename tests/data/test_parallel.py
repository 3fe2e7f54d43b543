"""Encoding in worker processes: they leave the user's program alone, and their failures are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


class Sleeping:
    """An encoder that is at work for long, and says which process it is in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, batch: Any) -> Any:
        (self.folder / f"pid-{os.getpid()}").touch()
        time.sleep(60)


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


def test_workers_end_with_a_killed_parent(source: Source, tmp_path: Path) -> None:
    """One that is at work does not look at its connection, and would hold its memory until it is done."""
    code = (
        "from chunkflow_cli.data import parallel; from chunkflow_cli.data.source import open_source\n"
        "from pathlib import Path; from test_parallel import Sleeping\nparallel.BYTES_PER_WORKER = 1\n"
        f"list(parallel.encode_source(open_source({source.names[0]!r}), Sleeping(Path({str(tmp_path)!r})), num_workers=2))"
    )
    paths = os.pathsep.join([str(SRC), str(Path(__file__).parent), str(Path(__file__).parents[1])])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("pid-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    workers = [Path("/proc", path.name.removeprefix("pid-")) for path in found]
    while any(worker.exists() and "(zombie)" not in (worker / "status").read_text() for worker in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)
