"""`chunkflow analyze` on long-tailed chat data: against the Rust tokenizer, against parsing alone; memory, truth, plan.

    python benchmarks/analyze.py                                       100,000 rows, three rounds
    python benchmarks/analyze.py --rows 1000000 --rounds 1             the claim: most of an hour on two cores
    python benchmarks/analyze.py --parts estimated plan --rows 1000000     without tokenizing: two minutes

exact      `chunkflow analyze DATA model.path=SMOLLM2` from an empty cache, the whole command, against the tokenizer
           alone: `encode_batch` of the same rendered texts on as many threads; neither reading nor rendering is counted
           for it. In rounds, one after the other; the fastest of each counts. Lengths against the generator's.
estimated  the command without a tokenizer; and, in one process, the reading of lengths against `orjson.loads` of the
           same lines, in rounds as well. Rates are a core's: bytes over CPU seconds.
plan       chunks of all rows' lengths: as one global batch, in global batches of 256, and all steps of a run.

Peak memory is that of the whole process tree: the peak of each process as the kernel keeps it (VmHWM), looked at all
the time, and summed, though the peaks may lie at different times and share pages.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import emit, hardware, mebibytes, say, smollm2_path
from longtail import write_long_tailed

PARTS = ("exact", "estimated", "plan")
MOST_TIMES_THE_TOKENIZER = 1.25
LEAST_MEGABYTES_A_SECOND = 200
MOST_POINTS = 0.01
"""Per cent of the samples, by which an entry of the cumulative table may be off."""
MOST_BYTES = 1 << 30
MOST_OVER_THE_BOUND = 1.01
CHUNK_SIZE = 8192
PARSED_LINES = 100_000
"""That the comparison with parsing is made on; they are held in memory."""


@dataclass(frozen=True)
class Finished:
    """A command that ran."""

    seconds: float
    cpu_seconds: float
    """Of all its processes."""
    peaks: list[int]
    """Bytes, of each process."""
    printed: dict[str, Any]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes that tokenize, threads of the rival (default: cores)")
    parser.add_argument("--rival-batch", type=int, default=1000, help="rows of an encode_batch (default: 1000)")
    parser.add_argument("--without-rival", action="store_true", help="exact: memory and truth alone, in half the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for data and cache, of 10 KB a row (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    parser.add_argument("--rival", nargs=2, metavar=("DATA", "TOKENIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        print(json.dumps(tokenizer_alone(*map(Path, arguments.rival), arguments.rival_batch)))
        return
    workers = arguments.workers or len(os.sched_getaffinity(0))
    result: dict[str, Any] = {
        "benchmark": "analyze", "hardware": hardware(), "rows": arguments.rows, "seed": arguments.seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        data = folder / "longtail.jsonl"
        lengths = generate(data, folder / "tokenizer", arguments.rows, arguments.seed)
        result |= {"bytes": data.stat().st_size, "tokens": int(lengths.sum()), "longest": int(lengths.max())}
        if "estimated" in arguments.parts:
            result["estimated"] = estimated(data, arguments.rounds)
        if "plan" in arguments.parts:
            result["plan"] = plan(lengths)
        if "exact" in arguments.parts:
            rival_batch = None if arguments.without_rival else arguments.rival_batch
            result["exact"] = exact(data, folder, lengths, workers, arguments.rounds, rival_batch)
    result["claims"] = claims(result)
    emit(result, arguments.out)


def generate(data: Path, tokenizer_folder: Path, rows: int, seed: int) -> NDArray[np.int64]:
    """Write the data and SmolLM2's tokenizer.json (transformers reads a GGUF file with torch); the true lengths."""
    from chunkflow_cli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_path(), trust_remote_code=False)
    tokenizer.save_pretrained(tokenizer_folder)
    say(f"writing {rows:,} rows")
    return write_long_tailed(data, rows, tokenizer=tokenizer, seed=seed)


