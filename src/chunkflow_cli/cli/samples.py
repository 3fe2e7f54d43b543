"""Choose the samples that `chunkflow analyze --show N` prints, and divide them into segments of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import DataConfig, Overlong
from chunkflow_cli.data.sample import IGNORED
from chunkflow_cli.data.source import Location
from chunkflow_cli.data.tokenized import TokenizedSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class ShownSample:
    """A sample as it is trained on, with the tokenizer that turns its ids into text."""

    location: Location
    input_ids: NDArray[np.int32]  # (tokens,)
    is_target: NDArray[np.bool_]  # (tokens,)
    tokens_cut: int
    """Number of tokens that `data.overlong=truncate` cuts off its end."""
    tokenizer: PreTrainedTokenizerBase | None
    """None shows the ids themselves."""

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return int(self.is_target.sum())

    def segments(self) -> Iterator[tuple[int, int, bool]]:
        """Yield runs of targets and of other tokens, in order: first token, end, and whether they are targets."""
        ends = [*(np.flatnonzero(np.diff(self.is_target)) + 1).tolist(), self.tokens]
        start = 0
        for end in ends:
            yield start, end, bool(self.is_target[start])
            start = end

    def text(self, start: int, end: int) -> str:
        """Return the text of the tokens from `start` to before `end`, special tokens included.

        It is read off behind the token before them, because some tokenizers drop the space at the beginning of a text.
        """
        if self.tokenizer is None:
            return " ".join(map(str, self.input_ids[start:end].tolist()))
        decode, first = _decoder(self.tokenizer), max(start - 1, 0)
        before, through = decode(self.input_ids[first:start]), decode(self.input_ids[first:end])
        return through[len(before) :] if through.startswith(before) else decode(self.input_ids[start:end])

    def is_special(self, token: int) -> bool:
        """Return True if the token with this index is a special one, such as the end of a turn."""
        if self.tokenizer is None:
            return False
        number = int(self.input_ids[token])
        added = self.tokenizer.added_tokens_decoder.get(number)
        return number in self.tokenizer.all_special_ids or (added is not None and added.special)

    def to_json(self) -> dict[str, Any]:
        """Return the sample as plain values for JSON, with its whole text."""
        return {
            "file": self.location.file,
            "line": self.location.line,
            "tokens": self.tokens,
            "targets": self.targets,
            "segments": [
                {"text": self.text(start, end), "is_target": is_target} for start, end, is_target in self.segments()
            ],
        }


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[NDArray[np.int32]], str]:
    def decode(ids: NDArray[np.int32]) -> str:
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


def samples_to_show(
    data: TokenizedSource,
    config: DataConfig,
    count: int,
    *,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[ShownSample]:
    """Return samples from the shortest to the longest, evenly spaced in the order of lengths; the middle one if one.

    Those that training drops are not among them, and those that it truncates are cut.

    Args:
        limit: most tokens of a sample.
    """
    lengths = data.entry.lengths
    if limit is not None and config.overlong is Overlong.drop:
        eligible = np.flatnonzero(lengths <= limit)
    else:
        eligible = np.arange(len(lengths))
    is_cut = limit is not None and config.overlong is Overlong.truncate
    by_length = eligible[np.argsort(lengths[eligible], kind="stable")]
    chosen = by_length[_spread(len(by_length), count)].tolist()
    return [_shown(data, index, limit if is_cut else None, tokenizer) for index in chosen]


def _spread(available: int, count: int) -> NDArray[np.int64]:
    """Return `count` indices, or all if there are fewer, evenly spaced from the first to the last."""
    if count == 1 and available:
        return np.array([(available - 1) // 2])
    return np.linspace(0, available - 1, min(count, available)).round().astype(np.int64)


def _shown(
    data: TokenizedSource, index: int, limit: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> ShownSample:
    entry = data.entry
    start, stop = int(entry.offsets[index]), int(entry.offsets[index + 1])
    end = stop if limit is None else min(stop, start + limit)
    is_target = np.zeros(end - start, bool)
    is_target[1:] = entry.targets[start : end - 1] != IGNORED  # the target of a position is the token after it
    return ShownSample(data.location(index), entry.input_ids[start:end], is_target, stop - end, tokenizer)
