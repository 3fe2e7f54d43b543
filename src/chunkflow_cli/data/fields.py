"""Decide which fields of a row matter: the rule for keys that a format does not read.

A format reads the keys in the table of `data.formats`. Of the others, some names mean something in the training data of
other tools: masks, weights, reasoning, tools, images, the halves of a preference pair. Such a field changes what those
tools train on. chunkflow honors it, or refuses the row by the field's name, because a field without effect would be a
silent loss. It is refused only if it says something: null, an empty value, and a weight of 1 change nothing.

All other keys (id, source, category, score, ...) describe the row and are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from chunkflow_cli.config.schema import DataFormat
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.values import flag, is_absent, kind

SYSTEM = ("system", "system_prompt", "system_message")
"""Names of a row's system prompt."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning. transformers gives a template the first that is set, under all of them."""
SWITCHES = ("weight", "train", "training", "trainable", "should_train", "loss", "loss_weight", "loss_scale")
"""Names of 0 or 1, which says if the loss counts a turn: OpenAI and Mistral, Axolotl, Tinker, ms-swift."""
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "response_mask")
"""Lists of 0 and 1 which say if the loss counts a token: TRL, transformers, ms-swift, verl."""

_PER_TOKEN = {
    *MASKS,
    *("attention_mask", "labels", "position_ids", "token_type_ids", "seq_lengths", "cu_seqlens", "inputs_embeds"),
}
"""Fields of pre-tokenised rows."""
_BESIDE_IDS = {
    *("targets", "target_ids", "weights", "loss_weights", "advantages", "prompt_ids", "completion_ids"),
    *("prompt_length", "prompt_len", "decoder_input_ids", "decoder_attention_mask"),
}
"""Names that say what the loss counts only next to `input_ids`."""
_MEDIA = {
    *("image", "images", "video", "videos", "audio", "audios", "image_url", "image_urls"),
    *("pixel_values", "pixel_values_videos", "input_features", "image_grid_thw", "video_grid_thw"),
}
_PREFERENCE = {"chosen", "rejected", "rejected_response", "rejected_responses", "rejected_messages"}
_CONTEXT = {
    *("tools", "functions", "function_call", "function_calls", "tool_calls", "tool_call_id", "tool_choice"),
    *("documents", "context", "history", "chat_template_kwargs", "enable_thinking", "reasoning_effort"),
    *("response_format", "refusal", "train_detail", "training_detail", "mask_history", "mask"),
    *SYSTEM,
    *REASONING,
}
"""Fields that the model sees before an answer, or writes in it."""
_FREE_VALUES: dict[str, tuple[object, ...]] = {
    "tools": ("[]",),
    "functions": ("[]",),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "response_format": ("text", {"type": "text"}),
    "reasoning": ("on", "off"),
}
"""Values without effect: of JSON strings, of parameters of API requests, and of notes (Nemotron)."""
_WEIGHTS = {f"{name}_weight" for name in ("sample", "example", "instance", "row", "chosen", "rejected")}
"""Names of how much a row counts, or one of its answers."""
_OF_THE_LOSS = frozenset({"weight", "weights", "mask", "masks", "masked", "loss", "train", "trained", "trainable"})
"""Words in the names of lists that say which turns the loss counts."""
_ANSWERS = ("completion", "response", "output", "answer", "answers", "choices")
_OF_TOKENIZERS = ("special_tokens_mask", "offset_mapping")
"""Lists that tokenizers add and that no trainer reads."""
_SUSPECTS = {*_PER_TOKEN, *_MEDIA, *_PREFERENCE, *_CONTEXT, *SWITCHES, *_WEIGHTS, "label", "kto_tag", "prompt"}
_SUSPECTS_WITH_IDS = _SUSPECTS | _BESIDE_IDS

