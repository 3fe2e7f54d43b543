"""Row formats: which one a data set has, and the `Sample` that each of its rows becomes.

| format | keys of a row | sample |
|---|---|---|
| messages | messages: [{role, content}], tools | Conversation; targets: assistant turns |
| sharegpt | conversations: [{from, value}], system, tools | the same |
| alpaca | instruction, input, output, system, history | Instruction |
| prompt_completion | prompt, completion: strings | PromptCompletion |
| prompt_completion | prompt, completion: lists of messages | Conversation; targets: assistant turns of the completion |
| text | text | PlainText |
| tokens | input_ids, labels | TokenRow |

Other keys of a row are ignored. Other keys of a message (name, reasoning_content, ...) are passed to the chat template.
The reason for rejecting a row (`BadRowError`) names the key, as in `messages[2].content is null`.

Tools. A sharegpt `function_call` is a turn of the assistant. If its value is a call, `{"name", "arguments"}` or a list
of them, it becomes `tool_calls`, so that a template that supports calls writes them in its own syntax. `observation` is
the answer of a tool. `tools` may be a list or, as in LLaMA-Factory, a JSON string of one, and a bare `{"name", ...}` is
wrapped as `{"type": "function", "function": ...}`, which is what templates expect. `data.template` says what happens
under a template that does not support tools.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.readers import UnreadableRow
from chunkflow_cli.data.sample import (
    BadRowError,
    Conversation,
    Instruction,
    Message,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
)
from chunkflow_cli.data.source import Location, Source
from chunkflow_cli.errors import UsageError

DETECTION_ROWS = 100
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


def decode_row(raw: object) -> dict[str, Any]:
    """Return the JSON object of a row.

    Raises:
        BadRowError: the row is not valid UTF-8, not valid JSON, or not an object.
    """
    if isinstance(raw, UnreadableRow):
        raise BadRowError(raw.reason)
    row = raw
    if isinstance(raw, bytes):
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BadRowError(_why_not_json(raw, error)) from error
    if not isinstance(row, dict):
        hint = " (a file that holds one JSON array must be named .json)" if isinstance(row, list) else ""
        raise BadRowError(f"the row is {_kind(row)}, not an object{hint}")
    return row


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as utf8_error:
        return f"not valid UTF-8 at byte {utf8_error.start + 1} of the line"
    return f"not valid JSON: {error.msg} at character {error.pos + 1} of the line"


def parse_sample(row: dict[str, Any], format: DataFormat) -> Sample:
    """Return the sample that a row of this format describes.

    Raises:
        BadRowError: a key is missing, or holds a value that the format does not allow.
    """
    return _PARSERS[format](row)


def detect_format(source: Source, *, key: str = "data.path") -> DataFormat:
    """Return the format that the first rows agree on, by their keys.

    Rows that cannot be parsed do not count. If some rows have a known format, rows without one do not count either.
    Both are bad rows, which are reported with file and line when they are read.

    Raises:
        UsageError: no format fits, or more than one does. The message lists the keys found and the known formats.
    """
    seen: dict[str, tuple[DataFormat | None, Location]] = {}
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
    formats = {format for format, _ in seen.values() if format is not None}
    if len(formats) == 1:
        return formats.pop()
    if not seen:
        raise UsageError(f"{key}: none of the first {len(reasons)} rows is a JSON object\n  {reasons[0]}")
    known = "\n".join(f"  {name.value}: {' + '.join(keys)}" for name, keys in REQUIRED_KEYS.items())
    found = "\n".join(
        f"  keys {keys}: {format.value if format else 'no format'}, first {location}"
        for keys, (format, location) in seen.items()
    )
    what = "rows of more than one format" if formats else "rows of no known format"
    columns = next(filter(None, (_columns_to_rename(keys.split(", ")) for keys in seen)), None)
    remedy = "set data.format to the right one, or rename the keys"
    if columns is not None and not formats:
        remedy = f"rename the columns, as in 'data.columns={columns}', or set data.format"
    raise UsageError(f"{key} holds {what}\n{found}\n{remedy}:\n{known}")


REQUIRED_KEYS = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("conversations",),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text: ("text",),
    DataFormat.tokens: ("input_ids",),
}


OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "input", "instruction", "user", "source", "inputs"),
    "completion": ("answer", "response", "solution", "output", "assistant", "target", "targets", "completions"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "chosen"),
    "text": ("content", "document", "body", "code", "story"),
}
"""Names that data sets have for columns of the formats."""


def _columns_to_rename(keys: Sequence[str]) -> str | None:
    """Return a value of `data.columns` that makes a format of rows with these keys, or None if none is likely.

    It can be pasted: shells and Hydra take it as it is, in single quotes.
    """
    ours = {ours: next((name for name in (ours, *names) if name in keys), None) for ours, names in OTHER_NAMES.items()}
    for wanted in (("prompt", "completion"), ("messages",), ("text",)):
        found = {theirs: name for name in wanted if (theirs := ours[name]) is not None}
        if len(found) == len(wanted):
            return "{" + ",".join(f"{theirs}:{name}" for theirs, name in found.items() if theirs != name) + "}"
    return None


def _format_by_keys(row: Mapping[str, Any], keys: str, key: str) -> DataFormat | None:
    fitting = [name for name, required in REQUIRED_KEYS.items() if all(word in row for word in required)]
    if fitting == [DataFormat.alpaca, DataFormat.text]:
        return DataFormat.alpaca  # alpaca data sets on the hub also carry the finished prompt in `text`
    if len(fitting) > 1:
        names = " or ".join(f"data.format={name.value}" for name in fitting)
        raise UsageError(f"{key}: rows with the keys {keys} fit several formats\n  choose one: {names}")
    return fitting[0] if fitting else None


def _parse_messages(row: Mapping[str, Any]) -> Conversation:
    messages = _messages(_required(row, "messages"), "messages", are_targets=True)
    return Conversation(messages, _tools(row.get("tools")))


def _parse_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = _list_of_objects(_required(row, "conversations"), "conversations")
    messages = []
    if row.get("system"):
        messages.append(Message("system", _text(row, "system"), is_target=False))
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        speaker = _role(turn, "from", tuple(SHAREGPT_ROLES), place)
        role, value = SHAREGPT_ROLES[speaker], _text(turn, "value", place)
        calls = _function_calls(value) if speaker == "function_call" else ()
        messages.append(Message(role, "" if calls else value, role == "assistant", calls))
    return Conversation(tuple(messages), _tools(row.get("tools")))


def _parse_alpaca(row: Mapping[str, Any]) -> Instruction:
    history = []
    for index, exchange in enumerate(row.get("history") or ()):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise BadRowError(f"history[{index}] is not a pair of strings")
        history.append((exchange[0], exchange[1]))
    optional = {key: _text(row, key) if row.get(key) is not None else "" for key in ("input", "system")}
    return Instruction(
        _text(row, "instruction"), optional["input"], _text(row, "output"), optional["system"], tuple(history)
    )


def _parse_prompt_completion(row: Mapping[str, Any]) -> Conversation | PromptCompletion:
    prompt, completion = _required(row, "prompt"), _required(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = (
            *_messages(prompt, "prompt", are_targets=False),
            *_messages(completion, "completion", are_targets=True),
        )
        return Conversation(messages, _tools(row.get("tools")))
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptCompletion(prompt, completion)
    raise BadRowError(
        f"prompt is {_kind(prompt)} and completion is {_kind(completion)}: both must be strings, or lists of messages"
    )


def _parse_text(row: Mapping[str, Any]) -> PlainText:
    text = _text(row, "text")
    if not text:
        raise BadRowError("text is empty")
    return PlainText(text)


def _parse_tokens(row: Mapping[str, Any]) -> TokenRow:
    input_ids = _integers(_required(row, "input_ids"), "input_ids")
    if len(input_ids) == 0:
        raise BadRowError("input_ids is empty")
    if row.get("labels") is None:
        return TokenRow(input_ids, input_ids)
    labels = _integers(row["labels"], "labels")
    if len(labels) != len(input_ids):
        raise BadRowError(f"labels has {len(labels)} entries and input_ids {len(input_ids)}")
    return TokenRow(input_ids, labels)


_PARSERS: dict[DataFormat, Callable[[dict[str, Any]], Sample]] = {
    DataFormat.messages: _parse_messages,
    DataFormat.sharegpt: _parse_sharegpt,
    DataFormat.alpaca: _parse_alpaca,
    DataFormat.prompt_completion: _parse_prompt_completion,
    DataFormat.text: _parse_text,
    DataFormat.tokens: _parse_tokens,
}


def _messages(value: object, key: str, *, are_targets: bool) -> tuple[Message, ...]:
    messages = []
    for index, turn in enumerate(_list_of_objects(value, key)):
        place = f"{key}[{index}]"
        role = _role(turn, "role", ROLES, place)
        calls = _tool_calls(turn.get("tool_calls"), place)
        # Data from OpenAI-like APIs has null as the content of a turn that holds only calls.
        content = "" if calls and turn.get("content") is None else _text(turn, "content", place)
        extra = {name: value for name, value in turn.items() if name not in _MESSAGE_KEYS and value is not None}
        messages.append(Message(role, content, are_targets and role == "assistant", calls, extra))
    return tuple(messages)


_MESSAGE_KEYS = ("role", "content", "tool_calls")


def _tool_calls(value: object, place: str) -> tuple[Mapping[str, Any], ...]:
    if not value:
        return ()
    calls = _list_of_objects(value, f"{place}.tool_calls")
    functions = [call.get("function", call) for call in calls]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise BadRowError(f"{place}.tool_calls has a call without a name")
    return tuple(_as_tool_call(function) for function in functions)


def _function_calls(text: str) -> tuple[Mapping[str, Any], ...]:
    """Return the calls that a sharegpt `function_call` writes as JSON, or none if it is other text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return ()  # not JSON: the turn stays text
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and set(call) == {"name", "arguments"} for call in calls):
        return ()
    return tuple(_as_tool_call(call) for call in calls)


