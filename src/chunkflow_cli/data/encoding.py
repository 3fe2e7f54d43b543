"""From rows to tokens and targets, a batch at a time.

**Which token is a target.** A token is one if and only if the character at which it begins lies in a target span; so a
token that straddles the edge between prompt and answer belongs to the side on which it begins. The whole text is
tokenised once: no token differs from what the model sees at inference.

**The shift** is made here and nowhere else: `targets[i]` is the id that position i has to predict, so it is the label
of i + 1, and -100 where that is no target. The last position predicts nothing.

**Special tokens.** A templated conversation gets none but those that its template writes. Other texts get what the
tokenizer adds by itself (BOS, for many), and end with EOS if the tokenizer has one and they do not end with it already;
EOS belongs to the completion. Ids (`data.format=tokens`) are taken as they are.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataFormat, TrainOn
from chunkflow_cli.data.formats import (
    Conversation,
    Instruction,
    PlainText,
    PromptCompletion,
    Sample,
    TokenRow,
    decode_row,
    parse_sample,
)
from chunkflow_cli.data.sample import IGNORED
from chunkflow_cli.data.source import BadRowError, RowBatch
from chunkflow_cli.data.template import ChatTemplate, MarkedText
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The samples of a batch of rows, one after the other, and the rows that are none."""

    input_ids: NDArray[np.int32]  # (tokens,)
    targets: NDArray[np.int32]  # (tokens,), shifted
    lengths: NDArray[np.int64]  # (samples,)
    target_counts: NDArray[np.int64]  # (samples,)
    digests: NDArray[np.uint64]  # (samples,), equal where tokens and targets are
    lines: NDArray[np.int64]  # (samples,)
    file: int
    rejected: list[tuple[int, str]]
    """Line and reason."""
    position: int
    """How much of the source is read, as in `RowBatch`."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    input_ids: NDArray[np.int64]  # (length,)
    labels: NDArray[np.int64]  # (length,), not shifted


@dataclass(frozen=True, slots=True)
class TokenisedText:
    ids: NDArray[np.int64]  # (length,)
    encoding: Encoding | None
    """What the Rust tokenizer gave; None of a slow one, which cannot trace tokens to characters."""

    def first_token_from(self, character: int) -> int:
        """Index of the first token that begins at this character of the text or after it."""
        assert self.encoding is not None
        token = self.encoding.char_to_token(character)
        if token is not None:
            characters = self.encoding.token_to_chars(token)
            assert characters is not None
            return token if characters[0] >= character else token + 1
        # No token holds the character: the text's end, or white space that a normaliser takes away.
        last = self.encoding.token_to_chars(len(self.ids) - 1) if len(self.ids) else None
        if last is None or last[0] < character:
            return len(self.ids)
        return next((i for i, (start, _) in enumerate(self.encoding.offsets) if start >= character), len(self.ids))


class Encoder:
    """Turns batches of rows of one format into tokens and targets. It can be sent to another process.

    Args:
        tokenizer: None for `data.format=tokens`.
        train_on: `assistant` keeps the labels that a `tokens` row has; `all` counts every token of it.
        vocab_size: ids of `data.format=tokens` must be below it; None allows all that fit in 32 bits.

    Raises:
        UsageError: the format needs what the tokenizer does not have: a chat template, or character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        format: DataFormat,
        train_on: TrainOn,
        vocab_size: int | None,
    ) -> None:
        self._format = format
        self._mark_targets = train_on is TrainOn.assistant and format not in (DataFormat.text, DataFormat.tokens)
        self._train_on = train_on
        self._id_limit = vocab_size if vocab_size is not None else 1 << 31  # ids are kept in 32 bits
        self._template: ChatTemplate | None = None
        if tokenizer is None:
            assert format is DataFormat.tokens
            return
        if tokenizer.chat_template:
            self._template = ChatTemplate(tokenizer)
        elif format in (DataFormat.messages, DataFormat.sharegpt):
            raise UsageError(
                f"data.format={format.value} needs a chat template, "
                f"and the tokenizer of {tokenizer.name_or_path} has none\n"
                "  take the model's instruct variant, put a chat_template.jinja beside its tokenizer,\n"
                "  or write the data as prompt_completion"
            )
        if self._mark_targets and not tokenizer.is_fast:
            raise UsageError(
                f"the tokenizer of {tokenizer.name_or_path} has no fast version, so its tokens cannot be traced to the "
                "characters that the assistant said\n  data.train_on=all trains without that"
            )
        # A fast tokenizer is taken without what transformers wraps around it, which costs a third of the time and, in
        # every process that tokenises, the import of transformers.
        self._backend = plain_backend(tokenizer) if tokenizer.is_fast else None
        self._slow_tokenizer = None if tokenizer.is_fast else tokenizer
        self._prefix, self._suffix = _special_tokens_around(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id

    def encode(self, batch: RowBatch) -> EncodedBatch:
        """Tokens and targets of the rows; a row that is no sample is in `rejected`, with the reason."""
        samples: list[tuple[int, MarkedText | TokenRow, bool]] = []
        rejected: list[tuple[int, str]] = []
        for line, row in zip(batch.lines, batch.rows, strict=True):
            try:
                sample = parse_sample(decode_row(row), self._format)
                samples.append((line, *self._prepare(sample)))
            except BadRowError as error:
                rejected.append((line, str(error)))
        texts = [text for _, text, _ in samples if isinstance(text, MarkedText)]
        encoded = iter(self._tokenise(texts))
        kept: list[_Tokens] = []
        lines: list[int] = []
        for line, prepared, is_templated in samples:
            try:
                if isinstance(prepared, TokenRow):
                    tokens = self._check_ids(prepared)
                else:
                    tokens = self._label(prepared, next(encoded), is_templated=is_templated)
                if not np.any(tokens.labels[1:] != IGNORED):
                    raise BadRowError("no targets: no token of it would be trained on")
            except BadRowError as error:
                rejected.append((line, str(error)))
                continue
            kept.append(tokens)
            lines.append(line)
        rejected.sort()
        return _concatenate(kept, lines, rejected, batch)

    def _prepare(self, sample: Sample) -> tuple[MarkedText | TokenRow, bool]:
        """What is tokenised, and whether a chat template wrote it."""
        if isinstance(sample, Instruction):
            sample = sample.prompt_completion() if self._template is None else sample.conversation()
        if isinstance(sample, Conversation):
            if self._template is None:
                raise BadRowError("lists of messages need a chat template, and the tokenizer has none")
            return self._template.render(sample, mark_targets=self._mark_targets), True
        if isinstance(sample, PromptCompletion):
            whole = sample.prompt + sample.completion
            spans = ((len(sample.prompt), len(whole)),) if self._mark_targets else None
            return MarkedText(whole, spans), False
        if isinstance(sample, PlainText):
            return MarkedText(sample.text, None), False
        return sample, False

    def _tokenise(self, texts: Sequence[MarkedText]) -> list[TokenisedText]:
        if not texts:
            return []
        plain = [text.text for text in texts]
        if self._backend is not None:
            encodings = self._backend.encode_batch(plain, add_special_tokens=False)
            return [TokenisedText(np.array(encoding.ids, np.int64), encoding) for encoding in encodings]
        assert self._slow_tokenizer is not None
        rows = self._slow_tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        return [TokenisedText(np.array(row, np.int64), None) for row in rows]

    def _label(self, text: MarkedText, tokenised: TokenisedText, *, is_templated: bool) -> _Tokens:
        ids = tokenised.ids
        if text.target_spans is None:
            labels = ids
        else:
            labels = np.full_like(ids, IGNORED)
            for start, stop in text.target_spans:
                targets = slice(tokenised.first_token_from(start), tokenised.first_token_from(stop))
                labels[targets] = ids[targets]
        if is_templated:
            return _Tokens(ids, labels)
        ids = np.concatenate([self._prefix, ids, self._suffix])
        labels = np.concatenate([self._prefix, labels, self._suffix])
        if self._eos is not None and (len(ids) == 0 or ids[-1] != self._eos):
            ids, labels = np.append(ids, self._eos), np.append(labels, self._eos)
        elif self._eos is not None:
            labels[-1] = self._eos
        if text.target_spans is not None:
            labels[: len(self._prefix)] = IGNORED
        return _Tokens(ids, labels)

    def _check_ids(self, row: TokenRow) -> _Tokens:
        for name, ids in (("input_ids", row.input_ids), ("labels", row.labels)):
            if ids is None:
                continue
            wrong = (ids < 0) | (ids >= self._id_limit)
            if name == "labels":
                wrong &= ids != IGNORED
            if wrong.any():
                place = int(wrong.argmax())
                allowed = f"0 to {self._id_limit - 1}" + (f", or {IGNORED}" if name == "labels" else "")
                raise BadRowError(f"{name}[{place}] is {ids[place]}, and must be {allowed}")
        if row.labels is None or self._train_on is TrainOn.all:
            return _Tokens(row.input_ids, row.input_ids)
        return _Tokens(row.input_ids, row.labels)


def _concatenate(
    kept: Sequence[_Tokens], lines: Sequence[int], rejected: list[tuple[int, str]], batch: RowBatch
) -> EncodedBatch:
    """One flat array of ids and one of targets: the only place where labels are shifted."""
    lengths = np.array([len(tokens.input_ids) for tokens in kept], np.int64)
    ends = np.cumsum(lengths)
    input_ids = np.concatenate([tokens.input_ids for tokens in kept] or [np.empty(0, np.int64)]).astype(np.int32)
    labels = np.concatenate([tokens.labels for tokens in kept] or [np.empty(0, np.int64)]).astype(np.int32)
    targets = np.full_like(labels, IGNORED)
    targets[:-1] = labels[1:]
    targets[ends - 1] = IGNORED
    counted = np.concatenate([[0], np.cumsum(targets != IGNORED)])
    starts = ends - lengths
    digests = [_digest(input_ids[a:b], targets[a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    return EncodedBatch(
        input_ids=input_ids,
        targets=targets,
        lengths=lengths,
        digests=np.array(digests, np.uint64),
        target_counts=counted[ends] - counted[starts],
        lines=np.array(lines, np.int64),
        file=batch.file,
        rejected=rejected,
        position=batch.position,
    )


def _digest(input_ids: NDArray[np.int32], targets: NDArray[np.int32]) -> int:
    """64 bits: of a million samples, two different ones share a digest once in 37 million data sets."""
    digest = hashlib.blake2b(input_ids.data, digest_size=8)
    digest.update(targets.data)
    return int.from_bytes(digest.digest(), "little")


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer, set to report where a token truly begins and to give all of a text's tokens.

    A byte-level post-processor moves a token's beginning past its spaces (`trim_offsets`), so that a token of spaces
    alone seems to begin where the next one does: at the edge of an answer it would become a target. And a
    tokenizer.json may hold settings of padding and truncation, which transformers overrides on each call.
    """
    plain: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.post_processor = None
    plain.no_padding()
    plain.no_truncation()
    return plain


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids that the tokenizer by itself puts before and after a text."""
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    extra = len(whole) - len(plain)
    before = next((start for start in range(extra + 1) if whole[start : start + len(plain)] == plain), None)
    assert before is not None, f"special tokens change how {tokenizer.name_or_path} splits a text"
    return np.array(whole[:before], np.int64), np.array(whole[before + len(plain) :], np.int64)
