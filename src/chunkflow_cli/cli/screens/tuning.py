"""The screen of `chunkflow tune-chunk-size`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import percent
from chunkflow_cli.console import human_bytes
from chunkflow_cli.data.lengths import short_count

SHADES = ((1.02, "black on green"), (1.10, "black on bright_green"), (1.25, "black on yellow"), (1e9, "black on red"))
"""Styles by how many times as long as the best pair a pair takes."""
RANKED_SHOWN = 6


def print_tuning(console: Console, result: dict[str, Any], recipe: str) -> None:
    """Print the screen of a search.

    Args:
        result: what the search found, as JSON.
        recipe: for the command to run next.
    """
    best = result["best"]
    console.print(Text(f"chunk.size={best['chunk_size']} chunk.k={best['k']}{_layout(best)}", style="bold"))
    console.print(result["explanation"])
    error = result["cost_model_worst_error"]
    basis = result["cost_model"] + ("" if error is None else f", fitted to within {percent(error)}")
    console.print(f"costs: {basis}; {result['steps_planned']} global batches planned for each pair")
    console.print()
    console.print(_heat_map(result))
    console.print()
    layouts = _layouts(result)
    if layouts is not None:
        console.print(layouts)
        console.print()
    console.print(_ranking(result))
    console.print()
    recipe_word = f"recipe={recipe} " if recipe != "default" else ""
    console.print(
        f"Train with it:  chunkflow train {recipe_word}--overrides {result['overrides_file']}", soft_wrap=True
    )


def _layout(row: dict[str, Any]) -> str:
    words = " chunk.cuts=time" if row["cuts"] == "time" else ""
    words += f" parallel.sequence={row['sequence']}" if row["sequence"] > 1 else ""
    words += f" parallel.pipeline={row['stages']}" if row["stages"] > 1 else ""
    return words + (f" on {row['stages'] * row['data_parallel']} devices" if row["data_parallel"] > 1 else "")


def _layouts(result: dict[str, Any]) -> Table | None:
    """Return the best pair of each layout, if there are several."""
    if len(result["layouts"]) == 1:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("stages", "ranks", "group", "cuts", "chunk.size", "K", "predicted", "memory", "waiting"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["layouts"]:
        layout = (str(row["stages"]), str(row["data_parallel"]), str(row["sequence"]))
        memory = human_bytes(row["memory_bytes"])
        if not row["fits"]:
            table.add_row(*layout, "", "", "", "does not fit", memory, "")
            continue
        pair = (row["cuts"], f"{row['chunk_size']:,}", str(row["k"]))
        table.add_row(*layout, *pair, f"{row['step_seconds']:.3g} s", memory, percent(row["bubble_ratio"]))
    return table


def _heat_map(result: dict[str, Any]) -> Table:
    best = result["best"]
    alike = ("sequence", "stages", "cuts")
    rows = [row for row in result["candidates"] if all(row[name] == best[name] for name in alike)]
    candidates = {(row["chunk_size"], row["k"]): row for row in rows}
    sizes = sorted({size for size, _ in candidates})
    ks = sorted({k for _, k in candidates})
    fastest = min(row["step_seconds"] for row in candidates.values() if row["fits"])
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("seconds a step", no_wrap=True)
    for k in ks:
        table.add_column(f"K={k}", justify="right", no_wrap=True)
    for size in sizes:
        cells = []
        for k in ks:
            row = candidates.get((size, k))
            if row is None:
                cells.append(Text("="))  # as the column before: the longest sample has no more chunks
            elif not row["fits"]:
                cells.append(Text(human_bytes(row["memory_bytes"]), style="dim"))
            else:
                ratio = row["step_seconds"] / fastest
                style = next(style for most, style in SHADES if ratio <= most)
                cells.append(Text(f"{row['step_seconds']:8.3g}", style=style))
        table.add_row(f"chunk.size {short_count(size)}", *cells)
    of_layout = ""
    if len(result["layouts"]) > 1:
        of_layout += f"groups of {best['sequence']}; " if best["sequence"] > 1 else ""
        of_layout += f"{best['stages']} pipeline stages, cuts of equal {best['cuts']}; " if best["stages"] > 1 else ""
    table.caption = f"{of_layout}dim: does not fit into {human_bytes(result['memory_limit_bytes'])}"
    table.caption_justify = "left"
    return table


def _ranking(result: dict[str, Any]) -> Table:
    rows = sorted((row for row in result["candidates"] if row["fits"]), key=lambda row: row["step_seconds"])
    columns = {
        "chunk.size": lambda row: f"{row['chunk_size']:,}",
        "K": lambda row: str(row["k"]),
        "stages": lambda row: str(row["stages"]),
        "group": lambda row: str(row["sequence"]),
        "cuts": lambda row: row["cuts"],
        "predicted": lambda row: f"{row['step_seconds']:.3g} s",
        "measured": lambda row: "" if row["measured_step_seconds"] is None else f"{row['measured_step_seconds']:.3g} s",
        "memory": lambda row: human_bytes(row["memory_bytes"]),
        "recomputed": lambda row: percent(row["recompute_share"]),
        "waiting": lambda row: percent(row["bubble_ratio"]),
        "full": lambda row: percent(row["fill"]),
    }
    for column, name in (("stages", "stages"), ("group", "sequence"), ("cuts", "cuts")):
        if len({row[name] for row in rows}) == 1:
            del columns[column]
    if len({(row["stages"], row["sequence"], row["cuts"]) for row in rows}) > 1:  # 80 columns have no room for all
        del columns["recomputed"], columns["full"]
    if all(row["measured_step_seconds"] is None for row in rows):
        del columns["measured"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:RANKED_SHOWN]:
        table.add_row(*(value(row) for value in columns.values()))
    return table
