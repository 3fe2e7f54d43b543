"""Replace the texts of a conversation by marks, and find where a chat template puts each of them.

A template writes a mark where it would write the text, unless it looks at the text. The skeleton of a conversation, its
copy with marks, therefore shows the place of every text, and texts cannot be confused with what the template itself
writes: a mark is a character of a private area of Unicode that occurs nowhere else in the skeleton. What templates do
look at is kept: keys, names, and the tags that the template itself names, such as `</think>`.

That a template looks at nothing else is checked: `Written.places` puts the texts back, and the result must equal what
the template makes of the conversation itself, character for character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import orjson

from chunkflow_cli.data.fields import REASONING
from chunkflow_cli.data.omissions import written_forms

FIRST_MARK = "\U000f0000"
_FIRST, _LAST = ord(FIRST_MARK), 0xFFFFD
SPARE_MARKS = chr(_LAST - 1), chr(_LAST)
"""Marks that no conversation has."""
RUN = re.compile(r"([\U000F0000-\U000FFFFD])\1*")
"""A mark in a text. It is written several times in a row for an id, whose length templates check."""
_ESCAPED_MARK = re.compile(r"(?i)\\+(?:u(db[89ab][0-9a-f])\\+u(d[c-f][0-9a-f]{2})|U000(f[0-9a-f]{4}))")
_ENCODED_MARK = re.compile(rb"\xf3[\xb0-\xbf]")
_TAG = re.compile(r"</?[\w:-]+>|<\|[^<>\s]+>|<[^<>\s]+\|>|<｜[^<>\s]+｜>|\[/?[A-Z_]+\]")
_THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_END_OF_THINKING = frozenset(_THINKING.values())


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that a mark stands for."""

    text: str
    is_reasoning: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Messages with marks in place of their texts."""

    messages: list[dict[str, Any]]
    pieces: list[Piece]
    """What the marks stand for, in the order of their code points."""
    key: bytes
    """Equal for conversations of which a template writes the same skeleton."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a template writes of a skeleton: `fixed[0]`, the piece `marks[0]`, `fixed[1]`, ..."""

    fixed: tuple[str, ...]  # (marks + 1,)
    marks: tuple[int, ...]

    def places(self, pieces: Sequence[Piece], text: str) -> list[tuple[int, int]] | None:
        """Return where each of `marks` stands in the text of the conversation itself, `[start, stop)`.

        None: that is another text, so the template writes something otherwise than the skeleton shows.
        """
        if not text.startswith(self.fixed[0]):
            return None
        place, places = len(self.fixed[0]), []
        for mark, following in zip(self.marks, self.fixed[1:], strict=True):
            for form in _forms(pieces[mark].text):
                end = place + len(form)
                if text.startswith(form, place) and text.startswith(following, end):
                    break
            else:
                return None
            places.append((place, end))
            place = end + len(following)
        return places if place == len(text) else None


def _forms(text: str) -> Iterator[str]:
    """Yield how a template may write a text: as it is, without white space at its ends, or as in JSON."""
    yield text
    if text[0].isspace() or text[-1].isspace():
        yield from dict.fromkeys(
            (text.strip(), text.strip("\n"), text.rstrip(), text.lstrip(), text.rstrip("\n"), text.lstrip("\n"))
        )
    yield from islice(written_forms(text), 1, None)


def with_marks(text: str) -> str:
    """Return a text in which marks that are escaped, as in JSON in ASCII or as Python does, are marks again."""
    return _ESCAPED_MARK.sub(_unescaped, text)


def _unescaped(escaped: re.Match[str]) -> str:
    high, low, point = escaped.groups()
    return chr(int(point, 16)) if point else (bytes.fromhex(high) + bytes.fromhex(low)).decode("utf-16-be")


def written(text: str) -> Written:
    """Return a text with marks, taken apart."""
    fixed, marks, end = [], [], 0
    for run in RUN.finditer(text):
        fixed.append(text[end : run.start()])
        marks.append(ord(run[1]) - _FIRST)
        end = run.end()
    return Written((*fixed, text[end:]), tuple(marks))


