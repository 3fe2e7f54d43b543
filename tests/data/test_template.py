"""What a chat template leaves out, what it inserts, where its turns end, and which day it is told."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.data import template_rendering
from chunkflow_cli.data.sample import BadRowError, Conversation, Message
from chunkflow_cli.data.template import ChatTemplate, MarkedText
from chunkflow_cli.data.tokenizer import load_tokenizer
from chunkflow_cli.errors import UsageError
from support.tokenizers import CHATML, make_tokenizer


def chatml(body: str, before: str = "") -> str:
    """Return a template that writes `body` as the text of each message."""
    return (
        before + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + body + "{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
ONE_OF_BOTH = chatml("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}")
BOTH = chatml("{{ m.content }}" + CALLS)
ESCAPED = chatml(
    "{{ m.content | tojson }}{% for c in m.tool_calls or [] %}{{ (c['function'] | tojson) | tojson }}{% endfor %}"
)
SPELT_OUT = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}<f={{ c['function'].name }}>{% for k, v in "
    "c['function'].arguments.items() %}<p={{ k }}>{{ v | string }}</p>{% endfor %}{% endfor %}"
)
ARGUMENTS_ONLY = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
)
NAMES_ONLY = chatml("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c['function'].name }}{% endfor %}")
R1 = chatml("{{ m.content.split('</think>')[-1] }}")
QWEN3 = chatml(
    "{% set text = m.content %}{% if '</think>' in text %}<think>\n{{ text.split('</think>')[0].split('<think>')[-1].strip()"
    " }}\n</think>\n\n{{ text.split('</think>')[-1].strip() }}{% else %}{{ text }}{% endif %}"
)
KNOWS_REASONING = chatml(
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
)
LAST_USER_ONLY = chatml("{% if m.role != 'system' %}{{ m.content }}{% endif %}")
PARTS = chatml("{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}")
CALL = {"type": "function", "id": "id-7", "function": {"name": "tide", "arguments": {"at": 'Brae "x"', "n": [1, True]}}}


@functools.cache
def template(text: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer(text, **options))


@functools.cache
def tokenizer(text: str, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(str(make_tokenizer(Path(folder), template=text, **options)), trust_remote_code=False)


def said(*turns: Message, text: str, tools: tuple[Any, ...] = (), **options: Any) -> list[str]:
    return [remark.text for remark in rendered(*turns, text=text, tools=tools, **options).remarks]


def rendered(*turns: Message, text: str, tools: tuple[Any, ...] = (), mark_targets: bool = True) -> MarkedText:
    return template(text).render(Conversation(turns, tools), mark_targets=mark_targets)


def user(content: str, **extra: Any) -> Message:
    return Message("user", content, is_target=False, extra=extra)


def answer(content: str, *calls: Any, **extra: Any) -> Message:
    return Message("assistant", content, is_target=True, tool_calls=calls, extra=extra)


THOUGHT = "<think>\na whale has lungs\n</think>\n\nno"


@pytest.mark.parametrize("mark_targets", [True, False])
@pytest.mark.parametrize(
    ("text", "turn", "lost"),
    [
        (CHATML, answer("no", reasoning_content="lungs"), "learn reasoning_content of the assistant"),
        (CHATML, answer("no", reasoning="lungs"), "learn reasoning of the assistant"),
        (CHATML, answer("no", thinking="lungs"), "learn thinking of the assistant"),
        (KNOWS_REASONING, answer("no", thinking="lungs"), None),
        (R1, answer(THOUGHT), "learn the text before </think> in the assistant's content"),
        (R1, answer("no"), None),
        (QWEN3, answer(THOUGHT), None),
        (QWEN3, answer("<think>lungs</think>no"), None),
        (chatml("{{ m.content[:9] }}"), answer("one line\nand another"), "learn a part of the assistant's content"),
        (chatml("{{ m.content | trim }}"), answer("\n no \n"), None),
        (ONE_OF_BOTH, answer("I look.", CALL), "learn the assistant's content next to tool calls"),
        (ONE_OF_BOTH, answer("", CALL), None),
        (chatml("{{ m.content or m.tool_calls }}"), answer("I look.", CALL), "learn tool calls of the assistant"),
        (NAMES_ONLY, answer("I look.", CALL), "learn arguments of tool calls"),
        (ARGUMENTS_ONLY, answer("", CALL), "learn names of tool calls"),
        (BOTH, answer("I look.", CALL), None),
        (ESCAPED, answer('I "look".\n', CALL), None),
        (SPELT_OUT, answer("I look.", CALL), None),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_said(
    text: str, turn: Message, lost: str | None, mark_targets: bool
) -> None:
    """The targets would silently be others than those of the row."""
    found = [line for line in said(user("Q"), turn, text=text, mark_targets=mark_targets) if "model will not" in line]
    assert found == ([] if lost is None else [f"the model will not {lost}, which the chat template leaves out"])


@pytest.mark.parametrize(
    ("turn", "lost"),
    [
        (Message("system", "Be brief.", is_target=False), "the content of system messages"),
        (user("Q", name="Ann"), "name of user messages"),
        (user("Q", ages=[3]), "ages of user messages"),
    ],
)
def test_what_a_template_leaves_out_of_other_turns_is_said(turn: Message, lost: str) -> None:
    turns = (turn, user("Q"), answer("no"))
    assert f"the model will not see {lost}, which the chat template leaves out" in said(*turns, text=LAST_USER_ONLY)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox bounds each loop, but not loops within loops."""
    monkeypatch.setattr(template_rendering, "LONGEST_SECONDS", 0.05)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match=r"it may never end\n  name another template with data.chat_template"):
        rendered(user("Q"), answer("A"), text=loops + CHATML)


