"""The screen of `chunkflow analyze`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from chunkflow_cli.console import counted, shortened
from chunkflow_cli.data.lengths import histogram, short_count

BLOCKS = " ▏▎▍▌▋▊▉█"
"""Eighths of a character."""
WIDEST = 140
"""Bars longer than that say no more."""
SHOWN_REASONS = 5
LIGHTEST_BAR = 1
"""Eighths that a bin with anything in it gets: a long tail of a few samples must be seen."""


def print_analyses(console: Console, analyses: Sequence[tuple[NDArray[np.int64], dict[str, Any]]]) -> None:
    """
    Args:
        analyses: of each data set, (samples,) lengths and what `analyze.analysis` found.
    """
    for index, (lengths, found) in enumerate(analyses):
        if index:
            console.print()
        console.print(_screen(console, lengths, found))
    if len(analyses) > 1:
        console.print()
        console.print(_side_by_side([found for _, found in analyses]))
    if any(found["estimated"] for _, found in analyses):
        console.print()
        console.print(
            "[bold]Lengths are estimated[/] from bytes, 4 a token: expect to be off by a quarter.\n"
            "Exact ones need a tokenizer: add [bold]model.path=MODEL[/] or [bold]recipe=NAME[/]."
        )


def _screen(console: Console, lengths: NDArray[np.int64], found: dict[str, Any]) -> Group:
    parts: list[Text | Table] = [
        _headline(found, console.width),
        Text(),
        _histogram(min(console.width, WIDEST), lengths),
        Text(),
        _cumulative(found),
        Text(),
        _longest(found, console.width),
        Text(),
        _costs(found),
        Text("* tokens that are forwarded twice, with chunk.k=1", style="dim"),
        Text(),
        _ranks(found),
    ]
    rejected = _rejected(found, console.width)
    return Group(*parts, *([Text(), rejected] if rejected is not None else []))


def _headline(found: dict[str, Any], width: int) -> Text:
    about = "about " if found["estimated"] else ""
    quantiles = found["quantiles"]
    text = Text()
    text.append(shortened(found["data"], width - len(found["format"]) - 2), style="bold")
    text.append(f"  {found['format']}\n")
    text.append(
        f"{counted(found['samples'], 'sample')}, {about}{counted(found['tokens'], 'token')}, {found['targets']:,} of "
        f"them targets ({percent(found['target_share'])})\n"
    )
    text.append(
        f"mean {found['mean']:,.0f}, half up to {quantiles['p50']:,}, 90 % {quantiles['p90']:,}, "
        f"99 % {quantiles['p99']:,}, 99.9 % {quantiles['p999']:,}, all {found['max']:,}"
    )
    if found["duplicates"]:
        repeat = "repeats" if found["duplicates"] == 1 else "repeat"
        text.append(
            f"\n{counted(found['duplicates'], 'sample')} {repeat} an earlier one ({_share(found, 'duplicates')})"
        )
    if found["over_model_limit"]:
        are = "is" if found["over_model_limit"] == 1 else "are"
        text.append(
            f"\n{counted(found['over_model_limit'], 'sample')} {are} longer than the limit of "
            f"{found['model_limit']:,} tokens"
        )
    return text


def _histogram(width: int, lengths: NDArray[np.int64]) -> Table:
    bins = histogram(lengths)
    samples, tokens = bins.samples / bins.samples.sum(), bins.tokens / bins.tokens.sum()
    label = max(len(_bin_name(low, high)) for low, high in itertools.pairwise(bins.edges.tolist()))
    fixed = label + 2 * len("30.2 %") + len(f"{bins.samples.max():,}") + 5  # and a space between columns
    bar = max(6, (width - fixed) // 2)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("samples", width=bar, no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("of all tokens", width=bar, no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for index in range(len(bins.samples)):
        table.add_row(
            _bin_name(int(bins.edges[index]), int(bins.edges[index + 1])),
            Text(bar_of(samples[index], samples.max(), bar), style="cyan"),
            f"{bins.samples[index]:,}",
            percent(samples[index]),
            Text(bar_of(tokens[index], tokens.max(), bar), style="magenta"),
            percent(tokens[index]),
        )
    return table


def _bin_name(low: int, high: int) -> str:
    return f"{short_count(low)}–{short_count(high)}"


def bar_of(value: float, largest: float, width: int) -> str:
    """A horizontal bar of at most `width` characters, in eighths of one."""
    if value <= 0 or largest <= 0:
        return ""
    eighths = max(LIGHTEST_BAR, round(8 * width * value / largest))
    return BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def _cumulative(found: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("shorter than", no_wrap=True)
    for name in found["cdf"]:
        table.add_column(name.removeprefix("<"), justify="right", no_wrap=True)
    table.add_row("samples", *(percent(share) for share in found["cdf"].values()))
    table.add_row("their tokens", *(percent(share) for share in found["cdf_tokens"].values()))
    cuts = {cut["limit"]: cut for cut in found["truncation"]}
    table.add_row("", *("" for _ in found["cdf"]))
    table.add_row("[bold]cut off at[/]", *(f"[bold]{short_count(limit)}[/]" for limit in cuts))
    table.add_row("samples cut", *(f"{cut['samples_cut']:,}" for cut in cuts.values()))
    table.add_row("tokens lost", *(percent(cut["tokens_lost"] / found["tokens"]) for cut in cuts.values()))
    return table


def _longest(found: dict[str, Any], width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("the longest samples", no_wrap=True)
    room = width - max(len("tokens"), len(f"{found['max']:,}")) - 2
    for sample in found["longest"]:
        table.add_row(f"{sample['tokens']:,}", Text(shortened(sample["location"], room)))
    return table


def _costs(found: dict[str, Any]) -> Table:
    """What becomes of the machine under each way of making batches."""
    padding, packing = found["padding"], found["packing"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("batches made by", no_wrap=True)
    table.add_column("empty", justify="right", no_wrap=True)
    table.add_column("twice*", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    batch = f"micro-batches of {padding['batch_size']}"
    table.add_row("padding, as they come", percent(padding["as_they_come"]), "", batch)
    table.add_row("padding, sorted", percent(padding["sorted_by_length"]), "", f"{batch}, no shuffling")
    longest = packing["to_longest"]
    table.add_row("packing", percent(longest["waste"]), "", f"{longest['bins']:,} of the longest sample's size")
    for chunk in packing["chunks"]:
        recomputed = chunk["recomputed_token_share"]
        table.add_row(f"chunks of {short_count(chunk['chunk_size'])}", percent(chunk["waste"]),
                      percent(recomputed) if recomputed else "", counted(chunk["chunks"], "chunk"))  # fmt: skip
    return table


def _ranks(found: dict[str, Any]) -> Table:
    ranks = found["ranks"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(f"{ranks['ranks']} ranks, samples", no_wrap=True)
    table.add_column("idle", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    batch = f"{found['packing']['global_batch_size']} samples a step"
    table.add_row("dealt in turn", percent(ranks["idle_as_dealt"]), f"waiting for the slowest; {batch}")
    table.add_row("balanced by tokens", percent(ranks["idle_balanced"]), "")
    return table


def _rejected(found: dict[str, Any], width: int) -> Text | None:
    rejected = found["rejected"]
    if not rejected["rows"]:
        return None
    text = Text(f"{counted(rejected['rows'], 'row')} cannot be trained on\n", style="bold")
    for reason, place in list(rejected["reasons"].items())[:SHOWN_REASONS]:
        line = f"{place['rows']:>8,}  {reason}, first "
        if len(line) + len(place["first"]) > width:
            line, room = f"{place['rows']:>8,}  {reason}\n          first ", width - 16
        else:
            room = width - len(line)
        text.append(line + shortened(place["first"], room) + "\n", style="not bold")
    more = len(rejected["reasons"]) - SHOWN_REASONS
    if more > 0:
        text.append(f"          and {counted(more, 'more reason')}\n", style="not bold")
    text.append("train stops at them, or leaves them out with data.bad_rows=skip", style="not bold")
    return text


def _side_by_side(analyses: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("data", overflow="fold")
    for name in ("samples", "tokens", "mean", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("<1K", "<8K", "<32K"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in analyses:
        table.add_row(
            Text(Path(found["data"]).name), f"{found['samples']:,}", f"{found['tokens']:,}", f"{found['mean']:,.0f}",
            f"{found['max']:,}", *(percent(found["cdf"][name]) for name in ("<1K", "<8K", "<32K")),
        )  # fmt: skip
    return table


def _share(found: dict[str, Any], key: str) -> str:
    return percent(found[key] / found["samples"])


def percent(share: float) -> str:
    """Two digits behind the point near both ends, where a long tail is told; one in between."""
    percent = 100 * share
    if percent in (0, 100) or 1 <= percent <= 99:
        return f"{percent:.1f} %" if percent not in (0, 100) else f"{percent:.0f} %"
    return f"{percent:.2f} %"
