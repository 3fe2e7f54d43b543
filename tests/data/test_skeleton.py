"""Conversations that are put together are, to the character, what the template writes; or they are left to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chunkflow_cli.data.skeleton import Skeletons

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
OPEN = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # As Llama 3's: contents without the white space around them, and a text that is made before it is written.
    "trimmed": (
        "{% for m in messages %}{% set content = '<|' + m['role'] + '|>\n\n' + m['content'] | trim + '<|eot|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
    ),
    # As Gemma's and Mistral's: turns that must alternate.
    "alternating": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # As Qwen3's: it asks what a turn says, and writes more into the last one.
    "thinking": (
        "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages[::-1] %}"
        "{% if m.role == 'user' and not (m.content.startswith('<tool>') and m.content.endswith('</tool>')) %}"
        "{% set ns.last = (messages | length - 1) - loop.index0 %}{% break %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% endif %}"
        "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.last and (loop.last or content) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ content.lstrip('\n') + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "comparing": (
        "{% for m in messages %}{% if m.content == 'A' or m.content != '' and m.content in ['B', '</think>'] %}!"
        "{% elif not m.content %}?{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}
CLOSED = {
    "length": "{% for m in messages %}{% if m.content | length > 3 %}{{ m.content }}{% endif %}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content.upper() }}{% endfor %}",
    "first": "{% for m in messages %}{{ m.content[0] }}{% endfor %}",
    "cut": "{% for m in messages %}{{ m.content.split('A')[0] }}{% endfor %}",
    "ordered": "{% for m in messages %}{% if m.content < 'B' %}{{ m.content }}{% endif %}{% endfor %}",
    "joined": "{% set t = messages[0].content ~ 'x' %}{% if 'A' in t %}{{ t }}{% endif %}",
    "captured": "{% set t %}{{ messages[0].content }}{% endset %}{% if 'A' in t %}{{ t }}{% endif %}",
    "macro": "{% macro f(t) %}{{ t }}{% endmacro %}{% if 'A' in f(messages[0].content) %}A{% endif %}",
    "within": "{% if messages[0].content in 'ABC' %}{{ messages[0].content }}{% endif %}",
    "formatted": "{{ '%s' % messages[0].content }}",
    "sum": "{% if 'A' in 'x' + messages[0].content %}{{ messages[0].content }}{% endif %}",
    "json": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "listed": "{{ [messages[0].content] }}",
    "replaced": "{{ messages[0].content | replace('A', 'B') }}",
    "sequence": "{% if messages[0].content is sequence %}{{ messages[0].content }}{% endif %}",
}
CONTENTS = st.lists(
    st.sampled_from(["A", "B", "", " ", "\n", "</think>", "<tool>", "</tool>", '"', "\\", "é", "\x02", "\x03", "word"]),
    max_size=4,
).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def rendered(template: str, messages: list[dict[str, str]], ask: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=ask, **SPECIAL)
    return str(texts[0])


@pytest.mark.parametrize("template", OPEN.values(), ids=OPEN)
def test_usual_contents_are_put_together(template: str) -> None:
    messages = chat("What is it?", "It\nis this.", 'And\t"that"?', "{{ no }}")
    skeletons = Skeletons(SPECIAL)
    for ask in (False, True):
        for count in range(1, 5):
            text = skeletons.text(template, messages[:count], ask=ask)
            assert text == rendered(template, messages[:count], ask)
    assert not any(skeleton is None for skeleton in skeletons._made.values())


@pytest.mark.parametrize("template", CLOSED.values(), ids=CLOSED)
def test_templates_that_look_into_contents_are_asked(template: str) -> None:
    assert Skeletons(SPECIAL).text(template, chat("A", "B"), ask=False) is None


@given(data=st.data(), ask=st.booleans())
@hypothesis_settings(max_examples=400, deadline=None)
def test_what_is_put_together_is_what_the_template_writes(data: Any, ask: bool) -> None:
    template = data.draw(st.sampled_from([*OPEN.values(), *CLOSED.values()]))
    turns = data.draw(st.lists(st.tuples(ROLES, CONTENTS), min_size=1, max_size=5))
    messages = [{"role": role, "content": content} for role, content in turns]
    text = Skeletons(SPECIAL).text(template, messages, ask=ask)
    assert text is None or text == rendered(template, messages, ask)


def test_other_keys_and_refused_conversations_are_left_to_the_template() -> None:
    skeletons = Skeletons(SPECIAL)
    assert skeletons.text(OPEN["chatml"], [{"role": "user", "content": "A", "name": "B"}], ask=False) is None
    assert skeletons.text(OPEN["alternating"], chat("A")[:1] * 2, ask=False) is None
    assert skeletons.text("{% if %}", chat("A"), ask=False) is None
