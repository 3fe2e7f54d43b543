"""What a row means: its format, and the `Sample` that it becomes.

| format | keys of a row | sample |
|---|---|---|
| messages | messages: [{role, content}], tools | Conversation; targets: assistant turns |
| sharegpt | conversations: [{from, value}], system, tools | the same |
| alpaca | instruction, input, output, system, history | Instruction |
| prompt_completion | prompt, completion: texts | PromptCompletion |
| prompt_completion | prompt, completion: lists of messages | Conversation; targets: assistant turns of the completion |
| text | text | PlainText |
| tokens | input_ids, labels | TokenRow |

Other keys of a row are left alone; other keys of a message (name, reasoning_content, ...) reach the chat template. A
reason for refusing a row (`BadRowError`) names the key, as in `messages[2].content is null`.

Tools. A sharegpt `function_call` is what the assistant said. Where its text is a call, `{"name", "arguments"}` or a
list of them, it becomes `tool_calls` of the assistant, so that a template that knows calls writes them in its own
syntax. `observation` is the answer of a tool. `tools` may be a list or, as LLaMA-Factory has it, JSON text of one, and
a bare `{"name", ...}` is wrapped as `{"type": "function", "function": ...}`, which is what templates expect. What
becomes of all this under a template that knows no tools is told in `tokens.template`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.source import BadRowError, Location, RowBatch, Source
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
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The two prompts of Stanford Alpaca, word for word."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str
    is_target: bool
    """Whether the loss counts it (under `data.train_on=assistant`)."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`{"type": "function", "function": {"name", "arguments"}}` each, arguments as an object."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the row says of this turn, for the chat template."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that a chat template turns into text."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two texts that follow each other as they are; the completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """An alpaca row: a conversation where there is a chat template, the well-known prompt text where there is none."""

    instruction: str
    input: str
    output: str
    system: str
    history: tuple[tuple[str, str], ...]

    def conversation(self) -> Conversation:
        """The turns: system, earlier exchanges, then instruction and input, joined by a newline, and the output."""
        question = "\n".join(part for part in (self.instruction, self.input) if part)
        turns = [Message("system", self.system, is_target=False)] if self.system else []
        for asked, answered in (*self.history, (question, self.output)):
            turns += [Message("user", asked, is_target=False), Message("assistant", answered, is_target=True)]
        return Conversation(tuple(turns))

    def prompt_completion(self) -> PromptCompletion:
        """Stanford Alpaca's text; a system prompt goes before it.

        Raises:
            BadRowError: there is a history, for which that text has no place.
        """
        if self.history:
            raise BadRowError("history needs a chat template, and the tokenizer has none")
        prompt = ALPACA_PROMPT_WITH_INPUT if self.input else ALPACA_PROMPT
        preamble = f"{self.system}\n\n" if self.system else ""
        return PromptCompletion(preamble + prompt.format(instruction=self.instruction, input=self.input), self.output)


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document; every token is a target."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens that somebody else made."""

    input_ids: NDArray[np.int64]  # (length,)
    labels: NDArray[np.int64] | None  # (length,), not shifted, -100 = not a target; None: every token is one


Sample = Conversation | PromptCompletion | Instruction | PlainText | TokenRow


def decode_row(raw: object) -> dict[str, Any]:
    """The object that a row is.

    Raises:
        BadRowError: it is not valid UTF-8, not valid JSON, or not an object.
    """
    row = raw
    if isinstance(raw, bytes):
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BadRowError(_why_not_json(raw, error)) from error
    if not isinstance(row, dict):
        hint = " (a file that is one JSON array must be named .json)" if isinstance(row, list) else ""
        raise BadRowError(f"the row is {_kind(row)}, not an object{hint}")
    return row


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as utf8_error:
        return f"not valid UTF-8 at byte {utf8_error.start + 1} of the line"
    return f"not valid JSON: {error.msg} at character {error.pos + 1} of the line"


def parse_sample(row: dict[str, Any], format: DataFormat) -> Sample:
    """The sample that a row of this format is.

    Raises:
        BadRowError: a key is missing, or holds what the format does not allow.
    """
    return _PARSERS[format](row)


def detect_format(source: Source, *, key: str = "data.path") -> DataFormat:
    """The format that the first rows agree on, by their keys.

    Rows that cannot be parsed do not count, nor do rows of no known format beside others of one: they are bad rows,
    which are named with file and line when they are read.

    Raises:
        UsageError: no format, or more than one, fits them; the keys seen and the formats are named.
    """
    seen: dict[str, tuple[DataFormat | None, Location]] = {}
    reasons: list[str] = []
    for batch, index in islice(_each_row(source), DETECTION_ROWS):
        location = source.location(batch.file, batch.lines[index])
        try:
            row = decode_row(batch.rows[index])
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
    rows = "\n".join(
        f"  keys {keys}: {format.value if format else 'no format'}, first {location}"
        for keys, (format, location) in seen.items()
    )
    what = "rows of more than one format" if formats else "rows of no known format"
    raise UsageError(f"{key} holds {what}\n{rows}\nname the format with data.format, or rename the keys:\n{known}")


REQUIRED_KEYS = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("conversations",),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text: ("text",),
    DataFormat.tokens: ("input_ids",),
}


def _each_row(source: Source) -> Iterator[tuple[RowBatch, int]]:
    for batch in source.batches():
        for index in range(len(batch.rows)):
            yield batch, index


def _format_by_keys(row: Mapping[str, Any], keys: str, key: str) -> DataFormat | None:
    fitting = [name for name, required in REQUIRED_KEYS.items() if all(word in row for word in required)]
    if fitting == [DataFormat.alpaca, DataFormat.text]:
        return DataFormat.alpaca  # the hub's alpaca sets carry the finished prompt in `text` too
    if len(fitting) > 1:
        names = " or ".join(f"data.format={name.value}" for name in fitting)
        raise UsageError(f"{key}: rows with the keys {keys} fit several formats\n  say which: {names}")
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
            raise BadRowError(f"history[{index}] is not a pair of texts")
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
        f"prompt is {_kind(prompt)} and completion is {_kind(completion)}: both must be texts, or lists of messages"
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
        return TokenRow(input_ids, None)
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
        # A turn of calls alone has null as content where the data came from an OpenAI-like interface.
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
    """The calls that a sharegpt `function_call` writes as JSON; none where it is some other text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return ()  # not JSON: what the assistant said stays text
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and set(call) == {"name", "arguments"} for call in calls):
        return ()
    return tuple(_as_tool_call(call) for call in calls)


def _as_tool_call(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates write `arguments | tojson`, so arguments that are JSON text (as OpenAI has them) become the object."""
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            parsed = None  # some text that is not JSON: handed on as it is
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", "function": {**function, "arguments": arguments}}


def _tools(value: object) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else None
        except orjson.JSONDecodeError as error:
            raise BadRowError(f"tools is a text that is not JSON: {error.msg}") from error
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
        raise BadRowError(f"{place + '.' if place else ''}{key} is {_kind(value)}, not a text")
    return value


def _role(turn: Mapping[str, Any], key: str, known: tuple[str, ...], place: str) -> str:
    role = _text(turn, key, place)
    if role not in known:
        raise BadRowError(f"{place}.{key} is {role!r}, which is none of {', '.join(known)}")
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
        return np.frombuffer(array("q", value), dtype=np.int64)  # refuses 1.5 and "1", which np.array would take
    except (TypeError, OverflowError) as error:
        raise BadRowError(f"{name} holds something other than integers of 64 bits") from error


def _kind(value: object) -> str:
    """A JSON value's kind, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
