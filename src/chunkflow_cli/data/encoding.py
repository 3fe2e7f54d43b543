"""Encoding of rows into tokens and targets, a batch at a time.

**Special tokens.** A templated conversation has only those that its template writes. Other texts get what the tokenizer
adds by itself (BOS, for many), unless they begin or end with it already, and end with EOS if the tokenizer has one; EOS
belongs to the completion. Ids (`data.format=tokens`) are used unchanged.

**Samples of a row.** With `data.turns=split` a conversation becomes a sample for each answer. They follow each other
and have the row's line. If one of them cannot be trained on, the row is bad, with all of them.

**Where generation stops.** The tokens that end the last answers are counted (`EncodedBatch.ends`): `final/` has to stop
at each of them. Rows whose last answer ends with no special token are remarked on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.config.schema import DataFormat, TrainOn, Turns
from chunkflow_cli.data.encoded_batch import EncodedBatch, concatenated
from chunkflow_cli.data.formats import PLAIN_FORMATS, parse_sample
from chunkflow_cli.data.labels import first_token_from, labels_of
from chunkflow_cli.data.notes import Remark, notes_of
from chunkflow_cli.data.preferences import after_prompt, joined
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import (
    IGNORED,
    MAX_ID,
    NO_TARGETS,
    BadRowError,
    Conversation,
    Instruction,
    JudgedAnswers,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
    has_empty_answer,
)
from chunkflow_cli.data.skeleton import reasoning_in
from chunkflow_cli.data.source import RowBatch
from chunkflow_cli.data.template import ChatTemplate, MarkedText, without
from chunkflow_cli.data.tokenizer import plain_backend, special_tokens_around
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


STRADDLES = Remark(
    "the end of a prompt and the beginning of its answer are one token, which is a target; at inference the prompt is "
    "tokenized alone, so let the answer begin with the white space instead"
)
STRADDLES_PROMPT = Remark(
    "the end of the generation prompt and the beginning of an answer are one token, which is a target; at inference "
    "the prompt is tokenized alone; if answers have no reasoning, data.template_arguments={enable_thinking: false} may "
    "give the prompt that fits them"
)
NO_FIRST_TOKEN = Remark(
    "the prompt is empty and the tokenizer adds no BOS, so nothing predicts the completion's first token, and it is no "
    "target; begin the prompt with a line end"
)
CUTS_PROMPT = Remark(
    "the last tokens of a prompt change when an answer follows: from there on, everything counts as the answer, and at "
    "inference the prompt has other tokens; let the answer begin with a space or a line end"
)
NO_ARGUMENTS = Remark("the prompt is a string, which no chat template writes, so data.template_arguments has no effect")
EMPTY_ANSWER = Remark("an answer is empty: the model learns to end at once instead of answering")
NO_EOS = Remark("the tokenizer has no EOS token, so the model does not learn to stop")
NO_END = Remark(
    "the chat template ends the last answer with no special token, so the model does not learn to stop; let "
    "the template write {{ eos_token }} after an answer"
)


class Encoder:
    """Encodes batches of rows of one format. It can be pickled and sent to another process.

    Args:
        tokenizer: None for `data.format=tokens`.
        train_on: `assistant` and `last` keep the labels of a `tokens` row; `all` makes every token a target.
        turns: what a conversation becomes.
        reasoning: words of reasoning are targets as well.
        vocab_size: ids of `data.format=tokens` must be below it; None allows every id up to `MAX_ID`.
        template_arguments: variables for the chat template.

    Raises:
        UsageError: the tokenizer lacks what the format needs: a chat template, or character offsets; the format has no
            reasoning to tell apart; or the chat template has no use for an argument.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        format: DataFormat,
        train_on: TrainOn,
        vocab_size: int | None,
        turns: Turns = Turns.whole,
        reasoning: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if format in PLAIN_FORMATS:
            _check_plain(format, reasoning, template_arguments)
        self._format = format
        self._mark_targets = train_on is not TrainOn.all and format not in PLAIN_FORMATS
        self._train_on, self._turns, self._reasoning = train_on, turns, reasoning
        self._max_id = MAX_ID if vocab_size is None else vocab_size - 1
        self._template: ChatTemplate | None = None
        self._has_arguments = bool(template_arguments)
        if tokenizer is None:
            assert format is DataFormat.tokens
            return
        if tokenizer.chat_template:
            self._template = ChatTemplate(tokenizer, template_arguments)
        else:
            _check_needs_no_template(tokenizer, format, template_arguments)
        if self._mark_targets and not tokenizer.is_fast:
            raise UsageError(
                f"the tokenizer of {tokenizer.name_or_path} has no fast version, so the assistant's tokens "
                "cannot be found\n  set data.train_on=all, which needs no fast version"
            )
        # A fast tokenizer is used without its transformers wrapper, which costs a third of the time and, in every
        # process that tokenizes, the import of transformers.
        self._backend = plain_backend(tokenizer) if tokenizer.is_fast else None
        self._slow_tokenizer = None if tokenizer.is_fast else tokenizer
        self._prefix, self._suffix = special_tokens_around(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(special | set(tokenizer.all_special_ids))

    def encode(self, batch: RowBatch) -> EncodedBatch:
        """Return tokens and targets of the rows. Rows that cannot be trained on are in `rejected`, with the reason."""
        prepared: list[tuple[int, list[MarkedText] | TokenRow, bool, Sample]] = []
        rejected: list[tuple[int, str]] = []
        for line, row in zip(batch.lines, batch.rows, strict=True):
            try:
                sample = parse_sample(decode_row(row), self._format)
                prepared.append((line, *self._prepare(sample), sample))
            except BadRowError as error:
                rejected.append((line, str(error)))
        marked = [text.text for _, texts, *_ in prepared if isinstance(texts, list) for text in texts]
        encoded = iter(self._tokenise(marked))
        kept: list[tuple[int, TokenRow]] = []
        marks: list[int] = []
        remarks: list[tuple[int, list[Remark]]] = []
        ends: Counter[int] = Counter()
        for line, texts, is_templated, sample in prepared:
            try:
                if isinstance(texts, TokenRow):
                    kept.append((line, _with_targets(self._check_ids(texts))))
                    continue
                label = self._label_conversation if is_templated else self._label_text
                pairs = [(text, next(encoded)) for text in texts]
                labelled = [label(text, ids, encoding) for text, (ids, encoding) in pairs]
                if not isinstance(sample, JudgedAnswers):
                    kept += [(line, _with_targets(each.tokens)) for each in labelled]
                else:
                    answers = [each.tokens.input_ids for each in labelled[1:]]
                    prompt = pairs[0][1][0] if is_templated else self._with_prefix(pairs[0][1][0])
                    del labelled[0], texts[0]
                    tokens, mark = joined(prompt, answers, sample.is_good)
                    labelled[0].remarks.extend([CUTS_PROMPT] * (after_prompt(prompt, answers) < len(prompt)))
                    kept.append((line, tokens))
                    marks.append(mark)
                said = [remark for text in texts for remark in text.remarks] + [EMPTY_ANSWER] * has_empty_answer(sample)
                remarks.append((line, said + [remark for each in labelled for remark in each.remarks]))
                ends.update(end for each in labelled for end in each.ends)
            except BadRowError as error:
                rejected.append((line, str(error)))
        return concatenated(kept, marks, sorted(rejected), notes_of(remarks, batch.file), ends, batch)

    def _prepare_judged(self, sample: JudgedAnswers) -> tuple[list[MarkedText] | TokenRow, bool]:
        """Return the texts of the prompt and of each answer behind it, and True if a chat template wrote them."""
        if isinstance(sample.prompt, str):
            return [MarkedText(text, None) for text in (sample.prompt, *map(str, sample.answers))], False
        if self._template is None:
            raise BadRowError("lists of messages need a chat template, and the tokenizer has none")
        answers = [answer for answer in sample.answers if isinstance(answer, Conversation)]
        return [
            MarkedText(self._template.render_prompt(sample.prompt), None),
            *(self._template.render(answer, mark_targets=False) for answer in answers),
        ], True

    def _prepare(self, sample: Sample) -> tuple[list[MarkedText] | TokenRow, bool]:
        """Return what to tokenize, and True if a chat template wrote it."""
        if isinstance(sample, Instruction):
            sample = sample.prompt_completion() if self._template is None else sample.conversation()
        if isinstance(sample, JudgedAnswers):
            return self._prepare_judged(sample)
        if isinstance(sample, Conversation):
            return self._render(sample), True
        if isinstance(sample, PromptCompletion):
            whole, start = sample.prompt + sample.completion, len(sample.prompt)
            spans: tuple[tuple[int, int], ...] = ((start, len(whole)),)
            if not self._reasoning:
                holes = [(start + first, start + stop) for first, stop in reasoning_in(sample.completion)]
                spans = without(spans, holes)
            remarks = (NO_ARGUMENTS,) * self._has_arguments
            return [MarkedText(whole, spans if self._mark_targets else None, remarks=remarks)], False
        if isinstance(sample, PlainText):
            return [MarkedText(sample.text, None)], False
        return sample, False

    def _render(self, sample: Conversation) -> list[MarkedText]:
        if self._template is None:
            raise BadRowError("lists of messages need a chat template, and the tokenizer has none")
        if self._mark_targets and (reason := sample.why_no_targets()) is not None:
            raise BadRowError(reason)
        if self._train_on is TrainOn.last:
            sample = sample.with_last_answer()
        if self._turns is Turns.split:
            return self._template.render_answers(sample, reasoning=self._reasoning)
        return [self._template.render(sample, mark_targets=self._mark_targets, reasoning=self._reasoning)]

    def _tokenise(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], Encoding | None]]:
        """Return the ids of each text, and the Rust tokenizer's encoding, which traces tokens to characters."""
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            return [(np.array(encoding.ids, np.int64), encoding) for encoding in encodings]
        assert self._slow_tokenizer is not None
        rows = self._slow_tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(np.array(row, np.int64), None) for row in rows]

    def _label_conversation(self, text: MarkedText, ids: NDArray[np.int64], encoding: Encoding | None) -> _Labelled:
        labels, straddles = labels_of(text, ids, encoding)
        remarks = [STRADDLES_PROMPT] * straddles
        ends: set[int] = set()
        if self._backend is not None:
            ids_of_ends = map(self._backend.token_to_id, text.borrowed_ends)
            ends = {end for end in ids_of_ends if end is not None}
        if text.answer_end is not None and encoding is not None:
            last = int(ids[max(first_token_from(encoding, text.answer_end) - 1, 0)])
            if last in self._special_ids:
                ends.add(last)
                remarks += self._on_end(last)
            else:
                remarks.append(NO_END)
        return _Labelled(TokenRow(ids, labels), remarks, ends)

    def _on_end(self, token: int) -> list[Remark]:
        """Return a remark if an answer ends with a token at which only some programs stop generating."""
        if token == self._eos or self._backend is None:
            return []
        name = self._backend.id_to_token(token)
        eos = "none" if self._eos is None else self._backend.id_to_token(self._eos)
        text = f"answers end with {name}, not with the tokenizer's EOS ({eos}): generation has to stop there too"
        return [Remark(text, is_warning=False)]

    def _with_prefix(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ids behind the special tokens that the tokenizer begins a text with."""
        return np.concatenate([self._prefix[: len(self._prefix) - _overlap(self._prefix, ids)], ids])

    def _label_text(self, text: MarkedText, ids: NDArray[np.int64], encoding: Encoding | None) -> _Labelled:
        labels, straddles = labels_of(text, ids, encoding)
        remarks = [STRADDLES] * straddles
        before = self._prefix[: len(self._prefix) - _overlap(self._prefix, ids)]
        after = self._suffix[_overlap(ids, self._suffix) :]
        is_first = len(before) == 0 and len(ids) > 0 and ids[0] not in self._prefix
        if text.target_spans is not None and is_first and labels[0] != IGNORED:
            remarks.append(NO_FIRST_TOKEN)
        ids, labels = np.concatenate([before, ids, after]), np.concatenate([before, labels, after])
        if self._eos is None:
            remarks.append(NO_EOS)
        elif len(ids) == 0 or ids[-1] != self._eos:
            ids, labels = np.append(ids, self._eos), np.append(labels, self._eos)
        else:
            labels[-1] = self._eos
        if text.target_spans is not None:
            labels[: len(before)] = IGNORED
        return _Labelled(TokenRow(ids, labels), remarks, set() if self._eos is None else {self._eos})

    def _check_ids(self, row: TokenRow) -> TokenRow:
        for name, ids in (("input_ids", row.input_ids), ("labels", row.labels)):
            wrong = (ids < 0) | (ids > self._max_id)
            if name == "labels":
                wrong &= ids != IGNORED
            if wrong.any():
                place = int(wrong.argmax())
                allowed = f"0 to {self._max_id}" + (f", or {IGNORED}" if name == "labels" else "")
                raise BadRowError(f"{name}[{place}] is {ids[place]}, and must be {allowed}")
        return TokenRow(row.input_ids, row.input_ids) if self._train_on is TrainOn.all else row


def _check_plain(format: DataFormat, reasoning: bool, template_arguments: Mapping[str, Any] | None) -> None:
    """Refuse settings that have no effect on rows without answers."""
    if not reasoning:
        raise UsageError(
            f"data.train_on_reasoning=false needs conversations or completions, not data.format={format.value}\n"
            "  set data.train_on_reasoning=true"
        )
    if template_arguments:
        raise UsageError(
            f"data.template_arguments={as_written(template_arguments)} has no effect: no chat template writes rows "
            f"of data.format={format.value}\n  leave the key out"
        )


def _check_needs_no_template(
    tokenizer: PreTrainedTokenizerBase, format: DataFormat, template_arguments: Mapping[str, Any] | None
) -> None:
    """Refuse what cannot be done without a chat template."""
    if format in (DataFormat.messages, DataFormat.sharegpt):
        raise UsageError(
            f"data.format={format.value} needs a chat template, "
            f"and the tokenizer of {tokenizer.name_or_path} has none\n"
            "  name one with data.chat_template=FILE.jinja, use the model's instruct variant,\n"
            "  or convert the data to prompt_completion"
        )
    if template_arguments:
        raise UsageError(
            f"data.template_arguments={as_written(template_arguments)} has no effect: the tokenizer of "
            f"{tokenizer.name_or_path} has no chat template\n"
            "  name one with data.chat_template, or leave the key out"
        )


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A row as tokens, what there is to say of it, and the special tokens that end its answer."""

    tokens: TokenRow
    remarks: list[Remark]
    ends: set[int]


def _with_targets(tokens: TokenRow) -> TokenRow:
    if not np.any(tokens.labels[1:] != IGNORED):
        raise BadRowError(NO_TARGETS)
    return tokens


def _overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return how many ids at the end of the first are those at the beginning of the second."""
    most = min(len(first), len(second))
    return next((count for count in range(most, 0, -1) if np.array_equal(first[-count:], second[:count])), 0)