_IN_CONVERSATIONS = frozenset({"tools", "functions", "chat_template_kwargs", *SYSTEM})
_WITHIN_WHOLE_TEXTS = frozenset({"prompt", "context", "history", "label", "kto_tag", *SYSTEM})
"""Fields that come before an answer or judge it: a text, and ids, hold everything the model sees."""
_READ: dict[DataFormat, frozenset[str]] = {
    DataFormat.messages: _IN_CONVERSATIONS,
    DataFormat.sharegpt: _IN_CONVERSATIONS,
    DataFormat.alpaca: frozenset({"prompt", "history", *SYSTEM}),
    DataFormat.prompt_completion: _IN_CONVERSATIONS | {"prompt"},
    DataFormat.text: _WITHIN_WHOLE_TEXTS,
    DataFormat.tokens: frozenset(_PER_TOKEN - {"inputs_embeds"}) | _WITHIN_WHOLE_TEXTS,
    DataFormat.preference: _IN_CONVERSATIONS | {"prompt", "chosen", "rejected"},
    DataFormat.feedback: _IN_CONVERSATIONS | {"prompt", "label"},
}
"""Of the names above, those that the parser of each format reads, or that mean nothing next to what it reads."""
_TEXT_KEYS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text")
_ASKED = ("instruction", "input", "question", "query", "problem", "messages", "conversations", "conversation")
"""Names that data sets give to what is asked."""
_TEXTS_READ = {
    DataFormat.alpaca: ("output", "instruction", "input", "history", *SYSTEM),
    DataFormat.prompt_completion: ("completion", "prompt", *SYSTEM),
    DataFormat.preference: ("chosen", "rejected", "prompt", *SYSTEM),
    DataFormat.feedback: ("completion", "prompt", *SYSTEM),
}
"""Where the formats that name the question by a key of their own have their texts, that of the answer first."""


def check_row(row: Mapping[str, Any], format: DataFormat) -> None:
    """Raise if a row has a field that might change what is learned and that its format does not read.

    Raises:
        BadRowError: it has one. The message names it.
    """
    suspects = _SUSPECTS_WITH_IDS if format is DataFormat.tokens else _SUSPECTS
    for key, value in row.items():
        if format is not DataFormat.tokens and key not in suspects and _is_share_of_turns(key, value):
            raise BadRowError(
                f"{key} is a list of numbers about what the loss counts, and is not read; write 0 or 1 as weight into "
                f"each message, or {_REMOVE}"
            )
        if (key in suspects or key.endswith(("_mask", "_masks"))) and key not in _READ[format] and not is_absent(value):
            _check_field(row, key, value, format)
    if format in _TEXTS_READ:
        _check_asked(row, format)