def test_tools_and_ids_that_are_left_out_are_said() -> None:
    tools = ({"type": "function", "function": {"name": "moon"}},)
    result = Message("tool", "noon", is_target=False, extra={"tool_call_id": "id-7", "name": "tide"})
    turns = (user("Q"), answer("", CALL), result, answer("At noon."))
    with_ids = chatml("{{ m.content }}" + CALLS + "{{ m.tool_call_id }}{{ (m.tool_calls or [{}])[0].id }}{# 'tool' #}")
    ids, definitions = "the ids of tool calls", "definitions of tools, which the chat template leaves out"
    assert said(*turns, text=BOTH + "{# 'tool' #}") == [f"the chat template leaves out {ids}"]
    assert said(*turns, text=with_ids) == []
    assert f"the model will not see {definitions}" in said(*turns, text=with_ids + "{# tools #}", tools=tools)
    knows_none = said(*turns, text=CHATML, tools=tools)
    assert knows_none[0].startswith(
        "the chat template has no place for tools: their definitions are in the system message"
    )
    assert "calls are in the answer, as JSON; results are user messages" in knows_none[0]


@pytest.mark.parametrize("text", [chatml("{{ m.content.text }}"), chatml("{{ m.text }}")])
@pytest.mark.parametrize("turn", [answer("no"), answer("", CALL), answer("", reasoning_content="lungs")])
def test_an_answer_of_which_nothing_is_written_is_a_bad_row(text: str, turn: Message) -> None:
    """Its only target would be the end of the turn: the model would learn to say nothing."""
    with pytest.raises(BadRowError, match=r"writes nothing of what the assistant says in turn 2"):
        rendered(user("Q"), turn, text=text + "{# tool_calls #}")


def test_words_outside_of_the_marks_are_said() -> None:
    marked = chatml("{% if m.role == 'assistant' %}<a>{{ m.reasoning_content }}</a>{% generation %}{{ m.content }}"
                    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}")  # fmt: skip
    found = said(user("Q"), answer("no", reasoning_content="lungs"), text=marked)
    assert found[0] == (
        "the model will not learn reasoning_content of the assistant, which the chat template does not mark as an answer"
    )
    assert "marks end before <|im_end|>, so the model does not learn to stop" in found[1]


@hypothesis_settings(max_examples=100, deadline=None)
@given(asked=st.text(max_size=20), thought=st.text(max_size=20), said_last=st.text(max_size=20))
def test_what_is_written_is_never_called_lost_and_what_is_cut_always_is(
    asked: str, thought: str, said_last: str
) -> None:
    content = f"<think>{thought}.</think>{said_last}"
    for text in (CHATML, ESCAPED, chatml("{{ m.content | trim }}")):
        assert [line for line in said(user(asked), answer(content), text=text) if "model will not" in line] == []
    cut = chatml("{{ m.content if m.role == 'user' else 'It is: ' + m.content.split('</think>')[-1] }}")
    if "think>" not in thought + said_last and said_last.strip():
        assert "which the chat template leaves out" in "".join(said(user(asked), answer(content), text=cut))


def test_what_a_template_inserts_is_said() -> None:
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a kind helper.<|im_end|>\n{% endif %}"
    without, with_system = (user("Q"), answer("A")), (Message("system", "S", is_target=False), user("Q"), answer("A"))
    line = 'the chat template inserts "You are a kind helper."'
    assert said(*without, text=chatml("{{ m.content }}", default)) == [
        f"{line} into conversations without a system message"
    ]
    assert said(*with_system, text=chatml("{{ m.content }}", default)) == []
    always = chatml("{{ m.content }}", "You are a kind helper.\n")
    assert said(*without, text=always) == said(*with_system, text=always) == [line]
    assert said(*without, text=CHATML) == said(*with_system, text=CHATML) == []
    assert not rendered(*without, text=always).remarks[0].is_warning


DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"


def test_today_is_a_fixed_day() -> None:
    """Else the same data would be other tokens tomorrow, and a stopped run would go on with other samples."""
    text = chatml("{{ m.content }}", DATED)
    first = rendered(user("Q"), answer("A"), text=text)
    assert first.text.startswith("Today: 26 Jul 2024\n")
    assert any("asks for today's date and gets 26 Jul 2024" in remark.text for remark in first.remarks)
    # Elsewhere in this process, the clock is the clock.
    now = tokenizer(text).apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert "26 Jul 2024" not in now


THINKS = (
    "{% if messages | length > 9 %}{% set depth = 1 %}{% endif %}{{ '' if tone is undefined else tone }}{{ depth }}"
    "{% macro start() %}{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}{% endmacro %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m.role == 'assistant' %}{{ start() }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + start() }}{% endif %}"
)
"""As Qwen3 does: without thinking, an empty thought stands before the answer and in the generation prompt."""


@pytest.mark.parametrize(
    ("configured", "own", "result"),
    [
        ({}, {}, {}),
        ({"enable_thinking": False}, {}, {"enable_thinking": False}),
        ({}, {"enable_thinking": False}, {"enable_thinking": False}),
        (
            {"enable_thinking": True, "tone": "dry"},
            {"enable_thinking": False},
            {"enable_thinking": False, "tone": "dry"},
        ),
        ({"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": True}),
    ],
)
@pytest.mark.parametrize("text", [THINKS, chatml("{% generation %}{{ m.content }}{% endgeneration %}{{ tone }}")])
def test_arguments_reach_every_rendering(
    text: str, configured: dict[str, Any], own: dict[str, Any], result: dict[str, Any]
) -> None:
    """The text is that of `apply_chat_template` with the same keywords, and so is the prompt before the answer."""
    if text != THINKS:
        configured, own, result = ({"tone": str(each)} if each else {} for each in (configured, own, result))
        result = {**configured, **own}
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    plain = functools.partial(tokenizer(text).apply_chat_template, tokenize=False, **result)
    for mark_targets in (True, False):
        found = ChatTemplate(tokenizer(text), configured).render(
            Conversation((user("Q"), answer("A")), template_arguments=own), mark_targets=mark_targets
        )
        assert found.text == plain(chat)
        assert not [remark for remark in found.remarks if "never reads" in remark.text]
        if mark_targets and text == THINKS:
            (start, stop), = found.target_spans or ()  # fmt: skip
            assert found.text[:start] == plain(chat[:1], add_generation_prompt=True)
            assert found.text[start:stop] == "A<|im_end|>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", "the chat template never reads it\n  did you mean data.template_arguments.enable_thinking?"),
        ("zzz", "the chat template never reads it\n  it reads: enable_thinking, tone"),
        ("messages", "the name is reserved"),
        ("tools", "the name is reserved"),
        ("add_generation_prompt", "the name is reserved"),
        ("bos_token", "the name is reserved"),
        ("padding", "the name is reserved"),
    ],
)
def test_an_argument_without_effect_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        ChatTemplate(tokenizer(THINKS), {name: True})
    assert str(error.value).startswith(f"data.template_arguments.{name}: {message}")
    with pytest.raises(UsageError, match="it reads none, so leave the key out"):
        ChatTemplate(tokenizer(CHATML), {"zzz": True})


def test_arguments_of_a_row_without_effect_are_said_and_reserved_ones_refused() -> None:
    """Rows may be written for several models: TRL passes what a template does not read, and nothing comes of it."""
    turns = (user("Q"), answer("A"))
    remarks = template(CHATML).render(Conversation(turns, (), {"deep": 1}), mark_targets=True).remarks
    assert [(remark.text, remark.is_warning) for remark in remarks] == [
        ("the chat template never reads the argument deep, which has no effect", True)
    ]
    with pytest.raises(BadRowError, match=r"chat_template_kwargs\.eos_token: the name is reserved"):
        template(CHATML).render(Conversation(turns, (), {"eos_token": "x"}), mark_targets=True)


