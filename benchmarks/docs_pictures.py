"""Draw the pictures of docs/how-it-works.md from the planner itself: `make docs` calls this.

All show the same optimizer step: eight samples, one of them longer than a chunk, with chunk.size=512 and chunk.k=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.schedule import OpKind, plan

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LENGTHS = (1_728, 384, 320, 256, 192, 192, 128, 64)
"""Tokens of the samples of the step."""
CHUNK_SIZE = 512
COLOURS = ("#cc3377", "#0077bb", "#33bbee", "#009988", "#ee7733", "#bbbb33", "#9467bd", "#777777")
"""A color for each sample; the long one comes first."""
INK = "#24292f"


def draw_all() -> None:
    """Write every picture into docs/images/."""
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "chunkflow", "font.size": 11})
    IMAGES.mkdir(exist_ok=True)
    chunks = build_chunks(np.array(LENGTHS), CHUNK_SIZE)
    draw_chunks(chunks, IMAGES / "chunks.svg")
    draw_schedule(IMAGES / "schedule.svg")
    draw_state(chunks, IMAGES / "state.svg")


def draw_chunks(chunks: Chunks, path: Path) -> None:
    """Draw the samples on the left, and the chunks that they become on the right."""
    figure, (samples, packed) = new_figure(10.4, 3.3, 2)
    for row, length in enumerate(LENGTHS):
        box(samples, 0, row, length, str(row), COLOURS[row])
    for row, chunk in enumerate(chunks):
        place = 0
        for segment in chunk.segments:
            box(packed, place, row, segment.tokens, str(segment.sequence), COLOURS[segment.sequence])
            place += segment.tokens
        packed.text(-25, row, str(row), ha="right", va="center", color=INK)
    samples.set_title(f"{len(LENGTHS)} samples", loc="left", fontweight="bold", fontsize=12)
    packed.set_title(f"{len(chunks)} chunks of at most {CHUNK_SIZE} tokens", loc="left", fontweight="bold", fontsize=12)
    packed.axvline(CHUNK_SIZE, color=INK, linewidth=1, linestyle=":")
    for axes, widest, rows in ((samples, max(LENGTHS), len(LENGTHS)), (packed, CHUNK_SIZE, len(chunks))):
        axes.set_xlim(-60 if axes is packed else 0, widest * 1.02)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlabel("tokens")
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def draw_schedule(path: Path) -> None:
    """Draw the same step as `chunkflow plan --plot` does, with the paper's proportional costs."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        rows = [json.dumps({"input_ids": [1] * length}) for length in LENGTHS]
        data.write_text("\n".join(rows) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "chunkflow_cli", "plan", "recipe=tiny_random", f"data.path={data}",
            f"data.cache_dir={folder}/cache", "data.eval_fraction=0", f"chunk.size={CHUNK_SIZE}",
            f"train.global_batch_size={len(LENGTHS)}", "train.shuffle=false", "plan.cost_model=proportional",
            "--plot", str(path),
        ]  # fmt: skip
        # SOURCE_DATE_EPOCH keeps the date out of the file, so that an unchanged picture is an unchanged file.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"SOURCE_DATE_EPOCH": "0"})


def draw_state(chunks: Chunks, path: Path) -> None:
    """Draw the chunks of the long sample: keys and values go forward through the state, gradients come back."""
    long = [index for group in chunks.dependent_groups() if chunks.first_sequence(group.start) == 0 for index in group]
    schedule = [op for op in plan(chunks, 1).ops if op.chunks[0] in long]
    forward = [op for op in schedule if op.kind in (OpKind.state_pass, OpKind.forward)]
    figure, axes = new_figure(10.4, 4.0, 1)
    column = {index: place for place, index in enumerate(long)}
    names = {OpKind.state_pass: "state pass", OpKind.forward: "forward"}
    for op in forward:
        place = column[op.chunks[0]]
        panel(axes, place, 0, f"{op}", names[op.kind], "#33bbee" if op.kind is OpKind.state_pass else "#0077bb")
        if op.kind is OpKind.state_pass:  # no later chunk reads the state of the last one, so it is never stored
            panel(axes, place, 1, "", f"state of chunk {op.chunks[0]}", "#f6f8fa", ink=INK)
    for index in long:
        words = " ".join(str(op) for op in schedule if op.chunks[0] == index and op not in forward)
        below = "recompute, backward" if words.startswith("R") else "backward"
        panel(axes, column[index], 2, words, below, "#cc3377")
    last = len(long) - 1
    for place in range(last):
        arrow(axes, (place, 0.3), (place, 0.68), "#0077bb")
        arrow(axes, (place + 0.3, 0.74), (place + 0.72, 0.3), "#0077bb")
        arrow(axes, (place + 0.72, 1.7), (place + 0.3, 1.28), "#cc3377")
        arrow(axes, (place, 1.32), (place, 1.68), "#cc3377")
    axes.annotate(
        "", (last + 0.48, 2), (last + 0.48, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4,
                                                            "connectionstyle": "arc3,rad=-0.25"},
    )  # fmt: skip
    axes.text(-0.55, 0, "forward,\nfirst to last", ha="right", va="center", color="#0077bb")
    axes.text(-0.55, 1, "keys and values,\nand their gradients", ha="right", va="center", color=INK)
    axes.text(-0.55, 2, "backward,\nlast to first", ha="right", va="center", color="#cc3377")
    axes.set_xlim(-1.45, last + 0.85)
    axes.set_ylim(2.45, -0.45)
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})


def new_figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    """A white card, which reads on light and on dark pages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(1, panels)


def box(axes: Any, start: float, row: float, width: float, words: str, colour: str) -> None:
    axes.broken_barh([(start, width)], (row - 0.38, 0.76), facecolors=colour, edgecolor="white", linewidth=1)
    axes.text(start + width / 2, row, words, ha="center", va="center", color="white", fontsize=9)


def panel(axes: Any, column: float, row: float, title: str, words: str, colour: str, ink: str = "white") -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (column - 0.42, row - 0.29)
    edge = INK if ink == INK else colour
    axes.add_patch(
        FancyBboxPatch(corner, 0.84, 0.58, boxstyle="round,pad=0,rounding_size=0.05", facecolor=colour, edgecolor=edge)
    )
    if title:
        axes.text(column, row - 0.08, title, ha="center", va="center", color=ink, fontweight="bold", fontsize=12)
    axes.text(column, row + (0.13 if title else 0), words, ha="center", va="center", color=ink, fontsize=9.5)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8})