def _is_share_of_turns(key: str, value: object) -> bool:
    """Return whether a key is named after weights, masks or training, and holds numbers: of turns, or for each."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, (int, float)) for item in value)
    return is_list and not _OF_THE_LOSS.isdisjoint(key.lower().replace("-", "_").split("_"))


def _check_asked(row: Mapping[str, Any], format: DataFormat) -> None:
    """Raise if a row has what is asked under a key that its format does not read, and not in a text that it reads."""
    names = _TEXTS_READ[format]
    if names[0] not in row:
        return  # the parser says which key is missing
    for key in (key for key in _ASKED if key in row and key not in names and not is_absent(row[key])):
        texts = [text for name in names for text in _strings(row.get(name))]
        if not all(any(said.strip() in text for text in texts) for said in _said(row[key])):
            remedy = "write it into the prompt" if "prompt" in names else "write it into the instruction"
            if "prompt" in names and is_absent(row.get("prompt")):
                remedy = f"name it: 'data.columns={{{key}:prompt}}'"
            raise BadRowError(f"{key} is not read in data.format={format.value}; {remedy}, or {_REMOVE}")


def _said(value: object) -> Iterable[str]:
    """Yield a text, or the contents of a list of messages."""
    for turn in value if isinstance(value, list) else [value]:
        yield from _strings([turn.get("content"), turn.get("value")] if isinstance(turn, dict) else turn)


def check_has_no_turns(row: Mapping[str, Any]) -> None:
    """Raise if a row whose prompt is a string has a field that only a chat template could write.

    Raises:
        BadRowError: it has one.
    """
    for key in ("tools", "functions", "chat_template_kwargs", *SYSTEM):
        if not is_absent(row.get(key)) and row[key] != "[]":
            raise BadRowError(f"a prompt that is a string has no place for {key}; write it into the prompt")


def _check_field(row: Mapping[str, Any], key: str, value: Any, format: DataFormat) -> None:
    if key in SWITCHES or key in _WEIGHTS:
        _check_weight(key, value)
    elif key in _PREFERENCE and format in (DataFormat.preference, DataFormat.feedback):
        if format is DataFormat.feedback:
            raise BadRowError(f"the row has {key}, and train.task=kto reads completion and label; {_PAIRS}")
        raise BadRowError(f"{key} is not read, but chosen and rejected; {_REMOVE}")
    elif key in _PREFERENCE:
        # A row may keep the pair next to the chosen answer in the format's own key: that is SFT on it.
        if is_absent(row.get("chosen")) or row["chosen"] not in [row.get(name) for name in _TEXT_KEYS]:
            raise BadRowError(f"the row has {key}: {PREFERENCE}")
    elif key == "prompt":
        _check_prompt(row, value)
    elif key in ("label", "kto_tag"):
        if format is DataFormat.feedback:
            remedy = "remove it" if "label" in row else f"name it: 'data.columns={{{key}:label}}'"
            raise BadRowError(f"{key} is not read in data.format=feedback, but label; {remedy}")
        if isinstance(value, bool):  # a number or a word is the class of a text
            raise BadRowError(f"{key} is {_shown(value)}, feedback on an answer (KTO); {_KTO}")
    elif key in _MEDIA:
        raise BadRowError(f"the row has {key}, and chunkflow trains on text only; remove the row")
    elif key in _CONTEXT:
        if value not in _FREE_VALUES.get(key, ()) and not _is_written(value, row):
            raise BadRowError(f"{key} is not read in data.format={format.value}; {_WHERE.get(key, _REMOVE)}")
    elif format is DataFormat.tokens and key not in _OF_TOKENIZERS:
        raise BadRowError(f"{key} is not read; say what the loss counts with labels or completion_mask")
    elif key not in _OF_TOKENIZERS:
        raise BadRowError(f"{key} is about tokens, and data.format={format.value} holds text; {_REMOVE}")


_REMOVE = "remove or rename the key if it does not count"
_PAIRS = "set train.task=dpo for pairs, or remove or rename the key if it does not count"
_KTO = "set train.task=kto, or keep the rows with answers to imitate, and remove the key"
_WHERE = {
    **dict.fromkeys(REASONING, "put it into what the assistant says, or rename the key if it does not count"),
    "context": "put it into the prompt (alpaca: into input), or rename the key if it does not count",
    "function_call": "put it into the assistant's message",
    "tool_calls": "put it into the assistant's message",
    "tool_call_id": "put it into the tool's message",
}
PREFERENCE = (
    "preference data, and train.task=sft trains on one answer: set train.task=dpo or orpo; to imitate the chosen "
    "answer, write 'data.columns={chosen:messages,rejected:unused}', or chosen:completion if it is a string"
)


def _check_weight(key: str, value: Any) -> None:
    if key in ("loss", "training") and not isinstance(value, bool):
        return  # a measurement or a note; only messages have them as switches
    if flag(value) is None:
        raise BadRowError(f"{key} is {_shown(value)}, and all rows count equally; {_REMOVE}")
    if not flag(value):
        raise BadRowError(f"{key} is {_shown(value)}: the row asks not to be trained on; leave it out")


def _check_prompt(row: Mapping[str, Any], prompt: object) -> None:
    """Raise unless a conversation holds its row's `prompt`, which data sets like to repeat (ultrachat_200k)."""
    turns: list[Any] = next(
        (row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), []
    )
    is_beginning = isinstance(prompt, list) and turns[: len(prompt)] == prompt
    if not is_beginning and not (isinstance(prompt, str) and any(prompt.strip() in text for text in _strings(turns))):
        raise BadRowError(f"prompt is not part of the messages; write it as a message, or {_REMOVE}")


def _is_written(value: object, row: Mapping[str, Any]) -> bool:
    """Return True if a string is part of a text that the row's format reads."""
    if not isinstance(value, str) or len(value.strip()) < SHORTEST_QUOTE:
        return False
    return any(value.strip() in text for name in _TEXT_KEYS for text in _strings(row.get(name)))


