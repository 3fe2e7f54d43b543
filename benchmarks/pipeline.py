"""Pipelines as they ran against pipelines as they are simulated: order of operations, waits, bubble ratio.

    python benchmarks/pipeline.py            four stages on this machine, eight schedules; about five minutes

Each schedule is trained for real (`chunkflow train parallel.pipeline=4 train.trace=true`, four processes), on
long-tailed rows of random ids. Of one step then:

- the operations of every stage must have run in the order of the plan;
- the durations that each operation *had* are given to `simulate`, which says when each would have run if stages waited
  for nothing but what the schedule makes them wait for. Its makespan and bubble ratio stand beside the measured ones.

What cannot be measured on a machine with fewer cores than stages is the bubble ratio of a real pipeline: stages share
the cores, so an operation takes longer while others run, and a wait of one stage is work of another. Giving the
simulation the durations as they were takes that out: what is compared is the waiting, which is what a schedule decides.
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

import numpy as np

from common import emit, hardware, say

STAGES = 4
SCHEDULES = {
    "1f1b": ("parallel.schedule=1f1b",),
    "1f1b, K=4": ("parallel.schedule=1f1b", "chunk.k=4"),
    "state-aware": (),
    "state-aware, K=4": ("chunk.k=4",),
    "state-aware, one more warm-up": ("parallel.warmup_extra=1",),
    "searched": ("parallel.schedule=searched",),
    "zero bubble": ("parallel.schedule=zero_bubble",),
    "whole sequences": ("parallel.schedule=1f1b", "chunk.size=1024"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=3, help="which step is compared; the first ones warm up")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = prepare(Path(folder))
        rows = [compare(name, [*words, *extra], Path(folder), arguments.step) for name, extra in SCHEDULES.items()]
    simulated, measured = ([row[f"{kind}_bubble_ratio"] for row in rows] for kind in ("simulated", "measured"))
    result = {
        "benchmark": "pipeline",
        "hardware": hardware(),
        "stages": STAGES,
        "step": arguments.step,
        "schedules": rows,
        "all_in_order": all(row["in_order"] for row in rows),
        "rank_correlation_of_bubbles": rank_correlation(simulated, measured),
        "largest_difference_of_bubbles": float(np.abs(np.subtract(simulated, measured)).max()),
    }
    emit(result, arguments.out)


def prepare(folder: Path) -> list[str]:
    """A model of eight layers, long-tailed rows, and the words of every run."""
    from transformers import AutoConfig

    AutoConfig.for_model(
        "qwen2", hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, max_position_embeddings=2048, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / "model")  # fmt: skip
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(20, 200, 20), [1000, 700, 420]])
    with (folder / "rows.jsonl").open("w") as file:
        for length in random.permutation(lengths).tolist():
            file.write(json.dumps({"input_ids": random.integers(3, 2048, length).tolist()}) + "\n")
    return [
        f"model.path={folder / 'model'}", "model.init=random", "model.dtype=float32", "data.format=tokens",
        f"data.path={folder / 'rows.jsonl'}", f"data.cache_dir={folder}", "data.num_workers=1", "train.guard=false",
        f"train.global_batch_size={len(lengths)}", "train.shuffle=false", "chunk.size=128", "optim=sgd",
        f"launch.processes={STAGES}", f"parallel.pipeline={STAGES}", "train.trace=true",
    ]  # fmt: skip


def compare(name: str, words: list[str], folder: Path, step: int) -> dict[str, Any]:
    from chunkflow_cli.config import load
    from chunkflow_cli.plan import make_plan
    from chunkflow_cli.simulate import simulate
    from chunkflow_cli.trace import measured_timeline

    say(f"{name}...")
    run = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    words = [*words, f"train.epochs={step}"]
    subprocess.run(
        [sys.executable, "-m", "chunkflow_cli", "train", "--json", *words, f"train.output_dir={run}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    (rank,) = make_plan(load(words), step=step).step.ranks
    timeline = measured_timeline(json.loads((run / "trace.json").read_text()), step)
    in_order = True
    for stage, schedule in enumerate(rank.schedules):
        rows = timeline.stage == stage
        ran = [f"{kind}{chunk}" for kind, chunk in zip(timeline.kind[rows], timeline.chunk[rows], strict=True)]
        in_order &= ran == str(schedule).split()
    replayed = simulate(rank.schedules, durations(timeline, len(rank.chunks)))
    return {
        "schedule": name,
        "chunks": len(rank.chunks),
        "in_order": bool(in_order),
        "measured_makespan_seconds": timeline.makespan,
        "simulated_makespan_seconds": replayed.makespan,
        "measured_bubble_ratio": timeline.bubble_ratio,
        "simulated_bubble_ratio": replayed.bubble_ratio,
    }


def durations(timeline: Any, chunks: int) -> Any:
    """Of every operation as it ran; 0 for those that no schedule holds."""
    from chunkflow_cli.simulate import OperationSeconds

    kinds = {"F": "forward", "B": "backward", "R": "recompute", "S": "state_pass",
             "I": "input_gradient", "W": "weight_gradient"}  # fmt: skip
    tables = {name: np.zeros((STAGES, chunks)) for name in kinds.values()}
    took = timeline.stop_seconds - timeline.start_seconds
    for kind, stage, chunk, seconds in zip(timeline.kind, timeline.stage, timeline.chunk, took, strict=True):
        tables[kinds[str(kind)]][stage, chunk] = seconds
    return OperationSeconds(**tables)


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: 1 if both sort the schedules alike."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    main()
