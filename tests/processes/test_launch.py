"""How a run ends when ranks fail, die, hang or are asked to stop, with real processes.

The ranks are those of tests/support/launch_worker.py: they need no torch and start in a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from chunkflow_cli.config.load import load
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.processes import watch_folder
from chunkflow_cli.processes.deepspeed_launcher import deepspeed_command, exported_environment, launcher_environment
from chunkflow_cli.processes.environment import (
    check_own_variables,
    forget_other_ranks,
    local_environment,
    processes,
    rank,
    threads_of_user,
)
from chunkflow_cli.processes.failures import FailureRecord, read_failure
from chunkflow_cli.processes.first_cause import explained, first_cause, silent_failure
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.processes.heartbeat import STARTING, Heartbeat, Place, Watchdog, read_place
from chunkflow_cli.processes.hostfile import Host, read_hostfile
from chunkflow_cli.processes.watch_folder import Order, WatchFolder, follow_orders, write_order
from chunkflow_cli.training import launch
from support.ranks import run_ranks

pytestmark = pytest.mark.ranks

WORKER = Path(__file__).parents[1] / "support" / "launch_worker.py"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a launcher, without variables that an engine test in this process may have left behind."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    paths = [str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """A function: `start(scenario, processes, key=value)` starts a launcher of that scenario in a session of its own."""
    started = []

    def begin(scenario: str, processes: int = 3, **options: object) -> subprocess.Popen[str]:
        words = [str(tmp_path), str(processes), scenario, *(f"{key}={value}" for key, value in options.items())]
        launcher = subprocess.Popen(
            [sys.executable, str(WORKER), *words], env=environment, cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(launcher)
        return launcher

    yield begin
    for launcher in started:
        launcher.kill()
        for path in tmp_path.glob("pid-*"):  # after a test that failed: orphans hold the pipes open
            if is_alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
        launcher.communicate()


def ended(launcher: subprocess.Popen[str], code: int, *, within: float = 30.0) -> str:
    """Wait until a launcher exits with that code, and return what it printed on stderr."""
    out, err = launcher.communicate(timeout=within)
    assert launcher.returncode == code, out + err
    assert "Traceback" not in err
    return err


def pids(folder: Path, processes: int, within: float = 20.0) -> list[int]:
    """Return the process ids of the ranks, once all have written them."""
    deadline = time.monotonic() + within
    while True:
        texts = [path.read_text() for path in folder.glob("pid-*")]
        if len(texts) == processes and all(texts):
            return [int(text) for text in texts]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(numbers: list[int], within: float) -> None:
    deadline = time.monotonic() + within
    while any(map(is_alive, numbers)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)


def log(folder: Path, rank: int) -> str:
    return WatchFolder(folder).log(rank).read_text()


# A run without failures


def test_each_rank_knows_its_number_and_the_terminal_shows_rank_0(start: Start, tmp_path: Path) -> None:
    """Nobody can read sixteen progress bars in one terminal; the output of the other ranks must still be kept."""
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the current folder ran')")
    launcher = start("fine", 2)
    out, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, out, err) == (0, "", "stderr of rank 0\n")
    assert log(tmp_path, 0) == "stdout of rank 0\n"
    assert sorted(log(tmp_path, 1).splitlines()) == ["stderr of rank 1", "stdout of rank 1"]
    known = [(tmp_path / f"environment-{rank}").read_text().split() for rank in (0, 1)]
    assert [words[:5] for words in known] == [
        ["0", "0", "2", "2", "127.0.0.1"],
        ["1", "1", "2", "2", "127.0.0.1"],
    ]
    assert known[0][5] == known[1][5] == "?"  # rank 0 takes a port itself (`meeting.py`)
    assert int(known[0][6]) >= 1
    assert not WatchFolder(tmp_path).path.exists()


def test_the_thread_count_of_the_user_is_kept(environment: dict[str, str]) -> None:
    """If each rank had a thread for every core of the machine, the ranks would wait for each other."""
    environment.pop("OMP_NUM_THREADS", None)
    cores = len(os.sched_getaffinity(0))
    assert local_environment(environment, cores)["OMP_NUM_THREADS"] == "1"
    assert local_environment(environment, 4 * cores)["OMP_NUM_THREADS"] == "1"
    assert local_environment({**environment, "OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("users", "others", "expected"), [
    ("", {}, ""), ("7", {}, "7"), ("1", {"TORCHELASTIC_RUN_ID": "none"}, ""), ("2", {"TORCHELASTIC_RUN_ID": "none"}, "2"),
])  # fmt: skip
def test_ranks_know_the_thread_count_of_the_user(
    users: str, others: dict[str, str], expected: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measurements are stored under this number; torchrun sets it to 1 if the user has not set it."""
    environment = {**environment, "OMP_NUM_THREADS": users}
    if not users:
        del environment["OMP_NUM_THREADS"]
    made = {**environment, **others} if others else local_environment(environment, 2)
    monkeypatch.delenv("CHUNKFLOW_OMP_NUM_THREADS", raising=False)
    for name in ("CHUNKFLOW_OMP_NUM_THREADS", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        if name in made:
            monkeypatch.setenv(name, made[name])
    assert threads_of_user() == expected


# Ranks that fail


def test_the_error_names_the_rank_that_failed_first(start: Start, tmp_path: Path) -> None:
    """A rank that fails closes its connections: the others fail a moment later, and may exit before it."""
    err = ended(start("error_then_slow_end"), 1, within=10)
    assert err.startswith("error: rank 1: ValueError: spoiled\n")
    assert "    the last thing that rank 1 did\n" in err
    assert "Connection closed" not in err
    assert "raise ValueError" in log(tmp_path, 1)


def test_a_failed_rank_that_hangs_while_it_exits_does_not_hold_up_the_run(start: Start, tmp_path: Path) -> None:
    """NCCL may keep a rank from exiting after it reported its error; the others would wait as long as it hangs."""
    err = ended(start("error_that_never_ends"), 1, within=20)
    assert err.startswith("error: rank 1: ValueError: spoiled\n")


def test_debug_shows_the_traceback_of_the_rank(start: Start) -> None:
    _, err = start("error_then_slow_end", debug=1).communicate(timeout=10)
    assert 'raise ValueError("spoiled")' in err


def test_kill_9_of_a_rank_is_named_with_its_signal_and_last_lines(start: Start) -> None:
    """A rank that the kernel kills when memory runs out leaves no traceback, and the other ranks do not know why."""
    err = ended(start("killed"), 1, within=10)
    assert err.startswith("error: rank 1 was killed by SIGKILL: out of memory?")
    assert "    before the end\n" in err
    assert "Connection closed" not in err


def test_a_crash_in_native_code_shows_where_it_was(start: Start) -> None:
    """The others would wait for half an hour in a collective: the launcher kills them at once."""
    err = ended(start("crash"), 1, within=10)
    assert err.startswith("error: rank 1 was killed by SIGSEGV")
    assert "last seen at: step 3, B5" in err
    assert re.search(r"launch_worker.py\", line \d+ in crash", err)


def test_a_lost_connection_without_a_cause_says_so(start: Start) -> None:
    err = ended(start("connection_only"), 1, within=10)
    assert "rank 0: ConnectionResetError" in err
    assert "nothing is known of rank 1, 2" in err


def test_an_exit_without_an_error_is_named(start: Start) -> None:
    assert ended(start("early_death"), 1, within=10).startswith("error: rank 1 exited with code 3")


def test_a_mistake_of_the_user_is_shown_once(start: Start) -> None:
    """Every rank finds the same wrong key; the exit code is still that of a usage error."""
    assert ended(start("all_wrong"), 2, within=10) == "error: chunk.size=0 must be at least 1\n"


def test_a_mistake_that_only_one_rank_sees_names_it(start: Start) -> None:
    """Such as a file that is missing on one node."""
    assert ended(start("one_wrong"), 2, within=10) == "error: rank 1: data.path=/data: there is no such file\n"


def test_a_killed_rank_counts_before_ranks_that_lost_their_connection() -> None:
    """The launcher sees a death late, so a lost connection may look earlier; it must not count as the cause."""
    follower = FailureRecord(1, "Connection closed", True, 10.0, 0)
    killed = FailureRecord(-9, None, False, 10.2, None)
    later = FailureRecord(1, "assertion", False, 11.0, 0)
    assert first_cause({0: follower, 1: killed, 2: later}) == 1


def test_an_end_without_words_says_what_it_usually_means(tmp_path: Path) -> None:
    endings = {
        -signal.SIGKILL: "was killed by SIGKILL: out of memory? (dmesg shows the kernel's log)",
        -signal.SIGBUS: "was killed by SIGBUS: is shared memory (/dev/shm) full?",
        -signal.SIGSEGV: "was killed by SIGSEGV: a crash in native code",
        3: "exited with code 3",
    }
    for code, ending in endings.items():
        failures = {1: silent_failure(code, 1.0, tmp_path / "none.log")}
        error = explained(1, failures, 2, STARTING, tmp_path / "none.log", show_traceback=False)
        assert (type(error), str(error)) == (RunError, f"rank 1 {ending}")


# No orphans


@pytest.mark.parametrize("scenario", ["sleeping", "stopping"])
def test_kill_9_of_the_launcher_leaves_no_orphan(scenario: str, start: Start, tmp_path: Path) -> None:
    """Each worker has a session of its own: nothing else would end it, and it would hold its GPU."""
    launcher = start(scenario)
    ranks = pids(tmp_path, 3)
    assert all(map(is_alive, ranks))
    launcher.kill()
    wait_until_gone(ranks, within=20)


def test_a_worker_exits_if_its_launcher_died_while_it_started(tmp_path: Path, environment: dict[str, str]) -> None:
    """A worker can ask the kernel for its death only once Python runs; its launcher may have been killed before."""
    WatchFolder(tmp_path).path.mkdir()
    own = {"RANK": "0", "WORLD_SIZE": "2", "CHUNKFLOW_RUN_FOLDER": str(tmp_path), "CHUNKFLOW_LAUNCHER_PID": "1"}
    orphan = subprocess.run(
        [sys.executable, "-m", "launch_worker", "sleeping", str(tmp_path)], env={**environment, **own}, timeout=20
    )
    assert orphan.returncode == 1
    assert not (tmp_path / "pid-0").exists()


# Signals


def test_a_rank_exits_without_the_interpreters_shutdown(environment: dict[str, str]) -> None:
    """Leftover native threads may abort the shutdown. Exit handlers still run, and the exit code is kept."""
    code = (
        "import atexit, sys, threading, time; from chunkflow_cli.cli import main as cli\n"
        "atexit.register(print, 'the end'); threading.Thread(target=time.sleep, args=(120,)).start()\n"
        "sys.argv[1:] = ['train', 'chunk.sise=4']; cli.main()\n"
    )
    ranks = {**environment, "RANK": "0", "WORLD_SIZE": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=ranks, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout) == (2, "the end\n")
    assert "chunk.sise" in run.stderr


def test_a_crash_after_the_checkpoint_is_no_failure(start: Start, tmp_path: Path) -> None:
    """All ranks have saved and reported it: a crash of native code after that does not matter."""
    launcher = start("stopping_and_aborting")
    pids(tmp_path, 3)
    launcher.terminate()
    assert ended(launcher, 130, within=20) == "interrupted\n"


@pytest.mark.parametrize(
    "how", ["SIGTERM to the launcher", "Ctrl-C in its terminal", "a terminal that is closed", "SIGTERM to one rank"]
)
def test_every_rank_is_asked_to_stop_once_and_the_exit_code_is_130(how: str, start: Start, tmp_path: Path) -> None:
    """A second signal would stop a rank at once, without a checkpoint: Ctrl-C must not reach it twice."""
    launcher = start("stopping")
    ranks = pids(tmp_path, 3)
    if how == "SIGTERM to one rank":
        os.kill(ranks[0], signal.SIGTERM)
    elif how == "SIGTERM to the launcher":
        launcher.terminate()
    elif how == "a terminal that is closed":
        for _ in range(2):  # from the shell, and from the kernel
            os.killpg(launcher.pid, signal.SIGHUP)
            time.sleep(0.1)
    else:
        os.killpg(launcher.pid, signal.SIGINT)
    assert ended(launcher, 130, within=10) == "interrupted\n"
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(3)] == [str(int(signal.SIGTERM))] * 3