SHORTEST_QUOTE = 20
"""Minimum length in characters. Shorter strings occur in other texts by chance."""


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def check_ends_with_answer(row: Mapping[str, Any], last_role: str, key: str) -> None:
    """Raise if a conversation ends before its answer, which is under another key of the row.

    Raises:
        BadRowError: it does.
    """
    if last_role == "assistant":
        return
    for name in _ANSWERS:
        if not is_absent(row.get(name)):
            raise BadRowError(f"{key} ends with the role {last_role}, and {name} is not read; append it as a message")


def check_lists_of_tokens(row: Mapping[str, Any], length: int) -> None:
    """Raise if a row of ids has a list with a number for each of them that chunkflow does not read.

    Raises:
        BadRowError: it has one.
    """
    for key, value in row.items():
        if key == "input_ids" or key in _PER_TOKEN or key in _OF_TOKENIZERS:
            continue
        if isinstance(value, list) and len(value) == length and all(isinstance(item, (int, float)) for item in value):
            raise BadRowError(f"{key} has a number for each token, and chunkflow does not know its meaning; {_REMOVE}")


_REFUSED_IN_MESSAGES = {
    *_MEDIA,
    *_PREFERENCE,
    *MASKS,
    *(
        "mask",
        "masked",
        "is_masked",
        "ignore",
        "skip",
        "train_detail",
        "training_detail",
        "labels",
        "prefix",
        "documents",
        "chat_template_kwargs",
    ),
    *("tools", "parts", "choices"),
}


def check_message(turn: Mapping[str, Any], place: str, role: str) -> None:
    """Raise if a message has a field that might change what is learned and that no chat template reads.

    Raises:
        BadRowError: it has one. The message names it.
    """
    for key in _REFUSED_IN_MESSAGES.intersection(turn):
        if is_absent(turn[key]) or turn[key] is False:
            continue
        if key in _MEDIA:
            raise BadRowError(f"{place} has {key}, and chunkflow trains on text only; remove the row")
        raise BadRowError(f"{place}.{key} is not read; {_REMOVE}")
    if not is_absent(turn.get("refusal")):
        raise BadRowError(f"{place}.refusal is not read; move its text to content, or remove the row")
    reasoning = {key: turn[key] for key in REASONING if not is_absent(turn.get(key))}
    for key, value in reasoning.items():
        if not isinstance(value, str):
            raise BadRowError(f"{place}.{key} is {kind(value)}, not a string")
        if role != "assistant":
            raise BadRowError(f"{place}.{key}: the role {role} has no reasoning; only an assistant's message has")
    if len(set(reasoning.values())) > 1:
        raise BadRowError(f"{place} has different texts in {' and '.join(reasoning)}; keep one")


def is_trained(turn: Mapping[str, Any], place: str, *, can_be: bool, role: str) -> bool:
    """Return whether the loss counts a message: the value of its `weight` or `train` key, otherwise `can_be`.

    Args:
        can_be: False for messages that the loss never counts: those of other roles, and those of a prompt.

    Raises:
        BadRowError: the key holds something other than 0 or 1, contradicts another one, or asks for a turn that the
            loss never counts.
    """
    said = {key: turn[key] for key in SWITCHES if not is_absent(turn.get(key))}
    for key, value in said.items():
        if not isinstance(value, (int, float)):
            raise BadRowError(f"{place}.{key} is {_shown(value)}, and must be 0 or 1")
        if value not in (0, 1):
            raise BadRowError(f"{place}.{key} is {value}, and must be 0 or 1: a message counts fully or not at all")
        if value and not can_be:
            what = "a message of the prompt" if role == "assistant" else f"the role {role}"
            raise BadRowError(f"{place}.{key} is {_shown(value)}, but the loss never counts {what}; remove the key")
    if len({bool(value) for value in said.values()}) > 1:
        raise BadRowError(f"{place} contradicts itself: " + ", ".join(f"{k} is {_shown(v)}" for k, v in said.items()))
    return can_be and all(said.values())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, (str, int, float)) else kind(value)
