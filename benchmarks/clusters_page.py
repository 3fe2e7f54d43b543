"""The tables of docs/clusters.md, from the rows of `benchmarks/clusters.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

K, GIB = 1024, 2**30
PAGE = Path(__file__).parent.parent / "docs" / "clusters.md"
BEGIN, END = "<!-- benchmarks/clusters.py: begin -->", "<!-- benchmarks/clusters.py: end -->"
SMALLEST_CHUNK = 2 * K
"""The chunk size that a cell does not repeat."""
WIDTH = 120
Row = dict[str, Any]


def write(rows: Sequence[Row], nodes: Sequence[int]) -> None:
    """Replace the generated section of the page."""
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{PAGE} has no section between {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{section(rows, nodes)}\n{END}{after}", encoding="utf-8")


def section(rows: Sequence[Row], nodes: Sequence[int]) -> str:
    """Return the generated section: seconds and layouts, tokens per second, and what does not fit on one node."""
    by_recipe: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], {})[row["nodes"]] = row
    limit = next(row["memory_limit_bytes"] for row in rows if row["best"] is not None) / GIB
    lines = [
        _paragraph(
            'Each cell has the **seconds per step**, then data × sequence × pipeline, then K. A "t" means cuts of '
            'equal time, an "h" a state in host memory. The chunk size is 2K, the smallest that was tried, unless '
            "another one is given in parentheses."
        ),
        "",
        *_table("recipe", [_nodes(nodes)], {name: [_layout(row[n]) for n in nodes] for name, row in by_recipe.items()}),
        "",
        _paragraph(
            "**Thousands of tokens per second**, and the share of the time in which devices wait. The last column is "
            f"the memory of the fullest stage in GiB, of {limit:.1f} that the search allows (a twentieth less than the "
            "device has)."
        ),
        "",
        *_table(
            "recipe",
            [_nodes(nodes), [f"GiB on {nodes[0]}, on {nodes[-1]}"]],
            {
                name: [*(_rate(row[n]) for n in nodes), ", ".join(_gib(row[n]) for n in (nodes[0], nodes[-1]))]
                for name, row in by_recipe.items()
            },
        ),
        "",
        *_what_does_not_fit({name: row[nodes[0]] for name, row in by_recipe.items()}, limit),
    ]
    return "\n".join(lines)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _nodes(nodes: Sequence[int]) -> list[str]:
    first, *between, last = map(str, nodes)
    return [f"{first} node", *between, f"{last} nodes"]


def _table(corner: str, heads: Sequence[Sequence[str]], rows: dict[str, list[str]]) -> list[str]:
    titles = [corner, *(title for part in heads for title in part)]
    return [
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()),
    ]


def _layout(row: Row) -> str:
    best = row["best"]
    if best is None:
        return "does not fit"
    seconds = best["step_seconds"]
    text = f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2}f}"
    layout = f"{best['data_parallel'] // best['sequence']} x {best['sequence']} x {best['stages']}"
    marks = (" t" if best["cuts"] == "time" else "") + (" h" if best["offload_state"] == "host" else "")
    size = "" if best["chunk_size"] == SMALLEST_CHUNK else f" ({best['chunk_size'] // K}K)"
    return f"{text} s, {layout}, {best['k']}{marks}{size}"


def _rate(row: Row) -> str:
    if row["best"] is None:
        return "-"
    thousands = row["tokens_per_second"] / 1000
    text = f"{thousands:,.{0 if thousands >= 100 else 1 if thousands >= 10 else 2}f}"
    return f"{text}, {100 * row['best']['bubble_ratio']:.0f} %"


def _gib(row: Row) -> str:
    return "-" if row["best"] is None else f"{row['best']['memory_bytes'] / GIB:.0f}"


def _fit(row: Row) -> tuple[bool, float]:
    """Return what is smallest for the layout that fits, or else lacks the least."""
    return not row["fits"], row["memory_bytes"]


def _what_does_not_fit(rows: dict[str, Row], limit: float) -> list[str]:
    """Return a table of the least memory that each layout takes on one node, for recipes that some do not fit."""
    least: dict[str, dict[tuple[int, int], Row]] = {}
    for name, row in rows.items():
        layouts_of = least.setdefault(name, {})
        for each in row.get("of_each_layout", []):  # one for each kind of cuts
            layout = each["stages"], each["sequence"]
            layouts_of[layout] = min(each, layouts_of.get(layout, each), key=_fit)
    found = {name: layouts for name, layouts in least.items() if not all(each["fits"] for each in layouts.values())}
    layouts = sorted({layout for each in found.values() for layout, row in each.items() if not row["fits"]})

    def cell(name: str, layout: tuple[int, int]) -> str:
        row = found[name].get(layout)
        return "-" if row is None else "fits" if row["fits"] else f"{row['memory_bytes'] / GIB:.0f}"

    cells = {f"{stages}, {group}": [cell(name, (stages, group)) for name in found] for stages, group in layouts}
    return [
        _paragraph(
            f"**What does not fit** into {limit:.1f} GiB on one node. A cell has the least memory in GiB that any pair "
            "of chunk size and K takes, with this number of stages and groups of this size. A dash means that it was "
            "not tried, because of the heads or the number of GPUs. Models and layouts that are not listed fit."
        ),
        "",
        *_table("stages, group", [list(found)], cells),
    ]
