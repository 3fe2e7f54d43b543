"""What killed processes leave of a cache entry is removed, and what others are building is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow_cli.data import building
from chunkflow_cli.data.building import folder_to_build_in, remove_leftovers

SRC = Path(__file__).parents[2] / "src"
KILLED = """
import os, sys
from pathlib import Path
from chunkflow_cli.data.building import folder_to_build_in
with folder_to_build_in(Path(sys.argv[1]), "key") as folder:
    (folder / "input_ids.npy").write_text("half")
    os.kill(os.getpid(), 9)
"""


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@pytest.mark.processes
def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(SRC)})
    assert ended.returncode == -9
    assert len(hidden(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert not hidden(tmp_path)


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """Each has a lock of its own, and the kernel knows it also from another one of the same process."""
    (tmp_path / ".ranks.lock").touch()  # a lock that ranks share
    with folder_to_build_in(tmp_path, "key") as first:
        (first / "input_ids.npy").write_text("first")
        with folder_to_build_in(tmp_path, "key") as second:
            assert first != second
            assert (first / "input_ids.npy").read_text() == "first"
            second.rename(tmp_path / "key")
        remove_leftovers(tmp_path)
        assert (first / "input_ids.npy").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".ranks.lock"}


def test_a_folder_of_another_machine_is_left_until_it_is_a_day_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems lock on each machine alone: a free lock says nothing about another machine."""
    theirs = tmp_path / ".key.elsewhere-00000000"
    theirs.mkdir()
    lock = Path(f"{theirs}.lock")
    lock.touch()
    remove_leftovers(tmp_path)
    assert theirs.is_dir()
    for path in (theirs, lock):
        os.utime(path, (0, 0))
    (theirs / "input_ids.npy").write_text("growing")
    remove_leftovers(tmp_path)
    assert theirs.is_dir()
    monkeypatch.setattr(building, "QUIET_SECONDS", -1.0)
    remove_leftovers(tmp_path)
    assert not theirs.exists()
    assert not lock.exists()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder_to_build_in(tmp_path / "tokens", "key"):
        raise KeyboardInterrupt
    assert not list((tmp_path / "tokens").iterdir())
