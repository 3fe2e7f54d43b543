"""The screen of `chunkflow analyze`."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import bar_of, columns
from chunkflow_cli.console import counted, percent, shortened
from chunkflow_cli.data.lengths import histogram, short_count

WIDEST = 140
"""Maximum width of the histogram in columns. Longer bars would show no more."""
SHOWN_REASONS = 5


def print_analyses(console: Console, analyses: Sequence[tuple[NDArray[np.int64], dict[str, Any]]]) -> None:
    """Print the screen of each data set, and a comparison if there are several.

    Args:
        analyses: (samples,) lengths of each data set, and what `analyze.analysis` found.
    """
    for index, (lengths, found) in enumerate(analyses):
        for place, block in enumerate(_blocks(console.width, lengths, found)):
            if index or place:
                console.print()
            console.print(block)
    if len(analyses) > 1:
        console.print()
        console.print(_side_by_side([found for _, found in analyses]))
    if any(found["estimated"] for _, found in analyses):
        console.print()
        title, tokenizer, recipe = (
            (words, "bold") for words in ("Lengths are estimated", "model.path=MODEL", "recipe=NAME")
        )
        text = " from the text. They may be off by a quarter, or by a factor of two for languages other than English."
        console.print(Text.assemble(title, text))
        console.print(Text.assemble("For exact lengths, name a model: ", tokenizer, " or ", recipe, "."))


def print_next_command(console: Console, command: str) -> None:
    """Print the command to go on with, on one line, so that it can be copied."""
    console.print(Text(f"Next:  {command}", style="bold"), soft_wrap=True)


def _blocks(width: int, lengths: NDArray[np.int64], found: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield the parts of a screen, which are printed with an empty line between them."""
    yield _headline(found, width)
    yield _histogram(min(width, WIDEST), lengths, _unit(found))
    yield _cumulative(found)
    yield _longest(found, width)
    batches = f"chunks are made within steps of {_batch(found['packing'])}"
    notes = f"* share of the tokens that run forward twice with chunk.k=1; {batches}"
    yield Group(_costs(found), Text(notes, style="dim"))
    if found["ranks"]["configured"] > 1:
        yield _ranks(found)
    if found["rejected"]["rows"]:
        yield _rejected(found["rejected"], width)
    yield _conclusion(found)


def _batch(packing: dict[str, Any]) -> str:
    size, tokens = packing["global_batch_size"], packing["global_batch_tokens"]
    return f"train.global_batch_size={size} samples" if tokens is None else f"train.global_batch_tokens={tokens} tokens"


def _headline(found: dict[str, Any], width: int) -> Text:
    about = "about " if found["estimated"] else ""
    quantiles = found["quantiles"]
    text = Text()
    text.append(shortened(found["data"], width - len(found["format"]) - 2), style="bold")
    text.append(f"  {found['format']}\n")
    if rejected := found["rejected"]["rows"]:
        rows = f"{rejected:,} of {counted(found['rows'] + rejected, 'row')} cannot be trained on (reasons below)\n"
        text.append(rows, style="bold red")
    of_rows = "" if found["rows"] == found["samples"] else f" of {counted(found['rows'], 'row')}"
    is_pairs = _unit(found) == "answers"
    samples = f"{counted(found['samples'], 'pair')} of answers" if is_pairs else counted(found["samples"], "sample")
    text.append(
        f"{samples}{of_rows}, {about}{counted(found['tokens'], 'token')}, "
        f"{found['targets']:,} of them targets ({percent(found['target_share'])})\n"
    )
    each = "answer with its prompt" if is_pairs else "sample"
    text.append(
        f"per {each}: mean {found['mean']:,.0f}, median {quantiles['p50']:,}, p90 {quantiles['p90']:,}, "
        f"p99 {quantiles['p99']:,}, p99.9 {quantiles['p999']:,}, longest {found['max']:,}"
    )
    if found["duplicates"]:
        repeat = "repeats" if found["duplicates"] == 1 else "repeat"
        share = percent(found["duplicates"] / found["samples"])
        text.append(f"\n{counted(found['duplicates'], 'sample')} {repeat} an earlier one ({share})")
    if found["over_model_limit"]:
        are = "is" if found["over_model_limit"] == 1 else "are"
        over = counted(found["over_model_limit"], "answer" if is_pairs else "sample")
        text.append(f"\n{over} {are} longer than the limit of {found['model_limit']:,} tokens")
    return text


def _unit(found: dict[str, Any]) -> str:
    """Return what lengths are of: of the answers, with their prompts, if samples are pairs."""
    return "answers" if found["sequences"] > found["samples"] else "samples"


