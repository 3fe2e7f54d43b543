"""Quote strings for Hydra's grammar so that they arrive unchanged, and split lists without that grammar."""

from __future__ import annotations

import re
import shlex

_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"


def quoted(text: str, quote: str = "'") -> str:
    """Return a text as Hydra's grammar reads it back: in quotes, with the backslashes in front of a quote doubled."""
    escaped = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", text)
    at_the_end = escaped[len(escaped.rstrip("\\")) :]
    return f"{quote}{escaped}{at_the_end}{quote}"


def is_quoted(text: str) -> bool:
    """Return whether the whole text is one string in Hydra's quotes, such as `'a b'`."""
    return _QUOTED.fullmatch(text) is not None


def unquoted(text: str) -> str:
    """Return what Hydra's grammar reads from a quoted text; other texts are returned as they are."""
    if not is_quoted(text):
        return text
    quote, inside = text[0], text[1:-1]
    end = len(inside) - len(inside.rstrip("\\"))
    inside = inside[: len(inside) - end] + "\\" * (end // 2)
    return re.sub(rf"(\\*)\\{quote}", lambda found: "\\" * (len(found[1]) // 2) + quote, inside)


def split_list(text: str) -> list[str]:
    """Split at the commas that are neither in quotes nor in brackets; the parts have no spaces around them.

    >>> split_list("a b.jsonl, 'c,d', ${x:1,2}")
    ['a b.jsonl', "'c,d'", '${x:1,2}']
    """
    parts, start, depth, quote, position = [], 0, 0, "", 0
    while position < len(text):
        letter = text[position]
        if quote:
            position += letter == "\\"  # the next letter is escaped
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:position].strip(" [{("):
            quote = letter  # a quote within a word, as in it's, is a letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append(text[start:position])
            start, depth = position + 1, 0
        position += 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def is_list(text: str) -> bool:
    """Return whether a text is one list in brackets: `[a],[b]` is two."""
    return text.startswith("[") and text.endswith("]") and len(split_list(text)) == 1


def for_the_shell(name: str, text: str) -> str:
    """Return the word that sets a key to a text as a person types it: quoted for Hydra and for the shell."""
    return shlex.quote(f"{name}=" + quoted(text, '"'))
