"""The text of a conversation under a chat template, and which of its characters are targets.

**What is a target.** In an assistant's turn: everything the model itself has to generate, which is the answer and the
end-of-turn token (`<|im_end|>`, `<|eot_id|>`, ...). The header that the template writes before the answer
(`<|im_start|>assistant\\n`) and white space after the end-of-turn token are not targets. If a template ends turns with
plain text instead of a special token, all of that text is a target.

**How it is found.** A template with `{% generation %}` marks says where the targets are. For any other, and where only
some of the answers count, each turn is found in the conversation's skeleton (`data.turns`), which is rendered once for
all conversations of the same form. If the template changes words themselves, as with `| upper`, the skeleton shows
another text; then *prefixes* are rendered: the text before turn i is `messages[:i]` with the generation prompt, the
text up to its end is `messages[:i+1]`, and both must be exact prefixes of the whole text. A turn that cannot be found
is rejected, because a guess would train on the wrong tokens.

**Two texts of a conversation.** Many templates write an earlier turn differently from the last one: without its
reasoning, or with another token at its end. `ChatTemplate.render` returns the text of the whole conversation, with the
targets as they appear there. `ChatTemplate.render_answers` returns one text per answer: what the model gets at
inference, then the answer as the last turn.

**Turns without an end of their own.** Some templates (GLM) end a turn with the token that begins the next one. That
token is then a target as well: the model has to generate it to stop.

**Remarks.** A row's text comes with remarks about text that the template leaves out (`data.omissions`) or adds, such as
a default system message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chunkflow_cli.data.fields import REASONING
from chunkflow_cli.data.insertions import insertions
from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.omissions import CUT, Turn, omissions
from chunkflow_cli.data.outline import PROMPT_OPTIONS, Outline, TurnSpan
from chunkflow_cli.data.sample import BadRowError, Conversation
from chunkflow_cli.data.skeleton import Skeleton, skeleton_of, tags_of, with_marks
from chunkflow_cli.data.template_arguments import TemplateArguments, unread
from chunkflow_cli.data.template_input import TemplateInput, as_template_input, template_traits
from chunkflow_cli.data.template_rendering import TEMPLATE_DATE, Renderer
from chunkflow_cli.data.turn_reasons import REMEDY, not_found
from chunkflow_cli.data.turn_text import EndTokens
from chunkflow_cli.data.turns import outline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True, slots=True)
class _Found:
    """A text, the turns of it that are targets by index of the message, and words in them that are none."""

    text: str
    spans: dict[int, TurnSpan]
    holes: list[tuple[int, int]]

    def marked(self) -> MarkedText:
        spans = [(span.start, span.stop) for span in self.spans.values()]
        borrowed = frozenset(span.borrowed for span in self.spans.values() if span.borrowed)
        return MarkedText(self.text, without(spans, self.holes), spans[-1][1] if spans else None, borrowed)

    def turns(self, given: TemplateInput) -> list[Turn]:
        """Return all turns, to search what the template leaves out."""
        turns = []
        for index, turn in enumerate(given.messages):
            span = self.spans.get(index)
            region = None if span is None else (span.start, span.end)
            turns.append(Turn(turn, index + 1, span is not None, self.text, region, span is not None and span.is_cut))
        return turns


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
        self._arguments = TemplateArguments.checked(arguments or {}, tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Some vocabularies have runs of spaces as added tokens, which end no turn.
        ends = tuple(token for token in sorted(added) if token.strip())
        eos = tokenizer.eos_token
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._tokens = EndTokens(
            all=ends,
            # A closing tag, such as </tool_call>, ends a part of a turn. (The EOS of some models is </s>.)
            of_turns=tuple(token for token in ends if token == eos or not re.match(r"</\w", token)),
            starts=tuple(sorted(special - {tokenizer.bos_token}, key=len, reverse=True)),
            eos=eos,
        )
        self._renderer = Renderer(dict(tokenizer.special_tokens_map), self._arguments.values)
        self._outlines: dict[tuple[str, bytes, tuple[int, ...], str], Outline | None] = {}
        self._insertions: dict[tuple[str, bool], tuple[Remark, ...]] = {}

    def render(self, conversation: Conversation, *, mark_targets: bool, reasoning: bool = True) -> MarkedText:
        """Return the conversation's text with its target spans, or with the whole text as target unless `mark_targets`.

        Args:
            reasoning: words of reasoning are targets as well.

        Raises:
            BadRowError: the template rejects the conversation, its targets cannot be found, or it writes nothing of
                what is to be learned.
        """
        given = self._given(conversation)
        answers = [turn["role"] == "assistant" for turn in given.messages]
        if not mark_targets:
            text = self._text(given)
            end = self._end_of_last(given, text) if answers[-1] else None
            turns = [Turn(turn, number, True, text) for number, turn in enumerate(given.messages, 1)]
            return self._remarked(MarkedText(text, None, end), given, turns)
        if template_traits(given.template).marks_answers and given.are_targets == answers:
            return self._render_with_marks(given, reasoning=reasoning)
        found = self._found(given, reasoning=reasoning)
        result = self._remarked(found.marked(), given, found.turns(given))
        spans = found.spans.values()
        is_rewritten = any(span.is_rewritten for span in spans) and CUT not in result.remarks
        return replace(result, remarks=(*result.remarks, *[REWRITTEN] * is_rewritten))

    def render_prompt(self, conversation: Conversation) -> str:
        """Return the conversation's text with what the template writes before an answer to it.

        Raises:
            BadRowError: the template rejects the conversation.
        """
        return self._text(self._given(conversation), add_generation_prompt=True)

    def render_answers(self, conversation: Conversation, *, reasoning: bool = True) -> list[MarkedText]:
        """Return a text for each answer that is a target: the conversation up to there, the answer as the last turn.

        Raises:
            BadRowError: as in `render`; or an answer is not written after its generation prompt.
        """
        given = self._given(conversation)
        texts = []
        for index in (index for index, is_target in enumerate(given.are_targets) if is_target):
            part = replace(given, messages=given.messages[: index + 1], are_targets=[False] * index + [True])
            found = self._behind_prompt(part, self._found(part, reasoning=reasoning))
            # The other answers of this text are targets of their own.
            said = [turn for turn in found.turns(part) if turn.is_target or turn.message["role"] != "assistant"]
            texts.append(self._remarked(found.marked(), given, said))
        return texts

    def _given(self, conversation: Conversation) -> TemplateInput:
        """Return a conversation as its template gets it."""
        given = as_template_input(conversation, self._template_for(conversation))
        return replace(given, arguments=self._arguments.with_row(conversation.template_arguments))

    def _text(self, given: TemplateInput, messages: list[Any] | None = None, **options: bool) -> str:
        """Return the text of a conversation, or of other messages in its place."""
        return self._texts(given, [given.messages if messages is None else messages], **options)[0]

    def _texts(self, given: TemplateInput, conversations: list[list[Any]], **options: bool) -> list[str]:
        """Return the texts of several messages in the place of a conversation's own."""
        arguments = {**given.arguments, **options}
        return self._renderer.render(given.template, conversations, given.tools, **arguments)[0]

    def _template_for(self, conversation: Conversation) -> str:
        """Return the template to use. A tokenizer may have several by name; the choice follows transformers."""
        if isinstance(self._templates, str):
            return self._templates
        if conversation.tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise BadRowError(f"the tokenizer has chat templates {sorted(self._templates)}, and none named default")
        return self._templates["default"]

    def _render_with_marks(self, given: TemplateInput, *, reasoning: bool) -> MarkedText:
        texts, found = self._renderer.render(
            given.template, [given.messages], given.tools, return_assistant_tokens_mask=True, **given.arguments
        )
        text, spans = texts[0], tuple((start, stop) for start, stop in found[0])
        marked = "".join(text[start:stop] for start, stop in spans)
        numbered = enumerate(zip(given.messages, given.are_targets, strict=True), 1)
        turns = [Turn(turn, number, is_target, marked if is_target else text)
                 for number, (turn, is_target) in numbered]  # fmt: skip
        end = spans[-1][1] if spans else None
        counted = spans if reasoning else without(spans, self._reasoning_in(given, text))
        result = self._remarked(MarkedText(text, counted, end), given, turns)
        outside = next((token for token in self._tokens.all if end is not None and text.startswith(token, end)), None)
        if outside is None or text[spans[-1][0] : end].rstrip().endswith(self._tokens.all):
            return result
        left_out = Remark(
            f"the chat template's {{% generation %}} marks end before {outside}, so the model does not learn to stop; "
            "put {% endgeneration %} behind it"
        )
        return replace(result, answer_end=None, remarks=(*result.remarks, left_out))

    def _end_of_last(self, given: TemplateInput, text: str) -> int:
        """Return where the last answer ends in a text that ends with it."""
        if self._tokens.eos and text.rpartition(self._tokens.eos)[2].strip() and given.messages[1:]:
            with suppress(BadRowError):  # a template may reject what stands before an answer
                prompt = self._text(given, given.messages[:-1], **PROMPT_OPTIONS["prompt"])
                text = self._tokens.without_prompt(text, prompt)
        return len(text.rstrip())

    def _found(self, given: TemplateInput, *, reasoning: bool) -> _Found:
        """Return the text of a conversation and the turns in it that are targets."""
        targets = [index for index, is_target in enumerate(given.are_targets) if is_target]
        whole = self._text(given)
        known = self._places(given, targets, whole)
        if known is None:
            spans = self._turns_by_prefixes(given, targets, whole)
            return _Found(whole, spans, [] if reasoning else self._reasoning_in(given, whole))
        outline, skeleton, places = known
        if outline.reason is not None:
            raise BadRowError(outline.reason)
        spans = {index: outline.moved(index, places) for index in targets}
        return _Found(whole, spans, [] if reasoning else _of_reasoning(outline, skeleton, places))

    def _behind_prompt(self, given: TemplateInput, found: _Found) -> _Found:
        """Return what the model gets before the last turn, and that turn as the template writes it there.

        Raises:
            BadRowError: the template writes the turn behind something else.
        """
        index, span = len(given.messages) - 1, found.spans[len(given.messages) - 1]
        if span.ending == "none":  # the first turn, which no prompt asks for
            return found
        prompt = self._text(given, given.messages[:index], **PROMPT_OPTIONS[span.ending or "prompt"])
        if span.ending is None:
            asked = self._text(given, given.messages[:index])
            added = prompt[len(asked) :] if prompt.startswith(asked) else ""
            raise BadRowError(
                f"the chat template does not write turn {index + 1} after its generation prompt, which ends with "
                f"{(added or prompt)[-30:]!r}, so data.turns=split cannot show it as at inference; "
                "data.turns=whole trains on what the template writes"
            )
        # The skeleton's prompt is not always that of the words: a template may look at the last of them.
        if span.after_prompt and found.text.startswith(prompt):
            return found
        behind = len(prompt) - span.start
        moved = replace(span, start=len(prompt), stop=span.stop + behind, end=span.end + behind)
        holes = [(start + behind, stop + behind) for start, stop in found.holes if start >= span.start]
        return _Found(prompt + found.text[span.start :], {index: moved}, holes)

    def _places(
        self, given: TemplateInput, targets: list[int], whole: str
    ) -> tuple[Outline, Skeleton, list[tuple[int, int]]] | None:
        """Return the outline of a conversation and where each mark of it stands in the text.

        None: the text cannot be told from the skeleton.
        """
        skeleton = skeleton_of(given.messages, given.tools, tags_of(given.template))
        if skeleton is None:
            return None
        outline = self._outline(skeleton, given, tuple(targets))
        places = None if outline is None else outline.written.places(skeleton.pieces, whole)
        return None if outline is None or places is None else (outline, skeleton, places)

    def _outline(self, skeleton: Skeleton, given: TemplateInput, targets: tuple[int, ...]) -> Outline | None:
        """Return the outline of a skeleton, made once for all conversations with the same; None if it is rejected."""
        key = given.template, skeleton.key, targets, repr(sorted(given.arguments.items()))
        if key not in self._outlines:
            if len(self._outlines) == OUTLINES:
                self._outlines.clear()

            def render(conversations: list[Sequence[Any]], **options: bool) -> list[str]:
                texts = self._texts(given, [list(turns) for turns in conversations], **options)
                return [with_marks(text) for text in texts]

            switches = template_traits(given.template).switches_thinking
            try:
                self._outlines[key] = outline(
                    render, skeleton.messages, targets, self._tokens, switches_thinking=switches
                )
            except BadRowError:
                self._outlines[key] = None
        return self._outlines[key]

    def _turns_by_prefixes(self, given: TemplateInput, targets: list[int], whole: str) -> dict[int, TurnSpan]:
        """Return where turns are in the whole text, if all that it begins with is a prefix of it."""
        messages = given.messages
        if 0 in targets and not self._opens_with_answer(given, whole):
            raise BadRowError(f'the conversation begins with an assistant turn; give it "weight": 0, or {REMEDY}')
        inner = [index + 1 for index in targets if index + 1 < len(messages)]
        throughs = self._texts(given, [messages[:end] for end in inner]) if inner else []
        prefixes = self._texts(given, [messages[:end] for end in targets], add_generation_prompt=True)
        spans: dict[int, TurnSpan] = {}
        for index, before, text in zip(targets, prefixes, [*throughs, whole], strict=False):
            through = self._tokens.without_prompt(text, before)
            is_cut = through != text and any(str(self._tokens.eos) in turn["content"] for turn in messages)
            if is_cut or not (whole.startswith(through) and through.startswith(before)):
                raise BadRowError(not_found(index))
            end, own = self._tokens.end_of_turn(through, len(before))
            stop, borrowed = (end, "") if own else self._tokens.borrowed(whole, end)
            spans[index] = TurnSpan(len(before), stop, len(through), borrowed)
        return spans

    def _opens_with_answer(self, given: TemplateInput, whole: str) -> bool:
        """Return True if the template can write a generation prompt before the first turn, as this text has it."""
        try:
            prompt = self._text(given, [], **PROMPT_OPTIONS["prompt"])
        except BadRowError:
            return False  # most templates look at the first message
        return bool(prompt) and whole.startswith(prompt)

    def _reasoning_in(self, given: TemplateInput, whole: str) -> list[tuple[int, int]]:
        """Return where words of reasoning stand in a text.

        Raises:
            BadRowError: there are some, and the template changes words.
        """
        found = self._places(given, [], whole)
        if found is not None:
            return _of_reasoning(*found)
        for number, turn in enumerate(given.messages, 1):
            if any(turn.get(key) for key in REASONING) or "</think>" in turn["content"]:
                raise BadRowError(
                    f"the chat template looks at words or changes them, so the reasoning of turn {number} cannot be "
                    "told apart; data.train_on_reasoning=true makes it a target"
                )
        return []

    def _remarked(self, text: MarkedText, given: TemplateInput, turns: Sequence[Turn]) -> MarkedText:
        """Return the text with remarks on what the template leaves out of it and inserts into it."""
        has_system = given.messages[0]["role"] in ("system", "developer")
        left_out = omissions(turns, text.text, given.template, given.tools or ())
        inserted, ignored = self._inserted(given.template, has_system), unread(given.arguments, given.template)
        return replace(text, remarks=(*given.remarks, *inserted, *left_out, *ignored))

    def _inserted(self, template: str, has_system: bool) -> tuple[Remark, ...]:
        """Return remarks on the texts that the template inserts into every conversation, found by rendering one."""
        if (template, has_system) not in self._insertions:

            def render(messages: list[dict[str, Any]]) -> str:
                return self._renderer.render(template, [messages], None, **self._arguments.values)[0][0]

            found = list(insertions(render, self._tokens.all, has_system=has_system))
            if template_traits(template).writes_date:
                found.insert(0, DATED)
            self._insertions[template, has_system] = tuple(found)
        return self._insertions[template, has_system]


DATED = Remark(
    f"the chat template asks for today's date and gets {TEMPLATE_DATE:%d %b %Y}, so that every run of this data has "
    "the same tokens",
    is_warning=False,
)
REWRITTEN = Remark(
    "the chat template writes an answer differently once another turn follows it; data.turns=whole trains on answers "
    "as they appear in the whole conversation, data.turns=split on each as the model writes it at inference",
    is_warning=False,
)
OUTLINES = 1000
"""Outlines that are kept. Most data sets have fewer forms of conversations."""


def _of_reasoning(outline: Outline, skeleton: Skeleton, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    marks = zip(outline.written.marks, places, strict=True)
    return [place for mark, place in marks if skeleton.pieces[mark].is_reasoning]


def without(spans: Sequence[tuple[int, int]], holes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the parts of spans that are in no hole. Both are in order."""
    kept = []
    for start, stop in spans:
        for hole_start, hole_stop in holes:
            if start < hole_stop and hole_start < stop:
                if start < hole_start:
                    kept.append((start, hole_start))
                start = hole_stop
        if start < stop:
            kept.append((start, stop))
    return tuple(kept)
