"""From `data.path` to the samples that a run uses: the cache, after the policies for bad rows and long samples.

With `data.sources`, every function here is called with the configuration of one source (`data.data_sets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.config.schema import BadRows, DataConfig, DataFormat, Overlong, TrainOn, Turns
from chunkflow_cli.console import progress_bar
from chunkflow_cli.data.building import remove_leftovers
from chunkflow_cli.data.cache import CacheEntry, Ingredients, build_entry, cache_root, open_entry
from chunkflow_cli.data.columns import rename_columns
from chunkflow_cli.data.data_sets import configs_of_evaluation, configs_of_sources, key_of_path
from chunkflow_cli.data.encoding import Encoder
from chunkflow_cli.data.formats import PLAIN_FORMATS, PREFERENCE_FORMATS, detect_format, parse_sample
from chunkflow_cli.data.names import printable
from chunkflow_cli.data.notes import announce
from chunkflow_cli.data.parallel import encode_source
from chunkflow_cli.data.preferences import AnswerSizes
from chunkflow_cli.data.rows import decode_row
from chunkflow_cli.data.sample import IGNORED, BadRowError, RejectedRow
from chunkflow_cli.data.source import Location, Source, open_source
from chunkflow_cli.data.template_choice import load_with_template, needs_tokenizer
from chunkflow_cli.data.tokenized import SourceCounts, TokenizedData, TokenizedSource
from chunkflow_cli.data.tokenizer import tokenizer_fingerprint
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5
"""Maximum number of samples or rows that an error lists."""


def open_data(config: DataConfig, *, for_evaluation: bool = False) -> Source:
    """Return the rows of `data.path`, or those to evaluate on, under the names of columns that formats know.

    Raises:
        UsageError: they cannot be found or read.
    """
    path, key, subset = config.path, key_of_path(config), config.subset
    split, split_key = (config.eval_split, "data.eval_split") if for_evaluation else (config.split, "data.split")
    if not for_evaluation and config.sources and config.sources[0].split:
        split_key = f"data.sources[{config.sources[0].name}].split"
    if for_evaluation and config.eval_path is not None:
        subset = subset if config.eval_path == path else None
        path, key = config.eval_path, "data.eval_path"
    source = open_source(path, key=key, split=split, split_key=split_key, subset=subset)
    return rename_columns(source, config.columns, key) if config.columns else source


CHECKED_ROWS = 1000
"""Rows whose form is checked before anything slow begins."""
CHECKED_BATCHES = 32
"""Maximum number of batches to check. A batch ends at 1 MiB, so that long samples take no longer than short ones."""


def check_data(config: DataConfig) -> None:
    """Check that the data is there and that its first rows have a format, in a fraction of a second.

    Whether each row can be trained on under the model's tokenizer and template is only known after `tokenize`.

    Raises:
        UsageError: the data, or the data to evaluate on, cannot be found or read, or has bad rows and `data.bad_rows`
            is `error`.
    """
    parts = [(each, False) for each in configs_of_sources(config)]
    parts += [(each, True) for each in configs_of_evaluation(config)]
    sources = [open_data(each, for_evaluation=part) for each, part in parts]
    for source, (each, part) in zip(sources, parts, strict=True):
        _check_first_rows(source, _named(each, for_evaluation=part), each)


def _check_first_rows(source: Source, named: str, config: DataConfig) -> None:
    format = _format_of(source, named, config)
    rejected: list[tuple[Location, str]] = []
    rows, is_whole = 0, True
    for number, batch in enumerate(source.batches()):
        if rows >= CHECKED_ROWS or number == CHECKED_BATCHES:
            is_whole = False
            break
        for line, row in zip(batch.lines, batch.rows, strict=True):
            try:
                parse_sample(decode_row(row), format)
            except BadRowError as error:
                rejected.append((source.location(batch.file, line), str(error)))
        rows += len(batch.rows)
    if rejected and config.bad_rows is BadRows.error:
        raise UsageError(
            _bad_rows_message(rejected, rows, named, config.format, first="" if is_whole else "the first ")
        )


def _named(config: DataConfig, *, for_evaluation: bool) -> str:
    """Return key and path of the data, or of the data to evaluate on, for messages."""
    if for_evaluation and config.eval_path is not None:
        return f"data.eval_path={printable(as_written(config.eval_path))}"
    return f"{key_of_path(config)}={printable(as_written(config.path))}"


def _format_of(source: Source, named: str, config: DataConfig) -> DataFormat:
    if config.format is not DataFormat.auto:
        return config.format
    return detect_format(source, key=named.partition("=")[0])


def tokenize(
    config: DataConfig,
    *,
    for_evaluation: bool = False,
    model_path: str,
    model_limit: int | None,
    vocab_size: int | None,
    trust_remote_code: bool,
    key: str | None = None,
) -> TokenizedData:
    """Return the samples of `data.path`, tokenized once (see `data.cache`) and selected by the policies.

    Args:
        for_evaluation: read the data to evaluate on instead (`data.eval_path`, `data.eval_split`).
        model_limit: the longest sequence that the model supports, in tokens; None is no limit.
        vocab_size: ids of the model; None does not check ids.
        key: of the cache's entry, as another process of the run has found it. If it is in the cache of this one, the
            data is neither read nor hashed, and the entry not checked again.

    Raises:
        UsageError: the data cannot be read, has bad rows or samples that are too long (if the policy is `error`), or
            no sample is left; or the model's tokenizer does not fit the data or the model.
    """
    whole = None
    if key is not None:
        whole = _found_source(
            config, key, for_evaluation=for_evaluation, model_path=model_path, trust_remote_code=trust_remote_code
        )
    if whole is None:
        whole = tokenize_source(
            config,
            for_evaluation=for_evaluation,
            model_path=model_path,
            vocab_size=vocab_size,
            trust_remote_code=trust_remote_code,
        )
    return _apply_policies(config, whole, model_limit)


def tokenize_source(
    config: DataConfig,
    *,
    for_evaluation: bool = False,
    model_path: str,
    vocab_size: int | None,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TokenizedSource:
    """Return all samples of `data.path`, or those to evaluate on, from the cache, which is built first if necessary.

    Args:
        tokenizer: the model's with `data.chat_template`, if it is loaded already.

    Raises:
        UsageError: the data or `data.chat_template` cannot be read, or the model's tokenizer does not fit the data or
            the model.
        RunError: a worker process was killed.
    """
    source, named = open_data(config, for_evaluation=for_evaluation), _named(config, for_evaluation=for_evaluation)
    format = _format_of(source, named, config)
    if tokenizer is None and needs_tokenizer(config, format, model_path):
        tokenizer = load_with_template(config, model_path, trust_remote_code=trust_remote_code)
    chat_template = tokenizer.chat_template if tokenizer is not None and config.chat_template is not None else None
    if format is DataFormat.tokens:
        tokenizer = None
    ingredients = _ingredients(config, source, format, tokenizer, vocab_size)
    folder = cache_root(config.cache_dir) / ingredients.key()
    remove_leftovers(folder.parent)
    entry = open_entry(folder)
    if entry is None:
        encoder = Encoder(
            tokenizer,
            format=format,
            train_on=config.train_on,
            vocab_size=vocab_size,
            turns=config.turns,
            reasoning=config.train_on_reasoning,
            template_arguments=config.template_arguments,
        )
        batches = encode_source(source, encoder, num_workers=config.num_workers)
        with progress_bar(f"tokenizing {named}", source.size) as progress:
            entry = build_entry(folder, batches, ingredients, source.names, progress)
    if vocab_size is not None and entry.largest_id >= vocab_size:
        raise UsageError(
            f"the tokenizer of model.path={model_path} gives id {entry.largest_id}, "
            f"but the model has {vocab_size} ids\n  use the tokenizer that belongs to the model; if tokens were added "
            f"to it, set model.vocab_size={entry.largest_id + 1} or more"
        )
    announce(entry.notes, named, source.location)
    return TokenizedSource(source, format, entry, named, _name(config), chat_template)


def _name(config: DataConfig) -> str | None:
    return config.sources[0].name if config.sources else None


def _ingredients(
    config: DataConfig,
    source: Source,
    format: DataFormat,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None,
) -> Ingredients:
    """Return the keys that determine the tokens of a source, with their values for this format."""
    return Ingredients(
        source=source.fingerprint(),
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        format=format,
        train_on=TrainOn.all if format is DataFormat.text else config.train_on,
        turns=Turns.whole if format in PLAIN_FORMATS else config.turns,
        train_on_reasoning=config.train_on_reasoning,
        vocab_size=vocab_size if format is DataFormat.tokens else None,
        template_arguments=config.template_arguments,
    )


def _found_source(
    config: DataConfig, key: str, *, for_evaluation: bool, model_path: str, trust_remote_code: bool
) -> TokenizedSource | None:
    """Return the samples of a checked entry of the cache; None if the cache of this process does not have it."""
    entry = open_entry(cache_root(config.cache_dir) / key, is_checked=True)
    if entry is None:
        return None
    source, named = open_data(config, for_evaluation=for_evaluation), _named(config, for_evaluation=for_evaluation)
    chat_template = None
    if config.chat_template is not None:
        tokenizer = load_with_template(config, model_path, trust_remote_code=trust_remote_code)
        chat_template = tokenizer.chat_template
    return TokenizedSource(source, _format_of(source, named, config), entry, named, _name(config), chat_template)


def _apply_policies(config: DataConfig, whole: TokenizedSource, model_limit: int | None) -> TokenizedData:
    entry, limit = whole.entry, model_limit if config.max_length is None else config.max_length
    lengths, target_counts, bad_rows = entry.lengths, entry.target_counts, list(entry.rejected)
    answers = _answer_sizes(config, whole, limit)
    longest = lengths if answers is None else answers.whole.max(axis=1)
    is_long = np.zeros(len(lengths), bool) if limit is None else longest > limit
    is_dropped = is_long if config.overlong is Overlong.drop else np.zeros_like(is_long)
    if limit is not None and config.overlong is Overlong.truncate:
        lengths, target_counts = _truncated(entry, answers, is_long, limit)
        what = "no targets are left" if answers is None else "an answer is not left, or the answers are the same,"
        bad_rows += [
            RejectedRow(
                int(entry.files[sample]), int(entry.lines[sample]), f"{what} after truncation to {limit} tokens"
            )
            for sample in np.flatnonzero(target_counts == 0)
        ]
        bad_rows.sort(key=lambda row: (row.file, row.line))
    rejected = whole.locate(bad_rows)
    samples_read, dropped = len(entry) + len(entry.rejected), int(is_dropped.sum())
    rows_read = int(entry.rows.max(initial=-1)) + 1 + len(entry.rejected)
    if rejected and config.bad_rows is BadRows.error:
        raise UsageError(_bad_rows_message(rejected, rows_read, whole.named, config.format))
    if limit is not None and is_long.any() and config.overlong is Overlong.error:
        whose = "data.max_length" if config.max_length is not None else "the model's own limit"
        raise UsageError(_overlong_message(whole, longest, is_long, f"{limit} tokens ({whose})"))
    indices = np.flatnonzero(~is_dropped & (target_counts > 0))
    if len(indices) == 0:
        raise UsageError(
            f"{whole.named}: no samples are left of {rows_read} rows: "
            f"{len(rejected)} are bad, {dropped} were dropped as too long"
            f"{_listed(rejected[:SHOWN])}\n  fix the data, or raise data.max_length"
        )
    counts = SourceCounts(rows_read, samples_read, samples_rejected=len(rejected), samples_dropped=dropped)
    return TokenizedData(
        (whole,),
        np.zeros(len(indices), np.int32),
        indices,
        lengths[indices],
        target_counts[indices],
        rejected,
        (counts,),
        answers=None if answers is None else answers.select(indices),
    )


def _truncated(
    entry: CacheEntry, answers: AnswerSizes | None, is_long: NDArray[np.bool_], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the lengths and the counts of targets of samples after truncation, (samples,) each.

    A pair has no targets if one of its answers is gone, or if both have become the same.
    """
    if answers is None:
        target_counts = np.array(entry.target_counts)
        for sample in np.flatnonzero(is_long):
            start = int(entry.offsets[sample])
            # The last position that is kept predicts a token that is not.
            target_counts[sample] = np.count_nonzero(entry.targets[start : start + limit - 1] != IGNORED)
        return np.minimum(entry.lengths, limit), target_counts
    target_counts = np.where((answers.targets > 0).all(axis=1), answers.targets.sum(axis=1), 0)
    for pair in np.flatnonzero((answers.whole > limit).all(axis=1) & (target_counts > 0)).tolist():
        own = slice(int(entry.offsets[pair]), int(entry.offsets[pair + 1]))
        kept = [each.input_ids for each in answers.sequences(pair, entry.input_ids[own], entry.targets[own])]
        if len(kept) == 2 and np.array_equal(kept[0], kept[1]):
            target_counts[pair] = 0
    return answers.lengths.sum(axis=1), target_counts


