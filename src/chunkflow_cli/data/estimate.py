"""Sample lengths without a tokenizer: estimated from characters, at about the speed of parsing JSON.

Four characters count as a token, and so does each 1.6 bytes that UTF-8 needs beyond one byte per character: a Chinese
character is 1.5 tokens, a Cyrillic letter 0.9. What a chat template writes around a turn is `TOKENS_PER_TURN` tokens.

The estimate divided by the true count of SmolLM2's tokenizer (a vocabulary of 49,152, mostly English): English 1.17
(Alpaca) and 1.11 (web pages), Python code 0.93, JSON 0.92; of the translated messages of Vim and other programs: German
0.68, French 0.79, Russian 0.99, Greek 0.89, Arabic 0.80, Hindi 1.11, Chinese 0.82, Japanese 0.81, Korean 0.57. A larger
vocabulary needs fewer tokens for other scripts, about half as many for Chinese. So expect errors of up to a quarter in
English and code, and a factor of two in anything else. `data.format=tokens` rows are counted, not estimated.

Short functions size the usual rows and look only at the keys they need. A row that lacks these keys goes through
`parse_sample`, which either handles the less usual forms or says what is wrong, and so does every row if some of its
answers count and others do not (`data.turns=split`, `data.train_on=last`). So bad rows are the rows that training
would reject, except for problems that only a tokenizer or template can find.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat, TrainOn, Turns
from chunkflow_cli.data.fields import REASONING
from chunkflow_cli.data.formats import PREFERENCE_FORMATS, parse_sample
from chunkflow_cli.data.messages import ROLES
from chunkflow_cli.data.rows import decode_row, parse_json
from chunkflow_cli.data.sample import (
    IGNORED,
    MAX_ID,
    NO_TARGETS,
    BadRowError,
    Conversation,
    Instruction,
    JudgedAnswers,
    Message,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
)
from chunkflow_cli.data.skeleton import reasoning_in
from chunkflow_cli.data.source import Location, Source

CHARACTERS_PER_TOKEN = 4.0
CHARACTERS_PER_EXTRA_BYTE = 2.5
"""Weight of each UTF-8 byte beyond one per character."""
TOKENS_PER_TURN = 5
"""`<|im_start|>`, the role, a newline, `<|im_end|>`, a newline."""

Size = tuple[int, int]
"""Tokens of a row, and how many of them are targets."""


@dataclass(frozen=True)
class EstimatedSizes:
    """Lengths of all samples of a source. The samples themselves are not kept in memory.

    The two answers of a pair of preferences are two samples, one after the other.
    """

    lengths: NDArray[np.int64]  # (samples,) tokens
    target_counts: NDArray[np.int64]  # (samples,) tokens that the loss would count
    files: NDArray[np.int64]  # (samples,)
    lines: NDArray[np.int64]  # (samples,)
    digests: NDArray[np.int64]  # (samples,), equal if the rows are equal, within this process
    rows: int
    """Rows that the samples are of."""
    rejected: list[tuple[Location, str]]
    """Bad rows and why, in the order of the data."""


def estimate_sizes(
    source: Source,
    format: DataFormat,
    *,
    train_on: TrainOn,
    turns: Turns = Turns.whole,
    reasoning: bool = True,
    progress: Callable[[int], None],
) -> EstimatedSizes:
    """Estimate the sizes of all samples of a source.

    Args:
        turns: what a conversation becomes.
        reasoning: words of reasoning are targets as well.
        progress: called with how much of `source.size` is done.

    Raises:
        UsageError: the source cannot be read.
    """
    is_usual = format in PREFERENCE_FORMATS or (turns is Turns.whole and train_on is not TrainOn.last and reasoning)
    quick, is_exact = _QUICK_SIZERS.get(format) if is_usual else None, format is DataFormat.tokens
    count_all, rows = train_on is TrainOn.all, 0
    columns = array("q")  # one row per sample: length, targets, file, line, digest
    rejected: list[tuple[Location, str]] = []
    for batch in source.batches():
        for line, raw in zip(batch.lines, batch.rows, strict=True):
            try:
                if format is DataFormat.preference:
                    sizes = _sizes_of_judged(parse_sample(decode_row(raw), format))
                elif is_usual:
                    sizes = [_size_of_row(raw, format, quick)]
                else:
                    sizes = _sizes_of_answers(parse_sample(decode_row(raw), format), train_on, turns, reasoning)
                if count_all:
                    sizes = [(size, size - is_exact) for size, _ in sizes]  # nothing predicts the first id of a row
                if not all(target for _, target in sizes) or not sizes:
                    raise BadRowError(_why_no_targets(parse_sample(decode_row(raw), format)))
            except BadRowError as error:
                rejected.append((source.location(batch.file, line), str(error)))
                continue
            rows += 1
            digest = _digest(raw)
            for number, (size, target) in enumerate(sizes):
                columns.extend((size, target, batch.file, line, hash((digest, number)) if number else digest))
        progress(batch.position)
    lengths, target_counts, files, lines, digests = np.frombuffer(columns, np.int64).reshape(-1, 5).T
    return EstimatedSizes(lengths, target_counts, files, lines, digests, rows, rejected)


def _size_of_row(raw: object, format: DataFormat, quick: Callable[[dict[str, Any]], Size] | None) -> Size:
    if quick is not None and isinstance(raw, bytes):
        try:
            return quick(parse_json(raw))
        except (ValueError, LookupError, TypeError, AttributeError):
            pass  # an unusual row or a bad one: the parser below accepts it or says what is wrong
    return _size_of_sample(parse_sample(decode_row(raw), format))


def _sizes_of_answers(sample: Sample, train_on: TrainOn, turns: Turns, reasoning: bool) -> list[Size]:
    """Return the sizes of a row's samples if not all of its answers, or not all words of them, are targets of one."""
    if isinstance(sample, Instruction):
        sample = sample.conversation()
    if isinstance(sample, PromptCompletion) and not reasoning:
        size, target = _size_of_sample(sample)
        return [(size, target - _tokens(_thought(sample.completion)))]
    if not isinstance(sample, Conversation):
        return [_size_of_sample(sample)]
    return _sizes_of_conversation(sample.with_last_answer() if train_on is TrainOn.last else sample, turns, reasoning)


