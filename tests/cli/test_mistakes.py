"""Mistakes in a command line: each error names the word, and what was meant by it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from chunkflow_cli.cli.mistakes import OTHER_NAMES
from chunkflow_cli.config.keys import known_keys
from chunkflow_cli.config.load import load
from chunkflow_cli.config.words import FILES

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def error_of(line: str) -> str:
    """Return the error that a command line ends with. Nothing else is printed, and the exit code is 2."""
    result = CliRunner().invoke(app, shlex.split(line), prog_name="chunkflow")
    assert (result.exit_code, result.stdout) == (2, ""), line
    assert result.stderr.startswith("error: "), line
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("line", "word", "meant"),
    [
        ("tune", "tune", "chunkflow tune-chunk-size"),
        ("tune recipe=tiny_random chunk.k=2", "tune", "chunkflow tune-chunk-size"),
        ("trian model.path=m", "trian", "chunkflow train"),
        ("SFT", "SFT", "chunkflow train"),
        ("my.yaml", "my.yaml", "chunkflow train my.yaml"),
        ("'my run.yml' -m", "my run.yml", "chunkflow train 'my run.yml'"),
        ("recipe=tiny_random", "recipe=tiny_random", "chunkflow train recipe=tiny_random"),
        ("recipes cp tiny_random", "cp", "chunkflow recipes copy"),
        ("recipes lst", "lst", "chunkflow recipes list"),
        ("help train", "help", "chunkflow --help"),
        ("version", "version", "chunkflow --version"),
        ("recipes help", "help", "chunkflow recipes --help"),
    ],
)
def test_an_unknown_command_leads_to_the_one_that_is_meant(line: str, word: str, meant: str) -> None:
    assert error_of(line) == f"there is no command {word!r}\n  did you mean {meant}?"


def test_a_word_like_no_command_lists_them() -> None:
    assert error_of("xyzzy") == f"there is no command 'xyzzy'\n  commands: {', '.join(COMMANDS)}"
    assert error_of("recipes xyzzy").endswith("\n  commands: list, show, copy")


def test_names_of_other_tools_lead_to_commands_that_exist() -> None:
    assert set(OTHER_NAMES.values()) <= {*COMMANDS, *COMMANDS["recipes"].commands}
    assert not set(OTHER_NAMES) & set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "option", "hint"),
    [
        ("train --learning_rate 2e-4", "--learning_rate", "did you mean optim.lr=2e-4?"),
        ("train --learning-rate=2e-4 recipe=tiny_random", "--learning-rate", "did you mean optim.lr=2e-4?"),
        ("train --lr", "--lr", "did you mean optim.lr?"),
        ("train --output_dir 'a b'", "--output_dir", "did you mean 'train.output_dir=a b'?"),
        ("train --model.path x", "--model.path", "write keys without dashes: model.path=x"),
        ("plan --chunk.size=64", "--chunk.size", "write keys without dashes: chunk.size=64"),
        ("train --model.lora.enabled", "--model.lora.enabled", "write keys without dashes: model.lora.enabled=VALUE"),
        ("train --recipe tiny_random", "--recipe", "write keys without dashes: recipe=tiny_random"),
        ("train --config my.yaml", "--config", "did you mean recipe=my.yaml?"),
        ("train --accelerate_config my.yaml", "--accelerate_config", "did you mean recipe=my.yaml?"),
        ("plan --overrides tuned.yaml", "--overrides", "write keys without dashes: overrides=tuned.yaml"),
        ("train --overides tuned.yaml", "--overides", "did you mean --overrides?"),
        ("train --config_dir x", "--config_dir", "did you mean --config-dir?"),
        ("plan --jsn recipe=tiny_random", "--jsn", "did you mean --json?"),
        ("export run --outptu x", "--outptu", "did you mean --output?"),
        ("export run --learning_rate 3", "--learning_rate", "to see what it takes: chunkflow export --help"),
        ("analyze a.jsonl --num_epochs 3", "--num_epochs", "did you mean train.epochs=3?"),
        ("train --bf16", "--bf16", "set model.dtype=bfloat16, which is the default"),
        ("train -x", "-x", "to see what it takes: chunkflow train --help"),
    ],
)
def test_an_unknown_option_leads_to_the_key_that_is_meant(line: str, option: str, hint: str) -> None:
    assert error_of(line) == f"there is no option {option!r}\n  {hint}"
    for word in re.findall(r"(?:mean|dashes:) ([\w.]+=\S+?)\??$", hint):
        key = word.partition("=")[0]
        assert key in (*known_keys(), *FILES)
        if key not in FILES and "VALUE" not in word:
            load([word])


def test_all_wrong_words_of_a_line_are_named_at_once() -> None:
    assert error_of("train --learning_rate 2e-4 chunk.sise=3 --json --model.path x data.path=y").splitlines() == [
        "3 things are wrong:",
        "  there is no option '--learning_rate'; did you mean optim.lr=2e-4?",
        "  there is no option '--model.path'; write keys without dashes: model.path=x",
        "  there is no configuration key 'chunk.sise'; did you mean chunk.size?",
    ]


def test_a_missing_value_leads_to_the_help_of_the_command() -> None:
    for line, command in (("train --overrides", "train"), ("recipes show", "recipes show"), ("export", "export")):
        assert error_of(line).splitlines()[1:] == [f"  to see what it takes: chunkflow {command} --help"]
    assert error_of("doctor --timeout 0").startswith("invalid value for '--timeout'")


def test_home_is_expanded_in_every_option_that_takes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output=~/x` reaches the program as it is typed: the shell expands ~ only at the beginning of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for command in (*COMMANDS.values(), *COMMANDS["recipes"].commands.values()):
        required = ["word" for param in command.params if param.param_type_name == "argument" and param.required]
        for param in command.params:
            if param.metavar in ("FILE", "DIR", "RUN_DIR") and param.param_type_name == "option":
                words = [*required, f"{param.opts[0]}=~/a b"]
                assert command.make_context("x", words).params[param.name] == f"{tmp_path}/a b", (command.name, words)
                seen.add(param.opts[0])
    assert seen == {"--output", "--plot", "--overrides", "--config-dir", "--trace"}
    assert error_of("export run --output=~nobody-here/x").startswith(
        "--output=~nobody-here/x: this machine has no user"
    )
    monkeypatch.setenv("HOME", "")
    assert error_of("plan --plot ~/x.png").startswith(
        "--plot=~/x.png: there is no home folder, because HOME is not set"
    )
