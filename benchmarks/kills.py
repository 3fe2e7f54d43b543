"""Kill and stop a run at any moment, many times over: does it always end the same?

    python benchmarks/kills.py                                  40 kills, and each signal in each phase; half an hour
    python benchmarks/kills.py --kills 10 --signals TERM        shorter
    python benchmarks/kills.py --processes 2 --words engine.zero_stage=2

A small run (40 steps, a checkpoint after every fifth, held-out loss after every tenth) is disturbed, and the same
command is given again until it has ended by itself.

Kills: `kill -9` of any process of the run (the command itself, a rank, a worker that tokenizes) at a random moment.
Signals: INT, TERM and HUP to the command, in each phase: tokenizing, guard, evaluation, steps, checkpoint, final.

Each time: no traceback, nobody left behind. Each run that ends: the losses of all steps are those of a run left alone,
to the bit, every sample counts, and nothing half written is left. Anything else is an error.
Prints a table on stderr and one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import emit, hardware, say

STEPS = 40
ROWS, HELD_OUT_ROWS = 20_000, 150
RUN = (
    "recipe=tiny_random", f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=2",
    "train.global_batch_size=8", "data.eval_fraction=0", "eval.every=10", "data.num_workers=2",
)  # fmt: skip
SIGNALS = ("INT", "TERM", "HUP")
LEAVING_SECONDS = 10.0
"""Longest wait for the processes of a run to be gone after the command has ended."""


@dataclass(frozen=True)
class Place:
    """The files of one disturbed run."""

    folder: Path
    words: tuple[str, ...]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "stderr"

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(exist_ok=True)
        words = [*self.words, f"train.output_dir={self.run}", f"data.cache_dir={self.folder / 'cache'}"]
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "chunkflow_cli", "train", *words], stdout=subprocess.DEVNULL, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip

    def rows(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else -1


PHASES: dict[str, Callable[[Place], bool]] = {
    "tokenizing": lambda place: any((place.folder / "cache" / "tokens").glob(".*")),
    "guard": lambda place: b"attention" in place.log.read_bytes(),
    "evaluation": lambda place: place.rows() == 0,
    "steps": lambda place: place.rows() >= 7,
    "checkpoint": lambda place: any((place.run / "checkpoints").glob(".step-*.writing")),
    "final": lambda place: (place.run / ".final.writing").exists(),
}
"""How each phase is seen from outside, while the one before it is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--signals", nargs="*", default=SIGNALS, choices=SIGNALS)
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", nargs="*", default=[], help="overrides, such as the layout")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    # Shells let what they start in the background ignore SIGINT, and a run would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = (*RUN, *write_data(folder), f"launch.processes={arguments.processes}", *arguments.words)
        alone = Place(folder / "alone", words)
        began = time.monotonic()
        finish(alone)
        seconds, expected = time.monotonic() - began, results(alone)
        say(f"left alone it takes {seconds:.1f} s")
        victims: Counter[str] = Counter()
        runs = 0
        while victims.total() < arguments.kills:
            place = Place(folder / f"kills-{runs}", words)
            while victims.total() < arguments.kills and (killed := kill_one(place, generator, seconds)) is not None:
                victims[killed[0]] += 1
                say(f"{victims.total():>3} killed: {killed[0]}, after {killed[1]:.0%} of its time")
            finish(place)
            check(place, expected)
            runs += 1
        table = []
        for phase in arguments.phases:
            for number in arguments.signals:
                place = Place(folder / f"{phase}-{number}", words)
                code, after = stop_one(place, phase, signal.Signals[f"SIG{number}"])
                finish(place)
                check(place, expected)
                table.append({"phase": phase, "signal": number, "exit": code, "seconds": round(after, 1)})
                say(f"{phase:<11} SIG{number:<5} exit {code:>4}, {after:4.1f} s later; ended the same")
    emit(
        {
            "benchmark": "kills", "hardware": hardware(), "processes": arguments.processes, "words": arguments.words,
            "kills": victims.total(), "victims": dict(victims.most_common()), "runs_that_ended": runs + len(table),
            "signals": table,
        },
        arguments.out,
    )  # fmt: skip


