"""Locate the assistant's turns in the text that a chat template makes of a conversation.

All searches use the conversation's skeleton (`data.skeleton`), where texts are replaced by marks that occur nowhere
else.

**Where a turn begins.** `messages[:i]` with the generation prompt is what the model gets at inference. After the last
mark that this text and the whole text have in common, both must continue in the same way. The answer begins where the
prompt ends. Some prompts end with something that the turn lacks, such as `<think>`; then the prompt for
`enable_thinking=false` or `true` may fit. Otherwise the answer begins where the two texts differ, if its words begin
there, or if the place follows a tag or a line and the prompt or the answer continues with a tag. If even that fails, as
in a conversation that does not begin with a question, the same message as the answer to a question shows what stands
around it.

**Where it ends.** `messages[:i+1]` ends with turn i. After the last mark that this text and the whole text have in
common, both must continue in the same way, up to the end of the first. Some templates end the last turn differently
(gpt-oss), or add a token at the end of the conversation (Phi-3). Then turn i ends before the generation prompt that
follows it. Others write a generation prompt after every conversation (Command R7B); then a turn ends with the EOS
before it. At last, the longest end of `messages[:i+1]` that begins with a tag is looked for before the words of the
next message; it must stand there once.

A turn that cannot be located like this, or that would contain words of another message, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from chunkflow_cli.data.outline import PROMPT_OPTIONS, Ending, Outline, Render, TurnSpan
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.skeleton import FIRST_MARK, RUN, SPARE_MARKS, written
from chunkflow_cli.data.turn_reasons import REMEDY, SPLIT, NotFoundError, not_found, nothing_written
from chunkflow_cli.data.turn_text import (
    EndTokens,
    Tags,
    after_common_mark,
    common_length,
    end_but_for_spaces,
    strings_of,
)


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
    except BadRowError as error:
        reason = str(error)
    else:
        index_ = finder.not_apart(turns)
        reason = None if index_ is None else finder.why_not(index_)
    return Outline(written(text), turns, reason, tuple(run.end() for run in RUN.finditer(text)))


@dataclass(frozen=True, slots=True)
class _Form:
    """How a template writes a message as the answer to a question."""

    header: str
    """What stands between the question and the answer."""
    opening: str
    """What the answer begins with, up to its first mark."""
    mark: str
    ending: Ending | None


_QUESTION, _ANOTHER = ({"role": "user", "content": mark} for mark in SPARE_MARKS)


class _Finder:
    """Finds turns in the whole text of a skeleton."""

    def __init__(
        self, render: Render, messages: Sequence[Any], whole: str, tokens: EndTokens, switches_thinking: bool
    ) -> None:
        self._render, self._messages, self._whole, self._tokens = render, messages, whole, tokens
        self._tags = Tags(tokens.all)
        self._others: tuple[Ending, ...] = ("no thinking", "thinking") if switches_thinking else ()
        self._texts: dict[tuple[int, Ending], str] = {(len(messages), "none"): whole}
        self._speakers: dict[str, set[int]] = {}
        for number, message in enumerate(messages):
            for mark in RUN.findall(strings_of(message)):
                self._speakers.setdefault(mark, set()).add(number)

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
        try:
            return self._find(index)
        except NotFoundError as error:
            if self._prompt(index):
                raise BadRowError(self.why_not(index)) from error
            raise BadRowError(
                f'the conversation begins with an assistant turn; give it "weight": 0, or {REMEDY}'
            ) from error

    def not_apart(self, turns: Mapping[int, TurnSpan]) -> int | None:
        """Return a turn that runs into the next one, or does not hold its own words alone; None if there is none."""
        for (index, turn), (_, following) in pairwise(turns.items()):
            if following.start < turn.end:
                return index
        for run in RUN.finditer(self._whole):
            speakers = self._speakers[run[1]]
            for index, turn in turns.items():
                is_inside = turn.start <= run.start() < turn.end
                if index not in speakers if is_inside else speakers == {index}:
                    return index
        return None

    def why_not(self, index: int) -> str:
        """Return why turn `index` cannot be found, and what to do."""
        is_own = [self._speakers[run] == {index} for run in RUN.findall(self._whole)]
        last = self._as_last(index)
        with_split = False
        with suppress(BadRowError):
            with_split = index + 1 < len(self._messages) and self._start_in(last, index)[1] is not None
        remedy = SPLIT if with_split else REMEDY
        own = {mark for mark, speakers in self._speakers.items() if speakers == {index}}
        if own and not any(is_own) and not self._messages[index].get("tool_calls"):
            return nothing_written(index + 1, is_cut=with_split and bool(own & set(RUN.findall(last))))
        if any(is_own) and not all(is_own[is_own.index(True) : len(is_own) - is_own[::-1].index(True)]):
            return f"the chat template writes turn {index + 1} in pieces, with other turns between them; {remedy}"
        return not_found(index, remedy)

    def _find(self, index: int) -> TurnSpan:
        start, ending = self._start_in(self._whole, index)
        text = self._as_last(index)
        last = self._tokens.without_prompt(text, self._prompt(index))
        if last != text and any(str(self._tokens.eos) in strings_of(message) for message in self._messages):
            raise NotFoundError(not_found(index))  # what stands behind a word of somebody is no prompt
        if index + 1 == len(self._messages):
            return self._span(index, start, len(last), ending)
        end = self._end_in_whole(last, index, start)
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

    def _as_last(self, index: int) -> str:
        """Return a text that ends with turn `index`."""
        try:
            return self._text(index + 1)
        except BadRowError:
            if not self._opens(index):
                raise
            return self._render([[*self._messages[:index], _QUESTION, self._messages[index]]])[0]

    def _text(self, count: int, ending: Ending = "none") -> str:
        """Return what the template writes of the first messages."""
        if (count, ending) not in self._texts:
            self._texts[count, ending] = self._render([self._messages[:count]], **PROMPT_OPTIONS[ending])[0]
        return self._texts[count, ending]

    def _prompt(self, index: int, ending: Ending = "prompt") -> str:
        """Return what the model gets before it writes turn `index`; nothing if no prompt opens the conversation."""
        if not self._opens(index):
            return self._text(index, ending)
        with suppress(BadRowError):  # most templates look at the first message, some for a question
            prompt = self._text(index, ending)
            return prompt if index or self._whole.startswith(prompt) else ""
        return ""

    def _opens(self, index: int) -> bool:
        """Return whether nobody has asked before turn `index`."""
        return all(message["role"] in ("system", "developer") for message in self._messages[:index])

    def _span(self, index: int, start: int, end: int, ending: Ending | None) -> TurnSpan:
        stop, own = self._tokens.end_of_turn(self._whole[:end], start)
        stop, borrowed = (stop, "") if own else self._tokens.borrowed(self._whole, stop)
        after_prompt = ending is not None and self._whole.startswith(self._prompt(index, ending))
        return TurnSpan(start, stop, end, borrowed, ending, after_prompt)

    def _start_in(self, text: str, index: int) -> tuple[int, Ending | None]:
        """Return where turn `index` begins in a text, and the prompt that stands before it, if one does in full."""
        try:
            return self._start_after_prompt(text, index)
        except BadRowError:
            for form in self._forms(index):
                if (start := self._start_by_form(text, index, form)) is not None:
                    return start
            raise

    def _start_after_prompt(self, text: str, index: int) -> tuple[int, Ending | None]:
        if not self._prompt(index):
            raise NotFoundError(not_found(index))
        endings: tuple[Ending, ...] = ("prompt", *self._others)
        for ending in endings:
            prompt = self._prompt(index, ending)
            behind, place = after_common_mark(prompt, text)
            if text.startswith(prompt[behind:], place):
                start = place + len(prompt) - behind
                return start + self._header(text, start, index), ending
        for ending in endings:  # <think> and another number of line ends
            prompt = self._prompt(index, ending)
            behind, place = after_common_mark(prompt, text)
            bare = prompt[behind:].rstrip("\n")
            is_longer = self._before_prompt(index) - behind < len(bare) < len(prompt) - behind
            if is_longer and text.startswith(bare + "\n", place):
                return len(text) - len(text[place + len(bare) :].lstrip("\n")), ending
        for ending in endings:
            prompt = self._prompt(index, ending)
            behind, place = after_common_mark(prompt, text)
            before = max(behind, self._before_prompt(index))
            after = end_but_for_spaces(prompt[behind:before], text, place)
            if after is not None and text.startswith(prompt[before:], after):
                return after + len(prompt) - before, ending
        return self._start_within_prompt(text, index), None

    def _forms(self, index: int) -> Iterator[_Form]:
        """Yield how the template writes a message as an answer to a question, as the last turn and before another."""
        for asked in ([_QUESTION, self._messages[index]], [_QUESTION, self._messages[index], _ANOTHER]):
            with suppress(BadRowError):
                text = self._render([asked])[0]
                finder = _Finder(self._render, asked, text, self._tokens, bool(self._others))
                start, ending = finder._start_after_prompt(text, 1)
                behind, place = after_common_mark(finder._prompt(1), text)
                first = RUN.search(text, start)
                if behind and first is not None and finder._speakers[first[1]] == {1}:
                    header = text[place + finder._before_prompt(1) - behind : start]
                    yield _Form(header, text[start : first.start()], first[0], ending)

    def _start_by_form(self, text: str, index: int, form: _Form) -> tuple[int, Ending | None] | None:
        """Return where turn `index` begins in a text, if it stands there in a form that it has as an answer."""
        place = text.find(form.mark)
        if place < 0 or text.find(form.mark, place + 1) >= 0:
            return None
        is_answer = text.endswith(form.header + form.opening, 0, place)
        if not self._prompt(index):
            return (place - len(form.opening), "none") if is_answer else None
        if is_answer and form.header.strip():
            is_prompted = form.ending is not None and self._prompt(index, form.ending).endswith(form.header)
            return place - len(form.opening), form.ending if is_prompted else None
        # Some write no header behind a tool's result (Apertus), and leave out a part of both turns (DeepSeek).
        before = self._text(index)
        behind, start = after_common_mark(before, text)
        rest = before[behind:]
        common = self._tags.outside(text, start + common_length(rest, text[start:place])) - start
        own = text[start + common : place].lstrip()
        parts = common == len(rest) or (self._tags.end(rest[:common]) and self._tags.begin(rest[common:]))
        is_own = form.opening.endswith(own) and self._tags.begin(own)
        return (place - len(own), None) if parts and (is_own or (common == len(rest) and own == form.opening)) else None

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
        behind, place = after_common_mark(prompt, text)
        rest, least = prompt[behind:], self._before_prompt(index) - behind
        common = common_length(rest, text[place:])
        if common >= least and text[place + common : place + common + 1] >= FIRST_MARK:
            return place + common  # words of the answer
        for cut in range(common, max(least, 0), -1):
            if self._tags.end(rest[:cut]) and self._tags.outside(text, place + cut) == place + cut:
                if self._tags.begin(rest[cut:]) or self._tags.begin(text[place + cut :]):
                    return place + cut
                break
        raise NotFoundError(not_found(index))

    def _before_prompt(self, index: int) -> int:
        """Return how much of the prompt of turn `index` belongs to the messages before it."""
        if not index:
            return 0
        without, prompt = self._text(index), self._prompt(index)
        common = common_length(without, prompt)
        if common == len(without):
            return common
        # The two may part within a token: <|endoftext|>, which ends a conversation, and <|assistant|> begin alike.
        return min(self._tags.outside(without, common), self._tags.outside(prompt, common))

    def _end_in_whole(self, last: str, index: int, start: int) -> int:
        """Return where turn `index` ends, which ends the text `last`, and begins at `start`."""
        behind, place = after_common_mark(last, self._whole)
        if self._whole.startswith(last[behind:], place) and place + len(last) - behind >= start:
            return place + len(last) - behind
        followed = self._text(index + 1, "prompt")
        behind, place = after_common_mark(followed, self._whole)
        rest = followed[behind:]
        for prompt in self._prompts_of_users():
            end = len(rest) - len(prompt)
            if place + end >= max(place, start) and rest.endswith(prompt) and self._whole.startswith(rest[:end], place):
                return place + end
        return self._end_by_tail(last, index, start)

    def _end_by_tail(self, last: str, index: int, start: int) -> int:
        """Return where the only token stands behind the words of turn `index` that ends it as the last turn, too."""
        runs = [run for run in RUN.finditer(self._whole) if run.start() >= start]
        # A call without arguments has no words, and the id of a call is in the tool's message as well.
        following = next((run for run in runs if index not in self._speakers[run[1]]), None)
        if following is not None and index + 1 in self._speakers[following[1]]:
            place = max((run.end() for run in runs if self._speakers[run[1]] == {index}), default=start)
            gap = self._whole[place : following.start()]
            tail = last[max((run.end() for run in RUN.finditer(last)), default=len(last)) :].rstrip()
            for ending in self._tags.endings(tail):
                if gap.count(ending) == 1 and self._tags.end(ending):
                    return place + gap.index(ending) + len(ending)
        raise NotFoundError(not_found(index))

    def _prompts_of_users(self) -> Iterator[str]:
        """Yield the generation prompts that the template writes after users' messages."""
        for index, message in enumerate(self._messages[:-1], 1):
            if message["role"] == "user":
                yield self._prompt(index)[self._before_prompt(index) :]
