"""Predicted against measured: seconds of a step and peak memory of `chunkflow train`, over chunk sizes and K.

    python benchmarks/calibrate.py                              the claim: 256 to 4096, K 1 to 4; half an hour
    python benchmarks/calibrate.py --sizes 256 512 --ks 1 2     a first look
    python benchmarks/calibrate.py --threads 1                  on a machine that is used for other work too
    python benchmarks/calibrate.py --data data/stdlib_demo.jsonl --batch 8 --seed 3
                                                                the pick against the grid, on the demo's data

Predicted is what `chunkflow tune-chunk-size` predicts: costs fitted to timed chunks of the same model (timed anew here,
in a process of its own), and the memory line. Measured is `chunkflow train` itself, a process for each pair: the
seconds of its steps (metrics.jsonl), and the kernel's word on the peak of the process by then. Two steps, so that
activations and the optimizer's states meet in the peak. The data is one long sample and some short ones, as rows of
random ids of which half are targets; both steps take all of them, and the faster counts. With --data the steps are the
first two of a run on that file, as recipe smollm2_stdlib trains, and their mean counts. Pairs that differ in nothing
(K beyond the chunks of the longest sample) run once.

The claim: within 15 % for step time and 10 % for peak memory, SmolLM2-135M.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import emit, hardware, say, smollm2_path

VOCABULARY = 49_152
TIME_WITHIN, MEMORY_WITHIN = 0.15, 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--run", type=int, nargs="+", help="chunk sizes that are run; all if not given")
    add_load_arguments(parser)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        words = words_of(arguments, Path(folder))
        rows = [
            row
            for row in predict(words, arguments.sizes, arguments.ks)
            if arguments.run is None or row["chunk_size"] in arguments.run
        ]
        for row in rows:
            measured = measure(words, row["chunk_size"], row["k"], Path(folder))
            steps = measured["step_seconds"]
            row.update(measured, seconds=min(steps) if arguments.data is None else sum(steps) / len(steps))
            row["time_error"] = row["predicted_seconds"] / row["seconds"] - 1
            row["memory_error"] = row["predicted_bytes"] / row["peak_bytes"] - 1
            say(
                f"chunk.size {row['chunk_size']:>5} K {row['k']}: "
                f"{row['predicted_seconds']:6.1f} s predicted, {row['seconds']:6.1f} measured "
                f"({100 * row['time_error']:+.1f} %); {row['predicted_bytes'] / 2**30:.2f} GiB, "
                f"{row['peak_bytes'] / 2**30:.2f} ({100 * row['memory_error']:+.1f} %)"
            )
    worst_time = max(abs(row["time_error"]) for row in rows)
    worst_memory = max(abs(row["memory_error"]) for row in rows)
    fastest = min(rows, key=lambda row: row["seconds"])
    picked = min(rows, key=lambda row: row["predicted_seconds"])
    emit(
        {
            "benchmark": "calibrate",
            "hardware": hardware(),
            "model": "SmolLM2-135M-Instruct",
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "samples": {"long": arguments.long, "short": arguments.short}
            if arguments.data is None
            else {"data": Path(arguments.data).name, "batch": arguments.batch, "seed": arguments.seed},
            "rows": rows,
            "claims": {
                "worst_time_error": worst_time,
                "time_within": TIME_WITHIN,
                "worst_memory_error": worst_memory,
                "memory_within": MEMORY_WITHIN,
                "holds": worst_time <= TIME_WITHIN and worst_memory <= MEMORY_WITHIN,
                "picked": [picked["chunk_size"], picked["k"]],
                "fastest": [fastest["chunk_size"], fastest["k"]],
                "picked_to_fastest": picked["seconds"] / fastest["seconds"],
            },
        },
        arguments.out,
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on, and how."""
    parser.add_argument("--long", type=int, default=4500, help="tokens of the long sample")
    parser.add_argument("--short", type=int, default=8, help="short samples, of 50 to 500 tokens")
    parser.add_argument("--data", help="chat data to train on instead")
    parser.add_argument("--batch", type=int, default=16, help="with --data: samples of a step")
    parser.add_argument("--seed", type=int, default=0, help="with --data: which samples come first")
    parser.add_argument("--cache", type=Path, help="folder for tokens and the calibration: a second run finds both")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch; default all")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")


def words_of(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The run as overrides; random data is written into the folder."""
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    words = [
        f"model.path={smollm2_path()}", f"model.dtype={arguments.dtype}", "data.num_workers=1",
        f"data.cache_dir={arguments.cache or folder}/cache", "train.guard=false", "train.steps=2",
    ]  # fmt: skip
    if arguments.data is None:
        data = Path(folder, "data.jsonl")
        write_samples(data, arguments.long, arguments.short)
        words += [
            f"data.path={data}", "data.format=tokens", "data.max_length=1000000",
            f"train.global_batch_size={arguments.short + 1}",
        ]  # fmt: skip
    else:
        words = [
            "recipe=smollm2_stdlib", *words, f"data.path={arguments.data}", "data.eval_fraction=0",
            f"train.global_batch_size={arguments.batch}", f"train.seed={arguments.seed}",
        ]  # fmt: skip
    return words


def write_samples(path: Path, long: int, short: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for length in (long, *generator.integers(50, 500, short)):
            ids = generator.integers(0, VOCABULARY, int(length))
            labels = np.where(np.arange(int(length)) >= int(length) // 2, ids, -100)
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")


def predict(words: list[str], sizes: list[int], ks: list[int]) -> list[dict[str, Any]]:
    """What tune-chunk-size says of every pair; it times the chunks first, for the cache is new."""
    command = [
        sys.executable, "-m", "chunkflow_cli", "tune-chunk-size", *words, f"tune.chunk_sizes={sizes}", f"tune.ks={ks}",
        "tune.measure=0", "tune.budget_seconds=1000", "tune.samples=1000000", "--json", "--output", os.devnull,
    ]  # fmt: skip
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    say(f"fitted to within {100 * found['cost_model_worst_error']:.0f} % of every timed operation")
    return [
        {
            "chunk_size": row["chunk_size"],
            "k": row["k"],
            "predicted_seconds": row["step_seconds"],
            "predicted_bytes": row["memory_bytes"],
        }
        for row in found["candidates"]
    ]


def measure(words: list[str], chunk_size: int, k: int, folder: Path) -> dict[str, Any]:
    run = folder / f"run-{chunk_size}-{k}"
    command = [
        sys.executable, "-m", "chunkflow_cli", "train", *words, f"chunk.size={chunk_size}", f"chunk.k={k}",
        "optim.lr=0", f"train.output_dir={run}",
    ]  # fmt: skip
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"train with chunk.size={chunk_size} chunk.k={k} ended with {child.returncode}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Of the training itself: writing final/ comes after it and may take more.
    return {
        "step_seconds": [row["step_seconds"] for row in rows],
        "peak_bytes": rows[1]["peak_memory_bytes"],
        "process_peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "wall_seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
