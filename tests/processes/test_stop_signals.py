"""Which signals stop a run, end a command or are ignored, and what ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkflow_cli.cli import train
from chunkflow_cli.processes.stop_signals import STOP_SIGNALS, interruptible, stop_on_signals
from chunkflow_cli.processes.worker import die_with

SRC = Path(__file__).parents[2] / "src"
INT, TERM, HUP = STOP_SIGNALS


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with the handlers of a program, and check that they are restored."""
    for name in ("WORLD_SIZE", "CHUNKFLOW_RUN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    own = {INT: signal.default_int_handler, TERM: signal.SIG_DFL, HUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    if after[HUP] != signal.SIG_IGN:
        assert after == own


@pytest.mark.parametrize(("sent", "is_stopped_at_once"), [
    ([INT], False), ([TERM], False), ([HUP], False),
    ([INT, INT], True), ([INT, TERM], True), ([TERM, TERM], True),
    ([HUP, HUP], False),  # the shell and the kernel both send it when a terminal is closed
    ([TERM, HUP], False), ([HUP, TERM], False),  # systemd sends both to a session
    ([HUP, TERM, INT], True),
])  # fmt: skip
def test_the_first_signal_asks_and_a_second_stops_at_once(sent: list[signal.Signals], is_stopped_at_once: bool) -> None:
    asked = []
    try:
        with stop_on_signals(lambda: asked.append(1)):
            for number in sent:
                os.kill(os.getpid(), number)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    assert (asked, stopped) == ([1], is_stopped_at_once)


def test_a_run_under_nohup_does_not_hear_hang_ups() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    asked = []
    for block in (stop_on_signals(lambda: asked.append(1)), interruptible()):
        with block:
            os.kill(os.getpid(), HUP)
    assert not asked
    assert signal.getsignal(HUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_lets_a_command_clean_up(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), number)


def test_signals_end_a_rank_without_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its run wait for it in native code, which no exception leaves."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interruptible():
        assert (signal.getsignal(TERM), signal.getsignal(HUP)) == (signal.SIG_DFL, signal.SIG_DFL)


def test_a_background_command_does_not_hear_the_ctrl_c_of_its_script() -> None:
    signal.signal(INT, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), INT)
        assert signal.getsignal(INT) == signal.SIG_IGN
    signal.signal(INT, signal.default_int_handler)


@pytest.mark.processes
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_multirun_passes_signals_on_and_ends(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves; runs that have not started are not started."""
    code = (
        f"import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        f"os.kill({os.getpid()}, {int(number)})\ntime.sleep(20)\n"
    )
    monkeypatch.setattr(train, "module_command", lambda module, words: [sys.executable, "-c", code])
    with pytest.raises(KeyboardInterrupt), interruptible():
        train.run_sweep(["recipe=tiny_random", "train.seed=1,2", f"train.output_dir={tmp_path}"], config_dir=None,
                        json_output=False)  # fmt: skip


CHILD = "import os, signal, sys, time\nfrom chunkflow_cli.processes.worker import end_with_parent\nend_with_parent()\n"


@pytest.mark.processes
def test_a_child_is_asked_to_stop_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The runs of a multirun save, and the processes that tune and tokenize end."""
    child = CHILD + (
        "assert 'CHUNKFLOW_PARENT_PID' not in os.environ\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(0)))\n"
        "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(20)\n"
    )
    parent = (
        "import subprocess, sys; from chunkflow_cli.processes.environment import child_environment\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], env=child_environment(), start_new_session=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE, timeout=20
    )  # reads until the child, too, has closed stdout
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"saved\n")


@pytest.mark.processes
def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    """Python needs half a second for them, in which an impatient user has pressed Ctrl-C already."""
    (tmp_path / "typer.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(20)")
    command = [sys.executable, "-P", "-m", "chunkflow_cli", "--version"]
    paths = os.pathsep.join([str(tmp_path), str(SRC)])
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"interrupted\n")


@pytest.mark.processes
def test_files_in_the_current_folder_are_no_modules(tmp_path: Path) -> None:
    """A folder with data of a stranger may hold a json.py; `python -m` would run it, and `chunkflow` does not."""
    for name in ("json", "typer", "rich", "hydra", "shlex"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    command = [sys.executable, "-m", "chunkflow_cli", "recipes", "list", "--json"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(SRC)}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "tiny_random" in ended.stdout


def test_only_the_process_that_started_it_counts_as_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: type("C", (), {"prctl": lambda *_: 0})())
    die_with(os.getppid())
    assert not ended
    die_with(os.getpid())
    assert ended == [1]


@pytest.mark.processes
def test_an_interrupted_command_ends_with_130() -> None:
    """Python exits as if killed by SIGINT after a KeyboardInterrupt passed an `exec`, as in the imports of torch."""
    code = (
        "import sys; from chunkflow_cli.cli import main as cli, recipes\n"
        "recipes.list_recipes = lambda *words, **more: exec('raise KeyboardInterrupt')\n"
        "sys.argv[1:] = ['recipes', 'list']; cli.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (130, b"interrupted\n")
