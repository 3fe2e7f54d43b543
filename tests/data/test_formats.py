"""Parsing rows of every format, and detecting the format of a data set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.formats import detect_format, parse_sample
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import (
    BadRowError,
    Conversation,
    Instruction,
    PlainText,
    PromptCompletion,
    TokenRow,
)
from chunkflow_cli.data.source import open_source
from chunkflow_cli.errors import UsageError

SHARED = Path(os.environ.get("CHUNKFLOW_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data sets of LLaMA-Factory are not here")

# Formats

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"name": "f", "arguments": {"x": 1}}
AS_TOOL_CALL = {"type": "function", "function": CALL}


def turns(sample: object) -> list[tuple[str, str, bool]]:
    assert isinstance(sample, Conversation)
    return [(message.role, message.content, message.is_target) for message in sample.messages]


def test_messages() -> None:
    row = {"messages": [*CHAT, {"role": "user", "content": "Q2", "name": "Bo"}, {"role": "assistant", "content": ""}]}
    sample = parse_sample(row, DataFormat.messages)
    assert turns(sample) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", True),
        ("user", "Q2", False),
        ("assistant", "", True),
    ]
    assert isinstance(sample, Conversation)
    assert sample.messages[3].extra == {"name": "Bo"}
    assert sample.tools == ()


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": CALL},
        {"type": "function", "index": 0, "id": None, "function": {"name": "f", "parameters": {"x": 1}}},
        {"type": "tool_call", "name": "f", "args": {"x": 1}},
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        CALL,
    ],
)
def test_tool_calls_of_messages_have_arguments_as_objects(call: dict[str, Any]) -> None:
    """OpenAI stores arguments as a JSON string, which a template that writes `arguments | tojson` would encode twice."""
    row = {
        "messages": [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    sample = parse_sample(row, DataFormat.messages)
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls == (AS_TOOL_CALL,)
    assert sample.messages[1].content == ""
    assert sample.tools == ({"type": "function", "function": {"name": "f"}},)


def test_ids_of_calls_and_of_answers_reach_the_template() -> None:
    call = {"id": "call_7", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "tool", "tool_call_id": "call_7", "content": "2"}
    sample = parse_sample(
        {"messages": [CHAT[1], {"role": "assistant", "tool_calls": [call]}, answer]}, DataFormat.messages
    )
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls == ({"id": "call_7", **AS_TOOL_CALL},)
    assert sample.messages[2].extra == {"tool_call_id": "call_7"}


def test_openais_older_calls_become_tool_calls() -> None:
    row = {
        "functions": [{"name": "f", "parameters": {}}],
        "messages": [
            CHAT[1],
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "2"},
            CHAT[2],
        ],
    }
    sample = parse_sample(row, DataFormat.messages)
    assert turns(sample) == [
        ("user", "Q", False),
        ("assistant", "", True),
        ("tool", "2", False),
        ("assistant", "A", True),
    ]
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls == (AS_TOOL_CALL,)
    assert sample.messages[1].extra == {}
    assert sample.messages[2].extra == {"name": "f"}
    assert sample.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"a": null, "n": 123456789012345678901234567890}', {"a": None, "n": 123456789012345678901234567890}),
        ("", {}),
        (None, {}),
        ("x=1", "x=1"),
        ('{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        ('{"a": NaN}', '{"a": NaN}'),
    ],
)
def test_no_argument_of_a_call_changes(written: str | None, arguments: object) -> None:
    """A string that is no JSON object stays as it is; so does one of which parsing would lose something."""
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}
    sample = parse_sample({"messages": [CHAT[1], turn]}, DataFormat.messages)
    assert isinstance(sample, Conversation)
    assert sample.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": arguments}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "input_text", "text": "parts", "cache_control": {"type": "e"}}]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "A", "annotations": []}]}
    sample = parse_sample(
        {"system": parts[:1], "messages": [{"role": "user", "content": parts}, answer]}, DataFormat.messages
    )
    assert turns(sample) == [("system", "two ", False), ("user", "two parts", False), ("assistant", "A", True)]


def test_a_turn_may_hold_nothing_but_reasoning() -> None:
    turn = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": None}
    sample = parse_sample({"messages": [CHAT[1], turn]}, DataFormat.messages)
    assert turns(sample) == [("user", "Q", False), ("assistant", "", True)]
    assert isinstance(sample, Conversation)
    assert sample.messages[1].extra == {"reasoning_content": "hm"}


def test_a_conversation_may_be_a_json_string() -> None:
    """In CSV nothing else is possible, and data sets of agents' steps have it."""
    row = {"prompt": "Q", "messages": json.dumps(CHAT)}
    assert parse_sample(row, DataFormat.messages) == parse_sample({"messages": CHAT}, DataFormat.messages)
    with pytest.raises(BadRowError, match="messages is a string that is not JSON"):
        parse_sample({"messages": str(CHAT)}, DataFormat.messages)
    with pytest.raises(BadRowError, match="'role' occurs twice"):
        parse_sample({"messages": '[{"role": "user", "role": "assistant", "content": "A"}]'}, DataFormat.messages)


