"""Targets of chats, against the masks of TRL's training templates.

For 31 families TRL has the template as models ship it, and the same with `{% generation %}` marks around what an
assistant says. The two are read from the installed package. Targets under the first must be what the second marks, up
to white space and what the generation prompt writes. `DIFFERENCES` holds all others with their reasons.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.sample import BadRowError, Conversation
from chunkflow_cli.data.template import ChatTemplate, MarkedText
from chunkflow_cli.data.template_input import as_template_input
from chunkflow_cli.data.template_rendering import TEMPLATE_DATE

TRL = find_spec("trl")
pytestmark = pytest.mark.skipif(TRL is None, reason="trl is not installed")
FOLDER = Path(str(TRL.origin)).parent / "chat_templates" if TRL else Path()
NAMES = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
OF_PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates that write a content only if it is a list of parts."""
REFUSED = "refused"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


CALL = {"type": "function", "id": "aB3dE6gH9", "function": {"name": "tide", "arguments": {"place": "Brae"}}}
CALL_AS_TEXT = '{"name": "tide", "arguments": {"place": "Brae"}}'
RESULT = {"role": "tool", "name": "tide", "tool_call_id": "aB3dE6gH9", "content": "noon"}
PLACE = {"type": "string", "description": "where"}
TOOL = {"type": "function", "function": {"name": "tide", "description": "when", "parameters": {
    "type": "object", "properties": {"place": PLACE}, "required": ["place"]}}}  # fmt: skip
TWO = [user("sky?"), answer("blue"), user("grass?"), answer("green")]
THOUGHT, SECOND_THOUGHT = "<think>\nday\n</think>\n\nblue", "<think>\nmay\n</think>\n\ngreen"
CASES: dict[str, dict[str, Any]] = {
    "one": {"messages": TWO[:2]},
    "two": {"messages": TWO},
    "system": {"messages": [{"role": "system", "content": "short"}, *TWO]},
    "field": {"messages": [user("sky?"), answer("blue", reasoning_content="day")]},
    "fields": {"messages": [user("sky?"), answer("blue", reasoning_content="day"),
                            user("grass?"), answer("green", reasoning_content="may")]},
    "thought": {"messages": [user("sky?"), answer(THOUGHT)]},
    "thoughts": {"messages": [user("sky?"), answer(THOUGHT), user("grass?"), answer(SECOND_THOUGHT)]},
    "call": {"messages": [user("tide?"), answer("", tool_calls=[CALL]), RESULT, answer("At noon.")], "tools": [TOOL]},
    "calls": {"messages": [user("tide?"), answer("", tool_calls=[CALL], reasoning_content="hm"), RESULT,
                           answer("At noon."), *TWO[:2]], "tools": [TOOL]},
    "beside": {"messages": [user("tide?"), answer("I look.", tool_calls=[CALL]), RESULT, answer("At noon.")],
               "tools": [TOOL]},
    "steps": {"messages": [user("tides?"), answer("", tool_calls=[CALL]), RESULT, answer("", tool_calls=[CALL]), RESULT,
                           answer("At noon.")], "tools": [TOOL]},
    "opening": {"messages": [answer("Hello."), *TWO[:2]]},
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TWO]},
}  # fmt: skip