def _as_tool_call(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call whose arguments are an object. OpenAI has a JSON string, which `arguments | tojson` would quote."""
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            parsed = None  # not JSON: passed on unchanged
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", "function": {**function, "arguments": arguments}}


def _tools(value: object) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else None
        except orjson.JSONDecodeError as error:
            raise BadRowError(f"tools is a string that is not JSON: {error.msg}") from error
    if not value:
        return ()
    tools = _list_of_objects(value, "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _required(row: Mapping[str, Any], key: str, place: str = "") -> Any:
    if key not in row:
        subject = f"{place} has " if place else ""
        raise BadRowError(f"{subject}no key {key!r} (keys: {', '.join(map(str, row)) or 'none'})")
    return row[key]


def _text(row: Mapping[str, Any], key: str, place: str = "") -> str:
    value = _required(row, key, place)
    if not isinstance(value, str):
        raise BadRowError(f"{place + '.' if place else ''}{key} is {_kind(value)}, not a string")
    return value


def _role(turn: Mapping[str, Any], key: str, known: tuple[str, ...], place: str) -> str:
    role = _text(turn, key, place)
    if role not in known:
        raise BadRowError(f"{place}.{key} is {role!r}, which is not one of {', '.join(known)}")
    return role


def _list_of_objects(value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {_kind(value)}, not a list")
    if not value:
        raise BadRowError(f"{name} is empty")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRowError(f"{name}[{index}] is {_kind(item)}, not an object")
    return value


def _integers(value: object, name: str) -> NDArray[np.int64]:
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {_kind(value)}, not a list")
    if not value:
        return np.empty(0, np.int64)
    try:
        return np.frombuffer(array("q", value), dtype=np.int64)  # rejects 1.5 and "1", which np.array would take
    except (TypeError, OverflowError) as error:
        raise BadRowError(f"{name} holds something other than 64-bit integers") from error


def _kind(value: object) -> str:
    """Return the name of a JSON value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
