"""Is a memory limit kept? What `tune-chunk-size` picks under `tune.memory_gib`, and what it refuses, trained for real.

    python benchmarks/memory_limit.py --memory-gib 6                                      a few minutes on one core
    python benchmarks/memory_limit.py --memory-gib 6 --sizes 512 1024 2048 --data data/stdlib_demo.jsonl --batch 8

The search ranks the pairs that it predicts to fit. Then `chunkflow train` runs two steps of the best of them, and of
the smallest larger chunk size that was refused, a process each; the peak is the kernel's word on the whole process. The
claim: the first stays below the limit, the second exceeds it.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from calibrate import add_load_arguments, measure, words_of
from common import emit, hardware, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gib", type=float, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ks", type=int, nargs="+", default=[1])
    add_load_arguments(parser)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        words = words_of(arguments, Path(folder))
        found = search(words, arguments)
        best = found["best"]
        refused = min(
            (row for row in found["candidates"] if not row["fits"] and row["chunk_size"] > best["chunk_size"]),
            key=lambda row: (row["chunk_size"], row["k"]),
            default=None,
        )
        if refused is None:
            raise SystemExit(f"no larger chunk size is refused at {arguments.memory_gib} GiB: lower --memory-gib")
        rows = {}
        for name, row in (("picked", best), ("refused", refused)):
            peak = measure(words, row["chunk_size"], row["k"], Path(folder))["peak_bytes"]
            rows[name] = {
                "chunk_size": row["chunk_size"],
                "k": row["k"],
                "predicted_bytes": row["memory_bytes"],
                "peak_bytes": peak,
            }
            say(f"{name}: chunk.size {row['chunk_size']} K {row['k']} {peak / 2**30:.2f} GiB")
    limit = int(arguments.memory_gib * 2**30)
    emit(
        {
            "benchmark": "memory_limit",
            "hardware": hardware(),
            "model": "SmolLM2-135M-Instruct",
            "limit_bytes": limit,
            **rows,
            "holds": rows["picked"]["peak_bytes"] <= limit < rows["refused"]["peak_bytes"],
        },
        arguments.out,
    )


def search(words: list[str], arguments: argparse.Namespace) -> Any:
    command = [
        sys.executable, "-m", "chunkflow_cli", "tune-chunk-size", *words, f"tune.chunk_sizes={arguments.sizes}",
        f"tune.ks={arguments.ks}", f"tune.memory_gib={arguments.memory_gib}", "tune.measure=0",
        "tune.samples=1000000", "--json", "--output", os.devnull,
    ]  # fmt: skip
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    main()