@lru_cache(maxsize=16)
def tags_of(template: str) -> tuple[str, ...]:
    """Return the tags that a template names, and those of reasoning."""
    return tuple(sorted({*_TAG.findall(template), *_THINKING, *_END_OF_THINKING}, key=len, reverse=True))


@lru_cache(maxsize=16)
def _splitter(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, tags))})")


def skeleton_of(messages: Sequence[Mapping[str, Any]], tools: object, tags: tuple[str, ...]) -> Skeleton | None:
    """Return the skeleton of messages as a template gets them; None if they hold what marks cannot stand for.

    Args:
        tags: what stays of a text, because the template may look for it.
    """
    marks = _Marks(tags)
    bare = [marks.of_message(message) for message in messages]
    try:
        key = orjson.dumps([bare, tools], option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError):
        return None
    if len(marks.pieces) > _LAST - _FIRST - 1 or len(_ENCODED_MARK.findall(key)) != marks.written:
        return None
    return Skeleton(bare, marks.pieces, key)


def reasoning_in(text: str) -> list[tuple[int, int]]:
    """Return where words of reasoning stand in a text, by the tags around them."""
    marks = _Marks(tags_of(""))
    whole = written(marks.of_message({"role": "assistant", "content": text})["content"])
    places = whole.places(marks.pieces, text) or []
    return [place for mark, place in zip(whole.marks, places, strict=False) if marks.pieces[mark].is_reasoning]


class _Marks:
    """Puts marks into messages."""

    def __init__(self, tags: tuple[str, ...]) -> None:
        self.pieces: list[Piece] = []
        self.written = 0
        self._tags = tags
        self._ids: dict[str, str] = {}

    def of_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        bare = dict(message)
        bare["content"] = self._of_text(message["content"], is_reasoning=False)
        if len(message) == 2:  # role and content: the usual case
            return bare
        for key in REASONING:
            if isinstance(message.get(key), str):
                bare[key] = self._of_text(message[key], is_reasoning=True)
        if isinstance(message.get("tool_call_id"), str):
            bare["tool_call_id"] = self._of_id(message["tool_call_id"])
        if message.get("tool_calls"):
            bare["tool_calls"] = [self._of_call(call) for call in message["tool_calls"]]
        return bare

    def _of_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        bare = dict(call)
        if isinstance(call.get("id"), str):
            bare["id"] = self._of_id(call["id"])
        function = call["function"]
        bare["function"] = {**function, "arguments": self._of_arguments(function.get("arguments"))}
        return bare

    def _of_arguments(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._of_text(value, is_reasoning=False)
        if isinstance(value, dict):
            return {key: self._of_arguments(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._of_arguments(item) for item in value]
        return value

    def _of_id(self, value: str) -> str:
        if value not in self._ids:
            self._ids[value] = self._mark(value, is_reasoning=False) * len(value)
            self.written -= 1
        self.written += len(value)
        return self._ids[value]

    def _of_text(self, text: str, *, is_reasoning: bool) -> str:
        if not any(tag in text for tag in self._tags):
            return text if not text or text.isspace() else self._mark(text, is_reasoning=is_reasoning)
        parts = _splitter(self._tags).split(text)
        first, thinking = len(self.pieces), ""
        for place, part in enumerate(parts):
            if part in _THINKING and not thinking:
                thinking = _THINKING[part]
            elif part in _END_OF_THINKING:
                if not thinking:  # the generation prompt has the opening tag
                    self.pieces[first:] = [Piece(piece.text, True) for piece in self.pieces[first:]]
                thinking = ""
            elif place % 2 == 0 and (words := part.strip()):
                # White space next to a tag may belong to it: a prompt ends with <think> and a line end.
                start = part.index(words) if place else 0
                end = part.index(words) + len(words) if place + 1 < len(parts) else len(part)
                mark = self._mark(part[start:end], is_reasoning=is_reasoning or bool(thinking))
                parts[place] = part[:start] + mark + part[end:]
        return "".join(parts)

    def _mark(self, text: str, *, is_reasoning: bool) -> str:
        self.pieces.append(Piece(text, is_reasoning))
        self.written += 1
        return chr(_FIRST + len(self.pieces) - 1)
