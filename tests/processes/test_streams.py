"""What a process prints when its streams are closed, cannot take a character, or lose their reader."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SRC = Path(__file__).parents[2] / "src"
PREPARED = "import os, sys; from pathlib import Path; from chunkflow_cli.processes import streams; streams.prepare()\n"


def run(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program whose streams are prepared. By default its streams are pipes."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), **options.pop("env", {})}  # type: ignore[dict-item]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", PREPARED + code], cwd=folder, env=environment, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


def without_reader() -> int:
    """Return the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(("encoding", "expected"), [
    ("ascii", rb"\xe9 ... ## : +- \u6f22 \U0001f642 "), ("latin-1", b"\xe9 ... ## : +- \\u6f22 \\U0001f642 "),
    ("utf-8", "é … ██ ▏ ┌─ 漢 🙂 ".encode()),
])  # fmt: skip
def test_every_character_is_printed_in_every_encoding(encoding: str, expected: bytes, tmp_path: Path) -> None:
    """Cron and old terminals have no UTF-8; a file name may be no text at all, and its bytes are printed as they are."""
    code = "for s in (sys.stdout, sys.stderr): print('é … ██ ▏ ┌─ 漢 🙂 \\udcff', file=s)"
    ended = run(code, tmp_path, env={"PYTHONIOENCODING": encoding})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, expected + b"\xff\n", expected + b"\xff\n")


def test_closed_streams_do_not_write_into_files(tmp_path: Path) -> None:
    """The first file that is opened would take the number of stdout, and get what native libraries print."""
    code = (
        "file = open('weights', 'w')\nprint('out'); print('err', file=sys.stderr); sys.stdin.read()\n"
        "for native in (1, 2): os.write(native, b'native')\nfile.write('weights')\n"
    )
    program = [sys.executable, "-c", PREPARED + code]
    subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SRC)},
        check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "weights").read_text() == "weights"


RUN = """
print("before the run", file=sys.stderr)
streams.fall_back_to(Path("run/logs/rank-0.log"))
for step in range(3):
    print("step", step, file=sys.stderr)
os.write(2, b"native\\n")
print("the summary")
"""


def test_a_run_goes_on_in_its_log_when_stderr_has_no_reader(tmp_path: Path) -> None:
    """A pager that is closed, `2>&1 | head`, a lost connection: nothing of it may end hours of training."""
    writer = without_reader()
    ended = run(RUN, tmp_path, stderr=writer)
    os.close(writer)
    assert (ended.returncode, ended.stdout) == (0, b"the summary\n")
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert log == "stderr cannot be written (Broken pipe); it goes on in this file\nstep 0\nstep 1\nstep 2\nnative\n"


def test_a_run_goes_on_when_its_terminal_is_gone(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    os.close(master)
    ended = run(RUN, tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert ended.returncode == 0
    assert (tmp_path / "run/logs/rank-0.log").read_text().endswith("the summary\n")


def test_a_run_whose_summary_cannot_be_written_has_succeeded(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = run(RUN + "sys.stdout.flush()", tmp_path, stdout=full)
    assert ended.returncode == 0
    said = b"warning: stdout cannot be written (No space left on device); it goes on in run/logs/rank-0.log\n"
    assert ended.stderr.endswith(said)
    assert (tmp_path / "run/logs/rank-0.log").read_text().endswith("the summary\n")


def test_a_run_goes_on_without_any_place_to_print_to(tmp_path: Path) -> None:
    """The log may be on the disk that is full."""
    code = RUN.replace('Path("run/logs/rank-0.log")', 'Path("/dev/full")') + "sys.stdout.flush()"
    with open("/dev/full", "w") as full:
        ended = run(code, tmp_path, stdout=full, stderr=full)
    assert ended.returncode == 0


HANDLER = """
import signal
said = []
def handle(number, frame):
    print("stopping", file=sys.stderr)
    said.append(number)
signal.signal(signal.SIGINT, handle)
print("x" * (1 << 17), file=sys.stderr)
print(len(said))
"""


def test_a_signal_handler_may_print_while_a_paused_pager_holds_up_a_print(tmp_path: Path) -> None:
    """In a buffered stream its print would raise an error, and the run would end without saving."""
    reader, writer = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    child = subprocess.Popen(
        [sys.executable, "-c", PREPARED + HANDLER], env=environment, stdout=subprocess.PIPE, stderr=writer
    )
    os.close(writer)
    deadline = time.monotonic() + 60
    while struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, bytes(4)))[0] < 1 << 16:  # until the pipe is full
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    with os.fdopen(reader, "rb") as pager:
        shown = pager.read()
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, b"1\n"), shown[-500:]
    assert sorted(shown.replace(b"x", b"").split()) == [b"stopping"]
    assert shown.count(b"x") == 1 << 17


COMMAND = """
import typer
from chunkflow_cli.cli.command import run_command
def command():
    print("a result", flush=FLUSH)
    return {"result": 1}
try:
    run_command(command, json_output=True, debug=False)
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize("flush", [True, False])
def test_a_command_ends_as_other_programs_do_when_stdout_has_no_reader(flush: bool, tmp_path: Path) -> None:
    """`chunkflow analyze data | head -1` must show no traceback; 141 is what a shell makes of SIGPIPE."""
    writer = without_reader()
    ended = run(COMMAND.replace("FLUSH", str(flush)), tmp_path, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_command_whose_result_is_lost_fails(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = run(COMMAND.replace("FLUSH", "False"), tmp_path, stdout=full)
    said = b"error: stdout cannot be written: No space left on device; the output is incomplete\n"
    assert (ended.returncode, ended.stderr) == (1, said)
