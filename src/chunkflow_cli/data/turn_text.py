"""The text of a turn: its tags and tokens, and what two texts of one conversation have in common.

Texts are those of skeletons (`data.skeleton`), where a word is a mark that occurs nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkflow_cli.data.skeleton import FIRST_MARK

_TAG = re.compile(r"</?[^<>\s]+>|\[/?[A-Z_]+\]")
_TAG_AT_END = re.compile(rf"(?:{_TAG.pattern})\Z")
_LONGEST = 100
"""Characters of the longest token that a turn might begin or end with."""


def strings_of(value: Any) -> str:
    """Return all strings of a message, one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(strings_of(item) for item in value.values())
    return "\n".join(strings_of(item) for item in value) if isinstance(value, (list, tuple)) else ""


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Added tokens of a tokenizer, by what they can be at the end of a turn."""

    all: tuple[str, ...]
    of_turns: tuple[str, ...]
    """Those that end a turn, and not only a part of it as `</tool_call>` does."""
    starts: tuple[str, ...]
    """Those that may begin the next turn and thereby end one that has no end of its own."""
    eos: str | None = None

    def end_of_turn(self, through: str, start: int) -> tuple[int, bool]:
        """Return the end of the targets of a turn that begins at `start`, and whether a token of its own ends it."""
        stripped = through.rstrip()
        if len(stripped) <= start or not stripped.endswith(self.all):
            return len(through), False
        return len(stripped), stripped.endswith(self.of_turns)

    def borrowed(self, whole: str, end: int) -> tuple[int, str]:
        """Return the token that begins the next turn at `end`, and where it stops; `end` and "" if there is none."""
        rest = whole[end:]
        # White space belongs to the end, too, unless a closing tag is all that the turn ends with.
        behind = 0 if whole.endswith(self.all, 0, end) else len(rest) - len(rest.lstrip())
        token = next((token for token in self.starts if whole.startswith(token, end + behind)), "")
        return (end + behind + len(token) if token else end), token

    def without_prompt(self, through: str, prompt: str) -> str:
        """Return a text that ends with an answer, without a generation prompt that stands behind it unasked.

        Args:
            prompt: what the template writes before that answer.
        """
        if not self.eos:
            return through
        turns, eos, rest = through.rpartition(self.eos)
        if not (eos and rest.strip()):
            return through
        is_prompt = prompt.endswith(rest) or prompt.rpartition(eos)[2].startswith(rest)
        return turns + eos if is_prompt and len(turns + eos) > prompt.rindex(rest) else through


@dataclass(frozen=True, slots=True)
class Tags:
    """Finds added tokens of a tokenizer, and what looks like one."""

    tokens: tuple[str, ...]

    def end(self, text: str) -> bool:
        """Return True if a text ends with a line, a token or a tag."""
        return text.endswith(("\n", *self.tokens)) or _TAG_AT_END.search(text[-_LONGEST:]) is not None

    def begin(self, text: str) -> bool:
        """Return True if a text begins with a token or a tag, white space aside."""
        text = text.lstrip()
        return text.startswith(self.tokens) or _TAG.match(text) is not None

    def outside(self, text: str, place: int) -> int:
        """Return where the token or tag begins that a place lies in; the place itself if it is in none."""
        first = max(0, place - _LONGEST)
        around, inside = text[first : place + _LONGEST], place - first
        starts = [tag.start() for tag in _TAG.finditer(around) if tag.start() < inside < tag.end()]
        for token in self.tokens:
            start = around.find(token, max(0, inside - len(token) + 1))
            if 0 <= start < inside:
                starts.append(start)
        return first + min(starts, default=inside)

    def endings(self, text: str) -> Iterator[str]:
        """Yield what a text ends with, from its beginning on and then from each token or tag on."""
        yield text
        for place in range(1, len(text)):
            if self.begin(text[place:]) and not text[place].isspace() and self.outside(text, place) == place:
                yield text[place:]


def common_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071 - of characters, not of folders


def after_common_mark(text: str, other: str) -> tuple[int, int]:
    """Return the places behind the last mark of a text that both have once; the beginnings if there is none."""
    end = len(text)
    while end := next((place for place in range(end, 0, -1) if text[place - 1] >= FIRST_MARK), 0):
        mark = text[end - 1]
        count = text.count(mark)
        run = mark * count
        if text.endswith(run, 0, end) and other.count(mark) == count and run in other:
            return end, other.index(run) + count
        end -= 1
    return 0, 0


def end_but_for_spaces(piece: str, text: str, place: int) -> int | None:
    """Return where a piece ends that stands in a text at `place`, but for white space; None if it does not.

    Some templates (Hermes) write a line break behind a tool's result only if a turn follows. White space at the end of
    the piece must be the same.
    """
    letters = "".join(piece.split())
    if not letters:
        return None
    found = re.compile(r"\s*" + r"\s*".join(map(re.escape, letters))).match(text, place)
    end = piece[len(piece.rstrip()) :]
    return found.end() + len(end) if found and text.startswith(end, found.end()) else None
