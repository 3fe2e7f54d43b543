"""Fields of a row that mean something in other tools: each is honored, or the row is refused by the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.config.schema import DataFormat, TrainOn
from chunkflow_cli.data.encoding import Encoder
from chunkflow_cli.data.estimate import estimate_sizes
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.sample import BadRowError, Conversation, TokenRow
from chunkflow_cli.data.source import RowBatch, open_source
from chunkflow_cli.data.tokenizer import load_tokenizer
from support.tokenized import write_rows
from support.tokenizers import make_tokenizer

IGNORED = -100
USER: dict[str, Any] = {"role": "user", "content": "Q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "A"}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def parse(format: str, row: dict[str, Any]) -> Any:
    return parse_sample(row, DataFormat(format))


def chat(*turns: dict[str, Any], **row: Any) -> Conversation:
    sample = parse("messages", {"messages": list(turns), **row})
    assert isinstance(sample, Conversation)
    return sample


def tokens(**row: Any) -> tuple[list[int], list[int]]:
    sample = parse("tokens", row)
    assert isinstance(sample, TokenRow)
    return sample.input_ids.tolist(), sample.labels.tolist()


# No field is without effect: a property of all formats

EVERYTHING = (  # a template that writes all that it is given
    "{{ enable_thinking }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] }}{{ m | tojson }}"
    "{{ (m.tool_calls or []) | tojson }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS: dict[DataFormat, dict[str, Any]] = {
    DataFormat.messages: {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]},
    DataFormat.sharegpt: {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    DataFormat.alpaca: {"instruction": "I", "input": "X", "output": "O"},
    DataFormat.prompt_completion: {"prompt": [USER], "completion": [ANSWER]},
    DataFormat.text: {"text": "Some text."},
    DataFormat.tokens: {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8]},
    DataFormat.preference: {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B"}]},
    DataFormat.feedback: {"prompt": [USER], "completion": [ANSWER], "label": True},
}
# The first token is no target anyway.
flags = st.lists(st.sampled_from([0, 1]), min_size=4, max_size=4).filter(lambda values: 0 in values[1:])
weights = st.sampled_from([0, 0.0, 0.5, 2, False, "0"])
words = st.text("abc ", min_size=1).filter(lambda text: text.strip() != "")
calls = st.fixed_dictionaries({"name": st.sampled_from("fg"), "arguments": st.sampled_from(['{"x": 1}', {"y": None}])})
definitions = st.lists(st.fixed_dictionaries({"name": st.sampled_from("fg")}), min_size=1)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "attention_mask": flags,
    "completion_mask": flags,
    "assistant_masks": flags,
    "loss_mask": flags,
    "some_mask": flags,
    "labels": st.just([IGNORED, IGNORED, 7, 8]),
    "position_ids": st.sampled_from([[0, 1, 0, 1], [1, 2, 3, 4], [0, 1]]),
    "token_type_ids": flags.filter(any),
    "weight": weights,
    "train": weights,
    "loss": st.just(False),
    "function_call": calls,
    "functions": definitions,
    "tools": definitions,
    "tool_call_id": words,
    "tool_calls": st.lists(calls, min_size=1),
    "reasoning_content": words,
    "thinking": words,
    "reasoning": words,
    "chat_template_kwargs": st.just({"enable_thinking": False}),
    "documents": st.just([{"title": "T", "text": "D"}]),
    "images": st.just(["a.png"]),
    "videos": st.just([{"url": "a"}]),
    "audio": st.just("a.wav"),
    "chosen": words,
    "rejected": words,
    "refusal": words,
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[DataFormat, Encoder]:
    folder = make_tokenizer(tmp_path_factory.mktemp("everything"), template=EVERYTHING)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    return {
        format: Encoder(
            None if format is DataFormat.tokens else tokenizer,
            format=format,
            train_on=TrainOn.assistant,
            vocab_size=None,
        )
        for format in ROWS
    }


def learnt(encoder: Encoder, row: dict[str, Any]) -> tuple[list[int], list[int]] | str:
    """Return the ids and targets of a row, or the reason for which it is refused."""
    batch = encoder.encode(RowBatch(0, [1], [json.dumps(row).encode()], 0))
    if batch.rejected:
        return batch.rejected[0].reason
    return batch.input_ids.tolist(), batch.targets.tolist()


@pytest.mark.parametrize("format", ROWS, ids=[format.value for format in ROWS])
@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_field_is_without_effect(
    encoders: dict[DataFormat, Encoder], format: DataFormat, data: st.DataObject
) -> None:
    """A field of the row or of one of its messages changes tokens or targets, or the row is refused by its name."""
    encoder, row = encoders[format], ROWS[format]
    plain = learnt(encoder, row)
    assert not isinstance(plain, str)
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(FIELDS[name])
    lists = [key for key in row if isinstance(row[key], list) and isinstance(row[key][0], dict)]
    key = data.draw(st.sampled_from([None, *lists]))
    if key is None:
        changed = {**row, name: value}
    else:
        turns = list(row[key])
        index = data.draw(st.integers(0, len(turns) - 1))
        turns[index] = {**turns[index], name: value}
        if turns[index].get("role", turns[index].get("from")) in ("user", "human") and not value:
            return  # the loss never counts a user's turn: that it must not says nothing
        changed = {**row, key: turns}
    found = learnt(encoder, changed)
    if isinstance(found, str):
        assert name in found or "exclude" in found or "no targets" in found, found
    else:
        assert found != plain, f"{name}={value} of {key or 'the row'} has no effect"


@pytest.mark.parametrize("format", ROWS, ids=[format.value for format in ROWS])
def test_fields_that_say_nothing_or_describe_the_row_are_ignored(
    encoders: dict[DataFormat, Encoder], format: DataFormat
) -> None:
    empty = dict.fromkeys(FIELDS.keys() - ROWS[format].keys())
    notes = {
        "id": 7,
        "source": "web",
        "category": [1],
        "score": 0.5,
        "url": "u",
        "timestamp": "t",
        "label": 3,
        "loss": 2.5,
        "reasoning": "off",
        "trained_on": ["set"],
        "weights": [],
    }
    neutral = {"weight": 1, "train": True, "images": [], "rejected": "", "tool_choice": "auto", "score_chosen": 1.0}
    row = empty | notes | neutral | {"nan": float("nan")} | ROWS[format]
    assert learnt(encoders[format], row) == learnt(encoders[format], ROWS[format])


def test_an_empty_answer_is_named(encoders: dict[DataFormat, Encoder]) -> None:
    """A null of a spreadsheet becomes one, and a model that has learned it ends at once."""
    for format, row in (
        (DataFormat.messages, {"messages": [USER, {**ANSWER, "content": " "}]}),
        (DataFormat.alpaca, {"instruction": "I", "output": ""}),
        (DataFormat.prompt_completion, {"prompt": "Q", "completion": ""}),
        (DataFormat.preference, {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": ""}]}),
    ):
        for answer, said in ((row, True), (ROWS[format], False)):
            notes = encoders[format].encode(RowBatch(0, [1], [json.dumps(answer).encode()], 0)).notes
            assert any(note.text.startswith("an answer is empty") for note in notes) is said, format


def test_a_weight_in_a_table_without_types() -> None:
    """All cells of CSV are strings."""
    for one in ("1", "1.0", "True"):
        parse_sample({"text": "a", "weight": one}, DataFormat.text)
    for zero in ("0", "0.0", "false"):
        with pytest.raises(BadRowError, match="asks not to be trained on"):
            parse_sample({"text": "a", "weight": zero}, DataFormat.text)


# Which turns count


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("train", False, True),
        ("training", False, None),
        ("trainable", False, True),
        ("loss", False, True),
    ],
)
def test_a_message_that_asks_not_to_be_counted_is_no_target(key: str, off: object, on: object) -> None:
    sample = chat({**USER, key: off}, {**ANSWER, key: off}, USER, {**ANSWER, key: on}, USER, ANSWER)
    assert [message.is_target for message in sample.messages] == [False, False, False, True, False, True]
    assert not any(message.extra for message in sample.messages)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (
            {**ANSWER, "weight": 0.5},
            "messages[1].weight is 0.5, and must be 0 or 1: a message counts fully or not at all",
        ),
        ({**ANSWER, "weight": "0"}, "messages[1].weight is '0', and must be 0 or 1"),
        ({**USER, "train": True}, "messages[1].train is true, but the loss never counts the role user; remove the key"),
        ({**ANSWER, "weight": 1, "train": False}, "messages[1] contradicts itself: weight is 1, train is false"),
        ({**ANSWER, "train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail is not read"),
        ({**ANSWER, "mask": True}, "messages[1].mask is not read"),
        ({**USER, "thinking": "hm"}, "messages[1].thinking: the role user has no reasoning"),
        ({**ANSWER, "thinking": {"a": 1}}, "messages[1].thinking is an object, not a string"),
        ({**ANSWER, "thinking": "a", "reasoning": "b"}, "messages[1] has different texts in thinking and reasoning"),
        ({**ANSWER, "images": ["a.png"]}, "messages[1] has images, and chunkflow trains on text only"),
        ({**ANSWER, "content": None, "refusal": "No."}, "messages[1].refusal is not read; move its text to content"),
    ],
)
def test_a_message_whose_field_cannot_be_honoured_is_refused(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        chat(USER, turn)
    assert reason in str(error.value)


def test_a_prompt_is_never_counted() -> None:
    row = {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]}
    with pytest.raises(
        BadRowError, match=r"prompt\[1\]\.weight is 1, but the loss never counts a message of the prompt"
    ):
        parse("prompt_completion", row)


def test_why_a_conversation_has_no_targets(encoders: dict[DataFormat, Encoder]) -> None:
    encoder = encoders[DataFormat.messages]
    assert learnt(encoder, {"messages": [USER]}) == "there is no assistant message, so there is nothing to train on"
    excluded = learnt(encoder, {"messages": [USER, {**ANSWER, "train": False}]})
    assert (
        excluded == "the row excludes every assistant message (weight, train, prompt), so there is nothing to train on"
    )


# Rows


@pytest.mark.parametrize(
    ("format", "field", "reason"),
    [
        ("text", {"weight": 0.5}, "weight is 0.5, and all rows count equally; remove or rename the key"),
        ("messages", {"train": False}, "train is false: the row asks not to be trained on; leave it out"),
        ("text", {"attention_mask": [1]}, "attention_mask is about tokens, and data.format=text holds text"),
        ("alpaca", {"context": "C"}, "context is not read in data.format=alpaca; put it into the prompt"),
        ("alpaca", {"images": ["a"]}, "the row has images, and chunkflow trains on text only"),
        ("alpaca", {"label": False}, "label is false, feedback on an answer (KTO)"),
        (
            "messages",
            {"rejected": [ANSWER]},
            "the row has rejected: preference data, and train.task=sft trains on one",
        ),
        ("messages", {"thinking": "hm"}, "thinking is not read in data.format=messages; put it into what the"),
        (
            "tokens",
            {"prompt_length": 2},
            "prompt_length is not read; say what the loss counts with labels or completion",
        ),
        ("text", {"example_weight": 0.25}, "example_weight is 0.25, and all rows count equally; remove or rename"),
        ("messages", {"weights": [0, 1]}, "weights is a list of numbers about what the loss counts, and is not read;"),
        ("sharegpt", {"turn_mask": [True]}, "turn_mask is a list of numbers about what the loss counts"),
        ("messages", {"masked_turns": [1]}, "write 0 or 1 as weight into each message"),
        ("alpaca", {"train-on-turns": [0, 1]}, "train-on-turns is a list of numbers about what the loss counts"),
        ("tokens", {"label": [IGNORED, 6, 7, 8]}, "label has a number for each token, and chunkflow does not know"),
        ("tokens", {"anything": [0.1, 1, 2, 3]}, "anything has a number for each token, and chunkflow does not know"),
    ],
)
def test_a_row_whose_field_cannot_be_honoured_is_refused(format: str, field: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        parse(format, ROWS[DataFormat(format)] | field)
    assert reason in str(error.value)


def test_strings_have_no_place_for_a_system_prompt_or_tools() -> None:
    for key in ("system", "tools", "functions"):
        with pytest.raises(BadRowError, match=f"a prompt that is a string has no place for {key}"):
            parse("prompt_completion", {"prompt": "P", "completion": "C", key: [{"name": "f"}]})


def test_a_pair_is_accepted_next_to_the_chosen_answer() -> None:
    """ultrafeedback_binarized keeps chosen and rejected next to messages, which are the chosen conversation."""
    turns = [USER, ANSWER]
    pair = {"chosen": turns, "rejected": [USER, {**ANSWER, "content": "B"}]}
    assert chat(*turns, **pair) == chat(*turns)


def test_the_prompt_that_a_conversation_begins_with_is_a_note() -> None:
    """ultrachat_200k repeats the first message as `prompt`."""
    assert chat(USER, ANSWER, prompt="Q\n") == chat(USER, ANSWER, prompt=[USER]) == chat(USER, ANSWER)
    for other in ("Be brief.", [ANSWER]):
        with pytest.raises(BadRowError, match="prompt is not part of the messages; write it as a message, or remove"):
            chat(USER, ANSWER, prompt=other)


def test_text_that_the_sample_holds_already_is_a_note() -> None:
    thought = "a whale has lungs and breathes air"
    whole = {**ANSWER, "content": f"<think>{thought}</think>No."}
    assert chat(USER, whole, reasoning=thought) == chat(USER, whole)


def test_an_answer_outside_of_the_conversation_is_named() -> None:
    with pytest.raises(BadRowError, match="messages ends with the role user, and response is not read; append it"):
        chat(USER, ANSWER, USER, response="B")


# Rows of ids


def test_masks_and_labels_are_intersected() -> None:
    ids = [5, 6, 7, 8]
    assert tokens(input_ids=ids, completion_mask=[0, 0, 1, 1]) == (ids, [IGNORED, IGNORED, 7, 8])
    both = tokens(input_ids=ids, labels=[5, IGNORED, 7, IGNORED], assistant_masks=[False, True, True, True])
    assert both == (ids, [IGNORED, IGNORED, 7, IGNORED])


@pytest.mark.parametrize("train_on", TrainOn)
def test_padding_is_no_part_of_a_sample(train_on: TrainOn) -> None:
    encoder = Encoder(None, format=DataFormat.tokens, train_on=train_on, vocab_size=None)
    expected = learnt(encoder, {"input_ids": [5, 6, 7]})
    for before, after in [(0, 0), (2, 0), (0, 3), (1, 1)]:
        row = {
            "input_ids": [0] * before + [5, 6, 7] + [0] * after,
            "attention_mask": [0] * before + [1, 1, 1] + [0] * after,
            "position_ids": [0] * before + [0, 1, 2] + [2] * after,
            "token_type_ids": [0] * (before + 3 + after),
        }
        assert learnt(encoder, row) == expected


def test_train_on_all_counts_what_masks_exclude() -> None:
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1], "attention_mask": [1, 1, 1]}
    for train_on, targets in [(TrainOn.assistant, [IGNORED, 7, IGNORED]), (TrainOn.all, [6, 7, IGNORED])]:
        encoder = Encoder(None, format=DataFormat.tokens, train_on=train_on, vocab_size=None)
        assert learnt(encoder, row) == ([5, 6, 7], targets)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask[1] is 0 between tokens"),
        ({"attention_mask": [0, 1, 1, 0, 0]}, "attention_mask has 5 entries and input_ids 4"),
        ({"attention_mask": [0, 0, 0, 0]}, "attention_mask is 0 everywhere"),
        (
            {"attention_mask": [1, 1, 2, 2]},
            "attention_mask[2] is 2, and must be 0 or 1; if it numbers packed sequences",
        ),
        ({"completion_mask": [0, 1]}, "completion_mask has 2 entries and input_ids 4"),
        ({"loss_mask": [0, 1, 0.5, 1]}, "loss_mask holds something other than 64-bit integers"),
        ({"assistant_masks": [0, 1, 3, 1]}, "assistant_masks[2] is 3, and must be 0 or 1"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids[2] is 0, and must count tokens from 0; if sequences are packed"),
        ({"seq_lengths": [2, 2]}, "seq_lengths is not [4]; if sequences are packed, write one row per sequence"),
        ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens is not [0, 4]"),
        ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids is not 0 everywhere"),
    ],
)
def test_ids_whose_masks_cannot_be_honoured_are_refused(field: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        tokens(input_ids=[5, 6, 7, 8], **field)
    assert reason in str(error.value)


# The estimate without a tokenizer


def test_the_estimate_refuses_the_same_rows(tmp_path: Path) -> None:
    """Its short cuts look at few keys, so a field must not slip past them."""
    good = {"messages": [USER, ANSWER]}
    rows: list[object] = [
        good,
        good | {"weight": 0},
        {"messages": [USER, {**ANSWER, "weight": 0.5}]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
        {"messages": [USER]},
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
    ]
    source = open_source(str(write_rows(tmp_path / "a.jsonl", rows)))
    sizes = estimate_sizes(source, DataFormat.messages, train_on=TrainOn.assistant, progress=lambda position: None)
    assert sizes.lines.tolist() == [1]
    assert [reason.split(",")[0].split(";")[0] for _, reason in sizes.rejected] == [
        "weight is 0: the row asks not to be trained on",
        "messages[1].weight is 0.5",
        "the row excludes every assistant message (weight",
        "there is no assistant message",
        "the key 'content' occurs twice in one object",
    ]
    assert np.count_nonzero(sizes.target_counts) == 1
