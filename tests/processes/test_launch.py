"""Launching: what becomes of a run when ranks fail, die, hang or are told to stop, with real processes.

The ranks are those of launch_worker.py: they need no torch and start in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.processes import start as ranks_start
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.processes.heartbeat import STARTING, Heartbeat, Place, Watchdog, read_place
from chunkflow_cli.processes.supervisor import Failure, first_cause
from chunkflow_cli.processes.worker import WatchFolder, threads_of_user
from chunkflow_cli.training import launch
from support.ranks import run_ranks

WORKER = Path(__file__).parents[1] / "support" / "launch_worker.py"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a launcher; an engine test in this process may have left a launcher's variables behind."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    paths = [str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """`start(scenario, processes, key=value)`: a launcher of that scenario, in a session of its own."""
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
        for path in tmp_path.glob("pid-*"):  # a test that has failed leaves orphans, which hold the pipes
            if is_alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
        launcher.communicate()


def ended(launcher: subprocess.Popen[str], code: int, *, within: float = 30.0) -> str:
    """What it printed on stderr, once it has ended with that code."""
    out, err = launcher.communicate(timeout=within)
    assert launcher.returncode == code, out + err
    assert "Traceback" not in err
    return err


def pids(folder: Path, processes: int, within: float = 20.0) -> list[int]:
    """Of the ranks, once all have said so."""
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


# A run that ends well


def test_each_rank_knows_itself_and_one_terminal_shows_rank_0(start: Start, tmp_path: Path) -> None:
    """Sixteen progress bars in one terminal are none; what the others say must be somewhere."""
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
    assert known[0][5] == known[1][5]
    assert int(known[0][6]) >= 1
    assert not WatchFolder(tmp_path).path.exists()


def test_a_thread_count_of_the_user_is_kept(environment: dict[str, str]) -> None:
    """Each rank with a thread for every core of the machine makes them wait for each other."""
    environment.pop("OMP_NUM_THREADS", None)
    cores = len(os.sched_getaffinity(0))
    assert ranks_start.local_environment(environment, cores)["OMP_NUM_THREADS"] == "1"
    assert ranks_start.local_environment(environment, 4 * cores)["OMP_NUM_THREADS"] == "1"
    assert ranks_start.local_environment({**environment, "OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("users", "others", "expected"), [
    ("", {}, ""), ("7", {}, "7"), ("1", {"TORCHELASTIC_RUN_ID": "none"}, ""), ("2", {"TORCHELASTIC_RUN_ID": "none"}, "2"),
])  # fmt: skip
def test_ranks_know_the_thread_count_of_the_user(
    users: str, others: dict[str, str], expected: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By it they find what was measured; torchrun sets it to 1 where the user has not."""
    environment = {**environment, "OMP_NUM_THREADS": users}
    if not users:
        del environment["OMP_NUM_THREADS"]
    made = {**environment, **others} if others else ranks_start.local_environment(environment, 2)
    monkeypatch.delenv("CHUNKFLOW_OMP_NUM_THREADS", raising=False)
    for name in ("CHUNKFLOW_OMP_NUM_THREADS", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        if name in made:
            monkeypatch.setenv(name, made[name])
    assert threads_of_user() == expected


# Ranks that fail


def test_the_first_cause_is_named_and_not_those_that_follow(start: Start, tmp_path: Path) -> None:
    """A rank that fails closes its connections: the others fail a moment later, and may well end before it."""
    err = ended(start("error_then_slow_end"), 1, within=10)
    assert err.startswith("error: rank 1: ValueError: spoilt\n")
    assert "    the last thing that rank 1 did\n" in err
    assert "Connection closed" not in err
    assert "raise ValueError" in log(tmp_path, 1)


def test_a_rank_that_hangs_on_its_way_out_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    """It has said what it dies of, and NCCL keeps it from dying: the others would wait for as long as it hangs."""
    err = ended(start("error_that_never_ends"), 1, within=20)
    assert err.startswith("error: rank 1: ValueError: spoilt\n")


def test_debug_shows_the_traceback_of_the_rank(start: Start) -> None:
    _, err = start("error_then_slow_end", debug=1).communicate(timeout=10)
    assert 'raise ValueError("spoilt")' in err


def test_kill_9_of_a_rank_is_named_with_its_signal_and_last_lines(start: Start) -> None:
    """What the kernel does when memory is short leaves no traceback; the other ranks' errors say nothing of it."""
    err = ended(start("killed"), 1, within=10)
    assert err.startswith("error: rank 1 was killed by SIGKILL: out of memory?")
    assert "    before the end\n" in err
    assert "Connection closed" not in err


def test_a_crash_in_native_code_shows_where_it_was(start: Start) -> None:
    """The others wait for it for ever: the launcher ends them, at once and not after a collective's half hour."""
    err = ended(start("crash"), 1, within=10)
    assert err.startswith("error: rank 1 was killed by SIGSEGV")
    assert "it stood at: step 3, B5" in err
    assert re.search(r"launch_worker.py\", line \d+ in crash", err)


def test_a_lost_connection_without_a_cause_says_so(start: Start) -> None:
    err = ended(start("connection_only"), 1, within=10)
    assert "rank 0: ConnectionResetError" in err
    assert "nothing is known of rank 1, 2" in err


def test_an_exit_without_an_error_is_named(start: Start) -> None:
    assert ended(start("early_death"), 1, within=10).startswith("error: rank 1 ended with exit code 3")


def test_a_mistake_of_the_user_is_said_once(start: Start) -> None:
    """Every rank finds the same wrong key; the exit code must still be that of a usage error."""
    assert ended(start("all_wrong"), 2, within=10) == "error: chunk.size=0 must be at least 1\n"


def test_a_mistake_that_only_one_rank_sees_names_it(start: Start) -> None:
    """A file that lies on one node only."""
    assert ended(start("one_wrong"), 2, within=10) == "error: rank 1: data.path=/data: there is no such file\n"


def test_a_killed_rank_comes_before_what_follows_from_it() -> None:
    """Times of deaths are seen late, so an unknown follower may look earlier; a connection's error never counts."""
    spoke = Failure(0, 1, "Connection closed", True, 10.0, ())
    killed = Failure(1, -9, None, False, 10.2, ())
    later = Failure(2, 1, "assertion", False, 11.0, ())
    assert first_cause([spoke, later, killed]) is killed


# No orphans


@pytest.mark.parametrize("scenario", ["sleeping", "stopping"])
def test_kill_9_of_the_launcher_leaves_no_orphan(scenario: str, start: Start, tmp_path: Path) -> None:
    """Workers are sessions of their own: nothing else ends them, and they hold the GPUs for ever."""
    launcher = start(scenario)
    ranks = pids(tmp_path, 3)
    assert all(map(is_alive, ranks))
    launcher.kill()
    wait_until_gone(ranks, within=5)


def test_a_worker_whose_launcher_died_while_it_started_ends(tmp_path: Path, environment: dict[str, str]) -> None:
    """The kernel is told only once Python runs; a launcher that was killed before must be noticed."""
    WatchFolder(tmp_path).path.mkdir()
    own = {"RANK": "0", "WORLD_SIZE": "2", "CHUNKFLOW_RUN_FOLDER": str(tmp_path), "CHUNKFLOW_LAUNCHER_PID": "1"}
    orphan = subprocess.run(
        [sys.executable, "-m", "launch_worker", "sleeping", str(tmp_path)], env={**environment, **own}, timeout=20
    )
    assert orphan.returncode == 1
    assert not (tmp_path / "pid-0").exists()


# Signals


def test_a_worker_leaves_without_the_end_of_the_interpreter(environment: dict[str, str]) -> None:
    """Native threads that are left abort it there; what was to be done at the end is done, and the exit code is kept."""
    code = (
        "import atexit, sys, threading, time; from chunkflow_cli.cli import app as cli\n"
        "atexit.register(print, 'the end'); threading.Thread(target=time.sleep, args=(120,)).start()\n"
        "sys.argv[1:] = ['train', 'chunk.sise=4']; cli.main()\n"
    )
    ranks = {**environment, "RANK": "0", "WORLD_SIZE": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=ranks, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout) == (2, "the end\n")
    assert "chunk.sise" in run.stderr


def test_a_crash_on_the_way_out_changes_nothing(start: Start, tmp_path: Path) -> None:
    """All ranks have saved and said so: what native code does after that is no failure of the run."""
    launcher = start("stopping_and_aborting")
    pids(tmp_path, 3)
    launcher.terminate()
    assert ended(launcher, 130, within=20) == "interrupted\n"


@pytest.mark.parametrize("how", ["SIGTERM to the launcher", "Ctrl-C in its terminal", "SIGTERM to one rank"])
def test_every_rank_is_told_to_stop_once_and_the_exit_code_is_130(how: str, start: Start, tmp_path: Path) -> None:
    """A second signal stops at once, without a checkpoint: a terminal's Ctrl-C must not reach a rank on two ways."""
    launcher = start("stopping")
    ranks = pids(tmp_path, 3)
    if how == "SIGTERM to one rank":
        os.kill(ranks[0], signal.SIGTERM)
    elif how == "SIGTERM to the launcher":
        launcher.terminate()
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
    ended(launcher, 130, within=3)
    wait_until_gone(ranks, within=1)


def test_ranks_that_do_not_stop_are_killed_after_the_grace_period(start: Start, tmp_path: Path) -> None:
    """One that hangs while saving must not hold up a machine that is being shut down; nor is this a good end."""
    launcher = start("sleeping", grace=0.5)
    ranks = pids(tmp_path, 3)
    launcher.terminate()
    err = ended(launcher, 1, within=5)
    assert "launch.grace_seconds=0.5" in err
    assert "rank 2: step 2, saving a checkpoint" in err
    wait_until_gone(ranks, within=1)


def test_a_signal_before_anything_can_be_saved_ends_the_run(start: Start, tmp_path: Path) -> None:
    """A rank that dies of it while it imports is no failure, and the others need not wait for the grace period."""
    launcher = start("unprepared")
    pids(tmp_path, 3)
    launcher.terminate()
    assert ended(launcher, 130, within=5) == "interrupted\n"


# Hangs


def test_a_hang_is_found_and_names_where_every_rank_stands(start: Start, tmp_path: Path) -> None:
    """Collectives that do not match wait for half an hour and more, and then name nothing that helps."""
    err = ended(start("hanging", 2, hang=1), 1, within=15)
    assert "no rank has moved for launch.hang_seconds=1" in err
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


def test_repeating_an_operation_is_moving(tmp_path: Path) -> None:
    """Two steps may have their last operations in common: it is the writing that counts, not the text."""
    path = tmp_path / "rank-0.heartbeat"
    beat, now = Heartbeat(path), [0.0]
    dog = Watchdog([path], lambda: now[0])
    beat.at(1, "B0")
    assert dog.look()[0].seconds == 0
    now[0] = 5.0
    assert dog.look()[0].seconds == 5
    beat.at(1, "B0")
    assert dog.look()[0].seconds == 0


# How many ranks, and where


def test_the_number_of_ranks_is_the_launchers(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Under torchrun `launch.processes` is told twice; a plan for another number than there are would hang."""
    alone = load(["recipe=tiny_random"])
    assert launch.with_processes(alone) is alone
    assert not launch.is_needed(alone)
    assert launch.is_needed(load(["recipe=tiny_random", "launch.processes=2"]))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.is_needed(load(["recipe=tiny_random", "launch.processes=2"]))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="RANK"):
        launch.with_processes(alone)
    monkeypatch.setenv("RANK", "1")
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
        ("node-1\n", "line 1: 'node-1' is not of the kind"),
        ("node-1 slots=0\n", "line 1"),
        ("a slots=1\na slots=2\n", "line 2: a is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        ranks_start.read_hostfile(str(tmp_path / "hosts"))
    with pytest.raises(UsageError, match="no such file"):
        ranks_start.read_hostfile(str(tmp_path / "none"))


# DeepSpeed's launcher

AWKWARD_WORDS = [
    "chunk.size=4096", "tune.ks=[1,2]", "data.path=my chats.jsonl", "+a='b c'", "x=$HOME", "y=a $HOME `id` \"b\" c\\d",
    "z={a: 1}", "w=a;b&c", "~optim", "v=*",
]  # fmt: skip


def test_words_arrive_on_other_nodes_as_they_were_typed(tmp_path: Path, environment: dict[str, str]) -> None:
    """The launcher passes them through a shell there, which would expand brackets, stars and dollars.

    Its own code makes the command that the other node's shell runs; a shell here shows what that makes of the words.
    """
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    hosts = [ranks_start.Host("node-1", 8), ranks_start.Host("node-2", 8)]
    command = ranks_start.deepspeed_command(hosts, hostfile=tmp_path / "hostfile", module="echo", words=AWKWARD_WORDS)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    arguments = runner.parse_args(command[3:])
    assert (arguments.hostfile, arguments.module, arguments.no_local_rank) == (str(tmp_path / "hostfile"), True, True)
    arguments.master_addr = "10.0.0.1"
    remote = PDSHRunner(arguments, "d29ybGQ=")
    remote.add_export("CHUNKFLOW_RUN_FOLDER", "/shared/my run")
    sent, _, _ = remote.get_cmd({}, {"node-1": [0], "node-2": [0]})
    words = sent[sent.index("echo") + 1 :]
    shown = [sys.executable, "-c", "'import json, sys; print(json.dumps(sys.argv[1:]))'"]
    line = " ".join([*shown, *words])  # pdsh joins its words with spaces, as ssh does
    assert json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout) == AWKWARD_WORDS


def test_other_nodes_get_the_users_environment_file_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads one such file: naming ours must not lose the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth0\n")
    text = ranks_start.exported_environment({"OMP_NUM_THREADS": "3"}, WatchFolder(Path("/shared/run")))
    assert text == (
        "NCCL_SOCKET_IFNAME=eth0\nCHUNKFLOW_RUN_FOLDER=/shared/run\nCHUNKFLOW_OMP_NUM_THREADS=3\nOMP_NUM_THREADS=3\n"
    )


def hang_under_a_foreign_launcher(folder: str) -> None:
    """On each of two ranks."""
    watch, rank = WatchFolder(Path(folder)), int(os.environ["RANK"])
    with watched_together(watch, rank, 2, limit_seconds=2.0):
        Heartbeat(watch.heartbeat(rank)).at(3, ("F5", "B5")[rank])
        time.sleep(60)


def test_ranks_of_a_foreign_launcher_find_a_hang_themselves(tmp_path: Path) -> None:
    """Collectives wait for a day, and torchrun knows nothing of operations."""
    WatchFolder(tmp_path).empty()
    with pytest.raises(
        AssertionError, match=r"exit codes \[-9, -9\]|exit codes \[-9, None\]|exit codes \[None, -9\]"
    ) as end:
        run_ranks(2, "test_launch:hang_under_a_foreign_launcher", str(tmp_path), timeout=60)
    assert "error: no rank has moved for launch.hang_seconds=2: the run hangs and is ended" in str(end.value)
    assert "  rank 1: step 3, B5, for 2." in str(end.value)
    for rank in range(2):
        assert "in hang_under_a_foreign_launcher" in log(tmp_path, rank)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["stopping", "error_then_slow_end"])
def test_deepspeeds_launcher_starts_the_ranks_of_a_hostfile(scenario: str, start: Start, tmp_path: Path) -> None:
    """For real, as far as one machine goes. Its launcher answers a signal or a dead rank by signals that kill: the
    ranks must be told to save past it, and a rank's error must come through it."""
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
        assert err.startswith("error: rank 1: ValueError: spoilt\n")
        assert "    the last thing that rank 1 did\n" in err


# Joining other launchers' ranks


def joined(arguments: Any) -> Any:
    """On a rank: open the run's folder as `train` does, then once more while it is open; what came of it."""
    from chunkflow_cli.engine import close_process_group
    from chunkflow_cli.training.joining import open_folder

    loaded = launch.with_processes(load(arguments["words"]))
    folder = open_folder(loaded, None)
    print(f"from rank {os.environ['RANK']}", flush=True)
    try:
        open_folder(loaded, None)
        error = ""
    except UsageError as raised:
        error = str(raised)
    finally:
        close_process_group()
    return str(folder.path), folder.checkpoint, loaded.config.launch.processes, folder._lock is not None, error


def test_ranks_of_another_launcher_share_a_folder_that_rank_0_locks(tmp_path: Path) -> None:
    """Each would else open one of its own, or find the first one's locked; and data would be tokenised by each."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [3, 4, 5, number]}) + "\n" for number in range(6, 12)))
    run = tmp_path / "run"
    words = ["data.format=tokens", f"data.path={data}", f"data.cache_dir={tmp_path}", f"train.output_dir={run}"]
    taken = f"train.output_dir={run}: another process is training in this folder\n"
    taken += "  wait for it to end, or choose another folder"
    first, second = run_ranks(2, "test_launch:joined", {"words": words})
    assert first == (str(run), None, 2, True, taken)
    assert second == (str(run), None, 2, False, taken)
    assert log(run, 1) == "from rank 1\n"
    assert len(list((tmp_path / "tokens").glob("[0-9a-f]*"))) == 1
