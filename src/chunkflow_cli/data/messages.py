"""Convert the messages of a row from the forms of OpenAI, ShareGPT, Anthropic and others to one form.

A turn is `{role, content}` or `{from, value}`. Content is a string, or a list of text parts, which are joined without
anything between them, as chat templates for images and text do. Parts of another type make the row bad.

Calls. `tool_calls` (OpenAI, with `function` or flat as in LangChain), the older `function_call`, and the roles
`function_call` and `tool_call`, whose content is a call in JSON, all become
`{"id", "type": "function", "function": {"name", "arguments"}}`: the id only if there is one, and the arguments as an
object, because a template that writes `arguments | tojson` would quote a JSON string again.

Tools may be a list or, as in LLaMA-Factory, a JSON string of one. A bare `{"name", ...}` is wrapped as
`{"type": "function", "function": ...}`, which is what templates expect. `functions` is the older name of `tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from chunkflow_cli.data.fields import REASONING, SWITCHES, SYSTEM, check_message, is_trained
from chunkflow_cli.data.rows import check_keys
from chunkflow_cli.data.sample import BadRowError, Message
from chunkflow_cli.data.values import is_absent, kind, list_of_objects, required, text

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Names of roles in data sets, and the role that chat templates know."""
_CALLERS = ("function_call", "tool_call")
_READ = ("role", "from", "content", "value", "tool_calls", "function_call", "refusal", *SWITCHES)
_TEXT_PARTS = ("text", "input_text", "output_text")
_NOTES_OF_PARTS = ("type", "text", "cache_control", "citations", "annotations", "logprobs", "index", "id")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def parse_messages(value: object, key: str, *, are_targets: bool) -> tuple[Message, ...]:
    """Return the messages in a list.

    Args:
        key: where the list is in the row, for messages.
        are_targets: the loss counts the assistant's turns, except those that say otherwise.

    Raises:
        BadRowError: a message is not what this module's docstring describes.
    """
    turns = list_of_objects(value, key)
    return tuple(_message(turn, f"{key}[{index}]", are_targets) for index, turn in enumerate(turns))


def with_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its conversation as a list: tables, and some data sets, hold it as a JSON string.

    Raises:
        BadRowError: the string is not JSON.
    """
    written = {key: row[key] for key in ("messages", "conversations") if isinstance(row.get(key), str)}
    return row | {key: _from_json(value, key) for key, value in written.items()} if written else row


def with_turns_in_texts(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its prompt and answers as lists of messages, if a table holds them as JSON strings.

    An answer may be text that looks the same. It is messages if the prompt is, or if both answers of a pair are.

    Raises:
        BadRowError: a string holds messages as Python prints them.
    """
    texts = {key: row[key] for key in ("prompt", "completion", "chosen", "rejected") if isinstance(row.get(key), str)}
    found = {key: turns for key, value in texts.items() if (turns := _turns_in(value, key))}
    return {**row, **found} if "prompt" in found or {"chosen", "rejected"} <= found.keys() else row


def _turns_in(value: str, key: str) -> list[Any] | None:
    """Return the messages in a JSON string; None if it is another text."""
    if not value.lstrip().startswith("[{"):
        return None
    if re.match(r"\s*\[\{'(role|from|content|value)': ", value):
        raise BadRowError(f"{key} is a string of messages as Python prints them; write them as JSON")
    turns = _strict_json(value)
    are_turns = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    )
    return turns if isinstance(turns, list) and are_turns else None


