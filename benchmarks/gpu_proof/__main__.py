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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_proof.cases import GOOD, MINUTES, PARITY, Section, sections
from gpu_proof.profile import derived_rows
from gpu_proof.tables import markdown, print_tables

POLL_SECONDS = 0.2
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
    results: dict[str, Any] = field(default_factory=lambda: {"hardware": {}, "sections": {}})
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, started: float) -> None:
        """Run all sections.

        Args:
            started: when the limits of the sections began, in seconds of the epoch.
        """
        measured = [section for section in self.sections if section.limit_seconds]
        slack = 60 * self.minutes - sum(section.limit_seconds for section in measured)
        deadline = started + slack - 5  # the installation has taken its part, the tables take the rest
        try:
            if not self.dry:
                self._start("gpu_proof.prepare", "--work", str(self.work))
            # A dry run has one process, because imports take longer than tiny sections.
            groups = [measured] if self.dry else [[section] for section in measured]
            waiting = self._worker(groups[0], 0)
            for number, group in enumerate(groups):
                deadline += sum(section.limit_seconds for section in group)
                current = waiting
                if number + 1 < len(groups):
                    waiting = self._worker(groups[number + 1], 0)  # imports while the section before runs
                self._follow(current, group, deadline)
                self._derive()
        finally:
            for process in self._processes:
                _kill(process)
            self._keep()

    def _start(self, module: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words], stdin=subprocess.PIPE, stdout=2, text=True, start_new_session=True
        )
        self._processes.append(process)
        return process

    def _worker(self, group: list[Section], first: int) -> subprocess.Popen[str]:
        """Start the process of a group of sections; it waits until it is told to begin."""
        words = [
            *(section.name for section in group), "--first", str(first), "--rows", str(self.work / "rows.jsonl"),
            "--work", str(self.work), "--out", str(self.out), "--minutes", str(self.minutes),
        ]  # fmt: skip
        return self._start("gpu_proof.worker", *words, *(["--dry"] if self.dry else []))

    def _follow(self, process: subprocess.Popen[str], group: list[Section], deadline: float) -> None:
        """Keep the rows of a group as its process writes them, and note why others are missing."""
        path = self.work / "rows.jsonl"
        path.write_text("")
        _begin(process)
        read = 0
        while True:
            ended = process.poll() is not None  # before reading: what it has written by then is all
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in (line for line in lines[read:] if line.endswith("\n")):
                read += 1
                self._take(json.loads(line))
            section = next((each for each in group if len(self._rows(each)) < len(each.cases)), None)
            if section is None:
                break
            if time.time() > deadline:
                _kill(process)
                for each in group:
                    missing = len(each.cases) - len(self._rows(each))
                    self._rows(each).extend(
                        {"status": "not run", "note": "the time was over", "values": {}} for _ in range(missing)
                    )
                break
            if ended:
                # An error that ends a process, such as an illegal access of memory, spoils only one row.
                self._rows(section).append(
                    {"status": "error", "note": f"its process ended with exit code {process.returncode}", "values": {}}
                )
                rest = group[group.index(section) :]
                path.write_text("")
                read = 0
                process = self._worker(rest, len(self._rows(section)))
                _begin(process)
            time.sleep(POLL_SECONDS)
        self._keep()

    def _rows(self, section: Section) -> list[Row]:
        rows: list[Row] = self.results["sections"].setdefault(section.name, [])
        return rows

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


def _begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("begin\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, which `_follow` notices


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
