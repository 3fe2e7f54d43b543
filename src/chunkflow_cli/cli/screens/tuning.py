"""The screen of `chunkflow tune-chunk-size`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import columns
from chunkflow_cli.console import counted, human_bytes, human_seconds, percent
from chunkflow_cli.data.lengths import short_count

SHADES = ((1.02, "black on green"), (1.10, "black on bright_green"), (1.25, "black on yellow"), (1e9, "black on red"))
"""Pairs (ratio, style): the cell style for times up to this ratio to the best time."""
RANKED_SHOWN = 6
LAYOUT = ("sequence", "stages", "cuts")
"""The fields in which two candidates of the same pair may differ."""


def print_tuning(console: Console, result: dict[str, Any]) -> None:
    """Print the screen of a search, given as JSON."""
    best = result["best"]
    console.print(Text(f"chunk.size={best['chunk_size']} chunk.k={best['k']}{_layout(best)}", style="bold"))
    error = result["cost_model_worst_error"]
    is_measured = error is not None
    source = "measured on" if is_measured else "predicted for"
    note = f" (fitted to within {percent(error)})" if is_measured else ", from its data sheet; nothing was run"
    console.print(
        Text.assemble(
            (f"{source} {result['device']}", "bold"), f"{note}; ",
            f"{counted(result['steps_planned'], 'global batch', 'global batches')} planned for each pair",
        )
    )  # fmt: skip
    console.print(Text(result["explanation"]))
    console.print()
    _print_heat_map(console, result)
    console.print()
    if len(result["layouts"]) > 1:
        console.print(_layouts(result["layouts"]))
        console.print()
    console.print(_ranking(result["candidates"]))
    console.print()
    console.print(Text(f"Train with it:  {result['command']}"), soft_wrap=True)


def _layout(row: dict[str, Any]) -> str:
    words = " chunk.cuts=time" if row["cuts"] == "time" else ""
    words += " chunk.offload_state=host" if row["offload_state"] == "host" else ""
    words += f" parallel.sequence={row['sequence']}" if row["sequence"] > 1 else ""
    words += f" parallel.pipeline={row['stages']}" if row["stages"] > 1 else ""
    return words + (f" on {row['stages'] * row['data_parallel']} devices" if row["data_parallel"] > 1 else "")


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else human_seconds(seconds)


def _layouts(rows: list[dict[str, Any]]) -> Table:
    """Return a table of the best pair of each layout."""
    table = columns(">stages", ">ranks", ">group", ">cuts", ">chunk.size", ">K", ">predicted", ">memory", ">waiting")
    for row in rows:
        layout = (str(row["stages"]), str(row["data_parallel"]), str(row["sequence"]))
        memory = human_bytes(row["memory_bytes"])
        if row["fits"]:
            pair = (row["cuts"], f"{row['chunk_size']:,}", str(row["k"]))
            table.add_row(*layout, *pair, _seconds(row["step_seconds"]), memory, percent(row["bubble_ratio"]))
        else:
            table.add_row(*layout, "", "", "", "does not fit", memory, "")
    return table


def _print_heat_map(console: Console, result: dict[str, Any]) -> None:
    """Print the time of every pair with the layout of the best one."""
    best = result["best"]
    rows = [row for row in result["candidates"] if all(row[name] == best[name] for name in LAYOUT)]
    candidates = {(row["chunk_size"], row["k"]): row for row in rows}
    ks = sorted({row["k"] for row in rows})
    fastest = min(row["step_seconds"] for row in rows if row["fits"])
    unit, scale = ("ms", 1000.0) if max(row["step_seconds"] for row in rows if row["fits"]) < 1 else ("s", 1.0)
    table = columns(f"{unit} per step", *(f">K={k}" for k in ks), gap=1)
    notes = []
    if len(result["layouts"]) > 1:
        notes += [f"groups of {best['sequence']}"] if best["sequence"] > 1 else []
        notes += [f"{best['stages']} pipeline stages, cuts of equal {best['cuts']}"] if best["stages"] > 1 else []
    if len(candidates) < len(ks) * len({row["chunk_size"] for row in rows}):
        notes.append("=: the same as with a smaller K, because no sample has more chunks")
    if not all(row["fits"] for row in rows):
        notes.append(f"-: does not fit into {human_bytes(result['memory_limit_bytes'])}")
    for size in sorted({row["chunk_size"] for row in rows}):
        cells = [_cell(candidates.get((size, k)), fastest, scale) for k in ks]
        table.add_row(f"chunk.size {short_count(size)}", *cells)
    console.print(table)
    if notes:
        console.print(Text("; ".join(notes), style="italic"))


def _cell(row: dict[str, Any] | None, fastest: float, scale: float) -> Text:
    if row is None:
        return Text("=")
    if not row["fits"]:
        return Text("-")
    style = next(style for most, style in SHADES if row["step_seconds"] / fastest <= most)
    value = scale * row["step_seconds"]
    return Text(f" {value:,.0f}" if value >= 1000 else f" {value:#.3g}".rstrip("."), style=style)


def _ranking(candidates: list[dict[str, Any]]) -> Table:
    rows = sorted((row for row in candidates if row["fits"]), key=lambda row: row["step_seconds"])
    cells = {
        "chunk.size": lambda row: f"{row['chunk_size']:,}",
        "K": lambda row: str(row["k"]),
        "stages": lambda row: str(row["stages"]),
        "group": lambda row: str(row["sequence"]),
        "cuts": lambda row: row["cuts"],
        "state": lambda row: "host" if row["offload_state"] == "host" else "device",
        "predicted": lambda row: _seconds(row["step_seconds"]),
        "measured": lambda row: _seconds(row["measured_step_seconds"]),
        "memory": lambda row: human_bytes(row["memory_bytes"]),
        "recomputed": lambda row: percent(row["recompute_share"]),
        "waiting": lambda row: percent(row["bubble_ratio"]),
        "full": lambda row: percent(row["fill"]),
    }
    for column, name in (("stages", "stages"), ("group", "sequence"), ("cuts", "cuts"), ("state", "offload_state")):
        if len({row[name] for row in rows}) == 1:
            del cells[column]
    if {"stages", "group", "cuts", "state"} & cells.keys():  # 80 columns have no room for all
        del cells["recomputed"], cells["full"]
    if all(row["measured_step_seconds"] is None for row in rows):
        del cells["measured"]
    table = columns(*(f">{name}" for name in cells))
    for row in rows[:RANKED_SHOWN]:
        table.add_row(*(cell(row) for cell in cells.values()))
    return table
