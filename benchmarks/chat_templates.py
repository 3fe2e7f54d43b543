"""The targets of conversations under every chat template of some folders, by rules that do not know how they are found.

    python benchmarks/chat_templates.py FOLDER [FOLDER ...]
    python benchmarks/chat_templates.py FOLDER --show hermes    every row of the templates whose name has the word

Templates come as `*.jinja`; llama.cpp has those of 70 models in `models/templates`. Sixteen conversations are rendered
with each, as one sample and as a sample for each answer (`data.turns`). Either the row is refused, or

- no words of a user or of a tool are targets,
- the words of every answer are targets, and so is every call: unless the template does not write them, which is counted
  and, in training, said,
- each sample of `data.turns=split` begins with what transformers renders as the prompt of that answer. (Behind a tool's
  result, some templates write a header before the next answer, but no prompt that has it. It is no target.)
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.formats import parse_sample
from chunkflow_cli.data.sample import BadRowError, Conversation
from chunkflow_cli.data.template import ChatTemplate, MarkedText
from chunkflow_cli.data.template_input import as_template_input
from chunkflow_cli.data.template_rendering import TEMPLATE_DATE
from common import emit, say

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOKEN = re.compile(
    r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>|</?tool_call>|\[/?[A-Z_]+\]"
)
ENDS = ("<|END_OF_TURN_TOKEN|>", "<|im_end|>", "<|eot_id|>")
"""Tokens that end a turn in templates which never write the EOS token by its name."""
DATES = ("%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%b %d, %Y")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, *calls: dict[str, Any], reasoning: str | None = None) -> dict[str, Any]:
    extra: dict[str, Any] = {"tool_calls": list(calls)} if calls else {}
    return {"role": "assistant", "content": text, **extra, **({"reasoning_content": reasoning} if reasoning else {})}


def call(number: int, place: str) -> dict[str, Any]:
    function = {"name": "tide", "arguments": {"place": place}}
    return {"type": "function", "id": f"call{number:05d}", "function": function}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "tide", "tool_call_id": f"call{number:05d}", "content": text}


PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "tide", "description": "when", "parameters": PLACE}}
TWO = [user("q-sky"), answer("A-BLUE"), user("q-grass"), answer("A-GREEN")]
ASKED = [user("q-tide"), answer("", call(1, "BRAE")), result(1, "r-twelve"), answer("A-NOON")]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": TWO[:2],
    "two questions": TWO,
    "system message": [{"role": "system", "content": "s-short"}, *TWO],
    "question without answer": [*TWO, user("q-bye")],
    "reasoning": [user("q-sky"), answer("A-BLUE", reasoning="T-DAY")],
    "reasoning twice": [user("q-sky"), answer("A-BLUE", reasoning="T-DAY"),
                        user("q-grass"), answer("A-GREEN", reasoning="T-MAY")],
    "reasoning at times": [user("q-sky"), answer("A-BLUE", reasoning="T-DAY"), *TWO[2:], *TWO[:1],
                           answer("A-WHITE", reasoning="T-FOG")],
    "reasoning in the text": [user("q-sky"), answer("<think>\nT-DAY\n</think>\n\nA-BLUE")],
    "the same twice": [user("q-sky"), answer("<think>\nT-DAY\n</think>\n\nA-BLUE"),
                       user("q-grass"), answer("<think>\nT-MAY\n</think>\n\nA-GREEN")],
    "call": ASKED,
    "call, then a question": [*ASKED, *TWO[:2]],
    "reasoning before a call": [user("q-tide"), answer("", call(1, "BRAE"), reasoning="T-DAY"), *ASKED[2:], *TWO[:2]],
    "words beside a call": [user("q-tide"), answer("A-LOOK", call(1, "BRAE")), *ASKED[2:]],
    "two calls at once": [user("q-tide"), answer("", call(1, "BRAE"), call(2, "LUND")), result(1, "r-twelve"),
                          result(2, "r-six"), answer("A-NOON")],
    "two steps of calls": [*ASKED[:3], answer("", call(2, "LUND"), reasoning="T-HM"), result(2, "r-six"),
                           answer("A-NOON")],
    "line breaks": [user("q-sky"), answer("A-BLUE é 日本 🎉\n\n    indented\n"), *TWO[2:]],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of a conversation under a template."""

    template: str
    conversation: str
    turns: str
    outcome: str
    """exact | refused | left out: the template does not write some of it | wrong"""
    detail: str = ""


