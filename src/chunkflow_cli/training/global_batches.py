"""Say how the samples of a data set become global batches, by the keys of `train.*`.

Imports no torch: `analyze` packs the batches that `train` would make.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.config.schema import Config, TrainConfig
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.batches import GlobalBatches, WeightedSource


def global_batches(
    train: TrainConfig, lengths: NDArray[np.int64], sources: tuple[WeightedSource, ...] = ()
) -> GlobalBatches:
    """Return the global batches of samples of these lengths.

    Args:
        train: the keys `train.*`.
        lengths: (samples,) tokens.
        sources: all samples, in order, if they are drawn by weight.
    """
    return GlobalBatches(
        len(lengths),
        train.global_batch_size,
        train.seed,
        train.shuffle,
        sources,
        train.global_batch_tokens,
        None if train.global_batch_tokens is None else lengths,
    )


def global_batches_of(config: Config, data: TokenizedData) -> GlobalBatches:
    """Return the global batches of a run over these samples.

    Raises:
        UsageError: the weight of a source is so small that no sample of it is drawn in an epoch.
    """
    sources = tuple(
        WeightedSource(len(data.samples_of(number)), source.weight)
        for number, source in enumerate(config.data.sources)
        if source.weight is not None
    )
    batches = global_batches(config.train, data.lengths, sources)
    for name, draws in zip(data.names, batches.draws_per_epoch, strict=True) if sources else ():
        if draws == 0:
            raise UsageError(
                f"data.sources[{name}].weight: no sample of it would be drawn in an epoch of {len(data):,} samples\n"
                "  give it a larger weight, or remove the source"
            )
    return batches
