"""The samples that a run uses: the cache, after the policies for bad rows and long samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import BadRows, DataConfig, DataFormat, Overlong, TrainOn
from chunkflow_cli.console import progress_bar
from chunkflow_cli.data.cache import CacheEntry, Ingredients, RejectedRow, build_entry, cache_root, open_entry
from chunkflow_cli.data.encoding import Encoder
from chunkflow_cli.data.formats import detect_format
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.data.source import Location, Source, open_source
from chunkflow_cli.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from chunkflow_cli.errors import UsageError

SHOWN = 5
"""How many samples or rows an error names."""


class TokenizedData:
    """A selection of the cache's samples, which stay on disk until they are asked for.

    `samples_read == len(self) + samples_rejected + samples_dropped` always holds. A part of the data (`select`)
    counts its own samples only: what was rejected or dropped is told by the whole.
    """

    lengths: NDArray[np.int64]  # (samples,), after truncation
    target_counts: NDArray[np.int64]  # (samples,), after truncation
    rejected: list[tuple[Location, str]]
    """Bad rows and why, in the order of the data."""
    format: DataFormat
    """As found or as configured, never `auto`."""

    def __init__(
        self,
        entry: CacheEntry,
        source: Source,
        format: DataFormat,
        *,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        target_counts: NDArray[np.int64],
        rejected: list[tuple[Location, str]],
        samples_read: int,
        samples_dropped: int,
    ) -> None:
        self._entry = entry
        self._source = source
        self._indices = indices  # (samples,) into the cache
        self.format = format
        self.lengths = lengths
        self.target_counts = target_counts
        self.rejected = rejected
        self.samples_read = samples_read
        self.samples_dropped = samples_dropped
        assert samples_read == len(self) + self.samples_rejected + samples_dropped

    @property
    def samples_rejected(self) -> int:
        return len(self.rejected)

    @property
    def samples_truncated(self) -> int:
        return int(np.count_nonzero(self.lengths < self._entry.lengths[self._indices]))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> TokenizedSample:
        entry, sample = self._entry, int(self._indices[index])
        start, stop = int(entry.offsets[sample]), int(entry.offsets[sample + 1])
        end = start + int(self.lengths[index])
        targets = entry.targets[start:end]
        if end < stop:
            targets = targets.copy()
            targets[-1] = IGNORED  # what it would have to predict is cut off
        return TokenizedSample(entry.input_ids[start:end], targets)

    def location(self, index: int) -> Location:
        """Where the sample stands in the user's data."""
        sample = int(self._indices[index])
        return self._source.location(int(self._entry.files[sample]), int(self._entry.lines[sample]))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenizedData:
        """These samples, in this order."""
        chosen = np.asarray(indices, np.int64)
        return TokenizedData(
            self._entry,
            self._source,
            self.format,
            indices=self._indices[chosen],
            lengths=self.lengths[chosen],
            target_counts=self.target_counts[chosen],
            rejected=[],
            samples_read=len(chosen),
            samples_dropped=0,
        )


@dataclass(frozen=True)
class TokenizedSource:
    """A data set and its tokens, before any policy: every sample at its full length, and every bad row."""

    source: Source
    format: DataFormat
    """As found or as configured, never `auto`."""
    entry: CacheEntry
    named: str
    """Key and path, for messages."""

    def location(self, sample: int) -> Location:
        return self.source.location(int(self.entry.files[sample]), int(self.entry.lines[sample]))

    @property
    def rejected(self) -> list[tuple[Location, str]]:
        """Bad rows and why, in the order of the data."""
        return [(self.source.location(row.file, row.line), row.reason) for row in self.entry.rejected]


def tokenize(
    config: DataConfig,
    *,
    path: str | None = None,
    model_path: str,
    model_limit: int | None,
    vocab_size: int | None,
    trust_remote_code: bool,
) -> TokenizedData:
    """The samples of `data.path`, tokenised (once: see `tokens.cache`) and chosen by the policies.

    Args:
        path: read this instead of `data.path` (for `data.eval_path`).
        model_limit: the longest sequence that the model is made for; None knows no limit.
        vocab_size: of the model; None does not check ids.

    Raises:
        UsageError: the data cannot be read, has bad rows or samples that are too long (where the policy is `error`), or
            no sample is left; or the model's tokenizer does not fit data or model.
    """
    tokenized = tokenize_source(
        config, path=path, model_path=model_path, vocab_size=vocab_size, trust_remote_code=trust_remote_code
    )
    return _apply_policies(config, tokenized.entry, tokenized.source, tokenized.format, tokenized.named, model_limit)


