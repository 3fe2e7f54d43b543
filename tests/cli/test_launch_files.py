"""The files in recipes/launch start what they say: parsed, and run with stand-ins for what is not here.

They were also run for real: the SLURM file under slurm 22.05 with two nodes, stopped by SIGTERM, requeued and
continued; the image was built with buildah, and trained on a CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from chunkflow_cli.config.load import load

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for SLURM_PROCID in 0 1 2 3; do
    export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2)); "$@" || code=$?
done
exit ${code:-0}
"""
CHUNKFLOW = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT|$#|$*" >> ranks
exit $CODE
"""
SCONTROL = """#!/bin/bash
if [ $1 = show ]; then printf 'node-7\\nnode-8\\n'; else echo "$*" >> requeued; fi
"""


@pytest.mark.processes
@pytest.mark.parametrize("code", [0, 1, 130])
def test_slurm_starts_a_rank_for_each_task_and_requeues_a_run_that_was_stopped(code: int, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("chunkflow", CHUNKFLOW), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[7-8]"}
    words = ["recipe=qwen7b", "data.path=/shared/a b.jsonl"]
    run = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *words], cwd=tmp_path, check=False,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)},
    )  # fmt: skip
    assert run.returncode == code
    ranks = (tmp_path / "ranks").read_text().splitlines()
    assert ranks == [f"{r} {r % 2} 4 2 node-7 20041|3|train {' '.join(words)}" for r in range(4)]
    assert (tmp_path / "requeued").exists() == (code == 130)


def test_the_slurm_file_leaves_time_for_a_checkpoint() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)
    assert int(seconds) >= load([]).config.launch.grace_seconds


def test_skypilot_runs_what_exists() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "num_nodes", "envs", "file_mounts", "setup", "run"}
    run = task["run"].replace("\\\n", " ")
    for name, value in task["envs"].items():
        run = run.replace(f"${name}", value)
    launcher, _, command = run.partition(" -m chunkflow_cli train ")
    assert set(re.findall(r"\$(\w+)", launcher)) == {
        "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS",
    }  # fmt: skip
    config = load(command.split()).config
    assert config.checkpoint.every is not None, "a spot node may go away"
    assert str(config.train.output_dir).startswith(next(iter(task["file_mounts"])))
    (version,) = re.findall(r"--python ([\d.]+)", task["setup"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_the_image_is_made_of_what_is_in_the_repository() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    copied = {name for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in sources.split()}
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]) <= copied
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    ignored, *sent = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    assert {name.partition("/")[0] for name in copied} == {name[1:] for name in sent if name.startswith("!")}
