"""Load the samples that a run trains on and holds out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import Config, DataConfig, LossWeighting
from chunkflow_cli.data.cache import cache_root, stamp
from chunkflow_cli.data.data_sets import configs_of_evaluation, configs_of_sources, has_evaluation_data
from chunkflow_cli.data.dataset import tokenize
from chunkflow_cli.data.tokenized import TokenizedData, hold_out, joined, limited, without_duplicates
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import known_ids, position_limit
from chunkflow_cli.model.rope_scaling import scaling_for
from chunkflow_cli.processes.notices import warn_once

if TYPE_CHECKING:
    from chunkflow_cli.planning.run_plan import RankPlan, StepPlan


@dataclass(frozen=True)
class RunData:
    """The samples of a run, tokenized."""

    read: TokenizedData
    """All samples of `data.path` or `data.sources`, with the counts of what was left out."""
    train: TokenizedData
    evaluation: TokenizedData
    """Samples held out of these, or those of `data.eval_path` or `data.eval_split`; may be empty."""


@dataclass(frozen=True)
class FoundData:
    """Where a process has found the samples of its run in the token cache, for those that have not read the data."""

    keys: tuple[str, ...]
    """Keys of the entries: those of the data, and those of the data to evaluate on if there is some."""
    stamps: tuple[str | None, ...]
    """Stamps of the same entries (`data.cache.stamp`)."""

    @classmethod
    def of(cls, data: RunData) -> FoundData:
        """Return where the samples are that this process has loaded."""
        wholes = [*data.read.wholes]
        if data.evaluation.wholes[0] is not data.read.wholes[0]:
            wholes += data.evaluation.wholes
        return cls(tuple(whole.key for whole in wholes), tuple(stamp(whole.entry.folder) for whole in wholes))

    def is_seen_by(self, config: Config) -> bool:
        """Return whether this process sees the very entries, on the same disk. If not, it may have copies."""
        root = cache_root(config.data.cache_dir)
        return all(found is not None and stamp(root / key) == found for key, found in self._entries())

    def _entries(self) -> Iterator[tuple[str, str | None]]:
        return zip(self.keys, self.stamps, strict=True)

    def __str__(self) -> str:
        return ",".join(f"{key}:{found}" for key, found in self._entries())

    @classmethod
    def parse(cls, text: str) -> FoundData:
        """Return what `str` has written."""
        pairs = [part.partition(":") for part in text.split(",")]
        return cls(tuple(key for key, _, _ in pairs), tuple(found for _, _, found in pairs))


def load_run_data(config: Config, hf_config: Any | None, keys: Sequence[str] = ()) -> RunData:
    """Tokenize the samples of the run, or read them from the cache.

    Args:
        hf_config: the model's configuration; None only if rows are token ids and no model is named.
        keys: `FoundData.keys`, if another process of the run has found and checked the samples.

    Raises:
        UsageError: see `data.dataset.tokenize`.
    """

    to_train, to_evaluate = configs_of_sources(config.data), configs_of_evaluation(config.data)
    found = iter(keys) if keys else itertools.repeat(None)

    def read(data: DataConfig, *, for_evaluation: bool = False) -> TokenizedData:
        return tokenize(
            data,
            key=next(found),
            for_evaluation=for_evaluation,
            model_path=config.model.path,
            model_limit=None if hf_config is None else position_limit(hf_config),
            vocab_size=None if hf_config is None else known_ids(hf_config),
            trust_remote_code=config.model.trust_remote_code,
        )

    data = joined([read(each) for each in to_train])
    if config.data.deduplicate:
        data = without_duplicates(data)
    for one, other in itertools.combinations(data.wholes, 2):
        if one.key == other.key and not config.data.deduplicate:
            warn_once(f"data.sources: {one.name} and {other.name} hold the same rows, which count twice")
    seed, limits = config.train.seed, [source.samples for source in config.data.sources]
    data = limited(data, limits, seed)
    for whole, limit, count in zip(data.wholes, limits, data.counts, strict=False):
        if limit is not None and count.samples_left < limit:
            warn_once(f"data.sources[{whole.name}].samples={limit}: the source has only {count.samples_left:,}")
    if hf_config is not None and (warning := far_positions_warning(hf_config, data.longest_sequences)) is not None:
        warn_once(warning)
    if to_evaluate:
        run_data = RunData(data, data, joined([read(each, for_evaluation=True) for each in to_evaluate]))
    else:
        run_data = RunData(data, *hold_out(data, config.data.eval_fraction, seed))
    _check_parts(run_data)
    return run_data


def _check_parts(data: RunData) -> None:
    """Refuse a source of which nothing is trained on, and say if the held-out rows are those that are trained on.

    Raises:
        UsageError: names the source.
    """
    for number, whole in enumerate(data.train.wholes):
        if not len(data.train.samples_of(number)):
            raise UsageError(
                f"{whole.named}: none of its samples is left to train on; they are duplicates of others, "
                "or held out\n  remove the source, or change data.deduplicate or data.eval_fraction"
            )
    trained = {whole.key: whole.named for whole in data.train.wholes}
    for whole in data.evaluation.wholes:
        if data.train is data.read and whole.key in trained and len(data.evaluation):
            warn_once(f"{whole.named} holds the rows of {trained[whole.key]}, so the held-out loss is a training loss")


def far_positions_warning(hf_config: Any, lengths: NDArray[np.int64]) -> str | None:
    """Return what to say of samples with more tokens than the model was made for; None if there are none.

    Args:
        lengths: (samples,) tokens of the longest sequence of each.
    """
    limit, longest = position_limit(hf_config), int(lengths.max(initial=0))
    if limit is None or longest <= limit:
        return None
    remedy = scaling_for(hf_config, longest)
    return (
        f"{int((lengths > limit).sum()):,} of {len(lengths):,} samples are longer than the {limit:,} tokens that the "
        f"model was made for, up to {longest:,}" + ("" if remedy is None else f"; to scale its positions: {remedy}")
    )


def target_weights(rank: RankPlan, step: StepPlan, weighting: LossWeighting) -> NDArray[np.float64]:
    """Return the weight of each target, per sequence of the rank, (sequences,); over all targets they sum to 1."""
    if weighting is LossWeighting.token:
        return np.full(len(rank.samples), 1.0 / step.target_tokens)
    return 1.0 / (len(step.samples) * rank.target_counts)


def sample_counts(data: RunData, config: DataConfig) -> dict[str, int]:
    """Return what became of the rows that were read; rows of evaluation data are counted on their own."""
    has_file = has_evaluation_data(config)
    return {
        "rows_read": data.read.total.rows_read,
        **_counts_of(data.read),
        "samples_held_out": 0 if has_file else len(data.evaluation),
        "samples_to_train": len(data.train),
        **({f"eval_{name}": count for name, count in _counts_of(data.evaluation).items()} if has_file else {}),
    }


def _counts_of(data: TokenizedData) -> dict[str, int]:
    total = data.total
    return {
        "samples_read": total.samples_read,
        "samples_rejected": total.samples_rejected,
        "samples_dropped": total.samples_dropped,
        "samples_truncated": data.samples_truncated,
        "samples_duplicate": total.samples_duplicate,
        "samples_beyond_limit": total.samples_beyond_limit,
    }
