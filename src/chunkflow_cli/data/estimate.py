"""How long samples are, without a tokenizer: estimated from bytes, at about the speed at which JSON is parsed.

A token is taken for `BYTES_PER_TOKEN` bytes of UTF-8, and what a chat template writes around a turn for
`TOKENS_PER_TURN` tokens. English prose has 4 to 4.5 bytes a token with today's vocabularies, code 3 to 3.5, other
scripts 2.5 to 4: expect to be off by a quarter, more for unusual text. `data.format=tokens` rows are counted, not
estimated.

Rows are sized by short functions that look at what they need and no further; a row that does not have it goes through
`parse_sample`, which either knows the less usual forms or says what is wrong with it. So bad rows are the ones that
training would reject, except for what only a tokenizer or template can tell.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.formats import (
    SHAREGPT_ROLES,
    Conversation,
    Instruction,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
    decode_row,
    parse_sample,
)
from chunkflow_cli.data.source import BadRowError, Location, Source

BYTES_PER_TOKEN = 4.0
TOKENS_PER_TURN = 5
"""`<|im_start|>`, the role, a newline, `<|im_end|>`, a newline."""
LARGEST_ID = (1 << 31) - 1
"""Of `data.format=tokens`: ids are kept in 32 bits. A model's vocabulary, where there is one, allows fewer."""
NO_TARGETS = "no targets: no token of it would be trained on"


@dataclass(frozen=True)
class EstimatedSizes:
    """Lengths of all samples of a source, none of which is kept in memory."""

    lengths: NDArray[np.int64]  # (samples,) tokens
    target_counts: NDArray[np.int64]  # (samples,) tokens that the loss would count
    files: NDArray[np.int32]  # (samples,)
    lines: NDArray[np.int64]  # (samples,)
    digests: NDArray[np.int64]  # (samples,), equal where the rows are, within this process
    rejected: list[tuple[Location, str]]
    """Bad rows and why, in the order of the data."""


def estimate_sizes(
    source: Source, format: DataFormat, *, count_all: bool, progress: Callable[[int], None]
) -> EstimatedSizes:
    """Size every row of a source.

    Args:
        count_all: every token is a target (`data.train_on=all`).
        progress: called with how much of `source.size` is done.

    Raises:
        UsageError: the source cannot be read.
    """
    size_of, is_exact = _SIZERS[format], format is DataFormat.tokens
    lengths, targets, files, lines, digests = array("q"), array("q"), array("i"), array("q"), array("q")
    rejected: list[tuple[Location, str]] = []
    for batch in source.batches():
        for line, raw in zip(batch.lines, batch.rows, strict=True):
            try:
                if isinstance(raw, bytes):
                    try:
                        row = orjson.loads(raw)
                        size, target = size_of(row)
                    except (ValueError, LookupError, TypeError, AttributeError):  # unusual, or bad: looked at closely
                        size, target = _size_of_sample(parse_sample(decode_row(raw), format))
                    digest = hash(raw)
                else:
                    size, target = _size_of_sample(parse_sample(decode_row(raw), format))
                    digest = hash(orjson.dumps(raw, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))
                if count_all:
                    target = size - is_exact  # nothing predicts the first token of a row of ids
                if target == 0:
                    raise BadRowError(NO_TARGETS)
            except BadRowError as error:
                rejected.append((source.location(batch.file, line), str(error)))
                continue
            lengths.append(size)
            targets.append(target)
            files.append(batch.file)
            lines.append(line)
            digests.append(digest)
        progress(batch.position)
    return EstimatedSizes(
        np.frombuffer(lengths, np.int64),
        np.frombuffer(targets, np.int64),
        np.frombuffer(files, np.int32),
        np.frombuffer(lines, np.int64),
        np.frombuffer(digests, np.int64),
        rejected,
    )


Size = tuple[int, int]
"""Tokens, and how many of them are targets."""


def _size_of_messages(row: dict[str, Any]) -> Size:
    if row.get("tools"):
        raise LookupError
    return _size_of_turns(row["messages"], "role", "content", _IS_TARGET)


def _size_of_sharegpt(row: dict[str, Any]) -> Size:
    if row.get("tools") or row.get("system"):
        raise LookupError
    return _size_of_turns(row["conversations"], "from", "value", _IS_SHAREGPT_TARGET)


_IS_TARGET = {"system": False, "developer": False, "user": False, "tool": False, "assistant": True}
_IS_SHAREGPT_TARGET = {
    speaker: role == "assistant" for speaker, role in SHAREGPT_ROLES.items() if speaker != "function_call"
}


def _size_of_turns(turns: list[dict[str, Any]], role_key: str, text_key: str, is_target: dict[str, bool]) -> Size:
    size = target = answers = 0
    for turn in turns:
        text = turn[text_key]
        count = len(text) if text.isascii() else len(text.encode())
        size += count
        if is_target[turn[role_key]]:
            target += count
            answers += 1
        if "tool_calls" in turn:
            raise LookupError
    if not size:
        raise LookupError
    return (
        int(size / BYTES_PER_TOKEN) + TOKENS_PER_TURN * len(turns),
        int(target / BYTES_PER_TOKEN) + answers,  # an answer ends with a token of its own
    )


def _size_of_text(row: dict[str, Any]) -> Size:
    text = row["text"]
    size = 1 + int((len(text) if text.isascii() else len(text.encode())) / BYTES_PER_TOKEN)
    return size, size - (not text)


def _by_sample(format: DataFormat) -> Callable[[dict[str, Any]], Size]:
    return lambda row: _size_of_sample(parse_sample(row, format))


_SIZERS: dict[DataFormat, Callable[[dict[str, Any]], Size]] = {
    DataFormat.messages: _size_of_messages,
    DataFormat.sharegpt: _size_of_sharegpt,
    DataFormat.text: _size_of_text,
    DataFormat.alpaca: _by_sample(DataFormat.alpaca),
    DataFormat.prompt_completion: _by_sample(DataFormat.prompt_completion),
    DataFormat.tokens: _by_sample(DataFormat.tokens),
}


def _size_of_sample(sample: Sample) -> Size:
    match sample:
        case TokenRow(input_ids, labels):
            if input_ids.min() < 0 or input_ids.max() > LARGEST_ID:
                raise BadRowError(f"input_ids holds ids that are not from 0 to {LARGEST_ID}")
            return len(input_ids), len(input_ids) - 1 if labels is None else int(np.count_nonzero(labels[1:] != -100))
        case PlainText(text):
            return 1 + _tokens(text), 1 + _tokens(text)
        case PromptCompletion(prompt, completion):
            return 1 + _tokens(prompt + completion), 1 + _tokens(completion)
        case Instruction():
            return _size_of_sample(sample.conversation())
        case Conversation(messages, tools):
            size = _tokens(orjson.dumps([dict(tool) for tool in tools]).decode()) if tools else 0
            target = 0
            for message in messages:
                calls = orjson.dumps([dict(call) for call in message.tool_calls]).decode() if message.tool_calls else ""
                count = _tokens(message.content + calls)
                size += count + TOKENS_PER_TURN
                target += count + 1 if message.is_target else 0
            return size, target


def _tokens(text: str) -> int:
    return int(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN)
