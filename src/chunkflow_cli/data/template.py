"""The text of a conversation under a chat template, and which of its characters are targets.

**What is a target.** In an assistant's turn: everything the model itself has to generate, which is the answer and the
end-of-turn token (`<|im_end|>`, `<|eot_id|>`, ...). The header that the template writes before the answer
(`<|im_start|>assistant\\n`) and white space after the end-of-turn token are not targets. If a template ends turns with
plain text instead of a special token, all of that text is a target.

**Two ways to find it.** A template with `{% generation %}` marks says where the targets are. For any other, *prefixes*
are rendered: the text before the assistant's turn i is `messages[:i]` with the generation prompt, and the text up to
its end is `messages[:i+1]`. Both must be prefixes of the whole conversation's text, to the character. Otherwise the row
is rejected, because a guess would train on the wrong tokens. There is one exception, which is exact as well: some
templates (Qwen3) write more into the last turn (an empty `<think>` block) than into earlier ones. The whole text must
then contain the turn as its content followed by what the template writes after that content. If only some of the
assistant's turns are targets (`prompt_completion` with messages), prefixes are used even if there are marks.

**Templates without tools.** A template that never mentions `tools`, `tool_calls` or the role `tool` would silently drop
the first two and may reject the third. Then the definitions are written into the system message (which, like any system
message, replaces a default one), calls become the text of the assistant's turn (as JSON, one per line), and a tool's
answer becomes a user turn. Each of the three is decided independently, from the template's text alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from chunkflow_cli.data.sample import BadRowError, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOLS_HEADER = (
    "You have access to the following functions. "
    "To call one, answer with a JSON object that has its name and arguments."
)
REMEDY = "data.train_on=all makes every token a target instead"


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text, and the parts of it that are targets."""

    text: str
    target_spans: tuple[tuple[int, int], ...] | None
    """Character ranges `[start, stop)`, in order and disjoint; None: the whole text."""


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """Facts about a chat template, read from its text."""

    marks_answers: bool
    """True if it has `{% generation %}` marks."""
    names_tools: bool
    names_tool_calls: bool
    role_names: frozenset[str]
    """Roles that it quotes. It may render or reject other roles."""


