"""The screen of `chunkflow analyze --show`: samples, with their targets in color and in brackets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from chunkflow_cli.cli.samples import ShownSample
from chunkflow_cli.console import counted, percent, shortened

OPEN, CLOSE = "⟦", "⟧"
"""Brackets around targets. Color alone is lost in a pipe, and not everyone can see it."""
WHOLE_TOKENS = 600
"""Maximum number of tokens in a sample that is shown whole."""
EDGE_TOKENS = 50
"""Number of tokens shown at each end of a segment of a shortened sample."""
EDGE_SEGMENTS = 5
"""Number of segments shown at each end of a shortened sample."""
TARGET, GAP = "green", "dim"
_SPACE = " \t\n"
_SIGNS = str.maketrans({" ": "␣", "\t": "⇥", "\n": "↵"})
"""White space at the edges of targets."""
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal acts on instead of showing: control characters, and marks of writing direction."""


def print_samples(console: Console, named: str, samples: Sequence[ShownSample], available: int) -> None:
    """Print samples of a data set.

    Args:
        named: path of the data set.
        available: number of samples that it has.
    """
    order = ", from the shortest to the longest" if len(samples) > 1 else ", the median in length"
    which = f"{len(samples):,} of {counted(available, 'sample')}{order if len(samples) < available else ''}"
    console.print(Text(f"{shortened(named, console.width - len(which) - 2)}  {which}", style="bold"))
    console.print(Text.assemble("The tokens that the loss counts are in ", (f"{OPEN}brackets{CLOSE}", TARGET), "."))
    for sample in samples:
        console.print()
        console.print(_header(sample, console.width))
        console.print(_body(sample))


def _header(sample: ShownSample, width: int) -> Text:
    cut = f", {sample.tokens_cut:,} more are cut off" if sample.tokens_cut else ""
    facts = (
        f"{counted(sample.tokens, 'token')}{cut}, {counted(sample.targets, 'target')} "
        f"({percent(sample.targets / sample.tokens)})"
    )
    return Text(f"── {shortened(str(sample.location), width - len(facts) - 8)} ── {facts}", style="bold cyan")


class _Parts(NamedTuple):
    """The text of a segment."""

    head: str
    gap: str
    """The note about omitted tokens. If it is empty, `head` is everything before `last`."""
    tail: str
    last: str
    """The special token that ends the segment, or an empty string."""


def _body(sample: ShownSample) -> Text:
    segments = list(sample.segments())
    is_whole = sample.tokens <= WHOLE_TOKENS
    left_out = range(0) if is_whole else range(EDGE_SEGMENTS, len(segments) - EDGE_SEGMENTS)
    body = Text(overflow="fold")
    for number, (start, end, is_target) in enumerate(segments):
        if number not in left_out:
            parts = _parts(sample, start, end, is_whole=is_whole)
            if number and sample.tokenizer is None:
                body.append(" ")
            elif left_out and number == left_out.stop and not parts.head.startswith("\n"):
                body.append("\n")
            _append_segment(body, parts, is_target)
        elif number == left_out.start:
            tokens = segments[left_out[-1]][1] - start
            turns = sum(segments[each][2] for each in left_out)
            body.append("" if body.plain.endswith("\n") else "\n")
            body.append(f"[… {counted(tokens, 'token')} with {counted(turns, 'answer')} …]", GAP)
    if body.plain.endswith("\n"):
        body.right_crop(1)
    return body


def _parts(sample: ShownSample, start: int, end: int, *, is_whole: bool) -> _Parts:
    inside = end - 1 if end > start + 1 and sample.is_special(end - 1) else end
    last = sample.text(inside, end)
    more = inside - start - 2 * EDGE_TOKENS
    if is_whole or more <= 0:
        return _Parts(sample.text(start, inside), "", "", last)
    head, tail = sample.text(start, start + EDGE_TOKENS), sample.text(inside - EDGE_TOKENS, inside)
    # The cut may go through a character of several tokens.
    return _Parts(head.rstrip("\ufffd"), f" [… {counted(more, 'token')} …] ", tail.lstrip("\ufffd"), last)


def _append_segment(body: Text, parts: _Parts, is_target: bool) -> None:
    if not is_target:
        body.append(_safe(parts.head))
        body.append(parts.gap, GAP)
        body.append(_safe(parts.tail + parts.last))
        return
    head, tail = parts.head, parts.tail
    if parts.gap:
        head, tail = _visible_start(head), _visible_end(tail)
    else:
        head = _visible_start(_visible_end(head))
    body.append(OPEN + _safe(head), TARGET)
    body.append(parts.gap, GAP)
    body.append(_safe(tail + parts.last) + CLOSE, TARGET)
    if (parts.tail or parts.head).endswith("\n") and not parts.last:
        body.append("\n")


def _visible_start(text: str) -> str:
    words = text.lstrip(_SPACE)
    return text[: len(text) - len(words)].translate(_SIGNS).replace("↵", "↵\n") + words


def _visible_end(text: str) -> str:
    words = text.rstrip(_SPACE)
    return words + text[len(words) :].translate(_SIGNS)


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
