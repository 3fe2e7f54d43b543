"""Completion of overrides through the mechanism of each shell, and in a real bash."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chunkflow_cli.cli.completion import candidates
from chunkflow_cli.config.keys import known_keys

pytestmark = pytest.mark.processes

COMMAND = Path(sys.executable).parent / "chunkflow"


def complete(shell: str, *words: str, cwd: Path, position: int | None = None) -> list[str]:
    """Return what the shell receives for the last of the words."""
    if shell == "bash":
        position = len(words) - 1 if position is None else position
        variables = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(position)}
    else:
        variables = {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    run = subprocess.run(
        [COMMAND],
        env={**os.environ, **variables, "_CHUNKFLOW_COMPLETE": f"complete_{shell}"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    return run.stdout.split() if shell == "bash" else run.stdout.splitlines()


def texts(word: str, config_dir: str | None = None) -> list[str]:
    return [text for text, _ in candidates(word, config_dir)]


def test_an_unfinished_word_is_never_the_only_candidate() -> None:
    """The shell puts a space after the only candidate, and `chunk.size= 4096` would be two words."""
    for key in known_keys():
        for end in range(1, len(key) + 1):
            found = texts(key[:end])
            assert found, key[:end]
            assert len(found) > 1 or not found[0].endswith((".", "=")), found


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("chu", ["chunk.size=", "chunk.k=", "chunk.fill_tails=", "chunk.cuts=", "chunk.offload_state="]),
        ("chunk.s", ["chunk.size=", "chunk.size=8192"]),
        ("chunk.size=", ["chunk.size=8192"]),
        ("optim.l", ["optim.lr=", "optim.lr_factors="]),
        ("model.pa", ["model.path=", "model.path=VALUE"]),
        ("model.path=", []),
        ("model.dtype=b", ["model.dtype=bfloat16"]),
        ("model.dt", ["model.dtype=", "model.dtype=bfloat16", "model.dtype=float32", "model.dtype=float64"]),
        ("train.shuffle=", ["train.shuffle=true", "train.shuffle=false"]),
        ("model.lora.en", ["model.lora.enabled=", "model.lora.enabled=true", "model.lora.enabled=false"]),
        ("log.backends=", ["log.backends=[jsonl]"]),
        ("nothing", []),
        ("no.such=", []),
        ("recipe=tiny", ["recipe=tiny_random"]),
    ],
)
def test_candidates(word: str, expected: list[str]) -> None:
    assert texts(word) == expected


def test_recipes_of_the_config_dir(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "careful.yaml").write_text("optim: {lr: 1.0e-7}\n")
    assert texts("recipe=car", str(tmp_path)) == ["recipe=careful"]
    assert texts("recipe=car") == []
    assert texts("recipe=car", "no/such/folder") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_answered(shell: str, tmp_path: Path) -> None:
    found = "\n".join(complete(shell, "chunkflow", "train", "recipe=tin", cwd=tmp_path))
    assert "recipe=tiny_random" in found
    found = "\n".join(complete(shell, "chunkflow", "verify", "recipe=tiny_random", "chunk.", cwd=tmp_path))
    assert "chunk.fill_tails=" in found
    if shell != "bash":
        assert "Largest number of tokens in a chunk" in found


def test_a_candidate_and_its_meaning_are_on_one_line(tmp_path: Path) -> None:
    """fish takes each line for a candidate, and Typer wraps long ones."""
    for section in sorted({key.rpartition(".")[0] for key in known_keys()} - {""}):
        for line in complete("fish", "chunkflow", "train", f"{section}.", cwd=tmp_path):
            assert line.startswith(f"{section}."), line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "recipe", "=", "tiny"], ["tiny_random"]),
        (["train", "train.shuffle", "="], ["true", "false"]),
        (["train", "model.dtype", "=", "b"], ["bfloat16"]),
        (["train", "data.path", "=", "x"], []),
        (["train", "--config-dir", "=", "mine", "recipe", "=", "car"], ["careful"]),
    ],
)
def test_bash_cuts_words_at_equal_signs(words: list[str], expected: list[str], tmp_path: Path) -> None:
    """bash replaces only what follows the sign, so the candidates must not repeat `recipe=`."""
    (tmp_path / "mine" / "recipes").mkdir(parents=True)
    (tmp_path / "mine" / "recipes" / "careful.yaml").write_text("chunk: {size: 4}\n")
    assert complete("bash", "chunkflow", *words, cwd=tmp_path) == expected


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """Completion must be fast; importing torch alone takes two seconds."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND],
        env={
            **os.environ,
            "COMP_WORDS": "chunkflow\ntrain\nchu",
            "COMP_CWORD": "2",
            "_CHUNKFLOW_COMPLETE": "complete_bash",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "chunk.size=" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "chunkflow_cli.cli.completion" in imported
    assert not imported & {"torch", "hydra", "omegaconf", "numpy", "transformers", "yaml"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash(tmp_path: Path) -> None:
    """Press keys and read the line that bash shows after TAB."""
    (tmp_path / "chats.jsonl").write_text("")
    shell = _Bash(tmp_path)
    try:
        assert shell.press_tab("chunkflow train recipe=ti") == "chunkflow train recipe=tiny_random "
        assert shell.press_tab("chunkflow train recipe=q") == "chunkflow train recipe=qwen"
        assert shell.press_tab("chunkflow train chu") == "chunkflow train chunk."
        assert shell.press_tab("chunkflow train chunk.s") == "chunkflow train chunk.size="
        assert shell.press_tab("chunkflow train recipe=tiny_random model.dtype=b") == (
            "chunkflow train recipe=tiny_random model.dtype=bfloat16 "
        )
        assert shell.press_tab("chunkflow train data.path=ch") == "chunkflow train data.path=chats.jsonl "
        assert shell.press_tab("chunkflow veri") == "chunkflow verify "
    finally:
        shell.close()


class _Bash:
    """An interactive bash on a pseudo-terminal with the completion of chunkflow."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}
        environment.pop("PROMPT_COMMAND", None)
        self._process_id, self._terminal = pty.fork()
        if self._process_id == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self._say("bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; stty columns 200\n")
        self._say('source <(_CHUNKFLOW_COMPLETE=source_bash chunkflow); PS1="> "; echo rea""dy\n')
        self._read_until("ready")

    def press_tab(self, line: str) -> str:
        """Return the line as bash would run it after TAB. A mark typed at its end shows whether it ends with a space."""
        self._say(line + "\t")
        time.sleep(0.1)
        # Ctrl-A puts a quoting echo in front: bash prints the completed line instead of running it.
        self._say("@end'\x01echo 'line:\n")
        printed = self._read_until(r"\r\nline:(.*)@end\r\n")
        return printed.group(1)

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._process_id, 0)

    def _say(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _read_until(self, pattern: str) -> re.Match[str]:
        read, deadline = "", time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.2)[0]:
                read += os.read(self._terminal, 4096).decode(errors="replace")
                found = re.search(pattern, read)
                if found is not None:
                    return found
        raise AssertionError(f"bash said {read!r}")
