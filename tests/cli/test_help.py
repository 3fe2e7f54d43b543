"""`--help`: examples run when pasted, the text fits 80 columns, and keys are shown as the schema describes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from chunkflow_cli.cli.key_help import KEYS
from chunkflow_cli.config.keys import known_keys

pytestmark = pytest.mark.processes


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command and group of the application: its words, and the command that Typer made of it."""

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield words, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(f"{words} {name}", child)

    return walk("chunkflow", typer.main.get_command(app))


def examples(command: Any) -> list[str]:
    """Return the command lines of a help text, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", command.help or "")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("chunkflow ")]


COMMANDS = dict(commands())


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_three_examples_and_fits_80_columns(words: str) -> None:
    lines = examples(COMMANDS[words])
    assert len(lines) >= 3
    if words != "chunkflow":
        assert any(line.startswith(words) for line in lines)
    run = subprocess.run(
        [sys.executable, "-m", "chunkflow_cli", *words.split()[1:], "--help"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert "\x1b" not in run.stdout
    shown = [line.strip() for line in re.sub(r"\\\s*\n\s*", "", run.stdout).splitlines()]
    for line in lines:  # each on a line of its own, so that it can be copied
        assert line in shown
    assert run.stdout.index(lines[0][:40]) < run.stdout.index("Options")


def test_keys_in_help_exist() -> None:
    assert set(KEYS) <= {words.removeprefix("chunkflow ") for words in COMMANDS}
    for names in KEYS.values():
        assert set(names) <= set(known_keys())


@pytest.mark.slow
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all examples in the order of the help, in one empty directory.

    A shell runs the first example of each command. The others run in this process, without another import of torch.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)
    seen = set()
    for line in dict.fromkeys(line for command in COMMANDS.values() for line in examples(command)):
        words = shlex.split(line)[1:]
        name = words[0]
        # chat needs a model that reads text (test_chat.py). Another doctor runs in test_doctor.py, a sweep in test_cli.py.
        if name == "chat" or "-m" in words or (name == "doctor" and name in seen):
            continue
        if name in seen and ">" not in words:
            result = CliRunner().invoke(app, words)
            code, output = result.exit_code, result.output
        else:
            run = subprocess.run(
                line, shell=True, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            code, output = run.returncode, run.stdout + run.stderr
        seen.add(name)
        assert code == 0, f"{line}\n{output}"
        assert "\x1b" not in output, line