@lru_cache(maxsize=16)
def template_traits(template: str) -> TemplateTraits:
    """Return the traits of a Jinja template, found by searching its text."""
    return TemplateTraits(
        marks_answers=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
        names_tools=re.search(r"\btools\b", template) is not None,
        names_tool_calls=re.search(r"\btool_calls\b", template) is not None,
        role_names=frozenset(re.findall(r"""['"](\w+)['"]""", template)),
    )


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """A conversation in the form that `apply_chat_template` expects."""

    messages: list[dict[str, Any]]
    are_targets: list[bool]  # (messages,)
    tools: list[Any] | None


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Strings only, not the tokenizer: unpickling that in a worker process would import transformers.
        self._templates: str | dict[str, str] = tokenizer.chat_template
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Some vocabularies have runs of spaces as added tokens, which end no turn.
        self._end_tokens = tuple(token for token in sorted(added) if token.strip())

    def render(self, conversation: Conversation, *, mark_targets: bool) -> MarkedText:
        """Return the conversation's text with its target spans, or with the whole text as target unless `mark_targets`.

        Raises:
            BadRowError: the template rejects the conversation, or its targets cannot be found.
        """
        from jinja2.exceptions import TemplateError

        try:
            template = self._template_for(conversation)
            traits = template_traits(template)
            given = as_template_input(conversation, traits)
            if not mark_targets:
                return MarkedText(self._rendered(template, [given.messages], given.tools)[0][0], None)
            answers = [turn["role"] == "assistant" for turn in given.messages]
            if traits.marks_answers and given.are_targets == answers:
                return self._render_with_marks(template, given)
            return self._render_with_prefixes(template, given)
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, BadRowError):
                raise
            raise BadRowError(f"the chat template rejects the conversation: {error}") from error

    def _template_for(self, conversation: Conversation) -> str:
        """Return the template to use. A tokenizer may have several by name; the choice follows transformers."""
        if isinstance(self._templates, str):
            return self._templates
        if conversation.tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise BadRowError(f"the tokenizer has chat templates {sorted(self._templates)}, and none named default")
        return self._templates["default"]

    def _rendered(
        self, template: str, conversations: list[list[dict[str, Any]]], tools: list[Any] | None, **options: bool
    ) -> tuple[list[str], Any]:
        """Return the texts, and the ranges of each that `{% generation %}` marks. One call for several is faster.

        `apply_chat_template` calls this too, but maps characters to tokens by trimmed offsets: an answer that begins
        with a space loses its mask, and so do all later turns.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: tuple[list[str], Any] = render_jinja_template(
            conversations=conversations, tools=tools, chat_template=template, **options, **self._special_tokens
        )
        return rendered

    def _render_with_marks(self, template: str, given: TemplateInput) -> MarkedText:
        texts, spans = self._rendered(template, [given.messages], given.tools, return_assistant_tokens_mask=True)
        return MarkedText(texts[0], tuple((start, stop) for start, stop in spans[0]))

    def _render_with_prefixes(self, template: str, given: TemplateInput) -> MarkedText:
        messages, tools = given.messages, given.tools
        targets = [index for index, is_target in enumerate(given.are_targets) if is_target]
        ends = [index + 1 for index in targets if index + 1 < len(messages)]
        (whole, *throughs), _ = self._rendered(template, [messages, *(messages[:end] for end in ends)], tools)
        if 0 in targets:
            raise BadRowError(f"the conversation begins with an assistant turn; {REMEDY}")
        prefixes, _ = self._rendered(template, [messages[:end] for end in targets], tools, add_generation_prompt=True)
        spans = []
        for index, before, through in zip(targets, prefixes, [*throughs, whole], strict=False):
            if not (whole.startswith(before) and through.startswith(before)):
                raise BadRowError(_not_stable(index))
            if not whole.startswith(through):
                through = _turn_within(whole, before, through, messages[index]["content"], index)
            spans.append((len(before), self._end_of_turn(through, len(before))))
        return MarkedText(whole, tuple(spans))

    def _end_of_turn(self, through: str, start: int) -> int:
        """Return the end of the targets of a turn that begins at `start` and ends with the text."""
        stripped = through.rstrip()
        return len(stripped) if len(stripped) > start and stripped.endswith(self._end_tokens) else len(through)


def _turn_within(whole: str, before: str, through: str, content: str, index: int) -> str:
    """Return the text up to the end of a turn that the template writes differently when it is the last one."""
    content = content.strip()
    place = through.rfind(content, len(before))
    turn = before + content + through[place + len(content) :]
    if not content or place < 0 or not whole.startswith(turn):
        raise BadRowError(_not_stable(index))
    return turn


def _not_stable(index: int) -> str:
    return (
        f"the chat template writes turn {index + 1} differently within the whole conversation, "
        f"so its targets cannot be found; {REMEDY}"
    )


def as_template_input(conversation: Conversation, traits: TemplateTraits) -> TemplateInput:
    """Return messages and tools for a template. Tools become text if the template does not support them."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        role = message.role if message.role in traits.role_names else UNNAMED_ROLES.get(message.role, message.role)
        turn: dict[str, Any] = {**message.extra, "role": role, "content": message.content}
        if message.tool_calls and traits.names_tool_calls:
            turn["tool_calls"] = [dict(call) for call in message.tool_calls]
        elif message.tool_calls:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
            turn["content"] = "\n".join(filter(None, [message.content, *calls]))
        messages.append(turn)
    are_targets = [message.is_target for message in conversation.messages]
    if not conversation.tools or traits.names_tools:
        return TemplateInput(messages, are_targets, [dict(tool) for tool in conversation.tools] or None)
    definitions = [json.dumps(tool["function"], ensure_ascii=False) for tool in conversation.tools]
    text = "\n".join([TOOLS_HEADER, *definitions])
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n\n{text}"
        return TemplateInput(messages, are_targets, None)
    return TemplateInput([{"role": "system", "content": text}, *messages], [False, *are_targets], None)


UNNAMED_ROLES = {"tool": "user", "developer": "system"}
"""Replacements of roles that a template does not mention."""
