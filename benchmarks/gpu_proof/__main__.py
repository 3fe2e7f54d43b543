"""Prove on one GPU what the tests prove on CPUs, and measure what chunkflow predicts.

    make gpu-proof              nine minutes on a GPU; results go to outputs/gpu-proof
    make gpu-proof DRY=1        the same program at tiny sizes on a CPU
    python -m gpu_proof --markdown [--results FILE]     the tables of docs/gpu.md

Each section runs in a process of its own, with a limit. Every row is kept as soon as it is measured, so a run that is
killed keeps what it has. A row that fails says why, and the proof goes on. The exit code is 1 if a row of parity or of
the optimizer steps has not passed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_proof.cases import GOOD, MINUTES, PARITY, Part, Section, parts_of, sections
from gpu_proof.profile import derived_rows
from gpu_proof.tables import markdown, print_tables
from gpu_proof.worker import SPOILT

POLL_SECONDS = 0.2
SECONDS_TO_END = 15.0
"""Seconds that a process has to end, and free the GPU, after its last row."""
LEAST_SECONDS = 30.0
"""Seconds that every process may take, as long as its section has them."""
AHEAD = 3
"""Processes that import what they need before it is their turn."""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all sections; from 20 on, 256K on all layers"
    )
    parser.add_argument("--since", type=float, help="when the minutes began, in seconds of the epoch")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-proof"), help="folder for results")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/gpu.md, and stop")
    parser.add_argument("--results", type=Path, help="with --markdown: a results.json to fill them from")
    arguments = parser.parse_args()
    found = sections(dry=arguments.dry, minutes=arguments.minutes)
    if arguments.markdown:
        results = None if arguments.results is None else json.loads(arguments.results.read_text(encoding="utf-8"))
        print(markdown(found, results))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes below, too
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as work:
        proof = Proof(found, Path(work), arguments.out, arguments.minutes, arguments.dry)
        proof.run(time.time() if arguments.since is None else arguments.since)
    print_tables(found, proof.results)
    print(f"results: {arguments.out / 'results.json'}")
    sys.exit(1 if proof.failed else 0)


@dataclass
class Proof:
    """The sections, their rows so far, and the processes that measure them."""

    sections: tuple[Section, ...]
    work: Path
    out: Path
    minutes: float
    dry: bool
    worker: tuple[str, ...] = (sys.executable, "-m", "gpu_proof.worker")
    """The command of a process that measures."""
    results: dict[str, Any] = field(default_factory=lambda: {"hardware": {}, "sections": {}})
    _read: int = 0
    """Bytes read of the file in which the processes write their rows, one after the other."""
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, started: float) -> None:
        """Run all sections.

        Args:
            started: when the limits of the sections began, in seconds of the epoch.
        """
        measured = [section for section in self.sections if section.limit_seconds]
        slack = 60 * self.minutes - sum(section.limit_seconds for section in measured)
        until = started + slack - 5  # the installation has taken its part, the tables take the rest
        deadlines = {}
        for section in measured:
            until = deadlines[section.name] = until + section.limit_seconds
        tasks = [[part] for section in measured for part in parts_of(section)]
        if self.dry:  # imports take longer than tiny sections
            tasks = [[Part(section, 0, len(section.cases)) for section in measured]]
        try:
            if not self.dry:
                self._start(sys.executable, "-m", "gpu_proof.prepare", "--work", str(self.work))
            waiting = [self._worker(task) for task in tasks[:AHEAD]]
            for number, task in enumerate(tasks):
                waiting += [self._worker(later) for later in tasks[number + AHEAD : number + AHEAD + 1]]
                section, now = task[-1].section, time.time()
                left = [rows_of(later) for later in tasks[number:] if later[-1].section is section]
                # One that hangs leaves time to the others, which may take as long as they have rows.
                share = max(LEAST_SECONDS, 2 * (deadlines[section.name] - now) * left[0] / sum(left))
                self._follow(waiting.pop(0), task, min(deadlines[section.name], now + share))
        finally:
            for process in self._processes:
                _kill(process)
            self._derive()
            self._keep()

    def _start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, text=True, start_new_session=True)
        self._processes.append(process)
        return process

    def _worker(self, task: list[Part]) -> subprocess.Popen[str]:
        """Start the process of a task; it waits until it is told to begin."""
        words = [
            *map(str, task), "--rows", str(self.work / "rows.jsonl"), "--work", str(self.work), "--out", str(self.out),
            "--minutes", str(self.minutes),
        ]  # fmt: skip
        return self._start(*self.worker, *words, *(["--dry"] if self.dry else []))

    def _follow(self, process: subprocess.Popen[str], task: list[Part], deadline: float) -> None:
        """Keep the rows of a task as its process writes them, and note why others are missing."""
        path = self.work / "rows.jsonl"
        path.touch()
        _begin(process)
        while True:
            ended = process.poll() is not None  # before reading: what it has written by then is all
            self._take_new(path)
            left = self._left(task)
            if not left:
                break
            if time.time() > deadline:
                _kill(process)
                self._take_new(path)
                left = self._left(task)
                for part in left:
                    self._note(part, part.stop - part.first, "not run", "the time was over")
                break
            if ended:
                # An error that ends a process, such as an illegal access of memory, spoils only one row.
                if process.returncode != SPOILT:
                    self._note(left[0], 1, "error", f"its process ended with exit code {process.returncode}")
                if not (left := self._left(task)):
                    break
                os.truncate(path, self._read)  # it may have ended within a line
                process = self._worker(left)
                _begin(process)
            time.sleep(POLL_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        _kill(process)
        os.truncate(path, self._read)

    def _left(self, task: list[Part]) -> list[Part]:
        """Return what is still to be measured."""
        done = [(part, max(part.first, len(self._rows(part.section)))) for part in task]
        return [Part(part.section, first, part.stop) for part, first in done if first < part.stop]

    def _note(self, part: Part, count: int, status: str, note: str) -> None:
        rows = self._rows(part.section)
        for case in part.section.cases[len(rows) : len(rows) + count]:
            rows.append({"case": case.labels, "status": status, "note": note, "values": {}})
        self._keep()

    def _rows(self, section: Section) -> list[Row]:
        rows: list[Row] = self.results["sections"].setdefault(section.name, [])
        return rows

    def _take_new(self, path: Path) -> None:
        """Take the rows that the present process has written since the last time."""
        with path.open(encoding="utf-8") as rows:
            rows.seek(self._read)
            for line in rows:
                if not line.endswith("\n"):
                    break  # it is being written
                self._read += len(line.encode())
                self._take(json.loads(line))

    def _take(self, row: Row) -> None:
        if "hardware" in row:
            self.results["hardware"] = row["hardware"]
            return
        name = row.pop("section")
        section = next(each for each in self.sections if each.name == name)
        labels = section.cases[len(self._rows(section))].labels
        self._rows(section).append({"case": labels, **row})
        print(f"{section.title}: {', '.join(filter(None, labels))}: {row['status']}", file=sys.stderr, flush=True)
        self._keep()

    def _derive(self) -> None:
        section = next(section for section in self.sections if section.name == "profile")
        if "seconds" in self.results["sections"]:
            self.results["sections"]["profile"] = derived_rows(section, self.results["sections"]["seconds"])

    def _keep(self) -> None:
        path = self.out / "results.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").rename(path)

    @property
    def failed(self) -> list[Row]:
        """Rows of parity that have not passed."""
        return [row for name in PARITY for row in self.results["sections"].get(name, []) if row["status"] not in GOOD]


def rows_of(task: list[Part]) -> int:
    return sum(part.stop - part.first for part in task)


def _begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, which `_follow` notices
        process.stdin.write("begin\n")
        process.stdin.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