@functools.cache
def plain(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


@functools.cache
def chat_template(name: str) -> ChatTemplate:
    """Return the template of a tokenizer that has all tokens which the template names."""
    tokens = {*re.findall(r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<end_of_utterance>", plain(name)), *EOS}
    tokens |= set(re.findall(r"<(?:start|end)_of_turn>|</?tool_call>|\[gMASK\]", plain(name)))
    added = {number: SimpleNamespace(content=token, special=True) for number, token in enumerate(sorted(tokens))}
    tokenizer = SimpleNamespace(chat_template=plain(name), special_tokens_map=SPECIAL, added_tokens_decoder=added,
                                all_special_tokens=EOS, eos_token="</s>", bos_token="<s>")  # fmt: skip
    return ChatTemplate(tokenizer)  # type: ignore[arg-type]


EOS = ["<s>", "</s>"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def written(template: str, messages: list[Any], tools: Any = None, **options: Any) -> tuple[str, list[Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=template, **options, **SPECIAL
    )
    today, day = f"{datetime.now():%Y-%m-%d}", f"{TEMPLATE_DATE:%Y-%m-%d}"
    return texts[0].replace(today, day), spans[0] if spans else []


@functools.cache
def prompts(name: str) -> list[str]:
    """Return what generation prompts add to a question, the default one first."""
    asked = as_training_takes(name, TWO[:1])
    flags: list[dict[str, bool]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    texts = [written(plain(name), asked, add_generation_prompt=True, **flag)[0] for flag in flags]
    pairs = zip(written(plain(name), asked)[0], texts[0], strict=False)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [text[start:] for text in texts]


def as_training_takes(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with contents of the type that a training template writes."""
    texts = [turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"] for turn in messages]
    if name in OF_PARTS:
        return [
            {**turn, "content": [{"type": "text", "text": text}]} for turn, text in zip(messages, texts, strict=True)
        ]
    return [{**turn, "content": text} for turn, text in zip(messages, texts, strict=True)]


@functools.cache
def truth(name: str, case: str) -> str:
    """Return what TRL marks, without what the generation prompt before it writes."""
    row = CASES[case]
    messages, tools = as_training_takes(name, row["messages"]), row.get("tools")
    try:
        text, spans = written(
            (FOLDER / f"{name}_training.jinja").read_text(), messages, tools, return_assistant_tokens_mask=True
        )
    except Exception:  # the template's own refusal, of any type
        return REFUSED
    return "".join(_without_prompt(text, start, stop, prompts(name)) for start, stop in spans)


def _without_prompt(text: str, start: int, stop: int, prompts: list[str]) -> str:
    for prompt in prompts:
        for place in range(start, stop):
            if text.endswith(prompt, 0, place):
                return text[place:stop]
    return text[start:stop]


def found(texts: list[MarkedText]) -> str:
    return "".join(text.text[start:stop] for text in texts for start, stop in text.target_spans or ())


def conversation(case: str) -> Conversation:
    sample = parse_sample(json.loads(json.dumps(CASES[case])), DataFormat.messages)
    assert isinstance(sample, Conversation)
    return sample


@functools.cache
def targets(name: str, case: str, turns: str) -> str:
    try:
        if turns == "split":
            return found(chat_template(name).render_answers(conversation(case)))
        return found([chat_template(name).render(conversation(case), mark_targets=True)])
    except BadRowError:
        return REFUSED


def same(one: str, other: str) -> bool:
    return re.sub(r"\s", "", one) == re.sub(r"\s", "", other)


class Difference(NamedTuple):
    """Why targets differ in some cases, and what makes them the same."""

    reason: str
    names: tuple[str, ...]
    cases: tuple[str, ...]
    turns: tuple[str, ...] = ("whole", "split")
    ours: Callable[[str], str] = str
    theirs: Callable[[str], str] = str

    def holds_for(self, name: str, case: str, turns: str) -> bool:
        return turns in self.turns and case in self.cases and any(fnmatch(name, pattern) for pattern in self.names)


def without(*patterns: str) -> Callable[[str], str]:
    return lambda text: functools.reduce(
        lambda rest, pattern: re.sub(pattern, "", rest, flags=re.DOTALL), patterns, text
    )


THINKING = (
    r"(<think>)?[^<>]*</think>",  # Qwen, Nemotron, GLM; the prompt may have the opening tag
    r"<\|channel>thought.*?<channel\|>",  # Gemma 4
    r"<\|channel\|>analysis<\|message\|>[^<]*<\|end\|><\|start\|>assistant",  # gpt-oss
)
ENDS = (r"<\|im_end\|>", r"<turn\|>", r"<\|return\|>", r"<\|end\|>", r"<\|user\|>", r"<\|observation\|>", "</s>")


def with_last_thought(text: str) -> str:
    """Return answers without the reasoning of any but the last."""
    before, end, last = text.rstrip().removesuffix("<|im_end|>").rpartition("<|im_end|>")
    return without(*THINKING)(before) + end + last + "<|im_end|>"


CALLING = ("call", "calls", "beside", "steps")
SEVERAL = ("two", "system", "fields", "thoughts", "parts", "opening")
REASONED = ("fields", "thoughts", "calls")
NO_CALLS = ("cohere*", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3*", "qwen2_5_vl", "smolvlm")
DIFFERENCES = [
    Difference(
        "The template knows no calls. TRL's drops them or refuses the tool's message; chunkflow writes them as JSON.",
        NO_CALLS, CALLING, ours=without(re.escape(CALL_AS_TEXT)),
    ),
    Difference(
        "The training template writes the reasoning of every answer; the model's own, of the last one only.",
        ("qwen3", "qwen3_5_think", "qwen3_6"), (*SEVERAL, "calls"), ("whole",), with_last_thought, with_last_thought,
    ),
    Difference(
        "Qwen3 writes no <think> block into an answer that nobody has asked for.",
        ("qwen3",), ("opening",), ("split",), with_last_thought, with_last_thought,
    ),
    Difference(
        "The same, and its default prompt is for an answer without reasoning.",
        ("qwen3_5_nothink",), REASONED, ("whole",), with_last_thought, with_last_thought,
    ),
    Difference(
        "Qwen3 writes an empty <think> block before the last answer only, the training template before each.",
        ("qwen3",), ("call", "beside", "steps"), ("whole",), with_last_thought, with_last_thought,
    ),
    Difference(
        "TRL's template leaves out the reasoning of earlier answers; in split, each answer is the last.",
        ("nemotron_3*",), REASONED, ("split",), with_last_thought, with_last_thought,
    ),
    Difference(
        "The same for GLM.",
        ("glm4moe",), REASONED, ("split",), without(*THINKING, *ENDS), without(*THINKING, *ENDS),
    ),
    Difference(
        "The same; these templates do not know <think>, and gpt-oss takes a content beside calls for reasoning.",
        ("gptoss", "diffusion_gemma"), ("fields", "calls", "beside"), ("split",),
        without(*THINKING, *ENDS), without(*THINKING, *ENDS),
    ),
    Difference(
        "The last answer ends otherwise than those before it; in split, each answer is the last.",
        ("gptoss", "phi3*"), SEVERAL, ("split",), without(*THINKING, *ENDS), without(*THINKING, *ENDS),
    ),
    Difference(
        "The same after calls, which TRL's template drops.",
        ("phi3*",), CALLING, ("split",), without(re.escape(CALL_AS_TEXT), *ENDS), without(*ENDS),
    ),
    Difference(
        "GLM ends an answer with the token that begins the next turn. The training template adds one at the very end, "
        "where the model's own writes none.",
        ("glm4moe",), tuple(CASES), ("whole",), theirs=lambda text: text.removesuffix("<|user|>"),
    ),
    Difference(
        "The same for each answer in split.",
        ("glm4moe",), tuple(CASES), ("split",), theirs=without(*ENDS),
    ),
    Difference(
        "DeepSeek: the training template marks the header and what the template writes after results of tools.",
        ("deepseek*",), tuple(CASES), ("whole",), theirs=without(r"<｜Assistant｜>", r"<｜tool▁outputs▁end｜>"),
    ),
    Difference(
        "DeepSeek-R1's own template leaves out the reasoning of every answer.",
        ("deepseek_r1_distill",), ("thought", "thoughts"), ("whole",), theirs=without(*THINKING),
    ),
    Difference(
        "DeepSeek-R1's own template drops calls: nothing is left of an answer that says nothing else, and the row is refused.",
        ("deepseek_r1_distill",), ("call", "calls", "steps"), ("whole",), theirs=lambda text: REFUSED,
    ),
    Difference(
        "The template asks for a question, which the first sample of split has not: it refuses the row.",
        ("qwen3_5*", "qwen3_6", "qwen3_8"), ("opening",), ("split",), theirs=lambda text: REFUSED,
    ),
    Difference(
        "DeepSeek's prompt ends with <think>, and no answer begins behind it: split refuses the row.",
        ("deepseek*",), tuple(CASES), ("split",), theirs=lambda text: REFUSED,
    ),
    Difference(
        "Gemma 4 ends a call with <|tool_response>, the training template only with the call.",
        ("diffusion_gemma",), ("call", "calls", "steps"), ours=without(re.escape("<|tool_response>"), *THINKING),
    ),
    Difference(
        "DiffusionGemma writes a content beside calls after the tool's result, so the answer is in two pieces: refused.",
        ("diffusion_gemma",), ("beside",), theirs=lambda text: REFUSED,
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_what_trl_marks(name: str) -> None:
    """A difference is wrong unless it is listed, and so is one that is listed and gone."""
    for case in CASES:
        for turns in ("whole", "split"):
            ours, theirs = targets(name, case, turns), truth(name, case)
            reasons = [difference for difference in DIFFERENCES if difference.holds_for(name, case, turns)]
            explained, place = ours, f"{name}, {case}, {turns}: {ours!r}, TRL {theirs!r}"
            if same(ours, theirs):
                assert not reasons, f"no longer different: {place}"
                continue
            assert reasons, place
            for difference in reasons:
                explained, theirs = difference.ours(explained), difference.theirs(theirs)
            drops_calls = theirs == REFUSED and case in CALLING and any(fnmatch(name, some) for some in NO_CALLS)
            assert drops_calls or same(explained, theirs), place


def test_all_pairs_are_there_and_every_reason_is_needed() -> None:
    assert len(NAMES) >= 31
    for difference in DIFFERENCES:
        for pattern in difference.names:
            assert any(fnmatch(name, pattern) for name in NAMES), difference.reason


NEWER = ("qwen3*", "gptoss", "nemotron_3*", "phi3*", "gemma4*", "lfm2_2_5*", "llama3_1", "llama3_2", "muse_glimmer")


def test_no_chat_of_a_newer_model_is_refused() -> None:
    """Those without a training template, too."""
    names = [path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training")]
    for name in names:
        if any(fnmatch(name, pattern) for pattern in NEWER):
            for case in (
                "one",
                "two",
                "system",
                "field",
                "fields",
                "thought",
                "thoughts",
                "call",
                "calls",
                "steps",
                "parts",
            ):
                for turns in ("whole", "split"):
                    assert targets(name, case, turns) != REFUSED, (name, case, turns)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_sample_is_the_prompt_and_the_answer(name: str) -> None:
    """To the character what the model is given at inference, and then the template's own last turn."""
    form = chat_template(name)
    for case in CASES:
        sample = conversation(case)
        try:
            texts = form.render_answers(sample)
        except BadRowError:
            continue
        messages, tools = form_of(name, sample)
        places = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
        assert len(texts) == len(places)
        for text, place in zip(texts, places, strict=True):
            (start, stop), *others = text.target_spans or ()
            assert not others
            assert written(plain(name), messages[: place + 1], tools)[0].endswith(text.text[start:])
            if not place:
                continue  # most templates write no prompt of no messages
            flags: list[dict[str, bool]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
            given = [
                written(plain(name), messages[:place], tools, add_generation_prompt=True, **flag)[0] for flag in flags
            ]
            header = prompts(name)[0] if name == "diffusion_gemma" else ""  # written behind a tool's result
            behind = [*given, *(prompt + header for prompt in given)]
            assert text.text[:start] in behind, (name, case)
            assert not text.text[stop:].strip()


def form_of(name: str, sample: Conversation) -> tuple[list[dict[str, Any]], Any]:
    """Return messages and tools as the template gets them."""
    given = as_template_input(sample, plain(name))
    return as_training_takes(name, given.messages), given.tools
