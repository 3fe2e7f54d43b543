"""docs/coming-from.md: its files compose and train, and every key of the other tools has its place or a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from chunkflow_cli.cli.app import app
from chunkflow_cli.config.keys import known_keys

PAGE = (Path(__file__).parents[2] / "docs/coming-from.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", PAGE, re.DOTALL))
ASSETS = Path(__file__).parents[2] / "src/chunkflow_cli/assets/tiny_random"
SMALLER = {
    "chunk.size": 128,
    "train.epochs": 1,
    "train.steps": 2,
    "engine.zero_stage": 1,
    "launch.processes": 1,
    "log.backends": "[jsonl]",
    "model.dtype": "float32",
}
"""What a machine without GPUs and accounts needs otherwise."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with weights, which quantization needs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_each_file_trains_on_the_sample_data(name: str, model_folder: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(FILES[name])
    recipe["model"]["path"] = str(model_folder)
    samples = str(ASSETS / "samples.jsonl")
    for source in recipe["data"].get("sources", []):
        source["path"], source["samples"] = samples, 20
    if "sources" not in recipe["data"]:
        recipe["data"]["path"] = samples
    recipe["data"]["format"] = "tokens"
    if recipe.get("optim", {}).get("name", "").startswith("paged"):
        recipe["optim"]["name"] = recipe["optim"]["name"].removeprefix("paged_")  # pages move between GPU and host
    recipe["train"]["output_dir"] = str(tmp_path / "run")
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    overrides = [f"{key}={value}" for key, value in SMALLER.items()]
    result = CliRunner().invoke(app, ["train", f"recipe={file}", f"data.cache_dir={tmp_path}", *overrides, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == 2
    assert report["target_tokens_trained"] == report["target_tokens_planned"] > 0


def test_every_key_that_the_tables_name_exists() -> None:
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    named = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)[`=]", PAGE))
    assert {name for name in named if name.partition(".")[0] in sections} <= {*known_keys(), "model.lora"}
    assert len(FILES) == 4
