"""The files of a model's folder: what is broken or missing is named, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from chunkflow_cli.config.schema import ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.folder import check_settings, check_weights, tensors_of, write_checksums
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.loading import check_files, load_model, on_meta_device

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 5\n"


def model(folder: Path) -> Path:
    """Write the folder of a model in two files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    for part in ("a", "b"):
        save_file({f"{part}.weight": torch.ones(3, 4)}, folder / f"{part}.safetensors", {"format": "pt"})
    index = {"weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check(folder: Path) -> None:
    check_settings(folder, f"model.path={folder}")
    check_files(ModelConfig(path=str(folder)))


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, count: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda folder: (folder / "b.safetensors").unlink(), r"1 of the 2 files .* missing: b\.safetensors"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("*.s*")], r"has no weights(.|\n)*model\.init"),
    "a folder in a file's place": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()), r"config\.json cannot be read",
    ),
    "a GGUF file": (
        lambda folder: [*(file.unlink() for file in folder.glob("*.s*")), (folder / "m.gguf").touch()],
        r"name the GGUF file: model\.path=.*m\.gguf",
    ),
    "half a file": (cut("b.safetensors", -7), r"b\.safetensors has \d+ bytes, and its header announces \d+"),
    "half a header": (cut("b.safetensors", 30), r"b\.safetensors is not a complete safetensors file"),
    "nothing": (cut("b.safetensors", 0), r"b\.safetensors is not a complete safetensors file"),
    "a web page": (write("a.safetensors", "<!DOCTYPE html>" * 9), r"a\.safetensors is not a complete safetensors file"),
    "a pointer": (write("a.safetensors", POINTER), r"git-lfs pointers are in the place of a\.safetensors"),
    "a tokenizer's pointer": (write("tokenizer.json", POINTER), r"in the place of tokenizer\.json"),
    "a configuration's pointer": (write("config.json", POINTER), r"in the place of config\.json"),
    "an index's pointer": (write("model.safetensors.index.json", POINTER), r"in the place of model\.safetensors\.index"),
    "half an index": (cut("model.safetensors.index.json", 20), r"index\.json cannot be read as JSON"),
    "an index of nothing": (write("model.safetensors.index.json", "{}"), "has no weight_map"),
    "a list": (write("config.json", "[]"), r"config\.json is not a JSON object"),
    "half a generation_config": (write("generation_config.json", '{"a":'), r"generation_config\.json cannot be read"),
    "codes without their scales": (
        lambda folder: save_file({"b.weight": torch.ones(3, 4, dtype=torch.int8)}, folder / "b.safetensors"),
        r"b\.safetensors holds weights in I8: b\.weight",
    ),
    "an impossible generation_config": (
        write("generation_config.json", '{"max_new_tokens": -4}'), r"generation_config\.json is invalid: .*max_new_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case: str, tmp_path: Path) -> None:
    breaks, message = BROKEN[case]
    folder = model(tmp_path / "m")
    breaks(folder)
    with pytest.raises(UsageError, match=message) as error:
        check(folder)
    assert str(error.value).startswith(f"model.path={folder}")
    assert len(str(error.value).splitlines()) == 2


def test_pointers_of_files_that_are_not_read_do_not_matter(tmp_path: Path) -> None:
    """People clone without large files and fetch only the format they need."""
    folder = model(tmp_path / "m")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5"):
        (folder / name).write_text(POINTER)
    check_settings(folder, "m")
    check_weights(folder, "m")


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_size": "512"}, {"vocab_size": None}, {"hidden_size": 33, "num_attention_heads": 2},
        {"num_attention_heads": 0}, {"hidden_act": "nonsense"}, {"pad_token_id": 99999}, {"model_type": "t5"},
        {"rope_scaling": {"type": "weird", "factor": 2}},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)  # fmt: skip
def test_a_configuration_of_no_possible_model_is_explained(settings: dict[str, object], tmp_path: Path) -> None:
    """Libraries raise anything from KeyError to ZeroDivisionError for it."""
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    values = {"model_type": "llama", "num_attention_heads": 2, **sizes, **settings}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(UsageError, match=r"^model\.path=.*(no usable config\.json|not a causal language model)"):
        on_meta_device(config, load_config(config))


OTHERS: dict[str, tuple[str, list[str], str]] = {
    "a run": ("run", ["final/config.json", "report.json"], r"did you mean model\.path=.*/run/final\?"),
    "a run of adapters": ("run", ["final/adapter_config.json"], r"did you mean model\.path=.*/run/final\?"),
    "an unfinished run": ("run", [".hydra/config.yaml"], r"a run that has not finished"),
    "a trainer's checkpoints": ("run", ["checkpoint-9/config.json"], r"did you mean model\.path=.*/checkpoint-9\?"),
    "a hub's cache": ("models--a--b", ["snapshots/1f/config.json"], r"did you mean model\.path=.*/snapshots/1f\?"),
    "a file": ("m/model.safetensors", [], r"is a file(.|\n)*model\.path=.*/m$"),
    "a pointer to a GGUF file": ("x.gguf", [], r"is not a GGUF file"),
    "GGUF files": ("m", ["x.gguf"], r"name the GGUF file: model\.path=.*/m/x\.gguf"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_people_give_in_a_models_place_leads_to_the_model(case: str, tmp_path: Path) -> None:
    name, files, message = OTHERS[case]
    path = tmp_path / name
    for file in [path / file for file in files] or [path]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    with pytest.raises(UsageError, match=message):
        load_config(ModelConfig(path=str(path)))


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    damage=st.one_of(st.integers(0, 10_000), st.binary(min_size=1, max_size=9)),
)
def test_a_file_passes_exactly_if_the_safetensors_library_reads_it(
    shapes: list[list[int]], damage: int | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "one.safetensors"
    save_file({f"t{number}": torch.ones(shape) for number, shape in enumerate(shapes)}, file)
    content = file.read_bytes()
    file.write_bytes(content[:damage] if isinstance(damage, int) else content + damage)
    try:
        with safe_open(file, framework="pt") as data:
            expected = {name: data.get_slice(name).get_shape() for name in data.keys()}  # noqa: SIM118
    except Exception:
        with pytest.raises(UsageError, match=r"one\.safetensors"):
            tensors_of(file, "m")
    else:
        assert {name: facts["shape"] for name, facts in tensors_of(file, "m").items()} == expected


def test_damaged_numbers_of_a_model_that_chunkflow_wrote_are_found(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Headers and sizes do not show them."""
    tiny_model("llama").save_pretrained(tmp_path)
    config, file = ModelConfig(path=str(tmp_path)), tmp_path / "model.safetensors"

    def load() -> None:
        load_model(config, load_config(config), dtype=torch.float32, attention="sdpa", seed=0)

    write_checksums(tmp_path)
    load()
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"model.safetensors is damaged: .*(.|\n)*delete {tmp_path}/checksums.json"):
        load()
    (tmp_path / "checksums.json").write_text('{"model.safetensors": 5}')
    with pytest.raises(UsageError, match=r"model.safetensors cannot be compared with checksums.json"):
        load()
    (tmp_path / "checksums.json").unlink()  # as somebody does who has changed the weights
    load()
