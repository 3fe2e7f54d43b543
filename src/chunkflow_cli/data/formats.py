"""Row formats: which one a data set has, and the `Sample` that each of its rows becomes.

| format | keys of a row | sample |
|---|---|---|
| messages | messages: [{role, content}], system, tools, chat_template_kwargs | Conversation; targets: assistant turns |
| sharegpt | conversations: [{from, value}], system, tools, chat_template_kwargs | the same |
| alpaca | instruction, input, output, system, history | Instruction |
| prompt_completion | prompt, completion: strings | PromptCompletion |
| prompt_completion | the same as lists, system, tools, ... | Conversation; targets: the completion's assistant |
| text | text | PlainText |
| tokens | input_ids, labels, attention_mask, masks | TokenRow |
| preference, feedback | see `data.preferences` | JudgedAnswers |

`data.fields` decides about other keys: those that might change what is learned make the row bad, others are ignored.
`data.messages` reads messages. Other keys of a message (name, tool_call_id, reasoning_content, ...) are passed to the
chat template. The reason for rejecting a row (`BadRowError`) names the key, as in `messages[2].content is null`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.fields import (
    MASKS,
    PREFERENCE,
    check_ends_with_answer,
    check_has_no_turns,
    check_lists_of_tokens,
    check_row,
)
from chunkflow_cli.data.messages import (
    parse_messages,
    parse_template_arguments,
    parse_tools,
    system_prompt,
    with_system,
    with_turns,
    with_turns_in_texts,
)
from chunkflow_cli.data.preferences import parse_feedback, parse_preference
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import (
    IGNORED,
    BadRowError,
    Conversation,
    Instruction,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
)
from chunkflow_cli.data.source import Location, Source
from chunkflow_cli.data.values import integers, is_absent, kind, required, text
from chunkflow_cli.errors import UsageError

DETECTION_ROWS = 100
PREFERENCE_FORMATS = frozenset({DataFormat.preference, DataFormat.feedback})
"""Formats that `train.task` names; rows of them are never detected."""
_OF_TURNS_OR_TEXT = PREFERENCE_FORMATS | {DataFormat.prompt_completion}
PLAIN_FORMATS = frozenset({DataFormat.text, DataFormat.tokens})
"""Formats whose rows have no answers that could be distinguished from other text."""


def parse_sample(row: dict[str, Any], format: DataFormat) -> Sample:
    """Return the sample that a row of this format describes.

    Raises:
        BadRowError: a key is missing, holds a value that the format does not allow, or might change what is learned and
            is not read.
    """
    if format in (DataFormat.messages, DataFormat.sharegpt):
        row = with_turns(row)
    elif format in _OF_TURNS_OR_TEXT:
        row = with_turns_in_texts(row)
    check_row(row, format)
    return _PARSERS[format](row)


def detect_format(source: Source, *, key: str = "data.path") -> DataFormat:
    """Return the format that the first rows agree on, by their keys.

    Rows that cannot be parsed do not count. If some rows have a known format, rows without one do not count either.
    Both are bad rows, which are reported with file and line when they are read.

    Raises:
        UsageError: no format fits, or more than one does. The message lists the keys found and the known formats.
    """
    seen: dict[str, tuple[DataFormat | None, Location]] = {}
    firsts: list[dict[str, Any]] = []
    reasons: list[str] = []
    rows = (
        (source.location(batch.file, line), row)
        for batch in source.batches()
        for line, row in zip(batch.lines, batch.rows, strict=True)
    )
    for location, raw in islice(rows, DETECTION_ROWS):
        try:
            row = decode_row(raw)
        except BadRowError as error:
            reasons.append(f"{location}: {error}")
            continue
        keys = ", ".join(map(str, row)) or "none"
        if keys not in seen:
            seen[keys] = _format_by_keys(row, keys, key), location
            firsts.append(row)
    formats = list(dict.fromkeys(format for format, _ in seen.values() if format is not None))
    if len(formats) == 1:
        return formats[0]
    if not seen:
        raise UsageError(f"{key}: none of the first {len(reasons)} rows is a JSON object\n  {reasons[0]}")
    raise UsageError(_no_one_format(seen, firsts, formats, key))


def _no_one_format(
    seen: Mapping[str, tuple[DataFormat | None, Location]],
    firsts: Sequence[Mapping[str, Any]],
    formats: Sequence[DataFormat],
    key: str,
) -> str:
    if formats:
        names = " and ".join(format.value for format in formats)
        first = dict(reversed(list(seen.values())))
        places = "".join(f"\n  {format.value}: first in {first[format]}" for format in formats)
        return (
            f"{key} holds rows of more than one format: {names}{places}\n"
            "  split the data, or name one with data.format and leave the other rows out with data.bad_rows=skip"
        )
    places = "".join(f"\n  {location}: the keys {keys}{_hint(keys)}" for keys, (_, location) in seen.items())
    known = " | ".join(" + ".join(keys) for keys in REQUIRED_KEYS.values())
    puzzling = [row for row in firsts if not _hint(", ".join(row))]
    if not puzzling:
        return f"{key} holds rows of no known format{places}"
    columns = next(filter(None, map(_columns_to_rename, puzzling)), None)
    remedy = "give the keys the names of a format"
    if columns is not None:
        remedy = f"give them the names of a format, as in 'data.columns={columns}'"
    return f"{key} holds rows of no known format{places}\n  {remedy}: {known}"


_HINTS = (
    (("chosen",), PREFERENCE),
    (
        ("preferred_output",),
        "preference data (DPO); append preferred_output to the messages of input, for one answer (SFT)",
    ),
    (("choices",), "an API's answer without its request; append choices[0].message to the request's messages"),
    (("body",), "a batch of API requests; take messages and tools out of body, and append the answers"),
    (("request",), "a log of API requests; take messages and tools out of request, and append the answer"),
    (("contents",), "Gemini's form; write messages: the role model is assistant, the text of parts is content"),
    (("tokens",), "if they are ids, rename tokens to input_ids"),
)
"""Keys of common rows in other formats, and what to do about them."""


def _hint(keys: str) -> str:
    if ", " not in keys and re.search(r"[;\t|]", keys):
        return " (is that several? fields are separated by commas in .csv, by tabs in .tsv)"
    present = set(keys.split(", "))
    return next((f" ({hint})" for needed, hint in _HINTS if present.issuperset(needed)), "")


REQUIRED_KEYS = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("conversations",),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text: ("text",),
    DataFormat.tokens: ("input_ids",),
}
_CONVERSATION_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Where rows keep a conversation. The last four belong to the format `messages`."""