def _message(turn: Mapping[str, Any], place: str, are_targets: bool) -> Message:
    role_key = _one_of(turn, "role", "from", place)
    speaker = text(turn, role_key, place)
    if speaker not in ROLES:
        raise BadRowError(f"{place}.{role_key} is {speaker!r}, which is not one of {', '.join(ROLES)}")
    role = ROLES[speaker]
    check_message(turn, place, role)
    calls = _calls(turn, place)
    if calls and role != "assistant":
        key = "function_call" if is_absent(turn.get("tool_calls")) else "tool_calls"
        raise BadRowError(f"{place}.{key}: the role {role} makes no calls; only an assistant's message does")
    extra = {name: value for name, value in turn.items() if name not in _READ and value is not None and value == value}
    content = _content(
        turn,
        _one_of(turn, "content", "value", place),
        place,
        may_be_null=bool(calls) or any(name in extra for name in REASONING),
    )
    if speaker in _CALLERS and not calls and (calls := _calls_in(content)):
        content = ""
    is_target = is_trained(turn, place, can_be=are_targets and role == "assistant", role=role)
    return Message(role, content, is_target, calls, extra)


def _one_of(turn: Mapping[str, Any], key: str, other: str, place: str) -> str:
    """Return the one of two keys that a message has; `key` if it has neither."""
    if turn.get(key) is not None and turn.get(other) is not None:
        raise BadRowError(f"{place} has both {key} and {other}; keep one")
    return other if turn.get(key) is None and other in turn else key


def _content(turn: Mapping[str, Any], key: str, place: str, *, may_be_null: bool) -> str:
    """Return the text of a message.

    Args:
        may_be_null: APIs give null as the content of a message that holds only calls or reasoning.
    """
    if may_be_null and turn.get(key) is None:
        return ""
    value = required(turn, key, place)
    if isinstance(value, list):
        name = f"{place}.{key}" if place else key
        return "".join(_part(part, f"{name}[{index}]") for index, part in enumerate(value))
    return text(turn, key, place)


def _part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRowError(f"{place} is {kind(part)}, not a text part")
    type_ = part.get("type", "text")
    if type_ not in _TEXT_PARTS:
        raise BadRowError(
            f"{place} has type {type_!r}, and only text parts can be trained on{_PARTS.get(str(type_), '')}"
        )
    for name, value in part.items():
        if name not in _NOTES_OF_PARTS and not is_absent(value):
            raise BadRowError(f"{place}.{name} is not read; only text parts can be trained on")
    return text(part, "text", place)


_PARTS = {
    "tool_use": "; write it as tool_calls of the message",
    "tool_result": "; write it as a message of the role tool",
    "thinking": "; write it as reasoning_content of the message",
    "reasoning": "; write it as reasoning_content of the message",
}


def _calls(turn: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], ...]:
    modern, legacy = turn.get("tool_calls"), turn.get("function_call")
    if is_absent(modern) and is_absent(legacy):
        return ()
    if is_absent(modern):
        if not isinstance(legacy, dict):
            raise BadRowError(f"{place}.function_call is {kind(legacy)}, not an object")
        return (_call(legacy, f"{place}.function_call"),)
    if not is_absent(legacy):
        raise BadRowError(f"{place} has both tool_calls and function_call; keep tool_calls")
    calls = list_of_objects(modern, f"{place}.tool_calls")
    return tuple(_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls))


def _call(call: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        _refuse_others(call, ("id", "type", "function", "index"), place)
        place = f"{place}.function"
    else:  # flat: {"name": ..., "arguments": ...}
        function = {key: value for key, value in call.items() if key not in ("id", "type", "index")}
    if not isinstance(function.get("name"), str):
        raise BadRowError(f"{place} is a call without a name")
    if call.get("type") not in (None, "function", "tool_call", "tool_use"):
        raise BadRowError(f"{place.removesuffix('.function')}.type is {call['type']!r}, and must be 'function'")
    _refuse_others(function, ("name", *_ARGUMENTS), place)
    given = [key for key in _ARGUMENTS if function.get(key) is not None]
    if len(given) > 1:
        raise BadRowError(f"{place} has both {' and '.join(given)}; keep arguments")
    arguments = _arguments(function[given[0]], f"{place}.{given[0]}") if given else {}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse_others(call: Mapping[str, Any], read: tuple[str, ...], place: str) -> None:
    for key, value in call.items():
        if key not in read and not is_absent(value):
            raise BadRowError(f"{place}.{key} is not read; a call has a name, arguments and an id")


def _arguments(value: object, place: str) -> object:
    """Return arguments as an object, or unchanged if they are a string that does not hold one."""
    if isinstance(value, str):
        if not value.strip():
            return {}
        parsed = _strict_json(value)
        return parsed if isinstance(parsed, dict) else value
    if not isinstance(value, dict):
        raise BadRowError(f"{place} is {kind(value)}, not an object or a JSON string")
    _check_json(value, place)
    return value


def _calls_in(content: str) -> tuple[Mapping[str, Any], ...]:
    """Return the calls that a turn writes as JSON, or none if it is other text, which then stays as it is."""
    value = _strict_json(content)
    calls: list[Any] = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and set(call) == {"name", "arguments"} for call in calls):
        return ()
    return tuple(_call(call, "function_call") for call in calls)