def _histogram(width: int, lengths: NDArray[np.int64], unit: str) -> Table:
    bins = histogram(lengths)
    samples, tokens = bins.samples / bins.samples.sum(), bins.tokens / bins.tokens.sum()
    label = max(len(_bin_name(low, high)) for low, high in itertools.pairwise(bins.edges.tolist()))
    fixed = label + 2 * len("30.2 %") + len(f"{bins.samples.max():,}") + 5  # and a space between columns
    bar = max(6, (width - fixed) // 2)
    table = columns(">tokens", unit, ">", ">", "of all tokens", ">", gap=1)
    table.columns[1].width = table.columns[4].width = bar
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


def _cumulative(found: dict[str, Any]) -> Table:
    table = columns("shorter than", *(name.replace("<", ">") for name in found["cdf"]))
    table.add_row(_unit(found), *(percent(share) for share in found["cdf"].values()))
    table.add_row("their tokens", *(percent(share) for share in found["cdf_tokens"].values()))
    cuts = {cut["limit"]: cut for cut in found["truncation"]}
    table.add_row("", *("" for _ in found["cdf"]))
    table.add_row("cut off at", *(short_count(limit) for limit in cuts), style="bold")
    table.add_row(f"{_unit(found)} cut", *(f"{cut['samples_cut']:,}" for cut in cuts.values()))
    table.add_row("tokens lost", *(percent(cut["tokens_lost"] / found["tokens"]) for cut in cuts.values()))
    return table


def _longest(found: dict[str, Any], width: int) -> Table:
    table = columns(">tokens", "longest samples")
    room = width - max(len("tokens"), len(f"{found['max']:,}")) - 2
    for sample in found["longest"]:
        table.add_row(f"{sample['tokens']:,}", Text(shortened(sample["location"], room)))
    return table


def _costs(found: dict[str, Any]) -> Table:
    """Show what each way of making batches wastes."""
    padding, packing = found["padding"], found["packing"]
    table = columns("batches made by", ">empty", ">recomputed*", "")
    batch = f"micro-batches of {padding['batch_size']}"
    table.add_row("padding, as they come", percent(padding["as_they_come"]), "", batch)
    table.add_row("padding, sorted", percent(padding["sorted_by_length"]), "", f"{batch}, not shuffled")
    longest = packing["to_longest"]
    table.add_row(
        "packing", percent(longest["waste"]), "", f"{counted(longest['bins'], 'bin')} of {longest['size']:,} tokens"
    )
    for chunk in packing["chunks"]:
        recomputed = chunk["recomputed_token_share"]
        table.add_row(f"chunks of {short_count(chunk['chunk_size'])}", percent(chunk["waste"]),
                      percent(recomputed) if recomputed else "", counted(chunk["chunks"], "chunk"))  # fmt: skip
    return table


def _conclusion(found: dict[str, Any]) -> Text:
    """Return a sentence about what truncation would lose and how much room chunks leave empty."""
    packing = found["packing"]
    chunk = next(row for row in packing["chunks"] if row["chunk_size"] == packing["configured_chunk_size"])
    text = Text()
    cuts = [cut for cut in found["truncation"] if cut["tokens_lost"]]
    if cuts:
        cut = cuts[-1]
        lost = percent(cut["tokens_lost"] / found["tokens"])
        text.append(f"Truncating at {short_count(cut['limit'])} would lose {lost} of all tokens. ")
    size, empty = short_count(chunk["chunk_size"]), percent(chunk["waste"])
    text.append(f"Chunks of {size} lose no tokens, and leave {empty} of their room empty.")
    return text


def _ranks(found: dict[str, Any]) -> Table:
    ranks = found["ranks"]
    table = columns(f"{ranks['ranks']} ranks, samples", ">idle", "")
    batch = f"steps of {_batch(found['packing'])}"
    table.add_row("dealt in turn", percent(ranks["idle_as_dealt"]), f"waiting for the slowest; {batch}")
    table.add_row("balanced by tokens", percent(ranks["idle_balanced"]), "")
    return table


def _rejected(rejected: dict[str, Any], width: int) -> Text:
    text = Text(f"{counted(rejected['rows'], 'row')} cannot be trained on\n", style="bold")
    for reason, place in list(rejected["reasons"].items())[:SHOWN_REASONS]:
        line = f"{place['rows']:>8,}  {reason}, first "
        if len(line) + len(place["first"]) > width:
            count, indent = f"{place['rows']:>8,}  ", " " * 10
            line = textwrap.fill(reason, width, initial_indent=count, subsequent_indent=indent)
            line, room = f"{line}\n{indent}first ", width - 16
        else:
            room = width - len(line)
        text.append(line + shortened(place["first"], room) + "\n", style="not bold")
    more = len(rejected["reasons"]) - SHOWN_REASONS
    if more > 0:
        text.append(f"          and {counted(more, 'more reason')}\n", style="not bold")
    text.append("train stops at these rows, unless data.bad_rows=skip leaves them out", style="not bold")
    return text


def _side_by_side(analyses: Sequence[dict[str, Any]]) -> Table:
    shares = ("<1K", "<8K", "<32K")
    are_sources = "source" in analyses[0]
    parts = ("share_of_samples", "share_of_tokens", "share_of_targets") if are_sources else ()
    titles = [f">{name.replace('share_', '')}".replace("_", " ") for name in parts]
    table = columns("data", ">samples", ">tokens", ">mean", ">longest", *(f">{share}" for share in shares), *titles)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for found in analyses:
        name = found["source"] if are_sources else Path(found["data"]).name
        table.add_row(
            Text(name), f"{found['samples']:,}", f"{found['tokens']:,}", f"{found['mean']:,.0f}",
            f"{found['max']:,}", *(percent(found["cdf"][share]) for share in shares),
            *(percent(found[part]) for part in parts),
        )  # fmt: skip
    return table
