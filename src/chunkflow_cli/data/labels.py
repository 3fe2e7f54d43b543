"""Decide which tokens of a text are targets.

A token is a target if and only if it holds a character of a target span. The whole text is tokenized once, so a token
may straddle the edge between prompt and answer: the prompt `2 + 2 = ` ends with a space, and the tokenizer makes one
token of it and of the answer `4`. That token is a target, or the answer would have none. At inference the prompt is
tokenized alone and the model gets the space as a token of its own, which is why such rows are remarked on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.data.sample import IGNORED
from chunkflow_cli.data.template import MarkedText

if TYPE_CHECKING:
    from tokenizers import Encoding


def labels_of(text: MarkedText, ids: NDArray[np.int64], encoding: Encoding | None) -> tuple[NDArray[np.int64], bool]:
    """Return the ids where they are targets, IGNORED elsewhere, and whether a target begins before its span."""
    if text.target_spans is None:
        return ids, False
    assert encoding is not None
    labels, straddles = np.full_like(ids, IGNORED), False
    for start, stop in text.target_spans:
        if start == stop:
            continue
        first, begins_before = first_token_with(encoding, start)
        straddles |= begins_before
        targets = slice(first, first_token_from(encoding, stop))
        labels[targets] = ids[targets]
    return labels, straddles


def first_token_with(encoding: Encoding, character: int) -> tuple[int, bool]:
    """Return the index of the first token that holds this character of the text or a later one.

    The second value is True if the token begins before the character.
    """
    token = encoding.char_to_token(character)
    if token is None:  # a normalizer removes the character
        return first_token_from(encoding, character), False
    characters = encoding.token_to_chars(token)
    assert characters is not None
    return token, characters[0] < character


def first_token_from(encoding: Encoding, character: int) -> int:
    """Return the index of the first token that begins at this character of the text or after it."""
    token = encoding.char_to_token(character)
    if token is not None:
        characters = encoding.token_to_chars(token)
        assert characters is not None
        return token if characters[0] >= character else token + 1
    # No token holds the character: it is the end of the text, or white space that a normalizer removes.
    count = len(encoding)
    last = encoding.token_to_chars(count - 1) if count else None
    if last is None or last[0] < character:
        return count
    return next((index for index, (start, _) in enumerate(encoding.offsets) if start >= character), count)
