"""Rows of preferences, as TRL reads them: pairs of answers, and answers with a label.

| format | keys of a row | sample |
|---|---|---|
| preference | prompt, chosen, rejected: strings, or lists of messages; tools, chat_template_kwargs | a pair |
| preference | chosen, rejected: whole conversations (or texts) that begin alike | a pair |
| feedback | prompt, completion, label: true for a good answer, false for a bad one | one answer |

Every token after the prompt is part of the answer. Where the prompt ends is read off the tokens, as in TRL: after the
longest beginning that the prompt alone (with the generation prompt) and all of its answers have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.data.fields import check_has_no_turns
from chunkflow_cli.data.messages import parse_messages, parse_template_arguments, parse_tools, with_system
from chunkflow_cli.data.sample import (
    IGNORED,
    BadRowError,
    Conversation,
    JudgedAnswers,
    Message,
    TokenizedSample,
    TokenRow,
)
from chunkflow_cli.data.values import flag, kind, required

NOT_PAIRED = -1
"""Mark of a sample that is not a preference."""
ASKING = ("system", "developer", "user")
"""Roles whose messages belong to the prompt."""


def parse_preference(row: Mapping[str, Any]) -> JudgedAnswers:
    """Return the pair of a row; the chosen answer comes first.

    Raises:
        BadRowError: a key is missing or has another form, or the answers are the same.
    """
    chosen, rejected = required(row, "chosen"), required(row, "rejected")
    if chosen == rejected:
        raise BadRowError("chosen and rejected are the same, so neither is preferred")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts(row, ("chosen", "rejected"), None)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise BadRowError(
            f"chosen is {kind(chosen)} and rejected is {kind(rejected)}: both must be strings, or lists of messages"
        )
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        shared = _shared(chosen, rejected)
        if isinstance(prompt, str) and not any(prompt.strip() in str(turn) for turn in _contents(chosen[:shared])):
            raise BadRowError("prompt is a string that the messages of chosen and rejected do not begin with")
        row = {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return _conversations(row, ("chosen", "rejected"), None)


def parse_feedback(row: Mapping[str, Any]) -> JudgedAnswers:
    """Return the answer of a row and its label.

    Raises:
        BadRowError: a key is missing or has another form.
    """
    completion, label = required(row, "completion"), flag(required(row, "label"))
    if label is None:
        said = repr(row["label"]) if isinstance(row["label"], (str, int, float)) else kind(row["label"])
        raise BadRowError(f"label is {said}, and must be true for a good answer or false for a bad one")
    if isinstance(completion, str):
        return _texts(row, ("completion",), label)
    return _conversations(row, ("completion",), label)


def _texts(row: Mapping[str, Any], keys: Sequence[str], label: bool | None) -> JudgedAnswers:
    check_has_no_turns(row)
    answers = [row[key] for key in keys]
    if row.get("prompt") is None and label is None:
        shared = _shared(*answers)
        if shared and answers[0][shared - 1] == " ":  # as TRL does: the space is part of the answers
            shared -= 1
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    else:
        prompt = required(row, "prompt")
        if not isinstance(prompt, str):
            raise BadRowError(f"prompt is {kind(prompt)} and {keys[0]} is a string: both must be of the same kind")
    return JudgedAnswers(prompt, tuple(prompt + answer for answer in answers), label)


def _conversations(row: Mapping[str, Any], keys: Sequence[str], label: bool | None) -> JudgedAnswers:
    prompt = required(row, "prompt")
    if not isinstance(prompt, list):
        raise BadRowError(f"prompt is {kind(prompt)} and {keys[0]} is {kind(row[keys[0]])}: both must be of one kind")
    if not prompt:
        raise BadRowError("there is no prompt: chosen and rejected do not begin with the same message")
    asked = with_system(row, parse_messages(prompt, "prompt", are_targets=False))
    tools, arguments = parse_tools(row), parse_template_arguments(row)

    def conversation(turns: tuple[Message, ...]) -> Conversation:
        return Conversation(turns, tools, arguments)

    answers = [_answer(row[key], key) for key in keys]
    return JudgedAnswers(conversation(asked), tuple(conversation((*asked, *answer)) for answer in answers), label)


def _answer(value: object, key: str) -> tuple[Message, ...]:
    """Return the turns of an answer, of which every token counts.

    Raises:
        BadRowError: the assistant says nothing in them, they begin or end with another one's message, or one of them
            asks not to be counted.
    """
    turns = parse_messages(value, key, are_targets=True)
    said = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not said:
        raise BadRowError(f"{key} has no message of the assistant, so it is not an answer")
    if turns[0].role in ASKING:
        raise BadRowError(
            f"{key} after the prompt begins with the role {turns[0].role}, and every token of an answer counts; "
            "remove from it what the prompt holds, and begin both answers with the same question"
        )
    if turns[-1].role != "assistant":
        raise BadRowError(f"{key} ends with the role {turns[-1].role}, and every token of an answer counts; remove it")
    for index in said:
        if not turns[index].is_target:
            raise BadRowError(
                f"{key}[{index}] asks not to be trained on (weight, train or loss), and preferences count every token "
                "of an answer; move it to the prompt, or remove that key"
            )
    return turns


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many items both begin with; as in TRL, at least one stays for the shorter answer."""
    most = min(len(chosen), len(rejected))
    return next((place for place in range(most) if chosen[place] != rejected[place]), max(0, most - 1))


