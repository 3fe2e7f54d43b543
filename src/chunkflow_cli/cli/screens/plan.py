"""The screen of `chunkflow plan`."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import bar_of, facts, percent
from chunkflow_cli.console import counted, human_bytes, human_seconds
from chunkflow_cli.planning.simulate import Timeline

KINDS = {
    "F": ("forward", "blue"),
    "S": ("state pass", "cyan"),
    "R": ("recompute", "yellow"),
    "B": ("backward", "magenta"),
    "I": ("input gradient", "magenta"),
    "W": ("weight gradient", "green"),
}
IDLE = "·"
SHOWN_OPERATIONS = 400
"""Characters of a schedule that are printed; `--json` has all of it."""
SHOWN_STAGES = 6
"""With more stages, the list of their live activations is shortened."""
SHOWN_ROWS = 16
"""Rows of ranks and stages that are drawn."""


MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "head", "state")


def print_plan(console: Console, result: dict[str, Any], timeline: Timeline, measured: Timeline | None = None) -> None:
    """Print the screen of a plan.

    Args:
        result: the plan as JSON.
        timeline: predicted, of the step that is shown.
        measured: the same step in a run.
    """
    console.print(_headline(result))
    console.print()
    console.print(_chunks(result))
    if result["memory"] is not None:
        console.print()
        _print_memory(console, result["memory"], "stage" if "pipeline" in result else "rank")
    console.print()
    _print_step(console, result, timeline)
    if measured is not None:
        console.print()
        _print_measured(console, result, measured)


def _headline(result: dict[str, Any]) -> Text:
    text = Text()
    text.append("no recipe" if result["recipe"] == "default" else f"recipe {result['recipe']}", style="bold")
    text.append(f"  chunk.size={result['chunk_size']} chunk.k={result['k']}")
    layout = []
    if result["ranks"] > 1:
        layout.append(counted(result["ranks"] // result["sequence"], "data-parallel rank"))
    if result["sequence"] > 1:
        layout.append(f"each a sequence-parallel group of {result['sequence']}")
    if "pipeline" in result:
        layout.append(counted(result["pipeline"]["stages"], "pipeline stage"))
    if layout:
        text.append("\n" + ", ".join(layout))
    text.append(
        f"\n{counted(result['steps'], 'step')} of up to {counted(result['global_batch_size'], 'sample')}: "
        f"{result['samples']:,} samples, {result['tokens']:,} tokens, {result['target_tokens']:,} of them targets"
    )
    return text


def _chunks(result: dict[str, Any]) -> Table:
    table = facts()
    table.add_row(
        "chunks", f"{result['chunks']:,}, {percent(result['fill'])} full; no plan has fewer than "
        f"{result['lower_bound_chunks']:,}"
    )  # fmt: skip
    table.add_row("standalone", f"{result['standalone']:,}")
    if result["dependent"]:
        table.add_row(
            "dependent", f"{result['dependent']:,} of {counted(result['long_samples'], 'long sample')}, the longest "
            f"{result['longest']:,} tokens; {counted(result['filled_tails'], 'tail')} filled"
        )  # fmt: skip
    else:
        table.add_row("dependent", f"none: the longest sample has {result['longest']:,} tokens")
    table.add_row(
        "recomputed", f"{counted(result['recomputed_chunks'], 'chunk')} ({percent(result['recompute_share'])})"
    )
    table.add_row(
        "operations", f"{result['operations_per_step_and_rank']:,.1f} a step and rank, at most "
        f"{result['most_operations']:,}"
    )  # fmt: skip
    if result["dummies"]:
        table.add_row(
            "dummies", f"{result['dummies']:,} passes of one token: each rank must do what the others do"
        )  # fmt: skip
    if result["ranks"] > 1:
        balance = result["balance"]
        table.add_row(
            "balance", f"ranks wait {percent(balance['idle_share'])} of the time for the slowest; worst in step "
            f"{balance['worst_step']}, {balance['worst_ratio']:.2f} x the mean"
        )  # fmt: skip
    if result["sequence"] > 1:
        table.add_row(
            "spread", f"{counted(balance['spread_samples'], 'sample')} over groups of {result['sequence']}; if none "
            f"were, ranks would wait {percent(balance['idle_share_of_whole_samples'])}, and steps take "
            f"{balance['times_faster_than_whole_samples']:.2f} times as long"
        )  # fmt: skip
    if result["predicted_seconds"] is not None:
        table.add_row("time", f"about {human_seconds(result['predicted_seconds'])} ({result['cost_model']})")
    return table


def _print_memory(console: Console, memory: dict[str, Any], place: str) -> None:
    parts = {name: memory[f"{name}_bytes"] for name in MEMORY_PARTS}
    width = min(40, max(10, console.width - 44))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(f"memory of a {place}", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, value in parts.items():
        table.add_row(name, human_bytes(value), Text(bar_of(value, max(parts.values()), width), style="cyan"))
    table.add_row("[bold]at its peak[/]", f"[bold]{human_bytes(memory['total_bytes'])}[/]", "")
    console.print(table)
    if memory["host_bytes"]:
        console.print(f"and {human_bytes(memory['host_bytes'])} of host memory (engine.offload)")
    where = f"the {human_bytes(memory['device_bytes'])} of {memory['device']}"
    if memory["fits"]:
        console.print(f"fits into {where}")
    else:
        console.print(f"[bold red]does not fit[/] into {where}: {memory['remedy']}")


def _print_step(console: Console, result: dict[str, Any], timeline: Timeline) -> None:
    step = result["step"]
    console.print(
        f"[bold]step {step['step']}[/]: {counted(step['samples'], 'sample')}, {step['tokens']:,} tokens, "
        f"{counted(step['chunks'], 'chunk')}, {step['recomputed_chunks']:,} recomputed"
    )
    line = step["schedules"][0][0]
    shown = line if len(line) <= SHOWN_OPERATIONS else line[:SHOWN_OPERATIONS].rpartition(" ")[0] + " ..."
    console.print(Text(shown))
    console.print()
    if timeline.makespan > 0:
        for row in _gantt(timeline, console.width):
            console.print(row, no_wrap=True, crop=True)
    if "pipeline" in result:
        pipeline = result["pipeline"]
        console.print(
            f"bubbles {percent(pipeline['bubble_ratio'])}, {percent(pipeline['bubble_ratio_recompute_idle'])} with "
            f"recompute counted as idle; at most {_listed(pipeline['live_activations'])} live activations a stage"
        )
        times = pipeline["baseline_makespan"] / pipeline["makespan"]
        console.print(
            f"plain 1F1B, a sequence a micro-batch: {percent(pipeline['baseline_bubble_ratio'])}, "
            f"{times:.2f} times this step's time"
        )


def _print_measured(console: Console, result: dict[str, Any], measured: Timeline) -> None:
    console.print(f"[bold]step {result['step']['step']} as it ran[/]: {human_seconds(measured.makespan)}")
    for row in _gantt(measured, console.width):
        console.print(row, no_wrap=True, crop=True)
    console.print(f"idle {percent(measured.bubble_ratio)} of the time of all ranks")


def _listed(counts: list[int]) -> str:
    """Return `4, 3, 2, 1`; of many stages, only the first ones and the last."""
    words = [str(count) for count in counts]
    return ", ".join(words if len(words) <= SHOWN_STAGES else [*words[:3], "...", words[-1]])


def _gantt(timeline: Timeline, width: int) -> list[Text]:
    """Return a line for each rank and stage. A character is the operation that fills most of its slice of time."""
    places = [(rank, stage) for rank in range(timeline.ranks) for stage in range(timeline.stages)][:SHOWN_ROWS]
    names = [f"rank {rank}" if timeline.stages == 1 else f"{rank}, stage {stage}" for rank, stage in places]
    margin = max(map(len, names)) + 2
    slices = max(20, width - margin)
    edges = np.linspace(0, timeline.makespan, slices + 1)
    lines = []
    for name, (rank, stage) in zip(names, places, strict=True):
        rows = (timeline.rank == rank) & (timeline.stage == stage)
        line = Text(name.ljust(margin))
        shares = np.full((len(KINDS) + 1, slices), 0.0)
        for index, kind in enumerate(KINDS):
            of_kind = rows & (timeline.kind == kind)
            for start, stop in zip(timeline.start_seconds[of_kind], timeline.stop_seconds[of_kind], strict=True):
                first, last = np.searchsorted(edges, [start, stop], side="right") - 1
                slots = np.arange(first, min(last + 1, slices))
                shares[index, slots] += np.minimum(edges[slots + 1], stop) - np.maximum(edges[slots], start)
        shares[-1] = np.diff(edges) - shares[:-1].sum(axis=0)
        for slot in shares.argmax(axis=0):
            if slot == len(KINDS):
                line.append(IDLE, style="dim")
            else:
                kind = list(KINDS)[slot]
                line.append(kind, style=f"black on {KINDS[kind][1]}")
        lines.append(line)
    hidden = timeline.ranks * timeline.stages - len(places)
    if hidden:
        lines.append(Text(f"and {hidden} more"))
    return [*lines, *_legend(timeline, margin, width)]


def _legend(timeline: Timeline, margin: int, width: int) -> list[Text]:
    present = [(kind, name, f"black on {colour}") for kind, (name, colour) in KINDS.items()
               if (timeline.kind == kind).any()]  # fmt: skip
    lines = [Text(" " * margin)]
    for symbol, name, style in [*present, (IDLE, "idle", "dim")]:
        if len(lines[-1]) + len(symbol) + 1 + len(name) > width:
            lines.append(Text(" " * margin))
        lines[-1].append(symbol, style=style)
        lines[-1].append(f" {name}   ")
    for line in lines:
        line.rstrip()
    return lines
