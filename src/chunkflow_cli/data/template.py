"""From a conversation to text, and which of its characters the assistant said.

**What is a target.** Of an assistant's turn: what the model itself has to emit, which is the answer and the
end-of-turn token (`<|im_end|>`, `<|eot_id|>`, ...). Not the header that the template writes before it
(`<|im_start|>assistant\\n`), and not white space that the template writes after the end-of-turn token. (Where a
template ends turns with plain text instead of a token of its own, all of that text is a target.)

**Two ways to find it.** A template with `{% generation %}` marks says it itself. Of any other, *prefixes* are rendered:
for the assistant's turn i, what stands before it is `messages[:i]` with the generation prompt, and what stands up to
its end is `messages[:i+1]`. Both must be prefixes of the whole conversation's text, to the character; otherwise the row
is refused, for a guess would train on the wrong tokens. One exception is exact as well: some templates (Qwen3) write
more into the last turn (an empty `<think>` block) than into earlier ones. There the turn must stand in the whole text
as its content followed by what the template writes after that content. Where only some of the assistant's turns are
targets (`prompt_completion` with messages), prefixes are used even if there are marks.

**Templates that know no tools.** A template that nowhere names `tools`, `tool_calls` or the role `tool` would drop the
first two without a word and may refuse the third. Then the definitions are written into the system message (which, as
any system message, replaces a default one), calls become the text of the assistant's turn (as JSON, one a line), and a
tool's answer becomes a user turn. Each is decided by itself, from the template's text alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from chunkflow_cli.data.formats import Conversation
from chunkflow_cli.data.skeleton import Skeletons
from chunkflow_cli.data.source import BadRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOLS_HEADER = (
    "You have access to the following functions. "
    "To call one, answer with a JSON object that has its name and arguments."
)
REMEDY = "data.train_on=all counts every token instead"


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text, and the pieces of it that are targets."""

    text: str
    target_spans: tuple[tuple[int, int], ...] | None
    """Character ranges `[start, stop)`, in order and disjoint; None: all of it."""


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a chat template's text says about itself."""

    marks_answers: bool
    """It has `{% generation %}` marks."""
    names_tools: bool
    names_tool_calls: bool
    role_names: frozenset[str]
    """Roles that it quotes; one that it does not quote may still be rendered, or refused."""


@lru_cache(maxsize=16)
def template_traits(template: str) -> TemplateTraits:
    """Read a Jinja template's text."""
    return TemplateTraits(
        marks_answers=re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None,
        names_tools=re.search(r"\btools\b", template) is not None,
        names_tool_calls=re.search(r"\btool_calls\b", template) is not None,
        role_names=frozenset(re.findall(r"""['"](\w+)['"]""", template)),
    )


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """A conversation as `apply_chat_template` takes it."""

    messages: list[dict[str, Any]]
    are_targets: list[bool]
    """Of each message."""
    tools: list[Any] | None


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Texts and names alone, not the tokenizer: processes that tokenise then start without importing transformers.
        self._templates: str | dict[str, str] = tokenizer.chat_template
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._skeletons = Skeletons(self._special_tokens)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Some vocabularies have runs of spaces as added tokens; those end no turn.
        self._end_tokens = tuple(token for token in sorted(added) if token.strip())

    def render(self, conversation: Conversation, *, mark_targets: bool) -> MarkedText:
        """The conversation's text, with the target spans or, unless `mark_targets`, all of it as the target.

        Raises:
            BadRowError: the template refuses the conversation, or does not let its targets be told apart.
        """
        from jinja2.exceptions import TemplateError

        try:
            template = self._template_for(conversation)
            traits = template_traits(template)
            given = as_template_input(conversation, traits)
            if not mark_targets:
                return MarkedText(self._text(template, given.messages, given.tools), None)
            answers = [turn["role"] == "assistant" for turn in given.messages]
            if traits.marks_answers and given.are_targets == answers:
                return self._render_with_marks(template, given)
            return self._render_with_prefixes(template, given)
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, BadRowError):
                raise
            raise BadRowError(f"the chat template refuses the conversation: {error}") from error

    def _template_for(self, conversation: Conversation) -> str:
        """A tokenizer may have several templates by name; the choice is the one that transformers makes."""
        if isinstance(self._templates, str):
            return self._templates
        if conversation.tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise BadRowError(f"the tokenizer has chat templates {sorted(self._templates)}, and none named default")
        return self._templates["default"]

    def _text(
        self, template: str, messages: list[dict[str, Any]], tools: list[Any] | None, *, ask: bool = False
    ) -> str:
        known = None if tools else self._skeletons.text(template, messages, ask=ask)
        if known is not None:
            return known
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=ask,
            **self._special_tokens,
        )  # fmt: skip
        return str(texts[0])

    def _render_with_marks(self, template: str, given: TemplateInput) -> MarkedText:
        # apply_chat_template(return_assistant_tokens_mask=True) calls this too, but maps characters to tokens by
        # trimmed offsets: an answer that begins with a space loses its mask, and so do all turns after it.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(  # annotated as a text; it is texts and, of each, its marked ranges
            conversations=[given.messages],
            tools=given.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._special_tokens,
        )
        texts, spans = rendered
        return MarkedText(texts[0], tuple((start, stop) for start, stop in spans[0]))

    def _render_with_prefixes(self, template: str, given: TemplateInput) -> MarkedText:
        messages, tools = given.messages, given.tools
        whole = self._text(template, messages, tools)
        spans = []
        for index, turn in enumerate(messages):
            if not given.are_targets[index]:
                continue
            if index == 0:
                raise BadRowError(f"the conversation begins with the assistant's turn; {REMEDY}")
            before = self._text(template, messages[:index], tools, ask=True)
            through = self._text(template, messages[: index + 1], tools) if index + 1 < len(messages) else whole
            if not (whole.startswith(before) and through.startswith(before)):
                raise BadRowError(_not_stable(index))
            if not whole.startswith(through):
                through = _turn_within(whole, before, through, turn["content"], index)
            spans.append((len(before), self._end_of_turn(through, len(before))))
        return MarkedText(whole, tuple(spans))

    def _end_of_turn(self, through: str, start: int) -> int:
        """Where the targets of the turn stop that begins at `start` and ends with the text."""
        stripped = through.rstrip()
        return len(stripped) if len(stripped) > start and stripped.endswith(self._end_tokens) else len(through)


def _turn_within(whole: str, before: str, through: str, content: str, index: int) -> str:
    """The text up to the end of a turn that the template writes otherwise when it is the last one."""
    content = content.strip()
    place = through.rfind(content, len(before))
    turn = before + content + through[place + len(content) :]
    if not content or place < 0 or not whole.startswith(turn):
        raise BadRowError(_not_stable(index))
    return turn


def _not_stable(index: int) -> str:
    return (
        f"the chat template writes turn {index + 1} differently within the whole conversation, "
        f"so what the assistant said cannot be told apart; {REMEDY}"
    )


def as_template_input(conversation: Conversation, traits: TemplateTraits) -> TemplateInput:
    """Messages and tools for a template; as text where it knows no tools."""
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
"""What a role becomes under a template that does not name it."""