def tokenize_source(
    config: DataConfig, *, path: str | None = None, model_path: str, vocab_size: int | None, trust_remote_code: bool
) -> TokenizedSource:
    """All samples of `data.path` (or of `path`), from the cache or into it.

    Raises:
        UsageError: the data cannot be read, or the model's tokenizer does not fit data or model.
    """
    key = "data.path" if path is None else "data.eval_path"
    path = config.path if path is None else path
    source = open_source(path, key=key)
    format = detect_format(source, key=key) if config.format is DataFormat.auto else config.format
    named = f"{key}={path}"
    are_ids = format is DataFormat.tokens
    tokenizer = None if are_ids else load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    ingredients = Ingredients(
        source=source.fingerprint(),
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        format=format,
        train_on=TrainOn.all if format is DataFormat.text else config.train_on,
        vocab_size=vocab_size if are_ids else None,
    )
    folder = cache_root(config.cache_dir) / ingredients.key()
    entry = open_entry(folder)
    if entry is None:
        encoder = Encoder(tokenizer, format=format, train_on=config.train_on, vocab_size=vocab_size)
        with progress_bar(f"tokenising {named}", source.size) as progress:
            entry = build_entry(folder, source, encoder, ingredients, num_workers=config.num_workers, progress=progress)
    if vocab_size is not None and entry.largest_id >= vocab_size:
        raise UsageError(
            f"the tokenizer of model.path={model_path} gives id {entry.largest_id}, "
            f"and the model knows {vocab_size} ids\n  this tokenizer belongs to another model"
        )
    return TokenizedSource(source, format, entry, named)


def _apply_policies(
    config: DataConfig, entry: CacheEntry, source: Source, format: DataFormat, named: str, model_limit: int | None
) -> TokenizedData:
    limit = _length_limit(config.max_length, model_limit)
    lengths, target_counts = entry.lengths, np.array(entry.target_counts)
    is_long = lengths > limit if limit is not None else np.zeros(len(lengths), bool)
    is_kept = np.ones(len(lengths), bool)
    bad_rows = list(entry.rejected)
    dropped = 0
    if limit is not None and is_long.any():
        if config.overlong is Overlong.drop:
            is_kept, dropped = ~is_long, int(is_long.sum())
        elif config.overlong is Overlong.truncate:
            lengths = np.minimum(lengths, limit)
            for sample in np.flatnonzero(is_long):
                start = int(entry.offsets[sample])
                # The last position that is kept has to predict a token that is not.
                target_counts[sample] = np.count_nonzero(entry.targets[start : start + limit - 1] != IGNORED)
            is_kept = target_counts > 0
            reason = f"no targets are left of it after truncation to {limit} tokens"
            bad_rows += [
                RejectedRow(int(entry.files[sample]), int(entry.lines[sample]), reason)
                for sample in np.flatnonzero(~is_kept)
            ]
            bad_rows.sort(key=lambda row: (row.file, row.line))
    rejected = [(source.location(row.file, row.line), row.reason) for row in bad_rows]
    samples_read = len(entry) + len(entry.rejected)
    if rejected and config.bad_rows is BadRows.error:
        raise UsageError(_bad_rows_message(rejected, samples_read, named))
    if limit is not None and is_long.any() and config.overlong is Overlong.error:
        longest = [
            (source.location(int(entry.files[sample]), int(entry.lines[sample])), int(lengths[sample]))
            for sample in np.argsort(-lengths, kind="stable")[: min(SHOWN, int(is_long.sum()))]
        ]
        whose = "data.max_length" if config.max_length is not None else "the model's own limit"
        raise UsageError(_overlong_message(longest, int(is_long.sum()), len(entry), f"{limit} tokens ({whose})", named))
    indices = np.flatnonzero(is_kept)
    if len(indices) == 0:
        raise UsageError(
            f"{named}: no samples are left of {samples_read} rows: "
            f"{len(rejected)} are bad, {dropped} too long and dropped"
            + "".join(f"\n  {location}: {reason}" for location, reason in rejected[:SHOWN])
        )
    return TokenizedData(
        entry,
        source,
        format,
        indices=indices,
        lengths=lengths[indices],
        target_counts=target_counts[indices],
        rejected=rejected,
        samples_read=samples_read,
        samples_dropped=dropped,
    )


def _length_limit(max_length: int | None, model_limit: int | None) -> int | None:
    if max_length is None:
        return model_limit
    if model_limit is not None and max_length > model_limit:
        _warn_once(f"data.max_length={max_length} is longer than the {model_limit} tokens that the model is made for")
    return max_length


@once
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _bad_rows_message(rejected: Sequence[tuple[Location, str]], rows: int, named: str) -> str:
    shown = "".join(f"\n  {location}: {reason}" for location, reason in rejected[:SHOWN])
    more = f"\n  and {len(rejected) - SHOWN} more" if len(rejected) > SHOWN else ""
    return (
        f"{named}: {len(rejected)} of {rows} rows cannot be trained on{shown}{more}\n"
        "  mend them, or leave them out with data.bad_rows=skip (rejected.jsonl then lists them)"
    )


def _overlong_message(longest: Sequence[tuple[Location, int]], count: int, samples: int, limit: str, named: str) -> str:
    shown = "".join(f"\n  {location}: {length} tokens" for location, length in longest)
    more = f"\n  and {count - len(longest)} more" if count > len(longest) else ""
    return (
        f"{named}: {count} of {samples} samples are longer than {limit}{shown}{more}\n"
        f"  allow them with data.max_length={longest[0][1]}, or take data.overlong=drop or data.overlong=truncate"
    )
