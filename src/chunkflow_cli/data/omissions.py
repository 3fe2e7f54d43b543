"""Find the parts of a conversation that a chat template does not write.

Templates leave out fields that they do not know (`reasoning_content`, ids of calls), text that they remove (reasoning
before `</think>`), and text that they have no place for (next to a tool call). So every text of a turn is searched for
in the rendered conversation. White space at the ends of a content and around its tags is ignored, and the text may be
escaped as in JSON.

If nothing of a target turn is written, the row is bad: its only target would be the end of the turn. Any other omission
is a remark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from chunkflow_cli.data.fields import REASONING
from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.turn_reasons import nothing_written

_TAG = re.compile(r"(</?\w+>|\[/?[A-Z_]+\])")
_CLOSING = re.compile(r"</\w+>|\[/[A-Z_]+\]")
_TURN_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}


_BEFORE_TAG = "the text before {tag} in the assistant's content"
_CUT_OUT = (*(f"{key} of the assistant" for key in REASONING), _BEFORE_TAG.format(tag="</think>"))
CUT = Remark(
    "the model will not learn the reasoning of earlier answers, which the chat template writes in the last one only; "
    "data.turns=split makes a sample of each answer, with its reasoning"
)


class Turn(NamedTuple):
    """A message as a template gets it, and the rendered text that must contain its words."""

    message: Mapping[str, Any]
    number: int
    """Its place in the conversation, from 1."""
    is_target: bool
    text: str
    region: tuple[int, int] | None = None
    """Where the turn is in that text, `[start, stop)`; None: after the turn before it."""
    is_cut: bool = False
    """True if the template writes more of it when it is the last turn."""


def omissions(turns: Sequence[Turn], whole: str, template: str, tools: Sequence[Any]) -> list[Remark]:
    """Return a remark for each kind of omission.

    Args:
        whole: what the template writes of the conversation.
        template: the template itself.
        tools: the definitions that the template gets.

    Raises:
        BadRowError: nothing is written of what an assistant says in a turn that is to be learned.
    """
    remarks: list[Remark] = []
    places: dict[str, int] = {}  # up to where each text is used up
    for turn in turns:
        start, stop = turn.region or (places.get(turn.text, 0), len(turn.text))
        if len(turn.message) == 2 and (end := _end_of(turn.message["content"].strip(), turn.text, start, stop)) >= 0:
            places[turn.text] = end  # role and content, as they are: the usual case, and a fast one
            continue
        search = _Search(turn.text, start, stop)
        if turn.message["role"] == "assistant":
            lost = list(_of_assistant(turn.message, search))
            # Without a place of its own, a turn may stand anywhere.
            is_elsewhere = turn.region is None and _stands_somewhere(turn.message, whole)
            if lost and turn.is_target and not search.found and not is_elsewhere:
                raise BadRowError(nothing_written(turn.number, is_cut=turn.is_cut))
        else:
            lost = list(_of_others(turn.message, search))
        lost += _of_other_keys(turn.message, template, whole)
        # Words outside of `{% generation %}` marks are written, but are no targets.
        loses = "leaves out" if turn.text is whole else "does not mark as an answer"
        verb = "learn" if turn.is_target else "see"
        for what in lost:
            if turn.is_cut and what in _CUT_OUT:
                remarks.append(CUT)
            else:
                remarks.append(Remark(f"the model will not {verb} {what}, which the chat template {loses}"))
        remarks += _on_ids(turn.message, whole)
        places[turn.text] = search.end
    if any(_name_of(tool) not in whole for tool in tools):
        remarks.append(Remark("the model will not see definitions of tools, which the chat template leaves out"))
    return list(dict.fromkeys(remarks))


def _on_ids(message: Mapping[str, Any], whole: str) -> Iterator[Remark]:
    """Yield a remark if ids of calls are not written: few templates need them, and a model does not miss them."""
    ids = [message.get("tool_call_id"), *(call.get("id") for call in message.get("tool_calls") or ())]
    if not all(str(value) in whole for value in ids if value):
        yield Remark("the chat template leaves out the ids of tool calls", is_warning=False)


class _Search:
    """Searches for words in a range of a text, and remembers its position."""

    def __init__(self, text: str, start: int, stop: int) -> None:
        self.text, self.start, self.stop = text, start, stop
        self.end = start
        self.found = False
        """True if any words were found."""

    def has(self, words: str) -> bool:
        """Return True if the range holds these words, as they are or escaped."""
        words = words.strip()
        return not words or any(self._find(form, self.start) >= 0 for form in written_forms(words))

    def has_content(self, content: str) -> bool:
        """Return True if the range holds a content, as it is or with other white space around its tags."""
        if self.has(content):
            return True
        place = self.start
        parts = [part.strip() for part in _TAG.split(content) if part.strip()]
        if parts and _TAG.fullmatch(parts[0]) and self.text[: self.start].rstrip().endswith(parts[0]):
            parts = parts[1:]  # the generation prompt ends with <think>
        for part in parts:
            place = self._find(part, place)
            if place < 0:
                return False
        return True

    def _find(self, words: str, start: int) -> int:
        end = _end_of(words, self.text, start, self.stop)
        if end >= 0:
            self.found, self.end = True, max(self.end, end)
        return end


def _end_of(words: str, text: str, start: int, stop: int) -> int:
    """Return where the words end in a range of the text, or -1."""
    place = text.find(words, start, stop)
    return -1 if place < 0 else place + len(words)


def written_forms(words: str) -> Iterator[str]:
    """Yield how a template may write words: as they are, then escaped as in JSON once, or twice (JSON within JSON)."""
    yield words
    for ensure_ascii in (False, True):
        once = json.dumps(words, ensure_ascii=ensure_ascii)[1:-1]
        if once != words:
            yield once
            yield json.dumps(once, ensure_ascii=ensure_ascii)[1:-1]


def _of_assistant(message: Mapping[str, Any], search: _Search) -> Iterator[str]:
    content, calls = message["content"], message.get("tool_calls") or ()
    if not search.has_content(content):
        yield _lost_of_content(content, search, has_calls=bool(calls))
    for key in REASONING:
        if isinstance(message.get(key), str) and not search.has_content(message[key]):
            yield f"{key} of the assistant"
    has_names = all(search.has(call["function"]["name"]) for call in calls)
    has_arguments = all(_has_value(call["function"].get("arguments"), search) for call in calls)
    if not (has_names and has_arguments):
        what = "tool calls of the assistant" if not has_names else "arguments of tool calls"
        yield "names of tool calls" if has_arguments else what


def _lost_of_content(content: str, search: _Search, *, has_calls: bool) -> str:
    closing = list(_CLOSING.finditer(content))
    if closing and content[closing[-1].end() :].strip() and search.has(content[closing[-1].end() :]):
        return _BEFORE_TAG.format(tag=closing[-1].group())
    lines = (line.strip() for part in _TAG.split(content) for line in part.splitlines())
    if sum(search.has(line) for line in lines if line):
        return "a part of the assistant's content"
    return "the assistant's content next to tool calls" if has_calls else "the assistant's content"


def _has_value(value: object, search: _Search) -> bool:
    """Return True if each key and each value of arguments is written, however the template puts them together."""
    if value is None or isinstance(value, str):
        return search.has(value or "")
    if isinstance(value, Mapping):
        whole = json.dumps(value, ensure_ascii=False)
        return search.has(whole) or all(
            search.has(str(key)) and _has_value(item, search) for key, item in value.items()
        )
    if isinstance(value, list):
        return all(_has_value(item, search) for item in value)
    return search.has(json.dumps(value)) or search.has(str(value))


def _of_others(message: Mapping[str, Any], search: _Search) -> Iterator[str]:
    content = message["content"]
    # A template may move a message: some write the system message into the last question.
    if not search.has_content(content) and not _Search(search.text, 0, search.stop).has_content(content):
        yield f"the content of {message['role']} messages"


def _of_other_keys(message: Mapping[str, Any], template: str, whole: str) -> Iterator[str]:
    for key, value in message.items():
        if key in _TURN_KEYS or not (value or value == 0):
            continue
        if isinstance(value, str):
            is_written = re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", whole) is not None
        else:
            is_written = re.search(rf"\b{re.escape(key)}\b", template) is not None
        if not is_written:
            yield f"{key} of {message['role']} messages"


def _stands_somewhere(message: Mapping[str, Any], whole: str) -> bool:
    words: Iterable[str] = [message["content"], *(str(message[key]) for key in REASONING if key in message)]
    names = (call["function"]["name"] for call in message.get("tool_calls") or ())
    return any(word.strip() and word.strip() in whole for word in [*words, *names])


def _name_of(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
