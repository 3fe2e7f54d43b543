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

**Turns without an end of their own.** Some templates (GLM) end a turn with the token that begins the next one. That
token is then a target as well: the model has to generate it to stop.

**What is said.** A row's text comes with remarks: on what the template leaves out (`data.omissions`), and on what it
inserts that no row has, such as a default system message.

**Today's date.** For a template that writes it (`strftime_now`), today is `TEMPLATE_DATE`, the date that Llama 3.1's
own template writes if it is given none. With the real date the same data would become other tokens every day: another
run than yesterday's, and nothing that a cache could hold or a stopped run could go on from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.omissions import Turn, omissions
from chunkflow_cli.data.sample import BadRowError, Conversation
from chunkflow_cli.data.template_arguments import TemplateArguments, unread
from chunkflow_cli.data.template_input import TemplateInput, as_template_input, template_traits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "data.train_on=all makes every token a target instead"
TEMPLATE_DATE = datetime(2024, 7, 26)


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text, and the parts of it that are targets."""

    text: str
    target_spans: tuple[tuple[int, int], ...] | None
    """Character ranges `[start, stop)`, in order and disjoint; None: the whole text."""
    answer_end: int | None = None
    """Where the last answer of a conversation ends, its end-of-turn token included; None: it ends with no answer."""
    borrowed_ends: frozenset[str] = frozenset()
    """Tokens that begin a turn and thereby end the answer before it."""
    remarks: tuple[Remark, ...] = ()


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        arguments: `data.template_arguments`.

    Raises:
        UsageError: the template cannot be given one of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        # Strings only, not the tokenizer: unpickling that in a worker process would import transformers.
        self._templates: str | dict[str, str] = tokenizer.chat_template
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._arguments = TemplateArguments.checked(arguments or {}, tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Some vocabularies have runs of spaces as added tokens, which end no turn.
        self._end_tokens = tuple(token for token in sorted(added) if token.strip())
        eos = tokenizer.eos_token
        # A closing tag, such as </tool_call>, ends a part of a turn. (The EOS of some models is </s>.)
        self._turn_ends = tuple(token for token in self._end_tokens if token == eos or not re.match(r"</\w", token))
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._starts = tuple(sorted(special - {tokenizer.bos_token}, key=len, reverse=True))
        self._insertions: dict[tuple[str, bool], tuple[Remark, ...]] = {}

    def render(self, conversation: Conversation, *, mark_targets: bool) -> MarkedText:
        """Return the conversation's text with its target spans, or with the whole text as target unless `mark_targets`.

        Raises:
            BadRowError: the template rejects the conversation, its targets cannot be found, or it writes nothing of
                what is to be learnt.
        """
        template = self._template_for(conversation)
        traits = template_traits(template)
        arguments = self._arguments.with_row(conversation.template_arguments)
        given = replace(as_template_input(conversation, traits), arguments=arguments)
        answers = [turn["role"] == "assistant" for turn in given.messages]
        if not mark_targets:
            text = self._rendered(template, [given.messages], given.tools, **arguments)[0][0]
            end = len(text.rstrip()) if answers[-1] else None
            turns = [Turn(turn, True, text, None) for turn in given.messages]
            return self._remarked(MarkedText(text, None, end), given, turns, template)
        if traits.marks_answers and given.are_targets == answers:
            return self._render_with_marks(template, given)
        return self._render_with_prefixes(template, given)

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
        self, template: str, conversations: list[list[dict[str, Any]]], tools: list[Any] | None, **options: Any
    ) -> tuple[list[str], Any]:
        """Return the texts, and the ranges of each that `{% generation %}` marks. One call for several is faster.

        `apply_chat_template` calls this too, but maps characters to tokens by trimmed offsets: an answer that begins
        with a space loses its mask, and so do all later turns.

        Raises:
            BadRowError: the template fails.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _fixed_date(template):
                rendered: tuple[list[str], Any] = render_jinja_template(
                    conversations=conversations, tools=tools, chat_template=template, **options, **self._special_tokens
                )
        except (MemoryError, ImportError):  # of this machine
            raise
        except Exception as error:  # a template is a program, and may fail in any way: 1 / 0, a macro without an end
            raise BadRowError(
                f"the chat template rejects the conversation: {str(error) or type(error).__name__}"
            ) from error
        return rendered

    def _render_with_marks(self, template: str, given: TemplateInput) -> MarkedText:
        texts, found = self._rendered(
            template, [given.messages], given.tools, return_assistant_tokens_mask=True, **given.arguments
        )
        text, spans = texts[0], tuple((start, stop) for start, stop in found[0])
        marked = "".join(text[start:stop] for start, stop in spans)
        turns = [Turn(turn, is_target, marked if is_target else text, None)
                 for turn, is_target in zip(given.messages, given.are_targets, strict=True)]  # fmt: skip
        end = spans[-1][1] if spans else None
        result = self._remarked(MarkedText(text, spans, end), given, turns, template)
        outside = next((token for token in self._end_tokens if end is not None and text.startswith(token, end)), None)
        if outside is None or text[spans[-1][0] : end].rstrip().endswith(self._end_tokens):
            return result
        left_out = Remark(
            f"the chat template's {{% generation %}} marks end before {outside}, so the model does not learn to stop; "
            "put {% endgeneration %} behind it"
        )
        return replace(result, answer_end=None, remarks=(*result.remarks, left_out))

    def _render_with_prefixes(self, template: str, given: TemplateInput) -> MarkedText:
        messages, tools, arguments = given.messages, given.tools, given.arguments
        targets = [index for index, is_target in enumerate(given.are_targets) if is_target]
        ends = [index + 1 for index in targets if index + 1 < len(messages)]
        (whole, *throughs), _ = self._rendered(
            template, [messages, *(messages[:end] for end in ends)], tools, **arguments
        )
        if 0 in targets and not self._opens_with_answer(template, whole, given):
            raise BadRowError(f'the conversation begins with an assistant turn; give it "weight": 0, or {REMEDY}')
        prefixes, _ = self._rendered(
            template, [messages[:end] for end in targets], tools, add_generation_prompt=True, **arguments
        )
        regions: dict[int, tuple[int, int]] = {}
        spans, borrowed = [], set()
        for index, before, through in zip(targets, prefixes, [*throughs, whole], strict=False):
            if not (whole.startswith(before) and through.startswith(before)):
                raise BadRowError(_not_stable(index))
            if not whole.startswith(through):
                through = _turn_within(whole, before, through, messages[index]["content"], index)
            regions[index] = len(before), len(through)
            end, own = self._end_of_turn(through, len(before))
            follows = None if own else next((token for token in self._starts if whole.startswith(token, end)), None)
            if follows is not None:
                borrowed.add(follows)
                end += len(follows)
            spans.append((len(before), end))
        turns = [Turn(turn, index in regions, whole, regions.get(index)) for index, turn in enumerate(messages)]
        answer_end = spans[-1][1] if spans else None
        return self._remarked(MarkedText(whole, tuple(spans), answer_end, frozenset(borrowed)), given, turns, template)

    def _opens_with_answer(self, template: str, whole: str, given: TemplateInput) -> bool:
        """Return True if the template can write a generation prompt before the first turn, as this text has it."""
        try:
            (prompt,), _ = self._rendered(template, [[]], given.tools, add_generation_prompt=True, **given.arguments)
        except BadRowError:
            return False  # most templates look at the first message
        return bool(prompt) and whole.startswith(prompt)

    def _end_of_turn(self, through: str, start: int) -> tuple[int, bool]:
        """Return the end of the targets of a turn that begins at `start`, and whether a token of its own ends it."""
        stripped = through.rstrip()
        if len(stripped) <= start or not stripped.endswith(self._end_tokens):
            return len(through), False
        return len(stripped), stripped.endswith(self._turn_ends)

    def _remarked(self, text: MarkedText, given: TemplateInput, turns: Sequence[Turn], template: str) -> MarkedText:
        """Return the text with remarks on what the template leaves out of it and inserts into it."""
        has_system = given.messages[0]["role"] in ("system", "developer")
        remarks = [*omissions(turns, text.text, template, given.tools or ()), *unread(given.arguments, template)]
        return replace(text, remarks=(*given.remarks, *self._inserted(template, has_system), *remarks))

    def _inserted(self, template: str, has_system: bool) -> tuple[Remark, ...]:
        """Return remarks on the texts that the template inserts into every conversation, found by rendering one."""
        if (template, has_system) not in self._insertions:
            self._insertions[template, has_system] = tuple(self._find_insertions(template, has_system))
        return self._insertions[template, has_system]

    def _find_insertions(self, template: str, has_system: bool) -> Iterator[Remark]:
        if template_traits(template).writes_date:
            yield Remark(
                f"the chat template asks for today's date and gets {TEMPLATE_DATE:%d %b %Y}, so that every run of this "
                "data has the same tokens", is_warning=False,
            )  # fmt: skip
        prose = self._inserted_prose(template, ["system"] * has_system + ["user", "assistant"])
        if prose is None:
            return
        always = has_system or prose == self._inserted_prose(template, ["system", "user", "assistant"])
        shown = prose if len(prose) <= SHOWN_CHARACTERS else f"{prose[:SHOWN_CHARACTERS]}..."
        where = "" if always else " into conversations without a system message"
        yield Remark(f'the chat template inserts "{shown}"{where}', is_warning=False)

    def _inserted_prose(self, template: str, roles: list[str]) -> str | None:
        """Return the lines of prose that the template writes around a conversation's contents, or None."""
        probe = [{"role": role, "content": f"<{role[::-1]}>"} for role in roles]
        try:
            text = self._rendered(template, [probe], None, **self._arguments.values)[0][0]
        except BadRowError:
            return None  # it may reject a conversation that no row has
        for words in (*self._end_tokens, *(turn["content"] for turn in probe)):
            text = text.replace(words, "\n")
        lines = [line.strip() for line in text.splitlines() if len(_WORD.findall(line)) >= PROSE_WORDS]
        return " ".join(lines) or None


_WORD = re.compile(r"[A-Za-z0-9']+|[^\x00-\x7F]")
PROSE_WORDS = 4
"""A line of so many words is no header of a turn, such as `### Response:` or `GPT4 Correct User:`."""
SHOWN_CHARACTERS = 100


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the date that stands for today in the tokenizer's chat template, or None if it does not ask for one.

    It is part of what decides a run's tokens, like the template itself.
    """
    templates = tokenizer.chat_template or ""
    texts = [templates] if isinstance(templates, str) else list(templates.values())
    return f"{TEMPLATE_DATE:%Y-%m-%d}" if any(template_traits(text).writes_date for text in texts) else None


@contextmanager
def _fixed_date(template: str) -> Iterator[None]:
    """Let `strftime_now` return `TEMPLATE_DATE` within the block."""
    if not template_traits(template).writes_date:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers compiles a template once, with a clock of its own. Arguments cannot replace it: they are plain data.
    names = _compile_jinja_template(template).globals
    clock = names["strftime_now"]
    names["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        yield
    finally:
        names["strftime_now"] = clock


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