def _strict_json(value: str) -> object:
    """Return what a JSON string holds; None if it is not JSON, or if parsing would lose a repeated key or a digit."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(value, object_pairs_hook=object_of, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _from_json(value: str, key: str) -> Any:
    try:
        parsed = orjson.loads(value)
        check_keys(value.encode(), parsed)
    except orjson.JSONDecodeError as error:
        raise BadRowError(f"{key} is a string that is not JSON: {error.msg}") from error
    return parsed


def _check_json(value: object, place: str) -> None:
    """Raise if a value holds NaN, or something that JSON has no form for (parquet's dates and bytes)."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRowError(f"{place} is not valid JSON: {error}") from error


def parse_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the definitions in a row's `tools`, or in the older `functions`.

    Raises:
        BadRowError: a definition has no name, or the two keys differ.
    """
    tools, functions = _tools(row.get("tools"), "tools"), _tools(row.get("functions"), "functions")
    if tools and functions and tools != functions:
        raise BadRowError("tools and functions differ; keep tools")
    return tools or functions


def _tools(value: object, key: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        value = _from_json(value, key) if value.strip() else None
    if is_absent(value):
        return ()
    tools = list_of_objects(value, key)
    _check_json(tools, key)
    return tuple(_tool(tool, f"{key}[{index}]") for index, tool in enumerate(tools))


def _tool(tool: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    if isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool.get("name"), str):
        raise BadRowError(f"{place} has no function and no name")
    # OpenAI's responses API has the type inside of the flat definition.
    return {
        "type": "function",
        "function": {key: tool[key] for key in tool if (key, tool[key]) != ("type", "function")},
    }


def parse_template_arguments(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a row's `chat_template_kwargs` give the chat template, an object or a JSON string of one.

    Raises:
        BadRowError: they are something else.
    """
    key = "chat_template_kwargs"
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        value = _from_json(value, key)
    if is_absent(value):
        return {}
    if not isinstance(value, dict):
        raise BadRowError(f"{key} is {kind(value)}, not an object")
    _check_json(value, key)
    return value


def with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return messages that begin with the row's own system prompt, if it has one.

    Raises:
        BadRowError: the messages begin with another one.
    """
    prompt = system_prompt(row)
    if not prompt:
        return messages
    if messages[0].role not in ("system", "developer"):
        return (Message("system", prompt, is_target=False), *messages)
    if messages[0].content != prompt:
        raise BadRowError("the row's system prompt and the one in its first message differ; keep one")
    return messages


def system_prompt(row: Mapping[str, Any]) -> str:
    """Return the row's own system prompt, or an empty string.

    Raises:
        BadRowError: it is not text, or is there under two names with different texts.
    """
    prompts = {key: _content(row, key, "", may_be_null=True) for key in SYSTEM if not is_absent(row.get(key))}
    if len(set(prompts.values())) > 1:
        raise BadRowError(f"{' and '.join(prompts)} differ; keep one")
    return next(iter(prompts.values()), "")