OTHER_NAMES = {
    "instruction": ("question", "query", "problem", "input", "prompt", "user", "source", "inputs"),
    "output": ("answer", "response", "solution", "completion", "assistant", "target", "targets", "completions"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "chosen"),
    "text": ("content", "document", "body", "code", "story"),
}
"""Names that data sets have for columns of the formats."""


def _columns_to_rename(row: Mapping[str, Any]) -> str | None:
    """Return a value of `data.columns` that makes a format of rows like this one, or None if none is likely.

    It can be pasted: shells and Hydra take it as it is, in single quotes. Questions become instructions, which pass
    through the chat template; as prompts they would be joined to their answers with nothing in between.
    """
    asked, answered = _column(row, "instruction", str), _column(row, "output", str)
    if asked and answered:
        asked = "instruction" if "instruction" in row else asked
        context = {"context": "input"} if "context" in row and "input" not in row else {}
        found = {asked: "instruction", **context, answered: "output"}
    elif turns := _column(row, "messages", list):
        found = {turns: "messages"}
    elif document := _column(row, "text", str):
        found = {document: "text"}
    else:
        return None
    return "{" + ",".join(f"{theirs}:{ours}" for theirs, ours in found.items() if theirs != ours) + "}"


def _column(row: Mapping[str, Any], ours: str, kind: type) -> str | None:
    """Return the name of the column that is probably ours under another name."""
    return next((name for name in (ours, *OTHER_NAMES[ours]) if isinstance(row.get(name), kind)), None)


def _format_by_keys(row: Mapping[str, Any], keys: str, key: str) -> DataFormat | None:
    fitting = [name for name, required in REQUIRED_KEYS.items() if all(word in row for word in required)]
    if not fitting and any(_is_conversation(row.get(word)) for word in _CONVERSATION_KEYS):
        return DataFormat.messages
    if fitting == [DataFormat.alpaca, DataFormat.text]:
        return DataFormat.alpaca  # alpaca data sets on the hub also carry the finished prompt in `text`
    if len(fitting) > 1:
        names = " or ".join(f"data.format={name.value}" for name in fitting)
        raise UsageError(f"{key}: rows with the keys {keys} fit several formats\n  choose one: {names}")
    return fitting[0] if fitting else None


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _parse_conversation(key: str, row: Mapping[str, Any]) -> Conversation:
    if key not in row:
        key = next((other for other in _CONVERSATION_KEYS if _is_conversation(row.get(other))), key)
    messages = parse_messages(required(row, key), key, are_targets=True)
    check_ends_with_answer(row, messages[-1].role, key)
    return Conversation(with_system(row, messages), parse_tools(row), parse_template_arguments(row))


def _parse_alpaca(row: Mapping[str, Any]) -> Instruction:
    history = []
    exchanges = [] if is_absent(row.get("history")) else row["history"]
    if not isinstance(exchanges, list):
        raise BadRowError(f"history is {kind(exchanges)}, not a list")
    for index, exchange in enumerate(exchanges):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise BadRowError(f"history[{index}] is not a pair of strings")
        history.append((exchange[0], exchange[1]))
    asked = "" if is_absent(row.get("input")) else text(row, "input")
    return Instruction(text(row, "instruction"), asked, text(row, "output"), system_prompt(row), tuple(history))