def test_labels_that_are_shifted_already_are_refused() -> None:
    """They would teach the model to predict the token after the next one."""
    for labels in ([2, 3, 4, 9], [2, 3, 4, -100], [-100, 3, 4, -100]):
        with pytest.raises(BadRowError, match="labels are shifted"):
            parse_sample({"input_ids": [1, 2, 3, 4], "labels": labels}, DataFormat.tokens)
    for ids, labels in (([5, 5, 5], [5, 5, 5]), ([1, 2], [-100, -100]), ([1, 2, 3], [7, 8, 9]), ([1, 2], [-100, 9])):
        parse_sample({"input_ids": ids, "labels": labels}, DataFormat.tokens)


def test_nan_is_no_value() -> None:
    """pandas writes it for the empty cells of a table."""
    nan = float("nan")
    row = {"instruction": "I", "input": nan, "output": "O", "history": nan, "system": nan}
    assert parse_sample(row, DataFormat.alpaca) == Instruction("I", "", "O", "", ())
    sample = parse_sample({"messages": [CHAT[1] | {"name": nan}, CHAT[2]]}, DataFormat.messages)
    assert isinstance(sample, Conversation)
    assert sample.messages[0].extra == {}


@pytest.mark.parametrize("format", [DataFormat.messages, DataFormat.sharegpt])
def test_both_names_of_roles_and_texts_are_read(format: DataFormat) -> None:
    row = {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    mixed = {"conversations": [{"from": "human", "value": "Q"}, {"role": "gpt", "value": "A", "content": None}]}
    assert (
        turns(parse_sample(row, format))
        == turns(parse_sample(mixed, format))
        == turns(parse_sample({"messages": CHAT[1:]}, DataFormat.messages))
    )


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_the_system_prompt_of_a_row_comes_first(key: str) -> None:
    for row in ({"messages": CHAT[1:], key: "S"}, {"messages": CHAT, key: "S"}):
        assert turns(parse_sample(row, DataFormat.messages)) == turns(
            parse_sample({"messages": CHAT}, DataFormat.messages)
        )
    completion = parse_sample({"prompt": [CHAT[1]], "completion": [CHAT[2]], key: "S"}, DataFormat.prompt_completion)
    assert turns(completion) == [("system", "S", False), ("user", "Q", False), ("assistant", "A", True)]
    with pytest.raises(BadRowError, match="the row's system prompt and the one in its first message differ"):
        parse_sample({"messages": CHAT, key: "T"}, DataFormat.messages)


def test_flat_tools_are_wrapped() -> None:
    """OpenAI's responses API has the type next to the name."""
    expected = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tool in ({"name": "f", "parameters": {}}, {"type": "function", "name": "f", "parameters": {}}, expected):
        sample = parse_sample({"messages": CHAT, "tools": [tool]}, DataFormat.messages)
        assert isinstance(sample, Conversation)
        assert sample.tools == (expected,)


def test_sharegpt() -> None:
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
            {"from": "user", "value": "Q2"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "O"},
            {"from": "function_call", "value": "f(1)"},
            {"from": "tool", "value": "O2"},
            {"from": "assistant", "value": "A2"},
        ],
        "tools": json.dumps([{"name": "f", "description": "d"}]),
    }
    sample = parse_sample(row, DataFormat.sharegpt)
    assert turns(sample) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", True),
        ("user", "Q2", False),
        ("assistant", "", True),
        ("tool", "O", False),
        ("assistant", "f(1)", True),
        ("tool", "O2", False),
        ("assistant", "A2", True),
    ]
    assert isinstance(sample, Conversation)
    assert [message.tool_calls for message in sample.messages if message.tool_calls] == [(AS_TOOL_CALL,)]
    assert sample.tools == ({"type": "function", "function": {"name": "f", "description": "d"}},)


@pytest.mark.parametrize("tools", [None, "", "  ", "[]", []])
def test_no_tools(tools: object) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}], "tools": tools}
    sample = parse_sample(row, DataFormat.sharegpt)
    assert isinstance(sample, Conversation)
    assert sample.tools == ()


def test_alpaca() -> None:
    row = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["h1", "r1"]]}
    sample = parse_sample(row, DataFormat.alpaca)
    assert isinstance(sample, Instruction)
    assert turns(sample.conversation()) == [
        ("system", "S", False),
        ("user", "h1", False),
        ("assistant", "r1", True),
        ("user", "I\nX", False),
        ("assistant", "O", True),
    ]
    with pytest.raises(BadRowError, match="history needs a chat template"):
        sample.prompt_completion()
    short = parse_sample({"instruction": "I", "input": "", "output": "O"}, DataFormat.alpaca)
    assert isinstance(short, Instruction)
    assert turns(short.conversation()) == [("user", "I", False), ("assistant", "O", True)]