def _contents(turns: Sequence[Any]) -> list[object]:
    return [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]


def after_prompt(prompt: NDArray[np.int64], answers: Sequence[NDArray[np.int64]]) -> int:
    """Return how many ids the prompt alone and all answers behind it begin with in common."""
    length = min(len(prompt), *(len(answer) for answer in answers))
    for answer in answers:
        differs = np.flatnonzero(prompt[:length] != answer[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def joined(prompt: NDArray[np.int64], answers: Sequence[NDArray[np.int64]], label: bool | None) -> tuple[TokenRow, int]:
    """Return the sequences of a sample one after the other, and the mark that the cache keeps of it.

    Raises:
        BadRowError: an answer has no token of its own, or both have the same.
    """
    start = max(1, after_prompt(prompt, answers))  # nothing predicts the first token
    if any(len(answer) <= start for answer in answers):
        raise BadRowError("an answer is empty, or its tokens are all part of the prompt")
    if len(answers) == 2 and np.array_equal(answers[0], answers[1]):
        raise BadRowError("chosen and rejected have the same tokens, so neither is preferred")
    labels = [np.concatenate([np.full(start, IGNORED), answer[start:]]) for answer in answers]
    mark = len(answers[0]) if label is None else int(label)
    return TokenRow(np.concatenate(answers), np.concatenate(labels)), mark


@dataclass(frozen=True)
class AnswerSizes:
    """Tokens of the sequences of samples of preferences, which all targets but those of the prompt are."""

    lengths: NDArray[np.int64]
    """(samples, answers), after truncation."""
    prompts: NDArray[np.int64]
    """(samples,) tokens before the answers."""
    whole: NDArray[np.int64]
    """(samples, answers), before truncation."""
    limit: int | None
    """Most tokens that a sequence may have."""

    @classmethod
    def of(
        cls, lengths: NDArray[np.int64], targets: NDArray[np.int64], marks: NDArray[np.int64], *, has_pairs: bool,
        limit: int | None, is_cut: bool,
    ) -> AnswerSizes:  # fmt: skip
        """Read the sizes off what the cache keeps of samples: their tokens, targets and marks, (samples,) each.

        Args:
            limit: the most tokens that a sequence may have.
            is_cut: longer ones are cut to that length.
        """
        whole = np.stack([marks, lengths - marks], axis=1) if has_pairs else lengths[:, None]
        kept = whole if limit is None or not is_cut else np.minimum(whole, limit)
        return cls(kept, (lengths - targets) // whole.shape[1], whole, limit)

    @property
    def targets(self) -> NDArray[np.int64]:
        """(samples, answers) targets; 0 or less where truncation left no answer."""
        return self.lengths - self.prompts[:, None]

    def select(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> AnswerSizes:
        """Return the sizes of some samples."""
        return AnswerSizes(self.lengths[chosen], self.prompts[chosen], self.whole[chosen], self.limit)

    def sequences(self, index: int, tokens: NDArray[np.int32], targets: NDArray[np.int32]) -> list[TokenizedSample]:
        """Cut the tokens of a sample into its sequences."""
        samples, start = [], 0
        for whole, length in zip(self.whole[index].tolist(), self.lengths[index].tolist(), strict=True):
            own = targets[start : start + length]
            if length < whole:
                own = own.copy()
                own[-1] = IGNORED  # the token that it predicts is cut off
            samples.append(TokenizedSample(tokens[start : start + length], own))
            start += whole
        return samples


def mismatched(prompt_of: TokenizedSample, answer_of: TokenizedSample, limit: int | None) -> TokenizedSample:
    """Return one sample's prompt with the answer of another, truncated to the limit, as `kto` measures it."""
    asked = int(np.argmax(prompt_of.targets != IGNORED)) + 1
    start = int(np.argmax(answer_of.targets != IGNORED)) + 1
    ids = np.concatenate([prompt_of.input_ids[:asked], answer_of.input_ids[start:]])[:limit]
    targets = np.append(ids[1:], np.int32(IGNORED)).astype(np.int32)
    targets[: asked - 1] = IGNORED
    return TokenizedSample(ids, targets)