def test_a_second_signal_kills_at_once(start: Start, tmp_path: Path) -> None:
    launcher = start("sleeping")
    ranks = pids(tmp_path, 3)
    launcher.terminate()
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    ended(launcher, 130, within=10)
    wait_until_gone(ranks, within=10)


def test_ranks_that_do_not_stop_are_killed_after_the_grace_period(start: Start, tmp_path: Path) -> None:
    """A rank that hangs while saving must not hold up a shutdown, and the run must count as failed."""
    launcher = start("sleeping", grace=0.5)
    ranks = pids(tmp_path, 3)
    launcher.terminate()
    err = ended(launcher, 1, within=20)
    assert "launch.grace_seconds=0.5" in err
    assert "rank 2: step 2, saving a checkpoint" in err
    wait_until_gone(ranks, within=10)


def test_a_signal_before_anything_can_be_saved_ends_the_run(start: Start, tmp_path: Path) -> None:
    """A rank that dies from it while importing is no failure, and nobody waits for the grace period."""
    launcher = start("unprepared")
    pids(tmp_path, 3)
    launcher.terminate()
    assert ended(launcher, 130, within=15) == "interrupted\n"


# Hangs


def test_a_hang_is_found_and_the_operation_of_every_rank_named(start: Start, tmp_path: Path) -> None:
    """Collectives that do not match wait for half an hour or more, and then name nothing that helps."""
    err = ended(start("hanging", 2, hang=1), 1, within=15)
    assert "no rank started a new operation for launch.hang_seconds=1" in err
    assert re.search(r"rank 0: step 3, F5, for \d", err)
    assert re.search(r"rank 1: step 3, B5, for \d", err)
    assert re.search(r"launch_worker.py\", line \d+ in hanging", log(tmp_path, 1))