def test_alpaca_without_chat_template_is_stanfords_prompt() -> None:
    """Models that were trained on this prompt expect it word for word."""
    with_input = parse_sample({"instruction": "{I}", "input": "X", "output": "O"}, DataFormat.alpaca)
    without = parse_sample({"instruction": "I", "output": "O", "input": None}, DataFormat.alpaca)
    assert isinstance(with_input, Instruction)
    assert isinstance(without, Instruction)
    assert with_input.prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{I}\n\n### Input:\nX\n\n### Response:\n",
        "O",
    )
    assert without.prompt_completion() == PromptCompletion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nI\n\n### Response:\n",
        "O",
    )


def test_prompt_completion() -> None:
    assert parse_sample({"prompt": "P ", "completion": "C"}, DataFormat.prompt_completion) == PromptCompletion(
        "P ", "C"
    )
    row = {"prompt": [*CHAT, CHAT[1]], "completion": [{"role": "assistant", "content": "B"}]}
    assert turns(parse_sample(row, DataFormat.prompt_completion)) == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", False),
        ("user", "Q", False),
        ("assistant", "B", True),
    ]


def test_text_and_tokens() -> None:
    assert parse_sample({"text": " t\n"}, DataFormat.text) == PlainText(" t\n")
    row = parse_sample({"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, DataFormat.tokens)
    assert isinstance(row, TokenRow)
    np.testing.assert_array_equal(row.input_ids, [3, 4, 5])
    np.testing.assert_array_equal(row.labels, [-100, 4, 5])
    unlabelled = parse_sample({"input_ids": [3], "labels": None}, DataFormat.tokens)
    assert isinstance(unlabelled, TokenRow)
    np.testing.assert_array_equal(unlabelled.labels, unlabelled.input_ids)


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"text": "a"}, "no key 'messages' (keys: text)"),
        ("messages", {}, "no key 'messages' (keys: none)"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": "hi"}, "messages is a string that is not JSON"),
        ("messages", {"messages": None}, "messages is null, not a list"),
        ("messages", {"messages": [CHAT[0], "hi"]}, "messages[1] is a string, not an object"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] has no key 'content' (keys: role)"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0].content is null, not a string"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [1]}]},
            "messages[0].content[0] is a number, not a text part",
        ),
        (
            "messages",
            {"messages": [{"role": "robot", "content": "a"}]},
            "messages[0].role is 'robot', which is not one of",
        ),
        (
            "messages",
            {"messages": [{"speaker": "human", "value": "a"}]},
            "messages[0] has no key 'role' (keys: speaker, value)",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0] is a call without a name",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[0] has type 'image_url', and only text parts can be trained on",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "4"}]}]},
            "content[0] has type 'tool_result', and only text parts can be trained on; write it as a message of the role",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "messages[0].tool_calls: the role user makes no calls",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "function_call": CALL, "tool_calls": [CALL]}]},
            "messages[0] has both tool_calls and function_call",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": CALL, "result": "4"}]}]},
            "messages[0].tool_calls[0].result is not read",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}]},
            "messages[0].tool_calls[0] is a call without a name",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}]},
            "messages[0].tool_calls[0].arguments is not valid JSON",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "from": "user", "content": "a"}]},
            "has both role and from; keep one",
        ),
        ("messages", {"messages": CHAT, "tools": [{"type": "web_search"}]}, "tools[0] has no function and no name"),
        ("messages", {"messages": CHAT, "tools": [CALL], "functions": [{"name": "g"}]}, "tools and functions differ"),
        ("messages", {"messages": CHAT, "tools": "{"}, "tools is a string that is not JSON"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from is 'bot'"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value is null"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": ""}], "system": 1},
            "system is a number, not a string",
        ),
        ("alpaca", {"instruction": "a"}, "no key 'output'"),
        ("alpaca", {"instruction": "a", "output": None}, "output is null, not a string"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is not a pair of strings"),
        ("alpaca", {"instruction": "a", "output": "b", "history": 5}, "history is a number, not a list"),
        ("prompt_completion", {"prompt": "a"}, "no key 'completion'"),
        ("prompt_completion", {"prompt": "a", "completion": CHAT}, "prompt is a string and completion is a list"),
        ("text", {"text": ""}, "text is empty"),
        ("text", {"text": 7}, "text is a number, not a string"),
        ("tokens", {"input_ids": []}, "input_ids is empty"),
        ("tokens", {"input_ids": [1.5]}, "input_ids holds something other than 64-bit integers"),
        ("tokens", {"input_ids": ["1"]}, "input_ids holds something other than 64-bit integers"),
        ("tokens", {"input_ids": [[1]]}, "input_ids holds something other than 64-bit integers"),
        ("tokens", {"input_ids": [1 << 70]}, "input_ids holds something other than 64-bit integers"),
        ("tokens", {"input_ids": "1 2"}, "input_ids is a string, not a list"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries and input_ids 2"),
        ("tokens", {"input_ids": [1, 2], "labels": [1, None]}, "labels holds something other than 64-bit integers"),
    ],
)
def test_the_reason_for_a_bad_row_names_the_key(format: str, row: dict[str, Any], reason: str) -> None:
    """Users of other trainers get `KeyError: 'role'` in the middle of a run, without the row."""
    with pytest.raises(BadRowError) as error:
        parse_sample(row, DataFormat(format))
    assert reason in str(error.value)


