"""Locate the assistant's turns in the text that a chat template makes of a conversation.

All searches use the conversation's skeleton (`data.skeleton`), where texts are replaced by marks that occur nowhere
else.

**Where a turn begins.** `messages[:i]` with the generation prompt is what the model gets at inference. After the last
mark that this text and the whole text have in common, both must continue in the same way. The answer begins where the
prompt ends. Some prompts end with something that the turn lacks, such as `<think>`; then the prompt for
`enable_thinking=false` or `true` may fit. Otherwise the answer begins where the two texts differ, if its words begin
there, or if the place follows a tag or a line and the prompt continues with a tag.

**Where it ends.** `messages[:i+1]` ends with turn i. After the last mark that this text and the whole text have in
common, both must continue in the same way, up to the end of the first. Some templates end the last turn differently
(gpt-oss), or add a token at the end of the conversation (Phi-3). Then turn i ends before the generation prompt that
follows it. Others write a generation prompt after every conversation (Command R7B); then a turn ends with the EOS
before it.

A turn that cannot be located like this, or that would contain words of another message, is an error.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.skeleton import FIRST_MARK, RUN, Written, written


class Render(Protocol):
    """Returns what a template writes of each of several lists of messages."""

    def __call__(self, conversations: list[Sequence[Any]], **options: bool) -> list[str]: ...


Ending = Literal["none", "prompt", "thinking", "no thinking"]
"""Text after the messages: none, the generation prompt, or the prompt for answers with or without reasoning."""
PROMPT_OPTIONS: Mapping[Ending, Mapping[str, bool]] = {
    "none": {},
    "prompt": {"add_generation_prompt": True},
    "thinking": {"add_generation_prompt": True, "enable_thinking": True},
    "no thinking": {"add_generation_prompt": True, "enable_thinking": False},
}
_TAG = re.compile(r"</?[^<>\s]+>|\[/?[A-Z_]+\]")
REMEDY = "data.train_on=all makes every token a target instead"


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
class TurnSpan:
    """Range of the targets of a turn in a text, `[start, stop)`."""

    start: int
    stop: int
    end: int
    """Where the turn itself ends: without a token that it borrows from the next turn, and with white space."""
    borrowed: str = ""
    """The token that begins the next turn, if that alone ends this one."""
    ending: Ending | None = "prompt"
    """The generation prompt that stands before it in full; None: a part of one."""
    after_prompt: bool = True
    """True if all that stands before it is what the model gets with that prompt, to the character."""
    is_rewritten: bool = False
    """True if the template writes it otherwise when it is the last turn."""
    is_cut: bool = False
    """True if the template then writes more of what the message says."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A skeleton's text, and the turns in it. Places are of that text."""

    written: Written
    turns: Mapping[int, TurnSpan]
    """By index of the message."""
    reason: str | None
    """The reason why the turns cannot be found."""
    ends: tuple[int, ...]  # (marks,), where each mark ends

    def moved(self, index: int, places: Sequence[tuple[int, int]]) -> TurnSpan:
        """Return where turn `index` is in the text of the conversation itself, of which `places` are the marks'."""
        turn = self.turns[index]
        start, stop, end = (self._moved(place, places) for place in (turn.start, turn.stop, turn.end))
        return replace(turn, start=start, stop=stop, end=end)

    def _moved(self, place: int, places: Sequence[tuple[int, int]]) -> int:
        before = bisect_right(self.ends, place)
        return place if not before else place - self.ends[before - 1] + places[before - 1][1]


def outline(
    render: Render, messages: Sequence[Any], targets: Sequence[int], tokens: EndTokens, *, switches_thinking: bool
) -> Outline:
    """Return where the template writes the turns with the indices `targets` of a skeleton's messages.

    Args:
        switches_thinking: the template has prompts for answers with and without reasoning (`enable_thinking`).

    Raises:
        BadRowError: the template rejects the skeleton.
    """
    text = render([messages])[0]
    finder = _Finder(render, messages, text, tokens, switches_thinking)
    finder.look_ahead(targets)
    reason: str | None = None
    turns: dict[int, TurnSpan] = {}
    try:
        for index in targets:
            turns[index] = finder.find(index)
        _check_apart(text, messages, turns)
    except BadRowError as error:
        reason = str(error)
    return Outline(written(text), turns, reason, tuple(run.end() for run in RUN.finditer(text)))


