"""`chunkflow analyze`: show the lengths of samples, and what padding, packing or truncating them would cost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.cli.measured_data import MeasuredData, measured_data
from chunkflow_cli.cli.screens.analysis import print_analyses, print_next_command
from chunkflow_cli.cli.screens.plots import check_plot_path, plot_lengths
from chunkflow_cli.cli.screens.samples import print_samples
from chunkflow_cli.config.home import expand_home
from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config, SourceConfig
from chunkflow_cli.config.sources import has_data
from chunkflow_cli.console import progress_bar, stdout_console
from chunkflow_cli.data.data_sets import configs_of_sources
from chunkflow_cli.data.lengths import LengthStatistics, describe, idle_share, padding_share, truncation
from chunkflow_cli.data.source import Location
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.balance import balance, rank_loads
from chunkflow_cli.planning.chunks import count_chunks
from chunkflow_cli.training.global_batches import global_batches

CHUNK_SIZES = (2048, 4096, 8192, 16384, 32768)
TRUNCATIONS = (2048, 4096, 8192, 32768)
PADDED_BATCH = 8
"""Samples in a padded micro-batch."""
RANKS = 8
"""Number of data-parallel ranks in the balance table: a node of eight GPUs."""
REJECTED_LISTED = 100
"""Rejected rows that the JSON lists. The counts by reason include all of them."""


def run(
    paths: Sequence[str],
    loaded: LoadedConfig,
    *,
    plot: str | None = None,
    show: int | None = None,
    json_output: bool = False,
) -> dict[str, Any]:
    """Measure data sets, print the result unless `json_output` is set, and return what `--json` prints.

    Args:
        paths: the data sets; `data.path` if empty.
        plot: a PNG, SVG or PDF file for a histogram and cumulative curves.
        show: number of samples of each data set to show as they are trained on.

    Raises:
        UsageError: the data, the tokenizer or the name of the plot is wrong, or samples cannot be shown without a
            tokenizer.
    """
    config = loaded.config
    if not paths and not has_data(config.data):
        raise UsageError(
            "no data to analyze\n  name it, as in chunkflow analyze data.jsonl, or set data.path or a recipe"
        )
    if "" in paths:
        raise UsageError("the name of the data is empty\n  name it, as in chunkflow analyze data.jsonl")
    paths = [expand_home(path, "data.path") for path in paths]
    if plot is not None:
        check_plot_path(plot)
    parts = [replace(config.data, path=path, sources=[]) for path in paths] or configs_of_sources(config.data)
    measured = [measured_data(replace(config, data=part), show=show) for part in parts]
    trained = paths if len({data.format for data in measured}) == 1 else paths[:1]  # data.path has one format
    analyses = [analysis(data, config) for data in measured]
    if not paths and config.data.sources:
        for found, shares in zip(analyses, _shares(measured, config.data.sources), strict=True):
            found |= shares
    if plot is not None:
        plot_lengths({data.path: data.lengths for data in measured}, Path(plot))
    if json_output:
        for data, found in zip(measured, analyses, strict=True):
            if data.shown is not None:
                found["shown"] = [sample.to_json() for sample in data.shown]
    else:
        _print(measured, analyses, _next_command(trained, loaded), is_spaced=bool(show))
        if plot is not None:
            print(f"plot: {plot}", file=sys.stderr)
    return analyses[0] if len(analyses) == 1 else {"datasets": analyses}


def _print(
    measured: Sequence[MeasuredData], analyses: Sequence[dict[str, Any]], next_command: str, *, is_spaced: bool
) -> None:
    console, lengths = stdout_console(), [data.lengths for data in measured]
    print_analyses(console, list(zip(lengths, analyses, strict=True)))
    for data in measured:
        if data.shown is not None:
            console.print()
            print_samples(console, data.path, data.shown, data.samples)
    if is_spaced:
        console.print()
    print_next_command(console, next_command)


def _shares(measured: Sequence[MeasuredData], sources: Sequence[SourceConfig]) -> list[dict[str, Any]]:
    """Return what each source contributes to an epoch: its name, and its shares of samples, tokens and targets."""
    samples = [
        source.weight or min(data.samples, source.samples or data.samples)
        for data, source in zip(measured, sources, strict=True)
    ]
    columns = {
        "share_of_samples": samples,
        "share_of_tokens": [
            count * data.lengths.sum() / data.samples for count, data in zip(samples, measured, strict=True)
        ],
        "share_of_targets": [
            count * data.target_counts.sum() / data.samples for count, data in zip(samples, measured, strict=True)
        ],
    }
    return [
        {"source": source.name, **{name: float(parts[i] / sum(parts)) for name, parts in columns.items()}}
        for i, source in enumerate(sources)
    ]


def _next_command(paths: Sequence[str], loaded: LoadedConfig) -> str:
    """Return the command that tunes the chunk size to the data, with the user's own words."""
    words = [word for word in loaded.overrides if not (paths and word.startswith("data.path="))]
    if not loaded.config.model.path:
        words.insert(0, "model.path=MODEL")
    if paths:
        words.append(f"data.path={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}")
    return shlex.join(["chunkflow", "tune-chunk-size", *words])