# Detection


def detect(tmp_path: Path, *rows: object) -> DataFormat:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return detect_format(open_source(str(path)))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": CHAT, "tools": None, "prompt": "Q", "prompt_id": 1}, "messages"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"conversation": CHAT, "model": "m"}, "messages"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "Below is ..."}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "url": "x"}, "text"),
        ({"input_ids": [1], "attention_mask": [1], "labels": [1]}, "tokens"),
    ],
)
def test_the_format_is_detected_by_keys(tmp_path: Path, row: dict[str, Any], format: str) -> None:
    assert detect(tmp_path, b"{broken", row, row) is DataFormat(format)


def test_rows_that_fit_no_format_or_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as unknown:
        detect(tmp_path, {"question": "a", "answer": "b"})
    assert "a.jsonl:1: the keys question, answer\n" in str(unknown.value)
    assert "as in 'data.columns={question:instruction,answer:output}': messages | conversations | " in str(
        unknown.value
    )
    with pytest.raises(UsageError) as mixed:
        detect(tmp_path, {"text": "a"}, {"messages": CHAT}, {"text": "a", "id": 1})
    assert "rows of more than one format: text and messages\n  text: first in " in str(mixed.value)
    assert "a.jsonl:2\n" in str(mixed.value)
    with pytest.raises(UsageError, match=r"fit several formats\n  choose one: data.format=text or data.format=tokens"):
        detect(tmp_path, {"text": "a", "input_ids": [1]})
    with pytest.raises(UsageError, match=r"none of the first 2 rows is a JSON object\n  .*a.jsonl:1: not valid JSON"):
        detect(tmp_path, b"hello", b"world")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "P", "chosen": "A", "rejected": "B"}, "preference data, and train.task=sft trains on one answer"),
        (
            {"id": "x", "object": "chat.completion", "choices": []},
            "append choices[0].message to the request's messages",
        ),
        ({"custom_id": "a", "method": "POST", "url": "u", "body": {}}, "take messages and tools out of body"),
        ({"prompt;completion": "a;b"}, "fields are separated by commas in .csv"),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "Gemini's form; write messages"),
    ],
)
def test_rows_that_people_have_are_explained(tmp_path: Path, row: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError) as error:
        detect(tmp_path, row)
    assert hint in str(error.value)


def test_a_stray_row_after_the_first_hundred_does_not_change_the_format(tmp_path: Path) -> None:
    assert detect(tmp_path, *[{"text": "a"}] * 100, {"messages": CHAT}) is DataFormat.text
    with pytest.raises(UsageError, match="more than one format"):
        detect(tmp_path, *[{"text": "a"}] * 99, {"messages": CHAT})


@needs_shared
@pytest.mark.parametrize(
    ("name", "format", "count", "kind"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, Instruction),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, Conversation),
        ("c4_demo.jsonl", "text", 300, PlainText),
    ],
)
def test_llama_factorys_demo_files(name: str, format: str, count: int, kind: type) -> None:
    """Data from another project is read to the last row."""
    opened = open_source(str(SHARED / name))
    found = detect_format(opened)
    assert found is DataFormat(format)
    samples = [parse_sample(decode_row(row), found) for batch in opened.batches() for row in batch.rows]
    assert len(samples) == count
    assert {type(sample) for sample in samples} == {kind}


@needs_shared
def test_function_calls_of_glaive_become_tool_calls() -> None:
    """Every function_call in the file becomes a tool call, in the order of the file."""
    rows = json.loads((SHARED / "glaive_toolcall_en_demo.json").read_text())
    expected = [
        json.loads(turn["value"]) for row in rows for turn in row["conversations"] if turn["from"] == "function_call"
    ]
    samples = [parse_sample(row, DataFormat.sharegpt) for row in rows]
    found = [
        call["function"]
        for sample in samples
        if isinstance(sample, Conversation)
        for message in sample.messages
        for call in message.tool_calls
    ]
    assert found == expected
    assert len(found) > 200