def _check_apart(text: str, messages: Sequence[Any], turns: dict[int, TurnSpan]) -> None:
    """Raise unless turns follow each other, and each holds its own words and no others."""
    for (index, turn), (_, following) in pairwise(turns.items()):
        if following.start < turn.end:
            raise BadRowError(not_found(index))
    speakers: dict[str, set[int]] = {}
    for number, message in enumerate(messages):
        for mark in RUN.findall(_strings_of(message)):
            speakers.setdefault(mark, set()).add(number)
    for run in RUN.finditer(text):
        for index, turn in turns.items():
            is_inside = turn.start <= run.start() < turn.end
            if index not in speakers[run[1]] if is_inside else speakers[run[1]] == {index}:
                raise BadRowError(not_found(index))


def _strings_of(value: Any) -> str:
    """Return all strings of a message, one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(_strings_of(item) for item in value.values())
    return "\n".join(_strings_of(item) for item in value) if isinstance(value, (list, tuple)) else ""


def not_found(index: int) -> str:
    """Return why a row is bad in which turn `index` cannot be told apart from what is around it."""
    return (
        f"the chat template writes turn {index + 1} differently within the whole conversation, "
        f"so its targets cannot be found; {REMEDY}"
    )


class _Finder:
    """Finds turns in the whole text of a skeleton."""

    def __init__(
        self, render: Render, messages: Sequence[Any], whole: str, tokens: EndTokens, switches_thinking: bool
    ) -> None:
        self._render, self._messages, self._whole, self._tokens = render, messages, whole, tokens
        self._others: tuple[Ending, ...] = ("no thinking", "thinking") if switches_thinking else ()
        self._texts: dict[tuple[int, Ending], str] = {(len(messages), "none"): whole}

    def look_ahead(self, targets: Sequence[int]) -> None:
        """Render what the targets need, all at once, which is faster."""
        needed: tuple[tuple[Ending, list[int]], ...] = (
            ("prompt", [index for index in targets if index]),
            ("none", [index + 1 for index in targets if index + 1 < len(self._messages)]),
        )
        for ending, counts in needed:
            with suppress(BadRowError):  # raised again by the one that needs it
                texts = (
                    self._render([self._messages[:count] for count in counts], **PROMPT_OPTIONS[ending])
                    if counts
                    else []
                )
                self._texts.update({(count, ending): text for count, text in zip(counts, texts, strict=True)})

    def find(self, index: int) -> TurnSpan:
        start, ending = self._start_in(self._whole, index)
        last = self._tokens.without_prompt(self._text(index + 1), self._prompt(index))
        if index + 1 == len(self._messages):
            return self._span(index, start, len(last), ending)
        end = self._end_in_whole(last, index)
        if end < start:
            raise BadRowError(not_found(index))
        span = self._span(index, start, end, ending)
        try:
            start_as_last, ending_as_last = self._start_in(last, index)
        except BadRowError:
            return replace(span, is_rewritten=True)
        as_last = last[start_as_last:].rstrip()
        is_rewritten = as_last != self._whole[start:end].rstrip() or ending != ending_as_last
        return replace(
            span, is_rewritten=is_rewritten, is_cut=not set(RUN.findall(as_last)) <= set(RUN.findall(self._whole))
        )

    def _text(self, count: int, ending: Ending = "none") -> str:
        """Return what the template writes of the first messages."""
        if (count, ending) not in self._texts:
            self._texts[count, ending] = self._render([self._messages[:count]], **PROMPT_OPTIONS[ending])[0]
        return self._texts[count, ending]

    def _prompt(self, index: int, ending: Ending = "prompt") -> str:
        """Return what the model gets before it writes turn `index`."""
        if index:
            return self._text(index, ending)
        try:
            prompt = self._text(0, ending)
        except BadRowError:
            prompt = ""  # most templates look at the first message
        if not prompt or not self._whole.startswith(prompt):
            raise BadRowError(f'the conversation begins with an assistant turn; give it "weight": 0, or {REMEDY}')
        return prompt

    def _span(self, index: int, start: int, end: int, ending: Ending | None) -> TurnSpan:
        stop, own = self._tokens.end_of_turn(self._whole[:end], start)
        stop, borrowed = (stop, "") if own else self._tokens.borrowed(self._whole, stop)
        after_prompt = ending is not None and self._whole.startswith(self._prompt(index, ending))
        return TurnSpan(start, stop, end, borrowed, ending, after_prompt)

    def _start_in(self, text: str, index: int) -> tuple[int, Ending | None]:
        """Return where turn `index` begins in a text, and the prompt that stands before it, if one does in full."""
        endings: tuple[Ending, ...] = ("prompt", *self._others)
        for ending in endings:
            prompt = self._prompt(index, ending)
            behind, place = _after_common_mark(prompt, text)
            if text.startswith(prompt[behind:], place):
                start = place + len(prompt) - behind
                return start + self._header(text, start, index), ending
        return self._start_within_prompt(text, index), None

    def _header(self, text: str, start: int, index: int) -> int:
        """Return the length of what stands at a turn's start though it is a prompt elsewhere.

        After a tool's answer, some templates write the header of the next turn, but no generation prompt (Gemma 4).
        """
        if not index or self._messages[index - 1]["role"] == "user":
            return 0
        prompt = self._prompt(index)
        for usual in self._prompts_of_users():
            if text.startswith(usual, start) and not prompt.endswith(usual) and prompt == self._text(index):
                return len(usual)
        return 0

    def _start_within_prompt(self, text: str, index: int) -> int:
        """Return where turn `index` begins in a text that has only a part of the prompt."""
        prompt = self._prompt(index)
        behind, place = _after_common_mark(prompt, text)
        rest, least = prompt[behind:], self._before_prompt(index) - behind
        common = _common(rest, text[place:])
        if common >= least and text[place + common : place + common + 1] >= FIRST_MARK:
            return place + common  # words of the answer
        for cut in range(common, max(least, 0), -1):
            if self._ends_with_tag(rest[:cut]) and self._outside_token(text, place + cut) == place + cut:
                if self._begins_with_tag(rest[cut:]):
                    return place + cut
                break
        raise BadRowError(not_found(index))

    def _before_prompt(self, index: int) -> int:
        """Return how much of the prompt of turn `index` belongs to the messages before it."""
        if not index:
            return 0
        without, prompt = self._text(index), self._prompt(index)
        common = _common(without, prompt)
        if common == len(without):
            return common
        # The two may part within a token: <|endoftext|>, which ends a conversation, and <|assistant|> begin alike.
        return min(self._outside_token(without, common), self._outside_token(prompt, common))

    def _end_in_whole(self, last: str, index: int) -> int:
        """Return where turn `index` ends, which ends the text `last`."""
        behind, place = _after_common_mark(last, self._whole)
        if self._whole.startswith(last[behind:], place):
            return place + len(last) - behind
        followed = self._text(index + 1, "prompt")
        behind, place = _after_common_mark(followed, self._whole)
        rest = followed[behind:]
        for prompt in self._prompts_of_users():
            end = len(rest) - len(prompt)
            if end >= 0 and rest.endswith(prompt) and self._whole.startswith(rest[:end], place):
                return place + end
        raise BadRowError(not_found(index))

    def _prompts_of_users(self) -> Iterator[str]:
        """Yield the generation prompts that the template writes after users' messages."""
        for index, message in enumerate(self._messages[:-1], 1):
            if message["role"] == "user":
                yield self._prompt(index)[self._before_prompt(index) :]

    def _ends_with_tag(self, text: str) -> bool:
        return text.endswith(("\n", *self._tokens.all)) or _TAG_AT_END.search(text[-_LONGEST:]) is not None

    def _begins_with_tag(self, text: str) -> bool:
        text = text.lstrip()
        return text.startswith(self._tokens.all) or _TAG.match(text) is not None

    def _outside_token(self, text: str, place: int) -> int:
        """Return where the token or tag begins that a place lies in; the place itself if it is in none."""
        first = max(0, place - _LONGEST)
        around, inside = text[first : place + _LONGEST], place - first
        starts = [tag.start() for tag in _TAG.finditer(around) if tag.start() < inside < tag.end()]
        for token in self._tokens.all:
            start = around.find(token, max(0, inside - len(token) + 1))
            if 0 <= start < inside:
                starts.append(start)
        return first + min(starts, default=inside)


_TAG_AT_END = re.compile(rf"(?:{_TAG.pattern})\Z")
_LONGEST = 100
"""Characters of the longest token that a turn might begin or end with."""


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _after_common_mark(text: str, other: str) -> tuple[int, int]:
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
