"""Find text that a chat template adds to conversations, such as a default system message."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.sample import BadRowError

PROSE_WORDS = 4
"""Number of words from which a line is prose, and not the header of a turn such as `### Response:`."""
SHOWN_CHARACTERS = 100
_WORD = re.compile(r"[A-Za-z0-9']+|[^\x00-\x7F]")


def insertions(
    render: Callable[[list[dict[str, Any]]], str], tokens: Sequence[str], *, has_system: bool
) -> Iterator[Remark]:
    """Yield remarks on the texts that a template inserts into every conversation, found by rendering one.

    Args:
        render: what the template writes of messages.
        tokens: what is no prose in it.
        has_system: the conversations begin with a system message.
    """
    prose = _prose(render, tokens, ["system"] * has_system + ["user", "assistant"])
    if prose is None:
        return
    always = has_system or prose == _prose(render, tokens, ["system", "user", "assistant"])
    shown = prose if len(prose) <= SHOWN_CHARACTERS else f"{prose[:SHOWN_CHARACTERS]}..."
    where = "" if always else " into conversations without a system message"
    yield Remark(f'the chat template inserts "{shown}"{where}', is_warning=False)


def _prose(render: Callable[[list[dict[str, Any]]], str], tokens: Sequence[str], roles: list[str]) -> str | None:
    """Return the lines of prose that the template writes around a conversation's contents, or None."""
    probe = [{"role": role, "content": f"<{role[::-1]}>"} for role in roles]
    try:
        text = render(probe)
    except BadRowError:
        return None  # it may reject a conversation that no row has
    for words in (*tokens, *(turn["content"] for turn in probe)):
        text = text.replace(words, "\n")
    lines = [line.strip() for line in text.splitlines() if len(_WORD.findall(line)) >= PROSE_WORDS]
    return " ".join(lines) or None
