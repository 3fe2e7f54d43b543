"""The JSON schema accepts what chunkflow accepts, and refuses what it refuses by type, bounds or name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chunkflow_cli.config.json_schema import json_schema
from chunkflow_cli.config.keys import describe_element_keys, describe_keys, known_keys
from chunkflow_cli.config.load import load
from chunkflow_cli.config.recipe_files import recipe_files
from chunkflow_cli.errors import UsageError

RIGHT: list[tuple[str, Any]] = [
    ("chunk.size", 4096), ("chunk.size", "${chunk.k}"), ("optim.lr", 0.1), ("data.path", ["a", "b"]), ("data.path", "a"),
    ("data.columns", {"a": "text"}), ("data.max_length", None), ("optim.betas", [0.9, 0.95]), ("train.epochs", 2),
    ("data.sources", [{"path": "a", "weight": 2, "format": "text"}, {"path": ["b", "c"], "weight": 0.5}]),
    ("parallel.schedule", "1f1b"), ("data.template_arguments", {"x": [1, {"y": None}]}), ("eval.prompts", ["Hi"]),
]  # fmt: skip
WRONG: list[tuple[str, Any]] = [
    ("chunk.size", 0), ("chunk.size", "big"), ("chunk.size", 1.5), ("chunk.sizes", 4), ("optim.betas", [0.9, 1.0]),
    ("model.dtype", "bf16"), ("model.lora.dropout", 1.0), ("data.path", [3, {}]),
    ("data.sources", [{"path": "a", "heft": 2}]), ("data.sources", [{"path": "a", "weight": 0}]), ("data.sources", ["a"]),
    ("engine.zero_stage", 4), ("train.shuffle", "perhaps"), ("log.backends", ["paper"]), ("chunk", 5), ("new.key", 1),
]  # fmt: skip


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def in_file(tmp_path: Any, content: dict[str, Any]) -> str:
    from omegaconf import OmegaConf

    path = tmp_path / "keys.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return str(path)


@pytest.fixture(scope="module")
def is_valid() -> Callable[[Any], bool]:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid  # type: ignore[no-any-return]


def test_every_key_is_in_the_schema_with_its_meaning() -> None:
    schema = json_schema()
    for name, key in {**describe_keys(), **describe_element_keys()}.items():
        place = schema
        for part in name.split("."):
            inside = place["properties"][part.removesuffix("[]")]
            place = inside["anyOf"][0]["items"] if part.endswith("[]") else inside
        assert place["description"] == key.help
        assert "default" in place
    assert set(schema["properties"]) == {name.partition(".")[0] for name in known_keys()} | {"defaults"}
    assert schema["properties"]["chunk"]["properties"]["size"]["anyOf"][0]["minimum"] == 1


def test_recipes_are_valid(is_valid: Callable[[Any], bool]) -> None:
    from omegaconf import OmegaConf

    for name, path in recipe_files().items():
        assert is_valid(OmegaConf.to_container(OmegaConf.load(path))), name


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=str)
def test_what_chunkflow_accepts_is_valid(name: str, value: Any, is_valid: Callable[[Any], bool], tmp_path: Any) -> None:
    load([in_file(tmp_path, nested(name, value))])
    assert is_valid(nested(name, value))


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_what_chunkflow_refuses_is_not(name: str, value: Any, is_valid: Callable[[Any], bool], tmp_path: Any) -> None:
    with pytest.raises(UsageError):
        load([in_file(tmp_path, nested(name, value))])
    assert not is_valid(nested(name, value))