def analysis(data: MeasuredData, config: Config) -> dict[str, Any]:
    """Return the findings about a data set as plain values for JSON. Shares are between 0 and 1."""
    statistics: LengthStatistics = describe(data.lengths)
    targets = int(data.target_counts.sum())
    over_limit = 0 if data.model_limit is None else int(np.count_nonzero(data.lengths > data.model_limit))
    return {
        "data": data.path,
        "format": data.format.value,
        "estimated": data.estimated,
        "rows": data.rows,
        "samples": data.samples,
        "sequences": len(data.lengths),
        "tokens": statistics.tokens,
        "targets": targets,
        "target_share": targets / statistics.tokens,
        "mean": statistics.mean,
        "quantiles": statistics.quantiles,
        "max": statistics.max,
        "cdf": statistics.shorter,
        "cdf_tokens": statistics.tokens_in_shorter,
        "longest": [{"location": str(where), "tokens": tokens} for where, tokens in data.longest],
        "duplicates": len(data.digests) - len(np.unique(data.digests)),
        "rejected": _rejected(data.rejected),
        "model_limit": data.model_limit,
        "over_model_limit": over_limit,
        "truncation": [asdict(truncation(data.lengths, limit)) for limit in TRUNCATIONS],
        "padding": {
            "batch_size": PADDED_BATCH,
            "as_they_come": padding_share(data.lengths, PADDED_BATCH),
            "sorted_by_length": padding_share(np.sort(data.lengths), PADDED_BATCH),
        },
        **_by_global_batch(data, config),
    }


def _rejected(rejected: Sequence[tuple[Location, str]]) -> dict[str, Any]:
    reasons: dict[str, dict[str, Any]] = {}
    for where, reason in rejected:
        reasons.setdefault(reason, {"rows": 0, "first": str(where)})["rows"] += 1
    return {
        "rows": len(rejected),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1]["rows"])),
        "first": [{"location": str(where), "reason": reason} for where, reason in rejected[:REJECTED_LISTED]],
    }


def _by_global_batch(data: MeasuredData, config: Config) -> dict[str, Any]:
    """Return packing, chunks and balance, computed within the global batches of one epoch of training."""
    lengths, path = data.lengths, data.path
    sequences = np.arange(len(lengths)).reshape(data.samples, -1)
    batches = global_batches(config.train, lengths[sequences].sum(axis=1))
    sizes = sorted({*CHUNK_SIZES, config.chunk.size})
    longest, tokens = int(lengths.max()), int(lengths.sum())
    bins = 0
    chunks, lower_bounds = np.zeros((2, len(sizes)), dtype=np.int64)
    dealt, balanced = [], []
    with progress_bar(f"planning {path}", batches.steps_per_epoch) as progress:
        for step in range(batches.steps_per_epoch):
            batch = lengths[sequences[batches[step]].ravel()]
            bins += count_chunks(batch, longest)
            chunks += [count_chunks(batch, size) for size in sizes]
            lower_bounds += -(-batch.sum() // np.array(sizes))
            in_turn = [np.arange(rank, len(batch), RANKS) for rank in range(RANKS)]
            dealt.append(rank_loads(batch, in_turn))
            balanced.append(rank_loads(batch, balance(batch, RANKS)))
            progress(step + 1)
    rows = []
    for size, count, lower_bound in zip(sizes, chunks.tolist(), lower_bounds.tolist(), strict=True):
        pieces = -(-lengths[lengths > size] // size)
        rows.append(
            {
                "chunk_size": size,
                "chunks": count,
                "lower_bound": lower_bound,
                "dependent": int(pieces.sum()),
                "waste": 1 - tokens / (count * size),
                "recomputed_token_share": int((pieces - 1).sum()) * size / tokens,
            }
        )
    return {
        "packing": {
            "global_batch_size": config.train.global_batch_size,
            "global_batch_tokens": config.train.global_batch_tokens,
            "configured_chunk_size": config.chunk.size,
            "to_longest": {"size": longest, "bins": bins, "waste": 1 - tokens / (bins * longest)},
            "chunks": rows,
        },
        "ranks": {
            "ranks": RANKS,
            "configured": config.launch.processes,
            "idle_as_dealt": idle_share(dealt),
            "idle_balanced": idle_share(balanced),
        },
    }