def run(command: list[str], environment: dict[str, str] | None = None) -> Finished:
    """Run a command that prints a JSON object, and watch the memory of all its processes."""
    started = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ | (environment or {})
    )
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for process in process_tree(child.pid):
                peaks[process] = max(peaks.get(process, 0), peak_of(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)  # it is reaped; Popen need not look again
    ended.set()
    watcher.join()
    if child.returncode != 0:
        raise SystemExit(f"exit status {child.returncode}: {' '.join(command)}")
    # Of processes that were waited for, times are summed.
    return Finished(seconds, usage.ru_utime + usage.ru_stime, sorted(peaks.values(), reverse=True), json.loads(printed))


def process_tree(root: int) -> list[int]:
    found = [root]
    for process in found:
        for thread in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, thread.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def peak_of(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def exact(
    data: Path, folder: Path, lengths: NDArray[np.int64], workers: int, rounds: int, rival_batch: int | None
) -> dict[str, Any]:
    ours: list[Finished] = []
    rival: list[Finished] = []
    for number in range(rounds):
        cache = folder / "cache"
        ours.append(
            run(
                [
                    sys.executable, "-m", "chunkflow_cli", "analyze", str(data), f"model.path={folder / 'tokenizer'}",
                    f"data.cache_dir={cache}", f"data.num_workers={workers}", "--json",
                ]
            )
        )  # fmt: skip
        shutil.rmtree(cache)
        say(f"round {number}: chunkflow {ours[-1].seconds:.1f} s, {mebibytes(ours[-1].peak_bytes):,} MiB")
        if rival_batch is None:
            continue
        rival.append(
            run(
                [
                    sys.executable, __file__, "--rival", str(data), str(folder / "tokenizer"),
                    "--rival-batch", str(rival_batch),
                ],
                {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"},
            )
        )  # fmt: skip
        say(f"round {number}: tokenizer alone {rival[-1].printed['seconds']:.1f} s")
    last = ours[-1].printed
    truth = {name: float(np.mean(lengths < limit)) for name, limit in limits(last["cdf"]).items()}
    return {
        "workers": workers,
        "seconds": [round(finished.seconds, 2) for finished in ours],
        "cpu_seconds": [round(finished.cpu_seconds, 2) for finished in ours],
        **against_the_tokenizer(ours, rival, int(lengths.sum())),
        "tokens_a_second": round(int(lengths.sum()) / min(finished.seconds for finished in ours)),
        "peak_bytes": max(finished.peak_bytes for finished in ours),
        "peak_bytes_of_processes": max((finished.peaks for finished in ours), key=sum),
        "tokens_are_true": last["tokens"] == int(lengths.sum()) and last["max"] == int(lengths.max()),
        "cumulative": last["cdf"],
        "points_off": round(max(abs(last["cdf"][name] - share) for name, share in truth.items()) * 100, 6),
    }


def against_the_tokenizer(ours: list[Finished], rival: list[Finished], tokens: int) -> dict[str, Any]:
    if not rival:
        return {}
    assert all(finished.printed["tokens"] == tokens for finished in rival)
    seconds = [finished.printed["seconds"] for finished in rival]
    cpu_seconds = [finished.printed["cpu_seconds"] for finished in rival]
    return {
        "tokenizer_alone_seconds": [round(value, 2) for value in seconds],
        "tokenizer_alone_cpu_seconds": [round(value, 2) for value in cpu_seconds],
        "times_the_tokenizer": round(min(finished.seconds for finished in ours) / min(seconds), 3),
        "times_the_tokenizer_in_cpu_seconds": round(
            min(finished.cpu_seconds for finished in ours) / min(cpu_seconds), 3
        ),
    }


def limits(table: dict[str, float]) -> dict[str, int]:
    """The thresholds of a cumulative table, by their names: `<4K` is 4096."""
    return {name: int(name.strip("<K")) * 1024 for name in table}


def tokenizer_alone(data: Path, tokenizer_folder: Path, batch: int) -> dict[str, Any]:
    """What the rival's process does: time in `encode_batch`, and nothing else."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers shall not spend seconds on it
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    seconds = cpu_seconds = 0.0
    tokens = 0
    with data.open("rb") as file:
        while lines := list(islice(file, batch)):
            texts = [template.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
            start, cpu_start = time.perf_counter(), time.process_time()
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            tokens += sum(map(len, encodings))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}


def estimated(data: Path, rounds: int) -> dict[str, Any]:
    runs = []
    for number in range(rounds):
        runs.append(run([sys.executable, "-m", "chunkflow_cli", "analyze", str(data), "--json"]))
        say(f"round {number}: estimated {runs[-1].seconds:.1f} s, {mebibytes(runs[-1].peak_bytes):,} MiB")
    size = data.stat().st_size
    return {
        "seconds": [round(finished.seconds, 2) for finished in runs],
        "cpu_seconds": [round(finished.cpu_seconds, 2) for finished in runs],
        "megabytes_a_second": round(size / min(finished.seconds for finished in runs) / 1e6),
        "megabytes_a_cpu_second": round(size / min(finished.cpu_seconds for finished in runs) / 1e6),
        "peak_bytes": max(finished.peak_bytes for finished in runs),
        **reading_rates(data, rounds),
    }


def reading_rates(data: Path, rounds: int) -> dict[str, Any]:
    """MB/s of one core: reading files and lengths, and parsing lines that are in memory already."""
    import orjson

    from chunkflow_cli.config.schema import DataFormat, TrainOn
    from chunkflow_cli.data.estimate import estimate_sizes
    from chunkflow_cli.data.source import open_source

    part = data.with_name("part.jsonl")
    with data.open("rb") as file:
        lines = list(islice(file, PARSED_LINES))
    part.write_bytes(b"".join(lines))
    source = open_source(str(part))

    def parse() -> None:
        for line in lines:
            orjson.loads(line)

    def estimate() -> None:
        estimate_sizes(source, DataFormat.messages, train_on=TrainOn.assistant, progress=lambda _: None)

    seconds: dict[str, list[float]] = {"parsing": [], "reading_lengths": []}
    for _ in range(max(3, rounds)):
        seconds["parsing"].append(timed(parse))
        seconds["reading_lengths"].append(timed(estimate))
    size = part.stat().st_size
    part.unlink()
    return {f"{name}_megabytes_a_second": round(size / min(found) / 1e6) for name, found in seconds.items()}


def timed(function: Callable[[], object]) -> float:
    """CPU seconds: of one core, whatever else runs on it."""
    start = time.process_time()
    function()
    return time.process_time() - start


@dataclass(frozen=True)
class Planned:
    seconds: float
    chunks: int
    lower_bound: int
    """Of each global batch, summed."""
    over_the_bound: float


def plan(lengths: NDArray[np.int64]) -> dict[str, Any]:
    from chunkflow_cli.planning.batches import GlobalBatches
    from chunkflow_cli.planning.chunks import Chunks, build_chunks
    from chunkflow_cli.planning.run_plan import RunPlan

    batches = GlobalBatches(len(lengths), 256, seed=0, shuffle=True)

    def of_batches() -> list[Chunks]:
        return [build_chunks(lengths[batches[step]], CHUNK_SIZE) for step in range(batches.steps_per_epoch)]

    def of_run() -> list[Chunks]:
        run = RunPlan(batches, batches.steps_per_epoch, lengths, lengths - 1, CHUNK_SIZE, k=1)
        return [rank.chunks for step in run for rank in step.ranks]

    ways: dict[str, Callable[[], list[Chunks]]] = {
        "one_global_batch": lambda: [build_chunks(lengths, CHUNK_SIZE)],
        "global_batches_of_256": of_batches,
        "steps_with_schedules": of_run,
    }
    result: dict[str, Any] = {"chunk_size": CHUNK_SIZE, "lengths": len(lengths)}
    for name, way in ways.items():
        start = time.perf_counter()
        found = way()
        seconds = time.perf_counter() - start
        chunks, bound = sum(map(len, found)), sum(-(-chunks.tokens // CHUNK_SIZE) for chunks in found)
        result[name] = asdict(Planned(round(seconds, 2), chunks, bound, round(chunks / bound, 5)))
        say(f"{name}: {chunks:,} chunks of at least {bound:,} in {seconds:.2f} s")
    return result


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """What the parts that ran have to show, and whether they do."""
    found: dict[str, Any] = {}
    if exact := result.get("exact"):
        if "times_the_tokenizer" in exact:
            found["exact_within_1.25_times_the_tokenizer"] = exact["times_the_tokenizer"] <= MOST_TIMES_THE_TOKENIZER
        found["exact_lengths_are_true"] = exact["tokens_are_true"] and exact["points_off"] <= MOST_POINTS
        found["exact_below_1_GiB"] = exact["peak_bytes"] < MOST_BYTES
    if estimated := result.get("estimated"):
        least = min(LEAST_MEGABYTES_A_SECOND, estimated["parsing_megabytes_a_second"])
        found["reading_lengths_at_200_MB_or_as_parsing"] = estimated["reading_lengths_megabytes_a_second"] >= least
        found["estimated_command_at_200_MB_or_as_parsing"] = estimated["megabytes_a_cpu_second"] >= least
        found["estimated_below_1_GiB"] = estimated["peak_bytes"] < MOST_BYTES
    if planned := result.get("plan"):
        found["plan_within_1_percent_of_the_bound"] = (
            planned["one_global_batch"]["over_the_bound"] <= MOST_OVER_THE_BOUND
        )
    return found


if __name__ == "__main__":
    main()