def test_a_rank_that_waits_for_one_that_works_is_no_hang(start: Start) -> None:
    ended(start("one_moves", 2, hang=4), 0)


def test_a_heartbeat_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.heartbeat"
    assert read_place(path) == STARTING
    beat = Heartbeat(path)
    beat.at(12, "F3+4")
    assert read_place(path) == Place(1, 12, "F3+4")
    beat.at(0, "ä" * 200)
    assert read_place(path).doing.startswith("ä" * 55)
    beat.at(13, "B3")
    assert str(read_place(path)) == "step 13, B3"
    Heartbeat(None).at(1, "B0")


def test_a_repeated_operation_counts_as_movement(tmp_path: Path) -> None:
    """Two steps in a row may have the same last operation: the number of records counts, not their text."""
    path = tmp_path / "rank-0.heartbeat"
    beat, now = Heartbeat(path), [0.0]
    dog = Watchdog([path], lambda: now[0])
    beat.at(1, "B0")
    assert dog.look()[0].seconds == 0
    now[0] = 5.0
    assert dog.look()[0].seconds == 5
    beat.at(1, "B0")
    assert dog.look()[0].seconds == 0


# The number of ranks, and their nodes


@pytest.mark.parametrize(("given", "said"), [
    ({"RANK": None}, "RANK is not set"),
    ({"RANK": "abc"}, "RANK=abc is not a number"),
    ({"RANK": "-1"}, "RANK=-1 is not a number"),
    ({"RANK": "2"}, "RANK=2 is not below it"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
    ({"WORLD_SIZE": "0"}, "that is not a number of ranks"),
    ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is not a number"),
    ({"LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE=1.5 is not a number"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT=x is not a number"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
])  # fmt: skip
def test_wrong_variables_of_a_launcher_are_named(
    given: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Otherwise the ranks wait for each other, or DeepSpeed looks for MPI."""
    monkeypatch.setenv("CHUNKFLOW_OMP_NUM_THREADS", "")  # `worker.enter` would set them
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    right = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**right, **given}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", "recipe=tiny_random"])
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("given", [
    {"RANK": "abc"}, {"RANK": "3"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "7"}, {"MASTER_PORT": "x"},
])  # fmt: skip
def test_a_process_on_its_own_ignores_what_scripts_left(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert (rank(), processes()) == (0, 1)
    forget_other_ranks()
    assert not any(name in os.environ for name in LAUNCHER_VARIABLES)  # DeepSpeed and torch look there, too


@pytest.mark.parametrize(("given", "said"), [
    ({"CHUNKFLOW_RUN_FOLDER": "/x"}, "CHUNKFLOW_RUN_FOLDER=/x in the environment makes this process a rank"),
    ({"CHUNKFLOW_RUN_FOLDER": "/x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "of a run, but RANK is not set"),
    ({"CHUNKFLOW_RUN_FOLDER": "/x", "CHUNKFLOW_LAUNCHER_PID": "1"}, "LAUNCHER_PID=1 in the environment is not the proc"),
    ({"CHUNKFLOW_LAUNCHER_PID": "abc"}, "CHUNKFLOW_LAUNCHER_PID=abc in the environment is not the process that"),
    ({"CHUNKFLOW_PARENT_PID": ""}, "unset CHUNKFLOW_PARENT_PID: chunkflow sets it"),
])  # fmt: skip
def test_variables_of_our_own_processes_in_the_environment_of_a_user_are_named(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """They would make the process a rank, which looks for its launcher, or end it without a word."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(said)):
        check_own_variables()


def test_a_command_checks_our_own_variables(environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "chunkflow_cli", "--version"]
    stray = {**environment, "CHUNKFLOW_PARENT_PID": "1"}
    ended = subprocess.run(command, env=stray, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: CHUNKFLOW_PARENT_PID=1 in the environment")


def test_our_own_variables_are_right_in_processes_that_we_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in ("CHUNKFLOW_PARENT_PID", "CHUNKFLOW_LAUNCHER_PID"):
        monkeypatch.setenv(name, str(os.getppid()))
    check_own_variables()
    monkeypatch.setenv("CHUNKFLOW_RUN_FOLDER", "/x")
    check_own_variables()


def test_an_error_of_a_rank_without_a_watch_folder_is_printed(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """A launcher on another node cannot read what this node cannot write."""
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**ranks, "CHUNKFLOW_RUN_FOLDER": "/x", "CHUNKFLOW_OMP_NUM_THREADS": ""}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", "recipe=tiny_random"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: rank 1: the run's folder /x does not exist on this node\n")


def test_the_number_of_ranks_is_the_launchers(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """torchrun and `launch.processes` both say it; a plan for another number of ranks would hang."""
    alone = load(["recipe=tiny_random"])
    assert launch.with_processes(alone) is alone
    assert not launch.is_needed(alone)
    assert launch.is_needed(load(["recipe=tiny_random", "launch.processes=2"]))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.is_needed(load(["recipe=tiny_random", "launch.processes=2"]))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="RANK"):
        launch.with_processes(alone)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node-1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    joined = launch.with_processes(alone)
    assert (joined.config.launch.processes, joined.tree.launch.processes) == (4, 4)
    assert not launch.is_needed(joined)
    with pytest.raises(UsageError, match=r"launch.processes=2, but the launcher has started 4"):
        launch.with_processes(load(["recipe=tiny_random", "launch.processes=2"]))
    with pytest.raises(UsageError, match=r"parallel.pipeline=3"):
        launch.with_processes(load(["recipe=tiny_random", "parallel.pipeline=3"]))


def test_a_hostfile_gives_the_number_of_ranks(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nnode-1 slots=8\n\nnode-2   slots=4 # half of it\n")
    words = ["recipe=tiny_random", f"launch.hostfile={path}"]
    assert launch.with_processes(load(words)).config.launch.processes == 12
    assert launch.is_needed(load(words))
    with pytest.raises(UsageError, match="has slots for 12"):
        launch.with_processes(load([*words, "launch.processes=8"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1\n", "line 1: 'node-1' does not have the form"),
        ("node-1 slots=0\n", "line 1"),
        ("a slots=1\na slots=2\n", "line 2: a is listed twice"),
        ("# nothing\n", "names no host"),
        ("", "names no host"),
        ("Node-1 slots=1\nnode-1 slots=2\n", "line 2: node-1 is listed twice"),
        ("a slots=" + "9" * 5000, "line 1"),
        ("a slots=-1\n", "line 1"),
        ("a slots=\u0663\n", "line 1"),
        *(
            (f"a slots=1\n{name} slots=2\n", f"line 2: {name!r} is not the name or address of a host")
            for name in (
                "-oProxyCommand=touch${IFS}x",
                "x;id",
                "$(id)",
                "`id`",
                "a|b",
                "a,b",
                "node[1-4]",
                "a@-ob",
                "-l@b",
                "a@b@c",
                "a/b",
                "..",
                "%h",
                "'a'",
                "n\u00f6de",
                "a:b",
                "-1::2",
                "[::1]",
            )
        ),
    ],
)
def test_a_wrong_hostfile_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_hostfile(str(tmp_path / "hosts"))
    with pytest.raises(UsageError, match="no such file"):
        read_hostfile(str(tmp_path / "none"))


@pytest.mark.parametrize("name", [
    "localhost", "node-1.example.org", "10.0.0.7", "gpu_3", "me@node-1", "fe80::1%eth0", "2001:db8::7", "::1", "7",
])  # fmt: skip
def test_names_and_addresses_of_hosts_are_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(f"\ufeff{name} slots=2\r\n".encode())
    assert read_hostfile(str(tmp_path / "hosts")) == [Host(name, 2)]


# What others leave in the watch folder


def test_garbage_among_the_orders_does_not_end_the_thread_that_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that thread, a rank on another machine outlives its launcher."""
    watch, obeyed, ended = WatchFolder(tmp_path), [], threading.Event()
    watch.prepare()
    monkeypatch.setattr(watch_folder, "ORDERS_SECONDS", 0.005)
    monkeypatch.setattr("os.kill", lambda pid, number: obeyed.append(number))
    thread = threading.Thread(target=follow_orders, args=(watch, ended, 60.0))
    thread.start()
    watch.lease.write_bytes(b"\xff\xfe")
    for garbage in (b"\xff\xfe\x00", b"name", b"__class__", b"STOP\n" * 2, b"9", b""):
        watch.order.write_bytes(garbage)
        time.sleep(0.03)
    watch.order.unlink()
    (watch.order / "inside").mkdir(parents=True)
    time.sleep(0.03)
    write_order(watch, Order.STOP)
    deadline = time.monotonic() + 20
    while not obeyed and time.monotonic() < deadline:
        time.sleep(0.005)
    ended.set()
    thread.join()
    assert obeyed == [signal.SIGTERM]


def test_garbage_among_the_records_is_no_record(tmp_path: Path) -> None:
    """Such as half a file; the rank's exit code says that it failed."""
    path = tmp_path / "record"
    good = {"exit_code": 1, "message": "m", "is_follower": False, "at": 1.0, "log_bytes": 0}
    for text in (
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        json.dumps({**good, "more": 1}),
        json.dumps({**good, "at": "x"}),
    ):
        path.write_text(text)
        assert read_failure(path) is None
        assert read_place(path) == STARTING
    path.write_bytes(b"\xff\xfe")
    assert read_failure(path) is None
    path.write_text(json.dumps(good))
    assert read_failure(path) == FailureRecord(**good)  # type: ignore[arg-type]
    assert read_place(tmp_path) == STARTING  # a folder


def test_a_link_in_a_strangers_run_folder_deletes_nothing(tmp_path: Path) -> None:
    """The watch folder is emptied before a run: not what a link in its place points to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    watch = WatchFolder(tmp_path / "run")
    watch.run_folder.mkdir()
    watch.path.symlink_to(precious)
    watch.prepare()
    assert (precious / "thesis").exists()
    assert watch.path.is_dir()
    assert not watch.path.is_symlink()


# DeepSpeed's launcher

AWKWARD_WORDS = [
    "chunk.size=4096", "tune.ks=[1,2]", "data.path=my chats.jsonl", "+a='b c'", "x=$HOME", "y=a $HOME `id` \"b\" c\\d",
    "z={a: 1}", "w=a;b&c", "~optim", "v=*",
]  # fmt: skip


def test_words_reach_other_nodes_unchanged(tmp_path: Path, environment: dict[str, str]) -> None:
    """The launcher passes them through a shell there, which would expand brackets, stars and dollar signs.

    DeepSpeed's own code makes the command for the other node; a local shell shows how that command reads the words.
    """
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    hosts = [Host("node-1", 8), Host("node-2", 8)]
    command = deepspeed_command(hosts, hostfile=tmp_path / "hostfile", module="echo", words=AWKWARD_WORDS)
    assert command[1:4] == ["-P", "-m", "deepspeed.launcher.runner"]
    arguments = runner.parse_args(command[4:])
    assert (arguments.hostfile, arguments.module, arguments.no_local_rank) == (str(tmp_path / "hostfile"), True, True)
    arguments.master_addr = "10.0.0.1"
    remote = PDSHRunner(arguments, "d29ybGQ=")
    remote.add_export("CHUNKFLOW_RUN_FOLDER", "/shared/my run")
    sent, _, _ = remote.get_cmd({}, {"node-1": [0], "node-2": [0]})
    words = sent[sent.index("echo") + 1 :]
    shown = [sys.executable, "-c", "'import json, sys; print(json.dumps(sys.argv[1:]))'"]
    line = " ".join([*shown, *words])  # pdsh joins its words with spaces, as ssh does
    assert json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout) == AWKWARD_WORDS


def test_other_nodes_get_the_variables_of_the_user_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads only one environment file: ours must include the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth0\n")
    text = exported_environment({"OMP_NUM_THREADS": "3"}, WatchFolder(Path("/shared/run")))
    assert text == (
        f"NCCL_SOCKET_IFNAME=eth0\nCHUNKFLOW_RUN_FOLDER=/shared/run\nCHUNKFLOW_WORKING_FOLDER={tmp_path}\n"
        "CHUNKFLOW_OMP_NUM_THREADS=3\nOMP_NUM_THREADS=3\n"
    )


def test_folders_reach_other_nodes_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own code writes the commands for the other node, where a shell would run what is in a name."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    folder = tmp_path / 'my $(touch pwned) `touch pwned` "run" \\ $HOME'
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = exported_environment({}, WatchFolder(folder / "run"))
    remote = PDSHRunner(argparse.Namespace(user_args=[], user_script=""), "d29ybGQ=")
    for line in text.splitlines():
        remote.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in remote.exports.items())
    shown = 'printf "%s\\n" "$CHUNKFLOW_RUN_FOLDER" "$CHUNKFLOW_WORKING_FOLDER"'
    out = subprocess.run(["bash", "-c", exports + shown], cwd=tmp_path, capture_output=True, text=True).stdout
    assert out.splitlines() == [str(folder / "run"), str(folder)]
    assert not list(tmp_path.rglob("pwned"))


def test_workers_on_other_nodes_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher puts its own current folder on the workers' path; the paths of the user stay."""
    monkeypatch.chdir(tmp_path)
    given = {"PYTHONPATH": os.pathsep.join(["mine", "", "/theirs"])}
    made = launcher_environment(given, WatchFolder(tmp_path / "run"), tmp_path / "environment")
    assert made["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "mine"), "/theirs"])
    assert made["PYTHONSAFEPATH"] == "1"


def hang_under_a_foreign_launcher(folder: str) -> None:
    """Hang at different operations on two ranks. Runs on each of them."""
    watch, rank = WatchFolder(Path(folder)), int(os.environ["RANK"])
    with watched_together(watch, rank, 2, limit_seconds=2.0):
        Heartbeat(watch.heartbeat(rank)).at(3, ("F5", "B5")[rank])
        time.sleep(60)


def test_ranks_of_a_foreign_launcher_find_a_hang_themselves(tmp_path: Path) -> None:
    """Collectives wait for a day, and torchrun does not know our operations."""
    WatchFolder(tmp_path).prepare()
    with pytest.raises(
        AssertionError, match=r"exit codes \[-9, -9\]|exit codes \[-9, None\]|exit codes \[None, -9\]"
    ) as end:
        run_ranks(2, "test_launch:hang_under_a_foreign_launcher", str(tmp_path), timeout=60)
    assert "error: no rank started a new operation for launch.hang_seconds=2: the run hangs and is killed" in str(
        end.value
    )
    assert "  rank 1: step 3, B5, for 2." in str(end.value)
    for number in range(2):
        assert "in hang_under_a_foreign_launcher" in log(tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["stopping", "error_then_slow_end"])
def test_deepspeeds_launcher_starts_the_ranks_of_a_hostfile(scenario: str, start: Start, tmp_path: Path) -> None:
    """The real launcher, on one machine. It answers a signal or a dead rank by killing the ranks: the request to save
    must bypass it, and a rank's error must get through."""
    for name in ("json", "datasets", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current folder ran')")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = start(scenario, 2, hostfile=hosts)
    if scenario == "stopping":
        pids(tmp_path, 2, within=120)
        launcher.terminate()
        assert ended(launcher, 130, within=60) == "interrupted\n"
        saved = [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)]
        assert saved == [str(int(signal.SIGTERM))] * 2
    else:
        err = ended(launcher, 1, within=120)
        assert err.startswith("error: rank 1: ValueError: spoiled\n")
        assert "    the last thing that rank 1 did\n" in err


# Ranks of another launcher


def joined(arguments: Any) -> Any:
    """Open the run's folder as `train` does, and once more while it is open; return the results. Runs on each rank."""
    from chunkflow_cli.data.source import LocalFiles
    from chunkflow_cli.engine import close_process_group
    from chunkflow_cli.training.joining import load_data, open_folder, watched

    hashed: list[Any] = []
    plain = LocalFiles.fingerprint
    LocalFiles.fingerprint = lambda self: (hashed.append(self), plain(self))[1]  # type: ignore[method-assign]
    loaded = launch.with_processes(load(arguments["words"]))
    folder, data = open_folder(loaded, None)
    samples = load_data(loaded.config, None, data).train
    read = (len(hashed), [sample.input_ids.tolist() for sample in samples])
    with watched(folder.path, hang_seconds=0):
        print(f"from rank {os.environ['RANK']}", flush=True)
    try:
        open_folder(loaded, None)
        error = ""
    except UsageError as raised:
        error = str(raised)
    finally:
        close_process_group()
    return str(folder.path), folder.checkpoint, loaded.config.launch.processes, folder._lock is not None, error, *read


def test_ranks_of_another_launcher_share_the_folder_that_rank_0_locks(tmp_path: Path) -> None:
    """Otherwise each rank would open a folder of its own or find it locked, and would tokenize the data itself."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [3, 4, 5, number]}) + "\n" for number in range(6, 12)))
    run = tmp_path / "run"
    words = ["data.format=tokens", f"data.path={data}", f"data.cache_dir={tmp_path}", f"train.output_dir={run}"]
    taken = f"train.output_dir={run}: another process is training in this folder\n"
    taken += "  wait for it to end, or choose another folder"
    first, second = run_ranks(2, "test_launch:joined", {"words": words})
    samples = [[3, 4, 5, number] for number in range(6, 12)]
    assert first == (str(run), None, 2, True, taken, 1, samples)
    assert second == (str(run), None, 2, False, taken, 0, samples)
    assert log(run, 1) == "from rank 1\n"
    assert len(list((tmp_path / "tokens").glob("[0-9a-f]*"))) == 1
