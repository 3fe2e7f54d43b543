"""The proof that `make gpu-proof` runs, on a CPU: it measures every row, survives what fails, and docs/gpu.md shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PATHS = [str(REPOSITORY / "src"), str(REPOSITORY / "benchmarks")]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.slow
@pytest.mark.processes
def test_dry_run_measures_every_row(tmp_path: Path) -> None:
    """`make gpu-proof DRY=1`: the same program as on a GPU. What fails here would waste the minutes of a GPU."""
    from gpu_proof.cases import GOOD, sections

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-m", "gpu_proof", "--dry", "--out", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for section in sections(dry=True):
        assert section.title in run.stdout
        rows = results["sections"][section.name]
        assert [row["status"] for row in rows if row["status"] not in (*GOOD, "measured")] == []
        assert len(rows) == len(section.cases)
        measured = [row["values"] for row in rows if row["status"] in ("passed", "measured")]
        assert measured, f"{section.name}: nothing was measured"
        keys = {column.key for column in section.columns}
        assert keys <= set().union(*measured), f"{section.name}: a column without any value"
    assert max(map(len, run.stdout.splitlines()[:-1])) <= 80
    assert results["hardware"]["deepspeed"]
    assert (tmp_path / "calibration.json").exists()


def test_page_has_the_tables_of_the_program() -> None:
    from gpu_proof.tables import with_tables

    page = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "docs/gpu.md is out of date: run make docs"


FAKE = """
import json, os, sys, time
from pathlib import Path
from gpu_proof.cases import Part, sections
sys.stdin.readline()
words = sys.argv[1:]
found = sections(dry=True)
with Path(words[words.index("--rows") + 1]).open("a") as file:
    for text in words[: words.index("--rows")]:
        part = Part.parse(text, found)
        for index in range(part.first, part.stop):
            behavior = PLAN.get(f"{part.section.name}:{index}")
            if behavior == "die":
                file.write('{"half a row')
                file.flush()
                os.abort()
            if behavior == "hang":
                time.sleep(60)
            row = {"section": part.section.name, "status": behavior or "passed", "values": {"index": index}}
            file.write(json.dumps(row) + "\\n")
            file.flush()
"""


def proof_with(plan: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a proof whose processes do nothing but what the plan says of some rows."""
    from gpu_proof.__main__ import Proof
    from gpu_proof.cases import sections

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    worker = (sys.executable, "-c", FAKE.replace("PLAN", repr(plan)))
    return Proof(sections(dry=True), folder, folder, 9, dry=True, worker=worker)


@pytest.mark.processes
def test_a_row_that_ends_its_process_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = proof_with({"steps:2": "die", "memory:5": "die"}, tmp_path, monkeypatch)
    proof.run(time.time())
    kept = json.loads((tmp_path / "results.json").read_text())["sections"]
    for name, spoilt in (("parity", None), ("steps", 2), ("memory", 5), ("speed", None)):
        expected = [None if index == spoilt else index for index in range(len(kept[name]))]
        assert [row["values"].get("index") for row in kept[name]] == expected
    assert "exit code -6" in kept["steps"][2]["note"]
    assert [row["status"] for row in proof.failed] == ["error"]


@pytest.mark.processes
def test_what_was_measured_before_the_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that hangs on the device never returns: its process is killed, and parity has not passed."""
    proof = proof_with({"parity:1": "FAILED", "steps:3": "hang"}, tmp_path, monkeypatch)
    proof.run(time.time() - 9 * 60 + 7)
    kept = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert [row["status"] for row in kept["steps"]] == ["passed"] * 3 + ["not run"] * (len(kept["steps"]) - 3)
    assert {row["status"] for row in kept["speed"]} == {"not run"}
    assert [row["status"] for row in proof.failed] == ["FAILED"] + ["not run"] * (len(kept["steps"]) - 3)


def test_gradients_that_are_off_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_proof import parity
    from gpu_proof.cases import sections
    from gpu_proof.training import Place

    right = parity.chunked_gradients

    def wrong(*arguments: Any, k: int) -> Any:
        gradients = right(*arguments, k=k)
        return type(gradients)(gradients.loss, {name: 1.0001 * tensor for name, tensor in gradients.of.items()})

    cases = sections(dry=True)[0].cases
    monkeypatch.setattr(parity, "chunked_gradients", wrong)
    (row,) = parity.rows(cases[:1], Place(tmp_path, tmp_path, dry=True))
    assert (row["status"], row["note"].partition(" is ")[0]) == ("FAILED", "grad_error")


def test_time_is_shared_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process trains on three lengths and another on one: by halves, the longer one would be ended too early."""
    from gpu_proof.__main__ import Proof, rows_of
    from gpu_proof.cases import parts_of

    given: list[tuple[int, float]] = []
    proof = proof_with({}, tmp_path, monkeypatch)
    proof.dry, proof.sections = False, proof.sections[-1:]
    monkeypatch.setattr(Proof, "_start", lambda *_: None)
    monkeypatch.setattr(Proof, "_derive", lambda _: None)
    now = time.time()

    def follow(_: Any, process: Any, task: Any, deadline: float) -> None:
        given.append((rows_of(task), deadline - now))

    monkeypatch.setattr(Proof, "_follow", follow)
    proof.run(now)
    assert [rows for rows, _ in given] == [part.stop - part.first for part in parts_of(proof.sections[0])]
    (first, seconds), *_, (_, most) = given
    assert seconds == pytest.approx(min(most, 2 * most * first / sum(rows for rows, _ in given)), rel=0.01)
