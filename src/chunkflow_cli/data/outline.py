"""Say where the assistant's turns are in the text that a chat template makes of a conversation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from chunkflow_cli.data.skeleton import Written


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
