"""A process that measures the rows of a section or several, and writes each to a file as soon as it has it.

It imports what it needs at once, and begins when it reads a line on stdin: so the sections do not wait for imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_proof.cases import sections

PACKAGES = ("transformers", "deepspeed", "peft", "triton", "flash-attn", "flash-linear-attention")
Values = dict[str, Any]
"""A row's values by column, and more for the JSON file; `failed` tells why it did not pass."""


class NotHere(Exception):  # noqa: N818 - not an error
    """A case that this machine or this version cannot run, with the reason."""


def attempt(measure: Callable[[], Values], *, may_be_refused: bool = True) -> Values:
    """Return what `measure` returns, or why there is nothing: its status and a note.

    Args:
        may_be_refused: whether this machine may be one on which chunkflow refuses the case.
    """
    from chunkflow_cli.errors import UsageError, describe

    started = time.perf_counter()
    try:
        values = measure()
        row = {"status": "FAILED", "note": values["failed"]} if "failed" in values else {"status": "passed"}
        row["values"] = values
    except NotHere as reason:
        row = {"status": "not here", "note": str(reason)}
    except UsageError as error:
        row = {"status": "refused" if may_be_refused else "error", "note": str(error)}
    except Exception as error:
        row = {"status": "error", "note": describe(error)}
    return {"values": {}, **row, "took_seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="+")
    parser.add_argument("--first", type=int, required=True, help="index of the first section's case to begin with")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    known = {section.name: section for section in sections(dry=arguments.dry, minutes=arguments.minutes)}
    modules = {name: importlib.import_module(f"gpu_proof.{name}") for name in arguments.sections}

    import transformers  # noqa: F401 - now, not within a measurement

    from gpu_proof.training import Place, free_memory

    if not sys.stdin.readline():
        return  # the proof has ended without this section
    from common import hardware, versions

    place = Place(arguments.work, arguments.out, arguments.dry)
    with arguments.rows.open("a", encoding="utf-8") as rows:

        def write(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        write({"hardware": {**hardware(), **versions(*PACKAGES)}})
        first = arguments.first
        for name, module in modules.items():
            measured: Iterator[Values] = module.rows(known[name].cases[first:], place)
            for row in measured:
                write({"section": name, **row})
                free_memory()
            first = 0


if __name__ == "__main__":
    main()
