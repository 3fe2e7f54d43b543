"""The screen of `chunkflow plan`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import bar_of, columns
from chunkflow_cli.console import counted, facts, human_bytes, human_seconds, percent
from chunkflow_cli.planning.timeline import Timeline

KINDS = {
    "F": ("forward", "blue", "#0077bb"),
    "S": ("state pass", "cyan", "#33bbee"),
    "R": ("recompute", "yellow", "#ee7733"),
    "B": ("backward", "magenta", "#cc3377"),
    "I": ("input gradient", "magenta", "#cc3377"),
    "W": ("weight gradient", "green", "#009988"),
    "P": ("first pass", "cyan", "#33bbee"),
}
"""Name, color in a terminal and color in a plot of each kind of operation, by its letter in a schedule."""
IDLE = ("·", "idle", "dim")
"""Symbol, name and style of time without an operation."""
SHOWN_OPERATIONS = 400
"""Characters of a schedule that are printed; `--json` has all of them."""
SHOWN_STAGES = 6
"""With more stages, the list of their live activations is shortened."""
SHOWN_ROWS = 16
"""Rows of ranks and stages that are drawn."""
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "head", "state", "step")


def print_plan(console: Console, result: dict[str, Any], timeline: Timeline, measured: Timeline | None) -> None:
    """Print the screen of a plan.

    Args:
        result: the plan as JSON.
        timeline: the predicted timeline of the step that is shown.
        measured: the timeline of the same step in a traced run.
    """
    console.print(_headline(result))
    console.print()
    if "sources" in result:
        console.print(_sources(result["sources"]))
        console.print()
    console.print(_chunks(result))
    if result["memory"] is not None:
        console.print()
        _print_memory(console, result["memory"], "stage" if "pipeline" in result else "rank")
    console.print()
    _print_step(console, result, timeline)
    if measured is not None:
        title = (f"\nstep {result['step']['step']} as it ran", "bold")
        console.print(Text.assemble(title, f": {human_seconds(measured.makespan)}"))
        _print_timeline(console, measured)
        console.print(f"ranks were idle for {percent(measured.bubble_ratio)} of the time")


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
    text.append(f"\n{_outlook(result)}", style="bold")
    if result["global_batch_tokens"] is None:
        size = counted(result["global_batch_size"], "sample")
    else:
        size = counted(result["global_batch_tokens"], "token")
    text.append(
        f"\n{counted(result['steps'], 'step')} of up to {size}: "
        f"{result['samples']:,} samples, {result['tokens']:,} tokens, {result['target_tokens']:,} of them targets"
    )
    return text


def _sources(sources: dict[str, Any]) -> Table:
    """Return what each source contributes to the run."""
    table = columns("source", ">samples", ">passes", ">tokens", ">targets", ">of samples", ">of tokens", ">of targets")
    for name, part in sources.items():
        table.add_row(
            Text(name), f"{part['samples']:,}", f"{part['passes']:.2f}", f"{part['tokens']:,}", f"{part['targets']:,}",
            percent(part["share_of_samples"]), percent(part["share_of_tokens"]), percent(part["share_of_targets"]),
        )  # fmt: skip
    return table


def _outlook(result: dict[str, Any]) -> str:
    """Return how long the run takes and whether it fits into memory."""
    seconds, memory = result["predicted_seconds"], result["memory"]
    parts = [] if seconds is None else [f"about {human_seconds(seconds)}"]
    if memory is not None:
        fits = "fits" if memory["fits"] else "does not fit"
        have = human_bytes(memory["device_bytes"])
        parts.append(f"{human_bytes(memory['total_bytes'])} of {have} memory: {fits} ({memory['device']})")
    return ", ".join(parts) or "neither time nor memory is known without a model"


def _chunks(result: dict[str, Any]) -> Table:
    balance = result["balance"]
    longest = f"{result['longest']:,} tokens"
    dependent = f"none: the longest sample has {longest}"
    if result["dependent"]:
        samples, filled = counted(result["long_samples"], "long sample"), result["filled_tails"]
        tails = f"; {counted(filled, 'last piece')} filled with short samples" if filled else ""
        dependent = f"{result['dependent']:,} pieces of {samples} (longest: {longest}){tails}"
    rows = {
        "chunks": f"{result['chunks']:,}, {percent(result['fill'])} full "
        f"(at least {result['lower_bound_chunks']:,} are needed)",
        "standalone": f"{result['standalone']:,} of whole samples",
        "dependent": dependent,
        "recomputed": f"{counted(result['recomputed_chunks'], 'chunk')} ({percent(result['recompute_share'])})",
        "operations": f"{result['operations_per_step_and_rank']:,.1f} per step and rank, at most "
        f"{result['most_operations']:,}",
    }
    if result["first_passed_chunks"]:
        rows["first pass"] = (
            f"{counted(result['first_passed_chunks'], 'chunk')}, forwarded for their log-probabilities before they are "
            "trained on"
        )
    if result["dummies"]:
        rows["dummies"] = f"{result['dummies']:,} passes of one token, because all ranks must run the same operations"
    if result["ranks"] > 1:
        rows["balance"] = (
            f"ranks wait {percent(balance['idle_share'])} of the time for the slowest one, which takes up to "
            f"{balance['worst_ratio']:.2f} x the mean (step {balance['worst_step']})"
        )
    if result["sequence"] > 1:
        rows["spread"] = (
            f"{counted(balance['spread_samples'], 'sample')} over groups of {result['sequence']}; otherwise ranks "
            f"would wait {percent(balance['idle_share_of_whole_samples'])} of the time, and steps would take "
            f"{balance['times_faster_than_whole_samples']:.2f} times as long"
        )
    if "recurrent" in result:
        rows["recurrent"] = _recurrent(result["recurrent"], result["chunk_size"])
    if result["predicted_seconds"] is not None:
        rows["time"] = f"about {human_seconds(result['predicted_seconds'])} ({result['cost_model']})"
    return facts(rows.items())


def _recurrent(recurrent: dict[str, Any], chunk_size: int) -> str:
    """Return what recurrent layers keep after each chunk of a long sample, and whether the chunk size suits them."""
    tokens, block = recurrent["equal_tokens"], recurrent["block"]
    text = f"layers keep {human_bytes(recurrent['edge_bytes'])} after each chunk of a long sample"
    if tokens is not None:
        text += f", as much as attention keeps for {tokens:,} tokens"
    if block is not None and chunk_size % block:
        text += f"; they compute in blocks of {block} tokens, so use a multiple as chunk.size"
    return text


def _print_memory(console: Console, memory: dict[str, Any], place: str) -> None:
    parts = {name: memory[f"{name}_bytes"] for name in MEMORY_PARTS}
    width = min(40, max(10, console.width - 44))
    table = columns(f"memory per {place}", ">", "")
    for name, value in parts.items():
        table.add_row(name, human_bytes(value), Text(bar_of(value, max(parts.values()), width), style="cyan"))
    table.add_row("at its peak", human_bytes(memory["total_bytes"]), "", style="bold")
    console.print(table)
    if memory["host_bytes"]:
        console.print(f"and {human_bytes(memory['host_bytes'])} of host memory (engine.offload)")
    if memory["host_state_bytes"]:
        console.print(f"and {human_bytes(memory['host_state_bytes'])} of host memory for state (chunk.offload_state)")
    if memory["page_lock_seconds"] >= 1:
        console.print(f"Page-locking host memory takes about {human_seconds(memory['page_lock_seconds'])}, once.")
    if "CPU" in memory["device"]:
        console.print("On a CPU, train reports about 0.5 GiB more, for Python and its libraries.")
    if not memory["fits"]:
        where = f"the {human_bytes(memory['device_bytes'])} of {memory['device']}"
        console.print(Text.assemble(("does not fit", "bold red"), f" into {where}: {memory['remedy']}"))


def _print_step(console: Console, result: dict[str, Any], timeline: Timeline) -> None:
    step = result["step"]
    content = (
        f": {counted(step['samples'], 'sample')}, {step['tokens']:,} tokens, {counted(step['chunks'], 'chunk')}, "
        f"{step['recomputed_chunks']:,} recomputed"
    )
    console.print(Text.assemble((f"step {step['step']}", "bold"), content))
    line = step["schedules"][0][0]
    shown = line if len(line) <= SHOWN_OPERATIONS else line[:SHOWN_OPERATIONS].rpartition(" ")[0] + " ..."
    console.print(Text(shown))
    console.print()
    if timeline.makespan > 0:
        _print_timeline(console, timeline)
    if "pipeline" in result:
        pipeline = result["pipeline"]
        console.print(
            f"idle {percent(pipeline['bubble_ratio'])} of the time (bubbles), or "
            f"{percent(pipeline['bubble_ratio_recompute_idle'])} if recomputing counts as idle"
        )
        console.print(f"chunks that hold activations, per stage: at most {_listed(pipeline['live_activations'])}")
        times = pipeline["baseline_makespan"] / pipeline["makespan"]
        console.print(
            f"plain 1F1B with one sample per micro-batch: idle {percent(pipeline['baseline_bubble_ratio'])} of the "
            f"time, {times:.2f} times as long"
        )


def _listed(counts: list[int]) -> str:
    """Return `4, 3, 2, 1`; of many stages, only the first ones and the last."""
    words = [str(count) for count in counts]
    return ", ".join(words if len(words) <= SHOWN_STAGES else [*words[:3], "...", words[-1]])


def row_names(timeline: Timeline) -> dict[tuple[int, int], str]:
    """Return the name of each row of a timeline, by rank and stage."""
    places = itertools.product(range(timeline.ranks), range(timeline.stages))
    return {(rank, stage): f"rank {rank}" + f", stage {stage}" * (timeline.stages > 1) for rank, stage in places}


def _print_timeline(console: Console, timeline: Timeline) -> None:
    """Print a line per rank and stage. Each character is the operation that fills most of its slice of time."""
    rows = dict(itertools.islice(row_names(timeline).items(), SHOWN_ROWS))
    margin = max(map(len, rows.values())) + 2
    slices = max(20, console.width - margin)
    edges = np.linspace(0, timeline.makespan, slices + 1)
    symbols = [*((kind, name, f"black on {colour}") for kind, (name, colour, _) in KINDS.items()), IDLE]
    lines = []
    for (rank, stage), name in rows.items():
        here = (timeline.rank == rank) & (timeline.stage == stage)
        shares = np.zeros((len(symbols), slices))
        for index, kind in enumerate(KINDS):
            chosen = here & (timeline.kind == kind)
            for start, stop in zip(timeline.start_seconds[chosen], timeline.stop_seconds[chosen], strict=True):
                first, last = np.searchsorted(edges, [start, stop], side="right") - 1
                slots = np.arange(first, min(last + 1, slices))
                shares[index, slots] += np.minimum(edges[slots + 1], stop) - np.maximum(edges[slots], start)
        shares[-1] = np.diff(edges) - shares[:-1].sum(axis=0)
        drawn = (symbols[slot] for slot in shares.argmax(axis=0))
        lines.append(Text.assemble(name.ljust(margin), *((symbol, style) for symbol, _, style in drawn)))
    hidden = timeline.ranks * timeline.stages - len(rows)
    if hidden:
        lines.append(Text(f"and {hidden} more"))
    present = [symbol for symbol in symbols if symbol is IDLE or (timeline.kind == symbol[0]).any()]
    for line in [*lines, *_legend(present, margin, console.width)]:
        console.print(line, no_wrap=True, crop=True)


def _legend(symbols: list[tuple[str, str, str]], margin: int, width: int) -> list[Text]:
    lines = [Text(" " * margin)]
    for symbol, name, style in symbols:
        if len(lines[-1]) + len(symbol) + 1 + len(name) > width:
            lines.append(Text(" " * margin))
        lines[-1].append(symbol, style=style)
        lines[-1].append(f" {name}   ")
    for line in lines:
        line.rstrip()
    return lines
