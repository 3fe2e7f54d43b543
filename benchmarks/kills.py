"""`kill -9` of any one rank at any moment, many times over: does the run always say so, and always end the same?

    python benchmarks/kills.py                                        until twenty kills; about ten minutes
    python benchmarks/kills.py --words parallel.pipeline=2            another layout
    python benchmarks/kills.py --processes 4 --kills 50 --seed 1

A small run (tiny_random, 120 steps, a checkpoint after every tenth, held-out loss after every 15th) is started, one of
its ranks is killed after a random time, and the same command is given again, until it has ended by itself. Then it
begins anew, until there were enough kills. Each time: exit 1 within seconds, the rank is named, no traceback, nobody is
left behind. Each run that ends: the losses of all steps are those of a run left alone, to the bit, and every sample
counts.
Prints one JSON object on stdout: where the victims stood. Anything else is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chunkflow_cli.processes.heartbeat import read_place
from chunkflow_cli.processes.watch_folder import WatchFolder
from common import emit, hardware, say

STEPS = 120
RUN = (
    "recipe=tiny_random", f"train.steps={STEPS}", "checkpoint.every=10", "checkpoint.keep=1", "train.guard=false",
    "train.global_batch_size=8", "data.eval_fraction=0.2", "eval.every=15", "data.num_workers=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", nargs="*", default=["engine.zero_stage=2"], help="overrides, such as the layout")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    words = [*RUN, f"launch.processes={arguments.processes}", *arguments.words]
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone")
        began = time.monotonic()
        end(start(words, alone), 0)
        seconds, expected = time.monotonic() - began, losses(alone)
        samples = json.loads((alone / "report.json").read_text())["samples_trained"]
        say(f"left alone it takes {seconds:.1f} s")
        places: Counter[str] = Counter()
        latest, runs = 0.0, 0
        while places.total() < arguments.kills:
            run_folder = Path(folder, f"run-{runs}")
            while (killed := kill_one(words, run_folder, generator, seconds)) is not None:
                place, until_end = killed
                places[place] += 1
                latest = max(latest, until_end)
                say(f"{places.total():>3} killed while {place}: ended {until_end:.1f} s later")
            runs += 1
            if losses(run_folder) != expected:
                raise SystemExit(f"losses differ: {losses(run_folder)}, left alone {expected}")
            report = json.loads((run_folder / "report.json").read_text())
            if report["samples_trained"] != samples:
                raise SystemExit(f"{report['samples_trained']} samples were trained on, not {samples}")
    emit(
        {
            "benchmark": "kills", "hardware": hardware(), "processes": arguments.processes, "words": arguments.words,
            "kills": places.total(), "runs_that_ended": runs, "longest_until_the_end_seconds": round(latest, 1),
            "victims_stood_at": dict(places.most_common()),
        },
        arguments.out,
    )  # fmt: skip


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "chunkflow_cli", "train", *words, f"train.output_dir={folder}"]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end(run: subprocess.Popen[str], code: int) -> str:
    """What it printed on stderr."""
    _, err = run.communicate(timeout=300)
    if run.returncode != code or "Traceback" in err:
        raise SystemExit(f"exit {run.returncode}, expected {code}:\n{err}")
    return err


def kill_one(words: list[str], folder: Path, generator: random.Random, seconds: float) -> tuple[str, float] | None:
    """Where the victim stood, and the seconds until the launcher had ended; None where the run ended first."""
    run = start(words, folder)
    deadline = time.monotonic() + generator.uniform(0.1, 1.2) * seconds
    while time.monotonic() < deadline or not children(run.pid):
        if run.poll() is not None:
            end(run, 0)
            return None
        time.sleep(0.01)
    ranks = children(run.pid)
    rank, victim = generator.choice(sorted(ranks.items()))
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    place = read_place(WatchFolder(folder).heartbeat(rank)).doing
    _, err = run.communicate(timeout=120)
    if run.returncode == 0 and (folder / "report.json").exists():
        return None  # it had done all of its work, and nobody waits for a rank that has nothing left to do
    if run.returncode != 1 or "Traceback" in err or f"rank {rank} was killed by SIGKILL" not in err.replace("\n", " "):
        raise SystemExit(f"rank {rank}, killed while {place}: exit {run.returncode}\n{err}")
    if left := [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]:
        raise SystemExit(f"rank {rank}, killed while {place}: processes {left} are left behind")
    is_operation = re.fullmatch(r"[SFRB](\d+|-).*", place) is not None
    return "an operation of a step" if is_operation else place, time.monotonic() - killed


def children(launcher: int) -> dict[int, int]:
    """Rank -> process id, by the kernel's word."""
    found = {}
    try:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            environment = dict(
                entry.split(b"=", 1)
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if b"=" in entry
            )
            if b"RANK" in environment:
                found[int(environment[b"RANK"])] = int(child)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return {}
    return found


def losses(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row.get("eval_loss")) for row in rows]


if __name__ == "__main__":
    main()