def write_data(folder: Path) -> list[str]:
    """Write rows of ids: many, so that tokenizing takes a moment; the long ones are cut into chunks."""
    generator = random.Random(1)
    for name, rows in (("train", ROWS), ("held_out", HELD_OUT_ROWS)):
        lengths = (generator.choice((20, 40, 80, 400) if row % 50 == 0 else (20, 40, 80)) for row in range(rows))
        lines = (json.dumps({"input_ids": generator.choices(range(3, 256), k=length)}) for length in lengths)
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return [f"data.path={folder / 'train.jsonl'}", f"data.eval_path={folder / 'held_out.jsonl'}"]


def kill_one(place: Place, generator: random.Random, seconds: float) -> tuple[str, float] | None:
    """Kill one process of a run at a random moment; return which, and when as a share of the time of a run left alone.

    None if the run ended first.
    """
    run = place.start()
    share = generator.uniform(0.02, 1.1)
    deadline = time.monotonic() + share * seconds
    while time.monotonic() < deadline:
        if run.poll() is not None:
            expect(place, run.returncode == 0, f"undisturbed, it ends with {run.returncode}")
            return None
        time.sleep(0.005)
    family = {run.pid: "the command", **descendants(run.pid)}
    victim = generator.choice(sorted(family))
    what = family[victim]
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    code = wait(run)
    expect(place, code in (0, 1, -signal.SIGKILL), f"{what} was killed: exit {code}")
    nobody_left(place, family)
    return what, share


def stop_one(place: Place, phase: str, number: signal.Signals) -> tuple[int, float]:
    """Send a signal in a phase; return the exit code, and the seconds until the command had ended."""
    run, is_there = place.start(), PHASES[phase]
    while not is_there(place):
        expect(place, run.poll() is None, f"ended with {run.returncode} before {phase}")
        time.sleep(0.0005)
    family = {run.pid: "the command", **descendants(run.pid)}
    run.send_signal(number)
    sent = time.monotonic()
    code = wait(run)
    # Before it can save, a run may die of the signal; when all its steps are done, it may finish.
    allowed = {130, -number, 128 + number} | ({0} if phase in ("checkpoint", "final") else set())
    expect(place, code in allowed, f"SIG{number.name} in {phase}: exit {code}")
    nobody_left(place, family)
    return code, time.monotonic() - sent


def finish(place: Place) -> None:
    """Give the same command until it ends by itself: at once, because nobody disturbs it."""
    run = place.start()
    expect(place, wait(run) == 0, f"the same command ends with {run.returncode}")


def wait(run: subprocess.Popen[bytes]) -> int:
    return run.wait(timeout=600)


def check(place: Place, expected: Any) -> None:
    found = results(place)
    expect(place, found == expected, f"other losses or samples: {found}, left alone {expected}")
    half = [*place.run.rglob(".step*"), *place.run.rglob(".final*"), *place.run.rglob("*.tmp")]
    half += (place.folder / "cache" / "tokens").glob(".[0-9a-f]*")
    expect(place, not half, f"half written: {half}")


def results(place: Place) -> Any:
    """Return the losses of all steps, the number of samples, and the held-out losses."""
    rows = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((place.run / "report.json").read_text())
    losses = [(row["step"], row["loss"], row.get("eval_loss")) for row in rows]
    return losses, report["samples_trained"], report["eval_loss_start"], report["eval_loss_end"]


def expect(place: Place, is_so: bool, otherwise: str) -> None:
    printed = place.log.read_text(errors="replace")
    if not is_so or "Traceback" in printed:
        raise SystemExit(f"{place.folder.name}: {otherwise}\n{printed[-3000:]}")


def nobody_left(place: Place, family: dict[int, str]) -> None:
    deadline = time.monotonic() + LEAVING_SECONDS
    while left := [f"{pid} ({what})" for pid, what in family.items() if is_alive(pid)]:
        expect(place, time.monotonic() < deadline, f"left behind: {', '.join(left)}")
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> dict[int, str]:
    """Return the process ids of all children of a process and of theirs, each with what it is."""
    found: dict[int, str] = {}
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for child in children:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found[child] = "a rank" if any(entry.startswith(b"RANK=") for entry in environment) else "a worker"
            found |= descendants(child)
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
        return found
    return found


if __name__ == "__main__":
    main()