def rows_of(path: Path) -> Iterator[Row]:
    """Yield what becomes of every conversation under the template of a file."""
    text = path.read_text(encoding="utf-8")
    template = ChatTemplate(cast("Any", _tokenizer(text)))
    for name, messages in CONVERSATIONS.items():
        tools = {"tools": [TOOL]} if any("tool_calls" in turn for turn in messages) else {}
        sample = parse_sample(json.loads(json.dumps({"messages": messages, **tools})), DataFormat.messages)
        assert isinstance(sample, Conversation)
        for turns in ("whole", "split"):
            try:
                if turns == "split":
                    texts = template.render_answers(sample)
                else:
                    texts = [template.render(sample, mark_targets=True)]
            except BadRowError as error:
                yield Row(path.stem, name, turns, "refused", str(error))
                continue
            wrong = _leaks(texts, messages) or (turns == "split" and _wrong_prompt(text, sample, texts))
            missing = "" if wrong else _missing(texts, messages)
            outcome = "wrong" if wrong else "left out" if missing else "exact"
            yield Row(path.stem, name, turns, outcome, str(wrong or missing))


def _tokenizer(text: str) -> SimpleNamespace:
    tokens = {*TOKEN.findall(text), *TOKENS.values()}
    added = {number: SimpleNamespace(content=token, special=True) for number, token in enumerate(sorted(tokens))}
    eos = next((token for token in ENDS if token in tokens and "eos_token" not in text), TOKENS["eos_token"])
    return SimpleNamespace(
        chat_template=text, special_tokens_map=TOKENS, added_tokens_decoder=added,
        all_special_tokens=[*TOKENS.values()], eos_token=eos, bos_token=TOKENS["bos_token"],
    )  # fmt: skip


def _targets(texts: list[MarkedText]) -> str:
    return "\n".join(text.text[start:stop] for text in texts for start, stop in text.target_spans or ())


def _leaks(texts: list[MarkedText], messages: list[dict[str, Any]]) -> str:
    targets = _targets(texts)
    said = [turn["content"] for turn in messages if turn["role"] != "assistant" and turn["content"] in targets]
    return f"{said} are targets" if said else ""


def _missing(texts: list[MarkedText], messages: list[dict[str, Any]]) -> str:
    """Return which words of answers are no targets."""
    targets = _targets(texts)
    words = re.findall(r"A-[A-Z]+|BRAE|LUND", json.dumps([turn for turn in messages if turn["role"] == "assistant"]))
    return ", ".join(sorted({word for word in words if word not in targets}))


def _wrong_prompt(text: str, sample: Conversation, texts: list[MarkedText]) -> str:
    given = as_template_input(sample, text)
    places = [place for place, turn in enumerate(given.messages) if turn["role"] == "assistant"]
    asked, said = (_rendered(text, [user("q-sky")], None, add_generation_prompt=asks) for asks in (True, False))
    header = "".join(asked).removeprefix("".join(said))
    for found, place in zip(texts, places, strict=True):
        before = list(given.messages[:place])
        prompts = [
            _dated(prompt)
            for messages in (before, _with_arguments_as_text(before))
            for options in ({}, {"enable_thinking": False}, {"enable_thinking": True})
            for prompt in _rendered(text, messages, given.tools, add_generation_prompt=True, **options)
        ]
        start = (found.target_spans or ((0, 0),))[0][0]
        behind_tool = place and given.messages[place - 1]["role"] not in ("user", "system")
        shown = (found.text[:start], found.text[:start].removesuffix(header if behind_tool else ""))
        if not set(shown) & set(prompts):
            return f"turn {place + 1} stands behind {found.text[max(0, start - 60) : start]!r}"
    return ""


def _rendered(text: str, messages: list[Any], tools: Any, **options: Any) -> list[str]:
    try:
        return render_jinja_template(conversations=[messages], tools=tools, chat_template=text, **options, **TOKENS)[0]
    except Exception:  # of any type: what the template makes of arguments in the other form
        return []


def _with_arguments_as_text(messages: list[Any]) -> list[Any]:
    """Return messages with the arguments of calls as JSON, which some templates ask for."""
    changed = json.loads(json.dumps(messages))
    for each in (call for turn in changed for call in turn.get("tool_calls") or ()):
        each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    return changed


def _dated(text: str) -> str:
    """Replace today's date by the one that chunkflow gives to templates."""
    for form in DATES:
        text = text.replace(f"{datetime.now():{form}}", f"{TEMPLATE_DATE:{form}}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--show", default="", metavar="WORD", help="print every row of the templates whose name has it")
    arguments = parser.parse_args()
    paths = sorted(path for folder in arguments.folders for path in folder.glob("*.jinja"))
    rows = [row for path in paths for row in rows_of(path)]
    for row in rows:
        if row.outcome == "wrong" or (arguments.show and arguments.show.lower() in row.template.lower()):
            say(" | ".join(asdict(row).values()).replace("\n", "\\n"))
    reasons = Counter(
        (row.turns, re.sub(r"turn \d+", "a turn", row.detail)[:150]) for row in rows if row.outcome == "refused"
    )
    emit(
        {
            "templates": len(paths),
            "conversations": len(CONVERSATIONS),
            "outcomes": Counter(f"{row.turns}: {row.outcome}" for row in rows),
            "refused": [{"turns": turns, "why": why, "rows": count} for (turns, why), count in reasons.most_common()],
        },
        None,
    )


if __name__ == "__main__":
    main()
