"""Measure the samples of a data set: their lengths, their targets, and where the longest and the rejected ones are.

With a model, lengths are exact, and this builds the token cache that `train` reads. Without one they are estimated from
the text. Rows of `data.format=tokens` are always counted exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.cli.samples import ShownSample, samples_to_show
from chunkflow_cli.config.keys import as_written
from chunkflow_cli.config.schema import Config, DataConfig, DataFormat, ModelConfig
from chunkflow_cli.console import progress_bar
from chunkflow_cli.data.data_sets import key_of_path
from chunkflow_cli.data.dataset import open_data, other_format, tokenize_source
from chunkflow_cli.data.estimate import estimate_sizes
from chunkflow_cli.data.formats import detect_format
from chunkflow_cli.data.names import printable
from chunkflow_cli.data.source import Location, Source
from chunkflow_cli.data.template_choice import load_with_template, needs_tokenizer
from chunkflow_cli.data.tokenizer import has_tokenizer
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import known_ids, load_config, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SHOWN = 5


@dataclass(frozen=True)
class MeasuredData:
    """The lengths of the samples in a data set, and where the longest and the rejected ones are."""

    path: str
    format: DataFormat
    estimated: bool
    lengths: NDArray[np.int64]  # (sequences,) tokens
    sequences_per_sample: int
    """2 for pairs of preferences, whose answers are sequences of their own, one after the other; otherwise 1."""
    target_counts: NDArray[np.int64]  # (samples,), or (sequences,) if estimated
    digests: NDArray[np.int64]  # (samples,), equal where samples are
    longest: list[tuple[Location, int]]
    """The longest samples with their tokens, longest first."""
    rejected: list[tuple[Location, str]]
    model_limit: int | None
    """The longest sequence that the model supports; `data.max_length` without a model."""
    rows: int
    """Number of rows that the samples come from."""
    shown: Sequence[ShownSample] | None = None

    @property
    def samples(self) -> int:
        return len(self.lengths) // self.sequences_per_sample


def measured_data(config: Config, *, show: int | None) -> MeasuredData:
    """Return the lengths of the data set at `data.path`: exact if a model is configured, otherwise estimated.

    Args:
        show: number of samples to return as they are trained on.

    Raises:
        UsageError: the data cannot be read or has no usable sample, or the model has no tokenizer; or samples are to be
            shown that no tokenizer makes.
    """
    source = open_data(config.data)
    format = config.data.format
    if format is DataFormat.auto:
        format = detect_format(source, key=key_of_path(config.data))
    if config.model.path or (show and format is DataFormat.tokens):
        return _counted(config, format, show)
    if show:
        raise UsageError(
            f"--show={show}: samples can only be shown as they are tokenized, and no tokenizer is named\n"
            "  name one with model.path=MODEL or recipe=NAME"
        )
    return _estimated(config, source, format)


def _counted(config: Config, format: DataFormat, show: int | None) -> MeasuredData:
    """Tokenize the data set at `data.path`, and measure its samples."""
    vocab_size, limit = _vocabulary_and_limit(config.model) if config.model.path else (None, config.data.max_length)
    tokenizer = _tokenizer(config.data, config.model, format, show=show)
    data = tokenize_source(
        replace(config.data, format=format),
        model_path=config.model.path,
        vocab_size=vocab_size,
        trust_remote_code=config.model.trust_remote_code,
        tokenizer=tokenizer,
    )
    most = limit if config.data.max_length is None else config.data.max_length
    entry, path, rejected = data.entry, _path_of(config), data.locate(data.entry.rejected)
    lengths, count = entry.lengths, 1
    if format is DataFormat.preference:
        lengths, count = np.stack([entry.marks, entry.lengths - entry.marks], axis=1).ravel(), 2
    return MeasuredData(
        path=path,
        format=format,
        estimated=False,
        lengths=lengths,
        sequences_per_sample=count,
        target_counts=entry.target_counts,
        digests=entry.digests.view(np.int64),
        longest=_longest(path, lengths, config.data, rejected, lambda sequence: data.location(sequence // count)),
        rejected=rejected,
        model_limit=limit,
        rows=int(entry.rows.max(initial=-1)) + 1,
        shown=None if show is None else samples_to_show(data, config.data, show, limit=most, tokenizer=tokenizer),
    )


def _estimated(config: Config, source: Source, format: DataFormat) -> MeasuredData:
    """Measure the samples of `source` without a tokenizer."""
    path = _path_of(config)
    with progress_bar(f"reading {path}", source.size) as progress:
        sizes = estimate_sizes(
            source,
            format,
            train_on=config.data.train_on,
            turns=config.data.turns,
            reasoning=config.data.train_on_reasoning,
            progress=progress,
        )

    count = 2 if format is DataFormat.preference else 1

    def locate(sequence: int) -> Location:
        return source.location(int(sizes.files[sequence]), int(sizes.lines[sequence]))

    return MeasuredData(
        path=path,
        format=format,
        estimated=format is not DataFormat.tokens,
        lengths=sizes.lengths,
        sequences_per_sample=count,
        target_counts=sizes.target_counts,
        digests=sizes.digests[::count],
        longest=_longest(path, sizes.lengths, config.data, sizes.rejected, locate),
        rejected=sizes.rejected,
        model_limit=config.data.max_length,
        rows=sizes.rows,
    )


def _path_of(config: Config) -> str:
    return printable(as_written(config.data.path))


def _longest(
    path: str,
    lengths: NDArray[np.int64],
    config: DataConfig,
    rejected: Sequence[tuple[Location, str]],
    locate: Callable[[int], Location],
) -> list[tuple[Location, int]]:
    """Return where the longest sequences are, and their tokens.

    Raises:
        UsageError: there is no sample.
    """
    if len(lengths) == 0:
        reasons = "".join(f"\n  {where}: {reason}" for where, reason in rejected[:LONGEST_SHOWN])
        remedy = f"\n  {text}" if (text := other_format(config.format, rejected)) else ""
        raise UsageError(f"{path}: none of its {len(rejected)} rows can be trained on{reasons}{remedy}")
    longest = np.argsort(-lengths, kind="stable")[:LONGEST_SHOWN]
    return [(locate(int(sequence)), int(lengths[sequence])) for sequence in longest]


def _tokenizer(
    data: DataConfig, model: ModelConfig, format: DataFormat, *, show: int | None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that makes the samples, or else one that shows rows of ids as text."""
    is_useful = show is not None and bool(model.path) and has_tokenizer(model.path)
    if needs_tokenizer(data, format, model.path) or is_useful:
        return load_with_template(data, model.path, trust_remote_code=model.trust_remote_code)
    return None


def _vocabulary_and_limit(model: ModelConfig) -> tuple[int | None, int | None]:
    """Return vocabulary size and longest sequence of a model; None for a folder with only a tokenizer."""
    folder = Path(model.path).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists() and has_tokenizer(model.path):
        return None, None
    hf_config = load_config(model)
    return known_ids(hf_config), position_limit(hf_config)