def _sizes_of_conversation(sample: Conversation, turns: Turns, reasoning: bool) -> list[Size]:
    """Return the sizes of a conversation's samples, as if the template wrote reasoning after the last question only."""
    questions = [place for place, message in enumerate(sample.messages) if message.role == "user"]
    sizes, size, thought = [], _tokens_of_tools(sample.tools), 0
    for place, message in enumerate(sample.messages):
        count, hidden = _tokens_of_message(message), 0
        size += count + TOKENS_PER_TURN
        if message.role == "user":
            thought = 0
        elif turns is Turns.split or not questions or place > questions[-1]:
            hidden = max((_tokens(str(message.extra[key])) for key in REASONING if message.extra.get(key)), default=0)
            thought += hidden
        if message.is_target:
            counted = hidden if reasoning else -_tokens(_thought(message.content))
            sizes.append((size + thought, count + 1 + counted))
    return sizes if turns is Turns.split else [(size + thought, sum(target for _, target in sizes))]


def _thought(text: str) -> str:
    return "".join(text[start:stop] for start, stop in reasoning_in(text))


def _why_no_targets(sample: Sample) -> str:
    return (sample.why_no_targets() if isinstance(sample, Conversation) else None) or NO_TARGETS


def _digest(raw: object) -> int:
    if isinstance(raw, bytes):
        return hash(raw)
    return hash(orjson.dumps(raw, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))


def _size_of_turns(key: str, role_key: str, text_key: str, row: dict[str, Any]) -> Size:
    if not _ORDINARY_KEYS.issuperset(row):
        raise LookupError
    size = target = 0.0
    answers = 0
    turns = row[key]
    for turn in turns:
        text = turn[text_key]
        count = len(text) if text.isascii() else _weight(text)
        size += count
        if _IS_TARGET[turn[role_key]]:
            target += count
            answers += 1
        if len(turn) != 2:
            raise LookupError
    if not size:
        raise LookupError
    return (
        int(size / CHARACTERS_PER_TOKEN) + TOKENS_PER_TURN * len(turns),
        int(target / CHARACTERS_PER_TOKEN) + answers,  # the end-of-turn token of each answer is a target too
    )


_IS_TARGET = {name: role == "assistant" for name, role in ROLES.items() if not name.endswith("_call")}
_ORDINARY_KEYS = frozenset({"messages", "conversations", "id", "source", "category", "prompt_id", "url", "score"})
"""A row with others goes through `parse_sample`, which knows which of them count."""

_QUICK_SIZERS: dict[DataFormat, Callable[[dict[str, Any]], Size]] = {
    DataFormat.messages: partial(_size_of_turns, "messages", "role", "content"),
    DataFormat.sharegpt: partial(_size_of_turns, "conversations", "from", "value"),
}


def _size_of_sample(sample: Sample) -> Size:
    match sample:
        case TokenRow(input_ids, labels):
            if input_ids.min() < 0 or input_ids.max() > MAX_ID:
                raise BadRowError(f"input_ids has ids outside 0 to {MAX_ID}")
            return len(input_ids), int(np.count_nonzero(labels[1:] != IGNORED))
        case PlainText(text):
            return 1 + _tokens(text), 1 + _tokens(text)
        case PromptCompletion(prompt, completion):
            return 1 + _tokens(prompt + completion), 1 + _tokens(completion)
        case Instruction():
            return _size_of_sample(sample.conversation())
        case Conversation():
            return _sizes_of_conversation(sample, Turns.whole, reasoning=True)[0]
        case JudgedAnswers():
            return _sizes_of_judged(sample)[0]


def _sizes_of_judged(sample: Sample) -> list[Size]:
    """Return the size of each answer with its prompt."""
    assert isinstance(sample, JudgedAnswers)
    prompt = sample.prompt
    before = _tokens(prompt) if isinstance(prompt, str) else _size_of_sample(prompt)[0]
    sizes = [1 + _tokens(each) if isinstance(each, str) else _size_of_sample(each)[0] for each in sample.answers]
    return [(size, max(1, size - before)) for size in sizes]


def _tokens_of_tools(tools: Sequence[Mapping[str, Any]]) -> int:
    return _tokens(orjson.dumps([dict(tool) for tool in tools]).decode()) if tools else 0


def _tokens_of_message(message: Message) -> int:
    calls = orjson.dumps([dict(call) for call in message.tool_calls]).decode() if message.tool_calls else ""
    return _tokens(message.content + calls)


def _weight(text: str) -> float:
    """Return the number of English characters that have about as many tokens as a text."""
    extra = len(text.encode("utf-8", "surrogatepass")) - len(text)
    return len(text) + CHARACTERS_PER_EXTRA_BYTE * extra


def _tokens(text: str) -> int:
    return int(_weight(text) / CHARACTERS_PER_TOKEN)