def _parse_prompt_completion(row: Mapping[str, Any]) -> Conversation | PromptCompletion:
    prompt, completion = required(row, "prompt"), required(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = with_system(row, parse_messages(prompt, "prompt", are_targets=False))
        answers = parse_messages(completion, "completion", are_targets=True)
        return Conversation((*asked, *answers), parse_tools(row), parse_template_arguments(row))
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise BadRowError(
            f"prompt is {kind(prompt)} and completion is {kind(completion)}: both must be strings, or lists of messages"
        )
    check_has_no_turns(row)
    return PromptCompletion(prompt, completion)


def _parse_text(row: Mapping[str, Any]) -> PlainText:
    document = text(row, "text")
    if not document:
        raise BadRowError("text is empty")
    return PlainText(document)


def _parse_tokens(row: Mapping[str, Any]) -> TokenRow:
    """Return the ids of a row without its padding, and as labels those that all masks let through."""
    input_ids = integers(required(row, "input_ids"), "input_ids")
    length = len(input_ids)
    if length == 0:
        raise BadRowError("input_ids is empty")
    labels = input_ids if row.get("labels") is None else _labels(row, input_ids)
    for name in MASKS:
        if row.get(name) is not None:
            labels = np.where(_flags(row, name, length), labels, IGNORED)
    attended = slice(0, length) if row.get("attention_mask") is None else _attended(row, length)
    _check_is_one_sequence(row, attended, length)
    check_lists_of_tokens(row, length)
    return TokenRow(input_ids[attended], labels[attended])


def _labels(row: Mapping[str, Any], input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    labels = _per_token(row, "labels", len(input_ids))
    own, counted = input_ids[:-1], labels[:-1] != IGNORED
    following = np.where(counted, input_ids[1:], IGNORED)
    if np.array_equal(labels[:-1], following) and not np.array_equal(own[counted], following[counted]):
        raise BadRowError("labels are shifted: each is the id after its own; write the id itself, as in Hugging Face")
    return labels


def _per_token(row: Mapping[str, Any], key: str, length: int) -> NDArray[np.int64]:
    values = integers(row[key], key)
    if len(values) != length:
        raise BadRowError(f"{key} has {len(values)} entries and input_ids {length}")
    return values


def _flags(row: Mapping[str, Any], key: str, length: int) -> NDArray[np.bool_]:
    values = _per_token(row, key, length)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        place = int(wrong.argmax())
        packed = "; if it numbers packed sequences, write one row per sequence" if key == "attention_mask" else ""
        raise BadRowError(f"{key}[{place}] is {values[place]}, and must be 0 or 1{packed}")
    flags: NDArray[np.bool_] = values == 1
    return flags


def _attended(row: Mapping[str, Any], length: int) -> slice:
    """Return the tokens that are no padding: `attention_mask` may be 0 at both ends of a row, not in between."""
    places = np.flatnonzero(_flags(row, "attention_mask", length))
    if len(places) == 0:
        raise BadRowError("attention_mask is 0 everywhere")
    first, last = int(places[0]), int(places[-1])
    if len(places) < last + 1 - first:
        hidden = first + int(np.argmax(np.diff(places) > 1)) + 1
        raise BadRowError(
            f"attention_mask[{hidden}] is 0 between tokens; only padding at the ends of a row may be masked"
        )
    return slice(first, last + 1)


def _check_is_one_sequence(row: Mapping[str, Any], attended: slice, length: int) -> None:
    """Raise if a row says that its ids are several sequences, or that the model is given more than ids."""
    count = attended.stop - attended.start
    if row.get("position_ids") is not None:
        positions = _per_token(row, "position_ids", length)[attended]
        wrong = positions != np.arange(count)
        if wrong.any():
            place = attended.start + int(wrong.argmax())
            raise BadRowError(
                f"position_ids[{place}] is {positions[wrong.argmax()]}, and must count tokens from 0; {_ONE_SEQUENCE}"
            )
    for key, expected in (("seq_lengths", [length]), ("cu_seqlens", [0, length])):
        if not is_absent(row.get(key)) and row[key] != expected:
            raise BadRowError(f"{key} is not {expected}; {_ONE_SEQUENCE}")
    if row.get("token_type_ids") is not None and _per_token(row, "token_type_ids", length).any():
        raise BadRowError("token_type_ids is not 0 everywhere, and the model would not be given it")


_ONE_SEQUENCE = "if sequences are packed, write one row per sequence (chunkflow packs by itself)"

_PARSERS: dict[DataFormat, Callable[[dict[str, Any]], Sample]] = {
    DataFormat.messages: partial(_parse_conversation, "messages"),
    DataFormat.sharegpt: partial(_parse_conversation, "conversations"),
    DataFormat.alpaca: _parse_alpaca,
    DataFormat.prompt_completion: _parse_prompt_completion,
    DataFormat.text: _parse_text,
    DataFormat.tokens: _parse_tokens,
    DataFormat.preference: parse_preference,
    DataFormat.feedback: parse_feedback,
}
