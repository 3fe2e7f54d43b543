"""The samples that rows become, before and after they are tokenized."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Target of a position that the loss does not count, as in Hugging Face labels."""
MAX_ID = (1 << 31) - 1
"""Largest id that the cache can store. A model's vocabulary usually allows fewer."""
NO_TARGETS = "no targets: the loss would not count any of its tokens"
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


class BadRowError(ValueError):
    """A row that cannot be trained on. The message is the reason, without the location."""


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be trained on, and why."""

    file: int
    """Index into `Source.names`."""
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, developer, user, assistant or tool."""
    content: str
    is_target: bool
    """True if the loss counts this turn under `data.train_on=assistant`. Only an assistant's turn can be."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as `{"id", "type": "function", "function": {"name", "arguments"}}`: the id if there is one, the arguments
    as an object."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the turn, which are passed on to the chat template."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that a chat template turns into text."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Template arguments of the row itself. They take precedence over `data.template_arguments`."""

    def with_last_answer(self) -> Conversation:
        """Return the conversation in which no answer but the last is a target (`data.train_on=last`).

        Raises:
            BadRowError: the row excludes that one.
        """
        answers = [place for place, message in enumerate(self.messages) if message.role == "assistant"]
        if answers and not self.messages[answers[-1]].is_target:
            raise BadRowError(
                "the row excludes its last answer (weight, train), and data.train_on=last counts no other"
            )
        messages = tuple(
            replace(message, is_target=message.is_target and place == answers[-1])
            for place, message in enumerate(self.messages)
        )
        return replace(self, messages=messages)

    def why_no_targets(self) -> str | None:
        """Return why the loss would count nothing under `data.train_on=assistant`; None if it counts a turn."""
        if any(message.is_target for message in self.messages):
            return None
        if not any(message.role == "assistant" for message in self.messages):
            return "there is no assistant message, so there is nothing to train on"
        return "the row excludes every assistant message (weight, train, prompt), so there is nothing to train on"


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two strings that are concatenated unchanged. The completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """A prompt with two answers, of which the first is preferred, or with one answer that is good or bad."""

    prompt: Conversation | str
    answers: tuple[Conversation | str, ...]
    """Prompt and answer together, each."""
    is_good: bool | None
    """Label of a single answer; None for a pair."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An alpaca row: a conversation if there is a chat template, otherwise Stanford Alpaca's prompt."""

    instruction: str
    input: str
    output: str
    system: str
    history: tuple[tuple[str, str], ...]

    def conversation(self) -> Conversation:
        """Return the turns: system, earlier exchanges, instruction and input joined by a newline, output."""
        question = "\n".join(part for part in (self.instruction, self.input) if part)
        turns = [Message("system", self.system, is_target=False)] if self.system else []
        for asked, answered in (*self.history, (question, self.output)):
            turns += [Message("user", asked, is_target=False), Message("assistant", answered, is_target=True)]
        return Conversation(tuple(turns))

    def prompt_completion(self) -> PromptCompletion:
        """Return Stanford Alpaca's prompt and the output. A system prompt goes before it.

        Raises:
            BadRowError: the row has a history, for which that prompt has no place.
        """
        if self.history:
            raise BadRowError("history needs a chat template, and the tokenizer has none")
        prompt = ALPACA_PROMPT_WITH_INPUT if self.input else ALPACA_PROMPT
        preamble = f"{self.system}\n\n" if self.system else ""
        return PromptCompletion(preamble + prompt.format(instruction=self.instruction, input=self.input), self.output)


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document. Every token is a target."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Ids and labels: a row that is already tokenized, or any other sample once it is."""

    input_ids: NDArray[np.int64]  # (length,)
    labels: NDArray[np.int64]  # (length,) the id itself (not shifted) where the loss counts it, or IGNORED


Sample = Conversation | JudgedAnswers | PromptCompletion | Instruction | PlainText | TokenRow


@dataclass(frozen=True)
class TokenizedSample:
    """A sample as the cache stores it and as chunks are built from it. The arrays may be read-only views."""

    input_ids: NDArray[np.int32]  # (length,)
    targets: NDArray[np.int32]  # (length,) the id that each position has to predict (labels shifted once), or IGNORED


def has_empty_answer(sample: object) -> bool:
    """Return whether nothing but its end is to be learned of an answer."""
    if isinstance(sample, JudgedAnswers):
        return any(map(has_empty_answer, sample.answers))
    if isinstance(sample, Conversation):
        return any(
            turn.is_target and not turn.content.strip() and not turn.tool_calls and not any(turn.extra.values())
            for turn in sample.messages
        )
    answer = sample.output if isinstance(sample, Instruction) else getattr(sample, "completion", None)
    return isinstance(answer, str) and not answer.strip()


def digest_of(input_ids: NDArray[np.int32], targets: NDArray[np.int32], mark: int | None = None) -> int:
    """Return a hash of 64 bits: in a million samples, two different ones collide once in 37 million data sets.

    Args:
        mark: of preferences, `EncodedBatch.marks`: an answer that is good is not one that is bad.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(input_ids).data, digest_size=8)
    digest.update(np.ascontiguousarray(targets).data)
    if mark is not None:
        digest.update(str(mark).encode())
    return int.from_bytes(digest.digest(), "little")