def _answer_sizes(config: DataConfig, whole: TokenizedSource, limit: int | None) -> AnswerSizes | None:
    """Return the sizes of the sequences of all samples; None if a sample is one sequence to imitate."""
    if whole.format not in PREFERENCE_FORMATS:
        return None
    entry = whole.entry
    return AnswerSizes.of(
        entry.lengths, entry.target_counts, entry.marks, has_pairs=whole.format is DataFormat.preference,
        limit=limit, is_cut=config.overlong is Overlong.truncate,
    )  # fmt: skip


def _bad_rows_message(
    rejected: Sequence[tuple[Location, str]], rows: int, named: str, format: DataFormat, *, first: str = ""
) -> str:
    remedy = "fix them, or skip them with data.bad_rows=skip (rejected.jsonl then lists them)"
    if len(rejected) == rows:
        remedy = other_format(format, rejected) or remedy
    shown = _listed(_told_once(rejected))
    return f"{named}: {len(rejected)} of {first}{rows} rows cannot be trained on{shown}\n  {remedy}"


def other_format(format: DataFormat, rejected: Sequence[tuple[Location, str]]) -> str:
    """Return a remedy if rows lack the keys of a format that was set; empty if their fault is another one."""
    is_set = format is not DataFormat.auto and format not in PREFERENCE_FORMATS
    if not is_set or not all(reason.startswith("no key ") for _, reason in rejected[:SHOWN]):
        return ""
    return f"data.format={format.value} is set, by you or by the recipe: data.format=auto detects the format"


def _overlong_message(
    whole: TokenizedSource, lengths: NDArray[np.int64], is_long: NDArray[np.bool_], limit: str
) -> str:
    count = int(is_long.sum())
    longest = np.argsort(-lengths, kind="stable")[:count]
    shown = _listed([(whole.location(sample), f"{lengths[sample]} tokens") for sample in longest])
    return (
        f"{whole.named}: {count} of {len(lengths)} samples are longer than {limit}{shown}\n"
        f"  allow them with data.max_length={lengths[longest[0]]}, or set data.overlong=drop or data.overlong=truncate"
    )


def _told_once(rejected: Sequence[tuple[Location, str]]) -> list[tuple[Location, str]]:
    """Return the bad rows, with a short mark in place of a reason that repeats the one before it."""
    before = [None, *(reason for _, reason in rejected)]
    return [
        (row, "the same" if reason == last else reason) for (row, reason), last in zip(rejected, before, strict=False)
    ]


def _listed(places: Sequence[tuple[Location, str]]) -> str:
    lines = [f"\n  {location}: {what}" for location, what in places[:SHOWN]]
    return "".join(lines) + (f"\n  and {len(places) - SHOWN} more" if len(places) > SHOWN else "")
