"""`chunkflow tune-chunk-size`, from the command line to the file that train takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chunkflow_cli.cli import app
from chunkflow_cli.config import read_overrides
from chunkflow_cli.errors import UsageError

SIZES = "tune.chunk_sizes=[64,128,256]"
PROFILE = "tune.device=h100"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["tune-chunk-size", "recipe=tiny_random", *words])


def tuned(*words: str) -> dict[str, Any]:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_holds_what_was_promised_and_the_best_is_the_fastest_that_fits() -> None:
    found = tuned(PROFILE, SIZES)
    keys = {"chunk_size", "k", "step_seconds", "memory_bytes", "fits", "recompute_share", "bubble_ratio"}
    assert all(keys <= set(row) for row in found["candidates"])
    fitting = [row for row in found["candidates"] if row["fits"]]
    assert found["best"] == min(fitting, key=lambda row: row["step_seconds"])
    assert found["candidates"][0]["measured_step_seconds"] is None, "an H100 is not here"
    assert found["explanation"].count(".") >= 1


def test_train_takes_the_file_that_tune_writes() -> None:
    """And what is typed beside it wins."""
    found = tuned(PROFILE, SIZES, "--output", "mine/tuned.yaml")
    assert found["overrides_file"] == "mine/tuned.yaml"
    words = ["train", "recipe=tiny_random", "--overrides", "mine/tuned.yaml", "--cfg", "job"]
    chosen = CliRunner().invoke(app, words).stdout
    assert f"size: {found['best']['chunk_size']}" in chosen
    assert f"k: {found['best']['k']}" in chosen
    assert "  k: 7" in CliRunner().invoke(app, [*words, "chunk.k=7"]).stdout


def test_by_default_the_file_lies_with_the_recipes_outputs() -> None:
    found = tuned(PROFILE, SIZES)
    assert read_overrides(found["overrides_file"]) == [
        f"chunk.size={found['best']['chunk_size']}",
        f"chunk.k={found['best']['k']}",
    ]
    assert found["overrides_file"] == "outputs/tiny_random/tuned.yaml"


def test_a_memory_limit_is_kept_and_what_exceeds_it_is_shown_with_its_bytes() -> None:
    everything = tuned(PROFILE, SIZES)["candidates"]
    sizes = sorted(row["memory_bytes"] for row in everything)
    limit = sizes[len(sizes) // 2] / 2**30
    found = tuned(PROFILE, SIZES, f"tune.memory_gib={limit}")
    assert {row["fits"] for row in found["candidates"]} == {True, False}
    assert all(row["fits"] == (row["memory_bytes"] <= limit * 2**30) for row in found["candidates"])
    assert found["best"]["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune.memory_gib=0.000001", PROFILE, SIZES], "no pair fits into 0.0 GiB: the smallest, chunk.size="),
        (["tune.chunk_sizes=[]", PROFILE], "tune.chunk_sizes is empty"),
        (["tune.ks=[0]", PROFILE], "tune.ks=[0] must be positive numbers"),
        (["tune.device=h900"], "tune.device=h900: invalid value 'h900', expected one of"),
        (["data.path=", PROFILE], "data.path is not set"),
        (["data.path=nowhere.jsonl", PROFILE], "there is no such file"),
        (["launch.processes=2"], "name the device to predict for: tune.device=h100"),
        ([PROFILE, "--plot", "grid.txt"], "the name must end in .png"),
    ],
)
def test_bad_input_is_a_clear_line_and_exit_2(words: list[str], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_overrides_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read_overrides("no.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="holds no keys"):
        read_overrides("list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_overrides("broken.yaml")
    (tmp_path / "nested.yaml").write_text("chunk: {size: 64}\ndata: {max_length: null}\n")
    assert read_overrides("nested.yaml") == ["chunk.size=64", "data.max_length=null"]


def test_the_screen_fits_and_names_the_next_command() -> None:
    result = invoke(PROFILE, "--plot", "grid.png")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "Train with it:  chunkflow train recipe=tiny_random --overrides outputs/tiny_random/tuned.yaml" in lines
    sentences = [line for line in lines if line.startswith(("A step is predicted", "Train with it"))]
    assert max(len(line) for line in lines if line not in sentences) <= 80
    assert "\x1b" not in result.stdout
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_this_machine_is_measured_once_and_the_best_pairs_run_a_step() -> None:
    """Real operations of the real model, in processes of their own; the second search finds the calibration."""
    words = [SIZES, "tune.ks=[1,2]", "tune.measure=2", "data.num_workers=1"]
    first = tuned(*words)
    assert first["cost_model"].startswith("measured on")
    measured = [row for row in first["candidates"] if row["measured_step_seconds"] is not None]
    assert len(measured) == 2
    assert first["best"]["measured_step_seconds"] == min(row["measured_step_seconds"] for row in measured)
    assert list(Path("cache/chunkflow/calibrations").glob("*.json"))
    result = invoke(*words, "tune.measure=0", "--json")
    assert "Timing chunks" not in result.stderr
    again = json.loads(result.stdout)
    predicted = [row["step_seconds"] for row in again["candidates"]]
    assert predicted == [row["step_seconds"] for row in first["candidates"]]
