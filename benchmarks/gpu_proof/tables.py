"""The proof's tables: on a terminal of 80 columns, and in docs/gpu.md."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_proof.cases import GIB, Section, sections

WIDTH = 80
BEGIN, END = "<!-- proof: begin -->", "<!-- proof: end -->"
KEPT = Path(__file__).with_name("results.json")
"""The results that docs/gpu.md shows; absent until the proof has run on a GPU."""
Results = dict[str, Any]
"""`hardware`, and under `sections` the rows of each section by name, in the order of its cases."""


def print_tables(found: tuple[Section, ...], results: Results) -> None:
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for section in found:
        table = Table(title=section.title, title_justify="left", box=None, pad_edge=False)
        for title in section.label_titles:
            table.add_column(title, overflow="fold")
        for column in section.columns:
            table.add_column(column.title, justify="right")
        table.add_column("result")
        rows = results["sections"].get(section.name, [])
        for index, case in enumerate(section.cases):
            table.add_row(*case.labels, *_cells(section, rows, index))
        console.print(table)
        console.print()
    for line in notes(found, results):
        console.print(line)
    console.print(hardware_line(results["hardware"]))


def _cells(section: Section, rows: list[dict[str, Any]], index: int) -> list[str]:
    """Return the measured cells of a row and its result; all empty if it has not been measured."""
    row = rows[index] if index < len(rows) else {"values": {}, "status": ""}
    values = row["values"]
    return [
        *(column.show(values[column.key]) if column.key in values else "" for column in section.columns),
        row["status"],
    ]


def notes(found: tuple[Section, ...], results: Results) -> list[str]:
    """Return a line for each reason why rows are empty or have failed, with the rows."""
    lines = []
    for section in found:
        reasons: dict[str, list[str]] = {}
        for case, row in zip(section.cases, results["sections"].get(section.name, []), strict=False):
            if row.get("note"):
                reason = f"{row['status']}: {' '.join(row['note'].split())}"
                reasons.setdefault(reason, []).append(", ".join(filter(None, case.labels)))
        lines += [f"{section.title} ({'; '.join(cases)}): {reason}" for reason, cases in reasons.items()]
    return lines


def hardware_line(hardware: dict[str, Any]) -> str:
    """Return the hardware and the versions in one line."""
    if not hardware:
        return "no process has started"
    parts = []
    if "gpu" in hardware:
        parts += [f"{hardware['gpu']}, {hardware['gpu_memory_bytes'] / GIB:.0f} GiB", f"driver {hardware['driver']}",
                  f"CUDA {hardware['cuda']}", f"NCCL {hardware['nccl']}"]  # fmt: skip
    parts += [
        f"{hardware['cores']} cores of {hardware['cpu']}",
        f"{hardware['memory_bytes'] / GIB:.0f} GiB of host memory",
    ]
    names = ("torch", "transformers", "deepspeed", "peft", "triton", "flash-attn", "flash-linear-attention")
    return ", ".join(parts + [f"{name} {hardware[name]}" for name in names if name in hardware])


def markdown(found: tuple[Section, ...], results: Results | None) -> str:
    """Return the tables of docs/gpu.md: with empty cells if there are no results."""
    known = results or {"hardware": {}, "sections": {}}
    lines = [
        f"Measured on {hardware_line(known['hardware'])}." if results else "Not measured yet: the cells are empty."
    ]
    for section in found:
        titles = [*section.label_titles, *(column.title for column in section.columns), "result"]
        aligned = ["---" for _ in section.label_titles] + ["---:" for _ in section.columns] + ["---"]
        lines += ["", f"### {section.title}", "", *textwrap.wrap(section.about, 120), ""]
        lines += [_line(titles), _line(aligned)]
        rows = known["sections"].get(section.name, [])
        lines += [_line([*case.labels, *_cells(section, rows, index)]) for index, case in enumerate(section.cases)]
    found_notes = notes(found, known)
    lines += ["", *(f"- {note}" for note in found_notes)] if found_notes else []
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(page: str) -> str:
    """Return the text of docs/gpu.md with its tables, from the kept results if there are any."""
    results = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else None
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown(sections(), results)}\n\n{END}{rest.partition(END)[2]}"


def fill_page(page: Path) -> None:
    """Write the tables into docs/gpu.md."""
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
