"""What is printed of the user's words: all of it, and nothing of it is taken for markup or an emoji."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from chunkflow_cli.cli.screens.tables import columns
from chunkflow_cli.console import facts, plain_column, progress_bar, stderr_console, stdout_console, working

SRC = Path(__file__).parents[2] / "src" / "chunkflow_cli"
AWKWARD = "runs[/a] [bold]x[/] [red] [link=http://a]b[/link] :smile: {x} \\[c]"


@pytest.mark.parametrize("make", [stdout_console, stderr_console])
def test_text_is_printed_as_it_is(
    make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may be called `lr[small]`, and `runs[/a]` would end the run as a closing tag that nothing opened."""
    monkeypatch.setenv("COLUMNS", "200")
    console: Console = make()
    console.print(AWKWARD, soft_wrap=True)
    console.print(facts([(AWKWARD, AWKWARD)]))
    table = columns(AWKWARD)
    table.add_row(AWKWARD)
    console.print(table)
    printed = "".join(capsys.readouterr())
    assert printed.count(AWKWARD) == 5


def test_progress_shows_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=200, markup=False)
    with Progress(plain_column("{task.description}"), plain_column("{task.fields[numbers]}"), console=terminal) as bar:
        bar.add_task(AWKWARD, numbers=f"{AWKWARD} 2")
    with working(terminal, AWKWARD):
        pass
    with progress_bar(AWKWARD, 3) as update:
        update(1)
    assert f"{AWKWARD} {AWKWARD} 2" in shown.getvalue()


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module that are not docstrings."""
    documentation = {
        id(node.body[0].value) for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_no_module_writes_markup_or_makes_a_console_of_its_own() -> None:
    """Consoles that read markup are made nowhere, so no call needs to escape anything."""
    tag = re.compile(r"\[/[a-z]*\]|\[(bold|dim|italic|red|green|yellow|cyan|magenta|blue)\b[^\]]*\]")
    own = re.compile(r"\b(Console\(|TextColumn\(|from_markup|rich\.markup|rich import print|markup=True)")
    found = []
    for path in sorted(SRC.rglob("*.py")):
        text = path.read_text()
        found += [(path.name, line) for line, string in _strings(ast.parse(text)) if tag.search(string)]
        found += [(path.name, match.group()) for match in own.finditer(text) if path.name != "console.py"]
    assert not found
