"""A process that measures rows of a section or several, and writes each to a file as soon as it has it.

It imports what it needs at once, and begins when it reads a line on stdin: so the sections do not wait for imports.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chunkflow_cli.processes.worker import die_with
from gpu_proof.cases import PARITY, Part, sections
from gpu_proof.rows import Values, attempt, reraise

PACKAGES = ("transformers", "deepspeed", "peft", "triton", "flash-attn", "flash-linear-attention")
SPOILT = 75
"""Exit code of a process that can measure nothing more, though all rows that it has begun are written."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    die_with(os.getppid())
    found = sections(dry=arguments.dry, minutes=arguments.minutes)
    parts = [Part.parse(text, found) for text in arguments.parts]
    modules = [importlib.import_module(f"gpu_proof.{part.section.name}") for part in parts]

    import transformers  # noqa: F401 - now, not within a measurement

    from gpu_proof.training import Place

    gc.freeze()  # what is imported stays: collecting what a run has left takes milliseconds, not a third of a second
    if not sys.stdin.readline():
        return  # the proof has ended without this section
    from common import hardware, versions

    place = Place(arguments.work, arguments.out, arguments.dry)
    with arguments.rows.open("a", encoding="utf-8") as rows:

        def write(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        write({"hardware": {**hardware(), **versions(*PACKAGES)}})
        for part, module in zip(parts, modules, strict=True):
            for row in _rows(module, part, place):
                if row["status"] == "passed" and part.section.name not in PARITY:
                    row["status"] = "measured"
                write({"section": part.section.name, **row})
                if _is_spoilt():
                    sys.exit(SPOILT)


def _is_spoilt() -> bool:
    """Return whether an error on the device has ended all work on it, which lasts as long as the process."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _rows(module: Any, part: Part, place: Any) -> Iterator[Values]:
    """Yield a row for each case. An error outside of them is that of all that are left."""
    left = part.stop - part.first
    try:
        for row in module.rows(part.section.cases[part.first : part.stop], place):
            yield row
            left -= 1
    except Exception as error:
        yield from (attempt(partial(reraise, error)) for _ in range(left))


if __name__ == "__main__":
    main()
