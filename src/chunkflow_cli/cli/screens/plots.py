"""Plots in files. matplotlib is imported inside the functions: it takes half a second, and only plots need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.cli.screens.plan import KINDS, row_names
from chunkflow_cli.data.lengths import histogram, short_count
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
SAMPLES_COLOUR = "#0077bb"
TOKENS_COLOUR = "#cc3377"
CURVE_POINTS = 2_000
"""Points of a curve, for any number of samples."""


def check_plot_path(path: str) -> None:
    """Check the name of a plot before the work begins.

    Raises:
        UsageError: no plot can be written there.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot={path}: the name must end in {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise UsageError(f"--plot={path}: there is no folder {target.parent}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise UsageError(f"--plot={path} cannot be written: {error}") from error


def plot_lengths(data: Mapping[str, NDArray[np.int64]], path: Path) -> None:
    """Draw a histogram and cumulative curves of samples and tokens, one row per data set.

    Args:
        data: the lengths of the samples, (samples,), by name of the data set.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(data)), layout="constrained")
    axes = figure.subplots(len(data), 2, squeeze=False)
    for (left, right), (name, lengths) in zip(axes, data.items(), strict=True):
        _draw_histogram(left, lengths)
        _draw_cumulative(right, lengths)
        left.set_title(f"{Path(name).name}: {len(lengths):,} samples, {int(lengths.sum()):,} tokens", loc="left")
    save(figure, path)


def _draw_histogram(axes: Any, lengths: NDArray[np.int64]) -> None:
    bins = histogram(lengths)
    places = np.arange(len(bins.samples))
    axes.bar(places - 0.2, 100 * bins.samples / bins.samples.sum(), 0.4, color=SAMPLES_COLOUR, label="samples")
    axes.bar(places + 0.2, 100 * bins.tokens / bins.tokens.sum(), 0.4, color=TOKENS_COLOUR, label="tokens")
    axes.set_xticks(np.arange(len(bins.edges)) - 0.5, [short_count(int(edge)) for edge in bins.edges], rotation=45)
    _finish_axes(axes, "share in %")


def _draw_cumulative(axes: Any, lengths: NDArray[np.int64]) -> None:
    ascending = np.sort(lengths)
    tokens = np.cumsum(ascending) / ascending.sum()
    # Points spaced evenly over samples alone would leave only a handful for the tail, where the tokens are.
    over_samples = np.linspace(0, len(ascending) - 1, CURVE_POINTS).astype(np.int64)
    points = np.union1d(over_samples, np.searchsorted(tokens, np.linspace(0, 1, CURVE_POINTS, endpoint=False)))
    shares = (points + 1) / len(ascending)
    axes.step(ascending[points], 100 * shares, color=SAMPLES_COLOUR, where="post", label="samples")
    axes.step(ascending[points], 100 * tokens[points], color=TOKENS_COLOUR, where="post", label="tokens")
    axes.set_xscale("log", base=2)
    ticks = 2 ** np.arange(int(ascending[0]).bit_length() - 1, int(ascending[-1]).bit_length() + 1)
    axes.set_xticks(ticks, [short_count(int(tick)) for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    _finish_axes(axes, "up to this length, in %")


def _finish_axes(axes: Any, y: str) -> None:
    axes.set(xlabel="length in tokens", ylabel=y)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


LABELLED_OPERATIONS = 120
"""Maximum number of operations per row that are labeled with their chunk; more labels would be unreadable."""


def plot_timeline(panels: Mapping[str, Timeline], path: Path) -> None:
    """Draw the operations of each rank and stage over time, labeled with their chunks.

    Args:
        panels: timelines by title, drawn one below the other.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [timeline.ranks * timeline.stages for timeline in panels.values()]
    figure = Figure(figsize=(12, sum(1.4 + 0.45 * count for count in rows)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[1.4 + 0.45 * count for count in rows])
    for axes, (title, timeline) in zip(all_axes[:, 0], panels.items(), strict=True):
        _draw_timeline(axes, timeline)
        axes.set_title(title, loc="left")
    drawn = set().union(*(timeline.kind.tolist() for timeline in panels.values()))
    present = [Patch(color=colour, label=name) for kind, (name, _, colour) in KINDS.items() if kind in drawn]
    figure.legend(handles=present, loc="outside lower center", ncols=len(present), frameon=False)
    save(figure, path)


def _draw_timeline(axes: Any, timeline: Timeline) -> None:
    names = row_names(timeline)
    labelled = len(timeline.chunk) <= LABELLED_OPERATIONS * len(names)
    for row, (rank, stage) in enumerate(names):
        here = (timeline.rank == rank) & (timeline.stage == stage)
        for kind, (_, _, colour) in KINDS.items():
            chosen = here & (timeline.kind == kind)
            starts, stops = timeline.start_seconds[chosen], timeline.stop_seconds[chosen]
            bars = list(zip(starts, stops - starts, strict=True))
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.4)
            for start, stop, chunk in zip(starts, stops, timeline.chunk[chosen], strict=True):
                if labelled and stop - start > timeline.makespan / 60:
                    axes.text((start + stop) / 2, row, str(chunk), ha="center", va="center", color="white", fontsize=7)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan or 1)
    axes.set_xlabel("seconds, or units of tokens if costs are proportional")
    axes.spines[["top", "right", "left"]].set_visible(False)


def plot_grid(candidates: Sequence[Mapping[str, Any]], best: Mapping[str, Any], path: Path) -> None:
    """Draw predicted seconds by chunk size and K. Pairs that do not fit are empty; the best has a frame.

    Args:
        candidates: rows with chunk_size, k, step_seconds, memory_bytes and fits.
        best: the chosen row.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    sizes = sorted({row["chunk_size"] for row in candidates})
    ks = sorted({row["k"] for row in candidates})
    seconds = np.full((len(sizes), len(ks)), np.nan)
    figure = Figure(figsize=(2 + 1.1 * len(ks), 1.5 + 0.55 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    for row in candidates:
        place = sizes.index(row["chunk_size"]), ks.index(row["k"])
        if row["fits"]:
            seconds[place] = row["step_seconds"]
        words = f"{row['step_seconds']:.3g} s" if row["fits"] else f"{row['memory_bytes'] / 2**30:.0f} GiB"
        axes.text(
            place[1], place[0], words, ha="center", va="center", color="black" if row["fits"] else "gray", fontsize=8
        )
    image = axes.imshow(seconds, cmap="RdYlGn_r", aspect="auto")
    figure.colorbar(image, ax=axes, label="predicted seconds per step")
    axes.add_patch(
        Rectangle((ks.index(best["k"]) - 0.5, sizes.index(best["chunk_size"]) - 0.5), 1, 1, fill=False, linewidth=2.5)
    )
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_yticks(range(len(sizes)), [short_count(size) for size in sizes])
    axes.set(xlabel="K", ylabel="chunk.size")
    axes.set_title("gray: does not fit", loc="left", fontsize=9)
    save(figure, path)
