"""Convert a conversation to the input of a chat template.

A template that never mentions `tools`, `tool_calls` or the role `tool` would silently drop the first two and may reject
the third. Then the definitions are written into the system message (which, like any system message, replaces a default
one), calls become the text of the assistant's turn (as JSON, one per line), and results of tools become a user turn.
Each of the three is decided independently, from the template's text alone. A remark says so, because other programs do
not do the same at inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.sample import Conversation

TOOLS_HEADER = (
    "You have access to the following functions. "
    "To call one, answer with a JSON object that has its name and arguments."
)


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """Facts about a chat template, read from its text."""

    marks_answers: bool
    """True if it has `{% generation %}` marks."""
    names_tools: bool
    names_tool_calls: bool
    writes_date: bool
    """True if it asks for today's date."""
    switches_thinking: bool
    """True if its generation prompt depends on `enable_thinking`."""
    role_names: frozenset[str]
    """Roles that it quotes. It may render or reject other roles."""


@lru_cache(maxsize=16)
def template_traits(template: str) -> TemplateTraits:
    """Return the traits of a Jinja template, found by searching its text."""
    return TemplateTraits(
        marks_answers=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
        names_tools=re.search(r"\btools\b", template) is not None,
        names_tool_calls=re.search(r"\btool_calls\b", template) is not None,
        writes_date=re.search(r"\bstrftime_now\b", template) is not None,
        switches_thinking=re.search(r"\benable_thinking\b", template) is not None,
        role_names=frozenset(re.findall(r"""['"](\w+)['"]""", template)),
    )


@dataclass(frozen=True, slots=True)
class MessageForm:
    """The form of messages that a template needs."""

    parts: bool = False
    """It writes a content only if that is a list of parts, as some templates for images do."""
    json_arguments: bool = False
    """It writes the arguments of a call only if they are JSON in a string (DeepSeek-V3)."""


def in_form(turn: dict[str, Any], form: MessageForm) -> dict[str, Any]:
    """Return a message in the form that a template takes."""
    if form.parts:
        turn = {**turn, "content": [{"type": "text", "text": turn["content"]}]}
    if form.json_arguments and turn.get("tool_calls"):
        calls = [
            {**call, "function": {**call["function"], "arguments": _as_json(call["function"].get("arguments"))}}
            for call in turn["tool_calls"]
        ]
        turn = {**turn, "tool_calls": calls}
    return turn


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """A conversation in the form that `apply_chat_template` expects, and its template."""

    template: str
    messages: list[dict[str, Any]]
    are_targets: list[bool]  # (messages,)
    tools: list[Any] | None
    remarks: tuple[Remark, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables that the template gets, by name."""


def as_template_input(conversation: Conversation, template: str) -> TemplateInput:
    """Return messages and tools for a template. Tools become text if the template does not support them."""
    traits = template_traits(template)
    messages: list[dict[str, Any]] = []
    are_targets: list[bool] = []
    before = ""
    for message in conversation.messages:
        role = message.role if message.role in traits.role_names else UNNAMED_ROLES.get(message.role, message.role)
        turn: dict[str, Any] = {**message.extra, "role": role, "content": message.content}
        if message.tool_calls and traits.names_tool_calls:
            turn["tool_calls"] = [dict(call) for call in message.tool_calls]
        elif message.tool_calls:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
            turn["content"] = "\n".join(filter(None, [message.content, *calls]))
        if role == UNNAMED_ROLES["tool"] and message.role == before == "tool":
            # One user message for the results of one answer: many of these templates want roles to alternate.
            messages[-1]["content"] = f"{messages[-1]['content']}\n{message.content}"
        else:
            messages.append(turn)
            are_targets.append(message.is_target)
        before = message.role
    remarks = tuple(_rewritten(conversation, traits))
    if not conversation.tools or traits.names_tools:
        tools = [dict(tool) for tool in conversation.tools] or None
        return TemplateInput(template, messages, are_targets, tools, remarks)
    definitions = [json.dumps(tool["function"], ensure_ascii=False) for tool in conversation.tools]
    text = "\n".join([TOOLS_HEADER, *definitions])
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n\n{text}"
    else:
        messages, are_targets = [{"role": "system", "content": text}, *messages], [False, *are_targets]
    return TemplateInput(template, messages, are_targets, None, remarks)


def _rewritten(conversation: Conversation, traits: TemplateTraits) -> Iterator[Remark]:
    """Yield remarks on what is written otherwise than the row has it, because the template has no place for it."""
    roles = {message.role for message in conversation.messages} - traits.role_names
    parts = []
    if conversation.tools and not traits.names_tools:
        parts.append(f'their definitions are in the system message, after "{TOOLS_HEADER}"')
    if any(message.tool_calls for message in conversation.messages) and not traits.names_tool_calls:
        parts.append("calls are in the answer, as JSON")
    if "tool" in roles:
        parts.append(f"results are {UNNAMED_ROLES['tool']} messages")
    if parts:
        yield Remark(
            f"the chat template has no place for tools: {'; '.join(parts)}; write the same when you use the model"
        )
    if "developer" in roles:
        yield Remark("the chat template has no place for developer messages: they are written as system messages")


UNNAMED_ROLES = {"tool": "user", "developer": "system"}
"""Replacements of roles that a template does not mention."""