def test_a_template_that_writes_only_parts_or_only_json_gets_them() -> None:
    """Those of models for images write no string, and that of DeepSeek-V3 joins a call's arguments to others."""
    assert rendered(user("Q"), answer(" no "), text=PARTS).text == rendered(user("Q"), answer(" no "), text=CHATML).text
    joined = chatml(
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    )
    found = rendered(user("Q"), answer("", CALL), text=joined)
    assert marked(found) == ['tide{"at": "Brae \\"x\\"", "n": [1, true]}<|im_end|>']


def marked(text: MarkedText) -> list[str]:
    return [text.text[start:stop] for start, stop in text.target_spans or ()]


GLM = (
    "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '<s>') + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "fault", ["{{ 1 / 0 }}", "{{ range(999999) }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"]
)
def test_a_fault_of_the_template_is_a_bad_row(fault: str) -> None:
    with pytest.raises(BadRowError, match="the chat template rejects the conversation"):
        rendered(user("Q"), answer("A"), text=chatml("{{ m.content }}", before=fault))


def test_a_turn_that_the_next_one_ends() -> None:
    """The model has to generate the next role's token to stop: without it as a target, it never learns to."""
    found = rendered(user("Q"), answer("blue"), user("R"), answer("green"), text=GLM)
    assert marked(found) == ["blue<|im_start|>", "green"]
    assert found.borrowed_ends == {"<|im_start|>"}
    spaced = GLM.replace("m.content }}", "m.content + ('' if loop.last else '\n') }}").replace("'<s>' }}", "'\n<s>' }}")
    found = rendered(user("Q"), answer("blue"), user("R"), answer("green"), text=spaced)
    assert marked(found) == ["blue\n<|im_start|>", "green"]
    own = rendered(user("Q"), answer("blue"), user("R"), answer("green"), text=CHATML)
    assert marked(own) == ["blue<|im_end|>", "green<|im_end|>"]
    assert own.borrowed_ends == frozenset()


def test_a_generation_prompt_that_stands_behind_an_answer_is_no_end() -> None:
    """Generation has to stop at the token before it, whatever the loss counts."""
    always = CHATML[: CHATML.index("{% if add_generation_prompt")] + "{{ '<|im_start|>assistant\n' }}"
    asked = Conversation((user("Q"), answer("A")))
    for mark_targets in (True, False):
        found = template(always).render(asked, mark_targets=mark_targets)
        assert found.text[: found.answer_end].endswith("A<|im_end|>")


def test_a_name_among_the_tools_is_no_call() -> None:
    """Otherwise an answer would be learned of which the template writes nothing but its end."""
    tool = {"type": "function", "function": {"name": "tide"}}
    calls = Conversation((user("Q"), answer("", CALL), user("R"), answer("A")), (tool,))
    deaf = chatml("{{ m.content }}", before="{{ tools | tojson }}{% if tool_calls %}{% endif %}")
    with pytest.raises(BadRowError, match="writes nothing of what the assistant says in turn 2"):
        template(deaf).render(calls, mark_targets=True)


def test_remarks_are_the_same_words_for_all_rows() -> None:
    """They are counted by their words: a remark that quoted the row would be a line a row."""
    one = rendered(user("Q"), answer("no", reasoning_content="lungs"), text=CHATML)
    two = rendered(user("other"), answer("yes", reasoning_content="gills"), text=CHATML)
    assert one.remarks == two.remarks
    assert dataclasses.asdict(one.remarks[0])["is_warning"]


HOSTILE = {
    "leaves the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "leaves it by a format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "runs a command": "{{ raise_exception.__globals__['os'].system('touch PWNED') }}",
    "runs a command by name": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch PWNED') }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "imports a file": "{% import '/etc/passwd' as x %}",
    "changes the row": "{{ messages.append(messages[0]) }}",
    "is torn": "{% for %}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is nested too deeply": "{{ " + "(" * 3000,
    "counts too far": "{% for i in range(10 ** 9) %}{% endfor %}",
    "repeats too often": "{{ 'x' * 10 ** 30 }}",
    "uses an unknown encoding": "{{ 'a'.encode('nowhere') }}",
    "raises what it likes": "{{ cycler() }}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_template_that_fails_is_a_bad_row(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template is a program of a stranger: nothing of it runs outside, and no failure of it is a traceback."""
    monkeypatch.chdir(tmp_path)
    for mark_targets in (True, False):
        with pytest.raises(BadRowError, match="the chat template rejects the conversation: ") as error:
            rendered(user("Q"), answer("A"), text=text + CHATML, mark_targets=mark_targets)
        assert "root:" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_no_fault_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same row is fine on another day. As a bad row, it would be left out of the cache for good."""

    def no_room(**_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("transformers.utils.chat_template_utils.render_jinja_template", no_room)
    with pytest.raises(MemoryError):
        rendered(user("Q"), answer("A"), text=CHATML)
