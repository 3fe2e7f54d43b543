"""The screen of `chunkflow doctor`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkflow_cli.cli.screens.tables import columns
from chunkflow_cli.console import counted, facts, human_bytes

NAMED = ("torch", "transformers", "deepspeed")
"""Packages whose versions are always printed, because every bug report needs them."""
STYLES = {"ok": "green", "missing": "yellow", "too old": "yellow", "too new": "yellow", "broken": "red"}


def print_findings(console: Console, findings: dict[str, Any]) -> None:
    """Print what `doctor.examine` found."""
    machine = f", Python {findings['python']}, {findings['platform']}\n"
    console.print(Text.assemble((f"chunkflow {findings['chunkflow']}", "bold"), machine))
    _print_problems(console, "Training cannot work until you fix this:", "bold red", findings["problems"], True)
    if findings["ready"]:
        console.print(Text("Training can work here. Try: chunkflow train recipe=tiny_random\n", style="green"))
    packages = findings["packages"]
    fine = [f"{name} {package['version']}" for name, package in packages.items() if package["state"] == "ok"]
    named = [entry for entry in fine if entry.partition(" ")[0] in NAMED]
    rows = [("packages", f"{', '.join(named)} and {len(fine) - len(named)} others: ok" if fine else "none is ok")]
    rows += [("GPU" if device["kind"] == "cuda" else "CPU", _device(device)) for device in findings["devices"]]
    rows += _attention(findings["attention"], findings["backends"])
    cache = findings["cache"]
    if "raised" not in cache:
        free = cache["error"] or f"{human_bytes(cache['free_bytes'])} free"
        rows.append(("token cache", f"{cache['path']}, {free}"))
    console.print(facts((name, Text(sentence)) for name, sentence in rows))
    console.print()
    others = columns("package", "version", "state")
    others.add_column("", overflow="fold")
    for name, package in packages.items():
        if (state := package["state"]) != "ok":
            remark = package["error"] or f"for {package['purpose']}"
            others.add_row(name, package["version"] or "", Text(state, style=STYLES[state]), Text(remark))
    if others.row_count:
        console.print(others)
        console.print()
    _print_problems(console, "Training does not need this:", "bold", findings["problems"], False)


def _device(device: dict[str, Any]) -> str:
    memory = human_bytes(device["memory_bytes"])
    if device["kind"] == "cuda":
        bfloat16 = "" if device["bfloat16"] else ", no bfloat16: use model.dtype=float32"
        free = human_bytes(device["free_bytes"])
        return f"{device['name']}, {memory} ({free} free), sm {device['compute_capability']}{bfloat16}"
    bfloat16 = {True: ", native bfloat16", False: ", bfloat16 emulated in float32", None: ""}[device["bfloat16"]]
    return f"{device['name']}, {counted(device['cores'], 'core')}, {memory}{bfloat16}"


def _attention(attention: dict[str, Any], backends: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    chosen, why = attention["takes"] or "none", attention["reason"] or "as configured"
    rows = [("attention", f"model.attention={attention['requested']}, {attention['dtype']}: uses {chosen} ({why})")]
    if backends:
        working = [name for name, backend in backends.items() if backend["works"]]
        others = [name for name in backends if name not in working]
        rows.append(("", f"works here: {', '.join(working) or 'none'}; does not: {', '.join(others) or 'none'}"))
    return rows


def _print_problems(console: Console, heading: str, style: str, problems: list[dict[str, Any]], required: bool) -> None:
    bullets = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    for problem in problems:
        if problem["required"] is required:
            bullets.add_row("-", Text(problem["what"]))
            bullets.add_row("", Text(f"remedy: {problem['remedy']}"))
    if bullets.row_count:
        console.print(Text(heading, style=style))
        console.print(bullets)
        console.print()
