"""The screen of `chunkflow tune-chunk-size`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.lengths import short_count
from chunkflow_cli.report.analysis import percent
from chunkflow_cli.report.console import human_bytes

SHADES = ((1.02, "black on green"), (1.10, "black on bright_green"), (1.25, "black on yellow"), (1e9, "black on red"))
"""By how many times the best a pair takes."""
RANKED_SHOWN = 6


def print_tuning(console: Console, result: dict[str, Any], recipe: str) -> None:
    """
    Args:
        result: what the search found, as JSON.
        recipe: for the words of the next command.
    """
    best = result["best"]
    console.print(Text(f"chunk.size={best['chunk_size']} chunk.k={best['k']}", style="bold"))
    console.print(result["explanation"])
    error = result["cost_model_worst_error"]
    basis = result["cost_model"] + ("" if error is None else f", fitted to within {percent(error)}")
    console.print(f"costs: {basis}; {result['steps_planned']} global batches planned for each pair")
    console.print()
    console.print(_heat_map(result))
    console.print()
    console.print(_ranking(result))
    console.print()
    recipe_word = f"recipe={recipe} " if recipe != "default" else ""
    console.print(
        f"Train with it:  chunkflow train {recipe_word}--overrides {result['overrides_file']}", soft_wrap=True
    )


def _heat_map(result: dict[str, Any]) -> Table:
    candidates = {(row["chunk_size"], row["k"]): row for row in result["candidates"]}
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
    table.caption = f"dim: does not fit into {human_bytes(result['memory_limit_bytes'])}"
    table.caption_justify = "left"
    return table


def _ranking(result: dict[str, Any]) -> Table:
    rows = sorted((row for row in result["candidates"] if row["fits"]), key=lambda row: row["step_seconds"])
    has_measured = any(row["measured_step_seconds"] is not None for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("chunk.size", "K", "predicted", *(["measured"] if has_measured else []), "memory", "recomputed",
                 "waiting", "full"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:RANKED_SHOWN]:
        measured = row["measured_step_seconds"]
        table.add_row(
            f"{row['chunk_size']:,}", str(row["k"]), f"{row['step_seconds']:.3g} s",
            *([f"{measured:.3g} s" if measured is not None else ""] if has_measured else []),
            human_bytes(row["memory_bytes"]), percent(row["recompute_share"]), percent(row["bubble_ratio"]),
            percent(row["fill"]),
        )  # fmt: skip
    return table
