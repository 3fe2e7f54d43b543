"""Which characters of a conversation are targets, under templates that write turns in many ways.

Each template of `TEMPLATES` has `«` and `»` around what the model has to generate. Without them it is the template under
test; with `{% generation %}` marks in their place, Jinja itself says where the targets are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkflow_cli.config.load import load as load_config
from chunkflow_cli.config.schema import DataConfig, DataFormat, TrainOn, Turns
from chunkflow_cli.data.dataset import open_data
from chunkflow_cli.data.estimate import estimate_sizes
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.sample import BadRowError, Conversation, Message
from chunkflow_cli.data.template import REWRITTEN, ChatTemplate, MarkedText
from chunkflow_cli.data.tokenized import held_out, hold_out
from chunkflow_cli.errors import UsageError
from support.tokenized import bracketed, chat, load, only, write_rows
from support.tokenizers import CHATML, make_tokenizer

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
LAST_QUESTION = "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
SPLIT = "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"


def turns(answer: str, others: str = "{{ m.content }}<|im_end|>\n", before: str = "", after: str = PROMPT) -> str:
    """Return a template with the body of an answer, and of other turns."""
    return (
        before + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + answer
        + "{% else %}" + others + "{% endif %}{% endfor %}" + after
    )  # fmt: skip


PLAIN = "«{{ m.content }}<|im_end|>»\n"
TEMPLATES = {
    "plain": turns(PLAIN),
    "trims": turns("«{{ m.content | trim }}<|im_end|>»\n", "{{ m.content | trim }}<|im_end|>\n"),
    "quotes": turns("«{{ m.content | tojson }}<|im_end|>»\n", "{{ m.content | tojson }}<|im_end|>\n"),
    "shouts": turns("«{{ m.content | upper }}<|im_end|>»\n", "{{ m.content | upper }}<|im_end|>\n"),
    "cuts": turns("«{{ m.content[:3] }}<|im_end|>»\n"),
    "forgets reasoning": turns(
        SPLIT + "{% if loop.index0 > ns.last %}<think>\n«{{ thought }}\n</think>\n\n{{ words }}<|im_end|>»\n"
        "{% else %}«{{ words }}<|im_end|>»\n{% endif %}", before=LAST_QUESTION, after=THINKING_PROMPT),
    "forgets it always": turns(SPLIT + "«{{ words }}<|im_end|>»\n", after=THINKING_PROMPT),
    "thinks last": turns("{% if loop.last %}«<think>\n\n</think>\n\n{{ m.content }}<|im_end|>»\n"
                         "{% else %}" + PLAIN + "{% endif %}"),
    "thinks if asked": turns(
        "{% if '</think>' in m.content %}" + PLAIN + "{% else %}<think></think>" + PLAIN + "{% endif %}",
        after="{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think></think>' if enable_thinking is defined "
        "and not enable_thinking else '<think>\n' }}{% endif %}"),
    "one end for all": turns(
        "{% if loop.last and not add_generation_prompt %}«{{ m.content }}<|im_end|>\n</s>»{% else %}" + PLAIN + "{% endif %}",
        after="{% if add_generation_prompt %}<|im_start|>assistant\n{% elif messages[-1].role != 'assistant' %}</s>{% endif %}"),
    "another last end": turns(
        "{% if loop.last and not add_generation_prompt %}«{{ m.content }}</s>»{% else %}«{{ m.content }}<|im_end|>»{% endif %}", "{{ m.content }}<|im_end|>"),
    "breaks a line before the next": turns(
        PLAIN, "{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}<|im_end|>\n"),
    "instructs late": turns(
        PLAIN, "{% if loop.index0 == ns.last %}[RULES]Be brief.[/RULES]{% endif %}{{ m.content }}<|im_end|>\n", LAST_QUESTION),
    "adds to some": turns("{% if loop.last and 'b' in m.content %}«{{ m.content }}<|im_end|>MORE»{% else %}"
                          "«{{ m.content }}<|im_end|>»{% endif %}", "{{ m.content }}<|im_end|>"),
    "says it twice": turns("«{{ m.content }}<|im_end|>»\n", after=PROMPT + "{{ messages[1].content }}"),
    "backwards": turns(PLAIN).replace("in messages %}<", "in messages | reverse %}<"),
    "asks always": turns(PLAIN.replace("<|im_end|>", "</s>"), "{{ m.content }}</s>\n", after="{{ '<|im_start|>assistant\n' }}"),
    "asks more": turns("<think>\n«{{ m.content }}<|im_end|>»\n", after=PROMPT.replace("\n", "\n<think>\n\n", 1)),
    "asks in words": turns("{{ '\n' }}«{{ m.content }}<|im_end|>»\n", after=PROMPT.replace("\n", "\n\nHere is why:\n", 1)),
    "names no header": "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
                       "«{{ ' ' + m.content }}</s>»{% endif %}{% endfor %}",
}  # fmt: skip
NEVER = ("says it twice", "backwards")
"""Templates of which most conversations cannot be told apart."""


CALL = "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
CALLS = "{% for c in m.tool_calls or [] %}" + CALL + "{% endfor %}"
OF_CALLS = {
    "ids in earlier calls": turns(  # Apriel
        "«{{ m.content }}" + CALLS.replace("</call>", "{{ '' if last else ' ' + c.id }}</call>") + "<|im_end|>»\n"
    ).replace("<|im_start|>", "{% set last = loop.last %}<|im_start|>", 1),
    "another end of the last call": turns(  # Nemotron Nano v2
        "«{{ m.content }}" + CALLS + "{{ '' if loop.last or not m.tool_calls else '\n' }}<|im_end|>»\n"),
    "another end of the last result": turns(  # Hermes 2
        "«{{ m.content }}" + CALLS + "<|im_end|>»\n",
        "{{ m.content }}{{ '\n' if m.role == 'tool' and not loop.last else '' }}<|im_end|>\n"),
    "no header behind results": turns(  # Apertus
        "«{{ m.content }}" + CALLS + "<|im_end|>»\n").replace(
        "<|im_start|>", "{% if m.role != 'assistant' or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>", 1).replace(
        "{{ m.role }}\n", "{{ m.role }}\n{% endif %}", 1),
    "parts of later calls and results": turns(  # DeepSeek
        "«{% if m.tool_calls and loop.index0 < 2 %}<calls>{% endif %}{{ m.content }}" + CALLS + "<|im_end|>»",
        "{{ m.content }}{{ '</result>' if m.role == 'tool' else '<|im_end|>' }}").replace(
        "<|im_start|>", "{% if m.role != 'assistant' or not m.tool_calls or loop.index0 < 2 %}<|im_start|>", 1).replace(
        "{{ m.role }}\n", "{{ m.role }}\n{% endif %}", 1).replace(PROMPT,
        "{% if messages[-1].role == 'tool' %}<results_end>{% endif %}" + PROMPT),
}  # fmt: skip
OF_CALLS = {name: "{# 'tool' #}" + text for name, text in OF_CALLS.items()}
"""Templates that write a turn with calls, or what is before it, otherwise when it is the last."""


@functools.cache
def tokenizer(text: str) -> Any:
    tokens = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
    return SimpleNamespace(
        chat_template=text, special_tokens_map={}, all_special_tokens=[], eos_token="</s>", bos_token="<s>",
        added_tokens_decoder={n: SimpleNamespace(content=token, special=True) for n, token in enumerate(tokens)},
    )  # fmt: skip


@functools.cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(tokenizer((TEMPLATES | OF_CALLS)[name].translate({ord("«"): None, ord("»"): None})))


def truth(name: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    # A line end behind a tag is trimmed, one behind an expression is not.
    marked = (TEMPLATES | OF_CALLS)[name].replace("«", "{% generation %}").replace("»", "{% endgeneration %}{{ '' }}")
    texts, spans = render_jinja_template(
        conversations=[messages], chat_template=marked, return_assistant_tokens_mask=True
    )
    return texts[0], [(start, stop) for start, stop in spans[0]]


WORDS = st.lists(
    st.sampled_from(
        ["A", "b c", " ", "\n", "<think>", "</think>", "<think>\n", "\n</think>\n\n", "<|im_end|>", "<|im_start|>assistant\n",
         "</s>", '"', "é", "\U000f0000", "\U000f0001", "[INST]", "<think></think>"]
    ), max_size=4,
).map("".join)  # fmt: skip
ROLES = st.sampled_from([("user", "assistant") * n for n in (1, 2, 3)] + [("user", "user", "assistant", "assistant"),
                        ("system", "user", "assistant", "user", "assistant"), ("assistant", "user", "assistant"),
                        ("system", "assistant", "user", "assistant")])  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    return [{"role": role, "content": draw(WORDS)} for role in draw(ROLES)]


def as_sample(messages: list[dict[str, str]]) -> Conversation:
    return Conversation(tuple(Message(m["role"], m["content"], m["role"] == "assistant") for m in messages))


def spans(text: MarkedText) -> list[str]:
    return [text.text[start:stop] for start, stop in text.target_spans or ()]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(messages=conversations())
@example(messages=chat("Q", "<think>\nday\n</think>\n\nblue", "R", "<think>\nmay\n</think>\n\ngreen"))
@example(messages=chat("a, b or c", "c", "a, b or c", "c"))
@example(messages=chat("", "", "", ""))
@example(messages=chat("</s>", "</s>", "b", "b c"))
@example(messages=chat("", " <think></think>A", "", ""))
@example(messages=[{"role": "assistant", "content": " <think></think>A"}, *chat("", "")])
def test_a_target_is_what_the_model_generates_or_the_row_is_refused(name: str, messages: list[dict[str, str]]) -> None:
    # Tags stay in a skeleton, so one that is written twice is not seen to be the same.
    if name == "says it twice" and set("Abcé").isdisjoint(messages[1]["content"]):
        return
    text, expected = truth(name, messages)
    try:
        found = template(name).render(as_sample(messages), mark_targets=True)
    except BadRowError:
        return
    assert found.text == text
    expected = [(start, stop) for start, stop in expected if start < stop]
    assert len(found.target_spans or ()) == len(expected)
    for (start, stop), (first, end) in zip(found.target_spans or (), expected, strict=True):
        given_by_prompt = text[min(first, start) : start]
        assert start >= first
        assert given_by_prompt in ("", "\n", "<think>", "<think>\n", "<think></think>"), (
            "an answer that itself begins like the prompt"
        )
        assert text[min(stop, end) : max(stop, end)].strip() == ""


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NEVER])
def test_ordinary_conversations_are_not_refused(name: str) -> None:
    for messages in (chat("Q", "A1", "R", "A2"), chat("Q", "A"), chat("Q", "A", "Q", "A", "Q", "A")):
        text, expected = truth(name, messages)
        if name == "shouts":
            messages = chat(*(message["content"].upper() for message in messages))
        found = template(name).render(as_sample(messages), mark_targets=True)
        assert spans(found) == [text[start:stop] for start, stop in expected]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in NEVER])
@settings(max_examples=30, deadline=None)
@given(messages=conversations())
@example(messages=chat("Q", "A1", "R", "A2"))
@example(messages=chat("Q", "b", "", "A2"))
def test_a_sample_of_split_is_a_prompt_and_its_answer(name: str, messages: list[dict[str, str]]) -> None:
    form = template(name)
    try:
        texts = form.render_answers(as_sample(messages))
    except BadRowError:
        return
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(texts) == len(places)
    for text, place in zip(texts, places, strict=True):
        ((start, _),) = text.target_spans or ()
        options: list[dict[str, bool]] = [{}, {"enable_thinking": False}]
        asked = [form._renderer.render(tokenizer_text(name), [messages[:place]], None, add_generation_prompt=True, **option)
                 for option in options]  # fmt: skip
        if any(message["role"] == "user" for message in messages[:place]):
            assert text.text[:start] in [prompts[0] for prompts, _ in asked]
        alone, expected = truth(name, messages[: place + 1])
        assert same_up_to_prompt(text.text[start:], alone[expected[-1][0] :])


def tokenizer_text(name: str) -> str:
    return TEMPLATES[name].translate({ord("«"): None, ord("»"): None})


def same_up_to_prompt(ours: str, theirs: str) -> bool:
    return ours in (
        theirs,
        theirs.removeprefix("<think>\n"),
        theirs.removeprefix("<think></think>"),
        theirs.removeprefix("\n"),
    )


def call(number: int, arguments: dict[str, str]) -> dict[str, Any]:
    return {"id": f"id{number}", "type": "function", "function": {"name": "tide", "arguments": arguments}}


@pytest.mark.parametrize("name", OF_CALLS)
def test_calls_are_found_though_the_last_is_written_otherwise(name: str) -> None:
    """Several steps in a row, and calls at once. A call without arguments has no word to find it by."""
    first: dict[str, str] = {} if name == "another end of the last call" else {"place": "Brae"}
    messages = [
        {"role": "user", "content": "tides?"},
        {"role": "assistant", "content": "", "tool_calls": [call(1, first)]},
        {"role": "tool", "content": "noon", "tool_call_id": "id1"},
        {"role": "assistant", "content": "", "tool_calls": [call(2, {"place": "Voe"}), call(3, {"place": "Unst"})]},
        {"role": "tool", "content": "dusk", "tool_call_id": "id2"},
        {"role": "tool", "content": "dawn", "tool_call_id": "id3"},
        {"role": "assistant", "content": "So it is."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "Bye."},
    ]  # fmt: skip
    row = parse_sample({"messages": messages}, DataFormat.messages)
    assert isinstance(row, Conversation)
    text, expected = truth(name, messages)
    found = template(name).render(row, mark_targets=True)
    assert found.text == text
    assert [each.strip() for each in spans(found)] == [text[start:stop].strip() for start, stop in expected]


def test_an_answer_in_pieces_is_refused_with_what_to_do() -> None:
    """Gemma 4 writes what an answer says beside a call behind the call's result."""
    beside = (
        "{% if m.tool_calls and not loop.last %}[{{ loop.nextitem.content }}]{% endif %}{{ m.content }}<|im_end|>\n"
    )
    skip = "{% for m in messages %}{% if m.role != 'tool' %}"
    text = (
        turns(CALLS + beside)
        .replace("{% for m in messages %}", skip, 1)
        .replace("{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add")
    )
    form = ChatTemplate(tokenizer(text))
    messages = [
        {"role": "user", "content": "tide?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call(1, {"place": "Brae"})]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "At noon."},
    ]
    row = parse_sample({"messages": messages}, DataFormat.messages)
    assert isinstance(row, Conversation)
    with pytest.raises(BadRowError, match=r"turn 2 in pieces, with other turns between them; data[.]turns=split"):
        form.render(row, mark_targets=True)


def test_an_answer_of_which_only_the_last_writes_something_is_refused() -> None:
    row = as_sample(chat("Q", "<think>\nday\n</think>\n\n", "R", "A"))
    with pytest.raises(BadRowError, match=r"writes nothing of turn 2 once another turn follows it; data[.]turns=split"):
        template("forgets reasoning").render(row, mark_targets=True)
    assert len(template("forgets reasoning").render_answers(row)) == 2


def test_an_answer_that_stands_behind_no_prompt_names_the_prompt() -> None:
    row = as_sample(chat("Q", "A"))
    with pytest.raises(BadRowError, match=r"which ends with '.*<think>..', so data[.]turns=split"):
        template("forgets it always").render_answers(row)


def test_earlier_answers_that_are_written_otherwise_are_said() -> None:
    """Once in a run, with what to do: the default trains on other text than the model is asked to write."""
    thoughts = as_sample(chat("Q", "<think>\nday\n</think>\n\nblue", "R", "<think>\nmay\n</think>\n\ngreen"))
    found = template("forgets reasoning").render(thoughts, mark_targets=True)
    assert [remark.text for remark in found.remarks] == [
        "the model will not learn the reasoning of earlier answers, which the chat template writes in the last one only; "
        "data.turns=split makes a sample of each answer, with its reasoning"
    ]
    plain = as_sample(chat("Q", "A1", "R", "A2"))
    assert template("another last end").render(plain, mark_targets=True).remarks == (REWRITTEN,)
    for name in ("another last end", "forgets reasoning"):
        assert [text.remarks for text in template(name).render_answers(plain)] == [(), ()]
    assert template("plain").render(plain, mark_targets=True).remarks == ()


THOUGHTFUL = turns(
    "{% if m.reasoning_content %}«<think>{{ m.reasoning_content }}</think>{{ m.content }}<|im_end|>»\n"
    "{% else %}" + PLAIN + "{% endif %}"
).translate({ord("«"): None, ord("»"): None})
MARKED = (
    THOUGHTFUL.replace("assistant\n{% endif", "assistant\n{% endif")
    .replace("<think>{{ m.reasoning_content }}", "{% generation %}<think>{{ m.reasoning_content }}")
    .replace("{{ m.content }}<|im_end|>\n{% else %}", "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}", 1)
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (THOUGHTFUL, {"content": "no", "reasoning_content": "lungs, so"}),
        (MARKED, {"content": "no", "reasoning_content": "lungs, so"}),
        (CHATML, {"content": "<think>lungs, so</think>no"}),
        (turns(PLAIN.replace("content", "content | trim")).translate({ord("«"): None, ord("»"): None}),
         {"content": "<think>lungs, so</think>no\n"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turns_", Turns)
def test_words_of_reasoning_can_be_left_out(text: str, answer: dict[str, str], turns_: Turns, tmp_path: Path) -> None:
    """What is around them stays a target: the model has to open and close its reasoning."""
    model = make_tokenizer(tmp_path / "model", template=text)
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", **answer}]}
    data = write_rows(tmp_path / "a.jsonl", [row])
    counted = only(load(data, model, turns=turns_), model)
    assert "[<think>lungs, so</think>no<|im_end|>]" in counted
    left_out = only(load(data, model, turns=turns_, train_on_reasoning=False), model)
    assert "[<think>]lungs, so[</think>no<|im_end|>]" in left_out


def test_reasoning_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model", template=CHATML.replace("m['content']", "m['content'] | upper"))
    rows = [{"messages": chat("Q", "<think>hm</think>A")}, {"messages": chat("Q", "A")}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=r"1 of 2 rows .*\n.*a.jsonl:1: the chat template looks at words .* turn 2"):
        load(data, model, train_on_reasoning=False)
    assert len(load(data, model)) == 2


@pytest.mark.parametrize(
    "written", ["c.function.arguments | string", "c.function.arguments | tojson(ensure_ascii=true)"]
)
def test_reasoning_beside_arguments_that_are_escaped_can_be_told_apart(written: str) -> None:
    calls = PLAIN.replace("<|im_end|>", "{% for c in m.tool_calls or [] %}{{ " + written + " }}{% endfor %}<|im_end|>")
    call = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Bräe", "by": ["x"]}}}
    asked = Message("user", "Q", is_target=False)
    given = Conversation(
        (asked, Message("assistant", "<think>hm</think>A", True, (call,)), asked, Message("assistant", "B", True))
    )
    form = ChatTemplate(tokenizer(turns(calls).translate({ord("«"): None, ord("»"): None})))
    found = spans(form.render(given, mark_targets=True, reasoning=False))
    assert found[0] == "<think>"
    assert found[1].startswith("</think>A{")
    assert found[2] == "B<|im_end|>"


def test_reasoning_of_completions_and_of_formats_without_any(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model")
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "Q: ", "completion": "<think>hm</think>A"}])
    assert only(load(data, model, train_on_reasoning=False), model) == "Q: [<think>]hm[</think>A<|im_end|>]"
    text = write_rows(tmp_path / "b.jsonl", [{"text": "<think>hm</think>A"}])
    with pytest.raises(UsageError, match=r"train_on_reasoning=false needs conversations or completions"):
        load(text, model, train_on_reasoning=False)


def test_only_the_last_answer_changes_what_counts_and_nothing_else() -> None:
    turns_ = tuple(
        Message(turn["role"], turn["content"], turn["role"] == "assistant") for turn in chat("Q", "A", "R", "B")
    )
    given = Conversation(turns_, ({"function": {"name": "f"}},), {"enable_thinking": True})
    last = given.with_last_answer()
    assert [turn.is_target for turn in last.messages] == [False, False, False, True]
    assert (last.tools, last.template_arguments) == (given.tools, given.template_arguments)


def test_only_the_last_answer(tmp_path: Path) -> None:
    model = make_tokenizer(tmp_path / "model")
    called = {"role": "assistant", "content": "I look."}
    rows = [{"messages": [*chat("Q", "A1", "R"), called, {"role": "tool", "content": "T"}, *chat("A2", roles=("assistant",))]},
            {"messages": [*chat("Q", "A1", "R"), {"role": "assistant", "content": "A2", "train": False}]}]  # fmt: skip
    data = write_rows(tmp_path / "a.jsonl", rows)
    for turns_ in Turns:
        kept = load(data, model, train_on=TrainOn.last, turns=turns_, bad_rows="skip")
        assert only(kept, model).count("[") == 1
        assert only(kept, model).endswith("[A2<|im_end|>]\n")
        assert [reason for _, reason in kept.rejected] == [
            "the row excludes its last answer (weight, train), and data.train_on=last counts no other"
        ]


def test_split_counts_samples_rows_and_targets(tmp_path: Path) -> None:
    """A conversation is as many samples as it has answers that count; a bad one is none at all."""
    model = make_tokenizer(tmp_path / "model")
    three = [*chat("Q", "A1", "R", "A2"), {"role": "user", "content": "S"},
             {"role": "assistant", "content": "A3", "weight": 0}]  # fmt: skip
    rows = [{"messages": three}, {"messages": chat("Q")}, {"messages": chat("Q", "A")}, {"messages": chat("Q", "A")}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    kept = load(data, model, turns=Turns.split, bad_rows="skip")
    question, asked = "<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>assistant\n"
    assert [bracketed(kept[index], model) for index in range(len(kept))] == [
        f"{question}{asked}[A1<|im_end|>]\n",
        f"{question}{asked}A1<|im_end|>\n<|im_start|>user\nR<|im_end|>\n{asked}[A2<|im_end|>]\n",
        *[f"{question}{asked}[A<|im_end|>]\n"] * 2,
    ]
    assert [kept.location(index).line for index in range(4)] == [1, 1, 3, 4]
    assert kept.rows.tolist() == [0, 0, 1, 2]
    assert (kept.total.rows_read, kept.total.samples_read, kept.total.samples_rejected, len(kept)) == (4, 5, 1, 4)
    whole = load(data, model, bad_rows="skip")
    assert whole.target_counts.sum() == kept.target_counts.sum()
    assert (whole.total.rows_read, whole.total.samples_read, len(whole), whole.rows.tolist()) == (4, 4, 3, [0, 1, 2])
    source = open_data(DataConfig(path=str(data)))
    sizes = estimate_sizes(
        source, DataFormat.messages, train_on=TrainOn.assistant, turns=Turns.split, progress=lambda _: None
    )
    assert (len(sizes.lengths), sizes.rows, len(sizes.rejected), sizes.lines.tolist()) == (4, 3, 1, [1, 1, 3, 4])
    assert len(set(sizes.digests.tolist())) == 3


def test_estimates_count_reasoning_where_templates_write_it(tmp_path: Path) -> None:
    """Most write that of answers after the last question only."""
    thoughtful = [
        {"role": "user", "content": "Q" * 40},
        {"role": "assistant", "content": "A", "reasoning_content": "R" * 400},
    ]
    source = open_data(DataConfig(path=str(write_rows(tmp_path / "a.jsonl", [{"messages": thoughtful * 2}]))))
    lengths, targets = {}, {}
    for turns_ in Turns:
        sizes = estimate_sizes(
            source, DataFormat.messages, train_on=TrainOn.assistant, turns=turns_, progress=lambda _: None
        )
        lengths[turns_], targets[turns_] = sizes.lengths.tolist(), sizes.target_counts.tolist()
    assert lengths == {Turns.whole: [4 * 5 + 20 + 100], Turns.split: [2 * 5 + 10 + 100, 4 * 5 + 20 + 100]}
    assert targets == {Turns.whole: [1 + 1 + 100], Turns.split: [1 + 100, 1 + 100]}


def test_the_samples_of_a_row_are_held_out_together(tmp_path: Path) -> None:
    """Else the held-out loss would be of answers whose conversation was trained on."""
    model = make_tokenizer(tmp_path / "model")
    data = write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", f"A{n}", "R", f"B{n}")} for n in range(10)])
    train, held = hold_out(load(data, model, turns=Turns.split), 0.3, 1)
    assert (len(train), len(held), held.total.rows_read) == (14, 6, 3)
    lines = [{part.location(index).line for index in range(len(part))} for part in (train, held)]
    assert lines[0] | lines[1] == set(range(1, 11))
    assert lines[0].isdisjoint(lines[1])
    whole = [part.indices.tolist() for part in hold_out(load(data, model), 0.3, 1)]
    assert whole == [part.tolist() for part in held_out(10, 0.3, 1)]


@pytest.mark.parametrize("words", [["data.turns=split"], ["data.train_on_reasoning=false"]])
def test_what_contradicts_train_on_all_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"data.train_on=all.*\n.*set data.train_on=assistant"):
        load_config(["recipe=tiny_random", "data.train_on=all", *words])
