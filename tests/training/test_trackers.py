"""Trackers get each row once, go on under the same id, and never end or delay a run, whatever they do.

The libraries are real. `make test-trackers` installs MLflow, which is too large for everyone's environment.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import LogBackend
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes.environment import module_command
from chunkflow_cli.training import required_inputs
from chunkflow_cli.training.metrics import StepMetrics
from chunkflow_cli.training.trackers import following
from chunkflow_cli.training.trackers.backends import PACKAGES, flattened

pytestmark = pytest.mark.processes
DESCRIBED = {"optim": {"lr": 0.5, "betas": [0.9, 0.999]}, "run_plan": {"chunk_size": 64}}
FAKE = """
import os, time
class Run:
    def __init__(self): self.rows = 0
    def log(self, values, step):
        if step == 2: {log}
        print("row", step)
    def finish(self):
        {finish}
def init(*args, **kwargs):
    {init}
    return Run()
"""
"""A package trackio that fails in one way."""


def row(step: int) -> StepMetrics:
    return StepMetrics(step, 1.0 / step, 1.0, 0.1, 1, 1, 1, 1, 0, 0.1, 10.0, 0.1, 5, eval_loss=None)


def follow(tracker: str, folder: Path, steps: Sequence[int], error: type[BaseException] | None = None) -> str:
    """Train steps of a run as far as its tracker sees it, and return what is printed."""
    folder.mkdir(exist_ok=True)
    run = {"run_name": "mine", "project": "there", "described": DESCRIBED, "first_step": steps[0]}
    printed = io.StringIO()
    console = Console(file=printed, width=500)
    try:
        with following.followed([LogBackend.jsonl, LogBackend(tracker)], run, folder, console) as write:
            for step in steps:
                write(row(step))
            if error is not None:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    return printed.getvalue()


def test_wandb_offline_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill a run repeats steps: W&B gets each once. What it has recorded is read from its own files."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    said = follow("wandb", tmp_path / "run", [1, 2, 3], KeyboardInterrupt) + follow("wandb", tmp_path / "run", [3, 4])
    assert said.count("(wandb sync uploads it)") == said.count("\n") == 2
    # Two runs within a second get folders of one name and a suffix.
    (identity,) = {path.name.split("-")[3][:8] for path in (tmp_path / "run/trackers/wandb").glob("offline-run-*")}
    steps, configs, runs, codes = [], {}, set(), []
    for file in sorted((tmp_path / "run/trackers/wandb").glob("offline-run-*/*.wandb")):
        for content in leveldb_records(file.read_bytes()):
            record = Record.FromString(content)
            steps += [record.history.step.num] if record.HasField("history") else []
            configs |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            runs |= (
                {(record.run.run_id, record.run.project, record.run.display_name)} if record.HasField("run") else set()
            )
            codes += [record.exit.exit_code] if record.HasField("exit") else []
    assert steps == [1, 2, 3, 4]
    assert runs == {(identity, "there", "mine")}
    assert {name: configs[name] for name in DESCRIBED} == DESCRIBED
    assert codes == [1, 0]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB, parts with 7 bytes of header in them."""
    position, record = 7, b""  # after W&B's own header
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:
            position += left
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_trackio_goes_on_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    follow("trackio", tmp_path / "run", [1, 2, 3], ValueError)
    said = follow("trackio", tmp_path / "run", [3, 4])
    assert said == "trackio: trackio show --project 'there'\n"
    follow("trackio", tmp_path / "other", [1])  # of the same name
    read = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps({r: [[x['step'] for x in S.get_logs('there', r)], S.get_run_config('there', r)['optim.lr']]"
        " for r in S.get_runs('there')}))"
    )
    runs = json.loads(subprocess.run([sys.executable, "-c", read], capture_output=True, check=True).stdout)
    assert sorted(runs.values()) == [[[1], 0.5], [[1, 2, 3, 4], 0.5]]
    assert all(name.startswith("mine-") for name in runs)


def test_mlflow_on_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the middle: the run goes on, and the rows that are missing are counted."""
    pytest.importorskip("mlflow.server", reason="make test-trackers installs mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(tmp_path) as (uri, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        said = follow("mlflow", tmp_path / "run", [1, 2, 3], KeyboardInterrupt)
        assert said.startswith(f"mlflow: {uri}/#/experiments/1/runs/")
        assert said == follow("mlflow", tmp_path / "run", [3, 4])
        identity = said.strip().rpartition("/")[2]
        run = asked(f"{uri}/api/2.0/mlflow/runs/get?run_id={identity}")["run"]
        assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "mine")
        params = {each["key"]: each["value"] for each in run["data"]["params"]}
        assert params == {name: str(value) for name, value in flattened(DESCRIBED).items()}
        history = asked(f"{uri}/api/2.0/mlflow/metrics/get-history?run_id={identity}&metric_key=loss")["metrics"]
        assert [(each["step"], each["value"]) for each in history] == [(step, 1 / step) for step in (1, 2, 3, 4)]
        os.killpg(server.pid, signal.SIGKILL)
        said = follow("mlflow", tmp_path / "run", [5, 6])
    assert said.startswith("warning: mlflow: API request to ")
    assert said.endswith("; the run continues without it\nwarning: mlflow missed 2 of 2 rows; metrics.jsonl has them\n")


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "mlflow", "server", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]  # fmt: skip
    server = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{uri}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield uri, server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def asked(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("fault", "warned", "done"),
    [
        ({"init": "raise ValueError('no <key>')"}, "trackio: no <key>; the run continues without it", 0),
        ({"init": "os._exit(3)"}, "trackio: its process has ended; see ", 0),
        ({"log": "raise ValueError('full')"}, "trackio: full; the run continues without it", 2),
        (
            {"log": "time.sleep(99)"},
            "trackio did not finish within 2 s, and was stopped; what it has not sent is in ",
            1,
        ),
        ({"finish": "time.sleep(99)"}, "trackio did not finish within 2 s, and was stopped; what it has not", 3),
        ({"finish": "raise SystemExit"}, "trackio: SystemExit; the run continues without it", 3),
    ],
    ids=["at start", "crash", "in the middle", "hangs in the middle", "hangs at the end", "at the end"],
)
def test_a_tracker_that_fails(
    fault: dict[str, str], warned: str, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text(FAKE.format(**{"init": "pass", "log": "pass", "finish": "pass", **fault}))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    # Only one that hangs may run into it: any other one may take long to start on a busy machine.
    monkeypatch.setattr(following, "CLOSE_SECONDS", 2.0 if "sleep" in str(fault) else 60.0)
    lines = follow("trackio", tmp_path / "run", [1, 2, 3]).splitlines()
    if "init" not in fault:
        assert lines.pop(0) == "trackio: trackio show --project 'there'"
    assert lines.pop(0).startswith(f"warning: {warned}")
    if done < 3:
        assert lines.pop(0) == f"warning: trackio missed {3 - done} of 3 rows; metrics.jsonl has them"
    assert not lines, "one line says that it fails, and one how much it missed"
    assert "row 1" in (tmp_path / "run/trackers/trackio.log").read_text() or "init" in fault


def test_a_tracker_ends_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed tells its tracker nothing."""
    (tmp_path / "trackio.py").write_text(FAKE.format(init="pass", log="pass", finish="print('end')"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    run = {"folder": str(tmp_path), "run_name": "mine", "project": None, "described": {}, "first_step": 1}
    first = json.dumps({"tracker": "trackio", "kept": str(tmp_path / "kept.json"), "run": run}) + "\n"
    command = module_command("chunkflow_cli.training.trackers.process")
    ended = subprocess.run(command, input=first.encode(), capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"end\n")


def test_a_tracker_that_is_not_installed_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "wandb", ("no-such-package",))
    loaded = load(["recipe=tiny_random", "log.backends=[jsonl,tensorboard,wandb]"])
    with pytest.raises(UsageError) as caught:
        required_inputs.check_inputs(loaded)
    assert str(caught.value) == (
        "log.backends=wandb needs the package wandb, which is not installed: pip install wandb"
    )
