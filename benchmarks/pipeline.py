"""Pipelines and ranks as they ran against what is simulated: order of operations, waits, bubble ratio, balance.

    python benchmarks/pipeline.py            four stages on this machine, eight schedules; about six minutes
    python benchmarks/pipeline.py --balance  four ranks that share the samples instead, six layouts
    python benchmarks/pipeline.py --real     operations take as long as they take, instead of a given time

Each schedule is trained for real (`chunkflow train parallel.pipeline=4 train.trace=true`, four processes), on
long-tailed rows of random ids. Of one step then:

- the operations of every stage must have run in the order of the plan;
- makespan and bubble ratio of the trace stand beside those that `simulate` says for the same durations.

A machine with fewer cores than stages cannot measure the bubble ratio of a real pipeline: an operation takes longer
while other stages run, and the wait of one is the work of another. So each operation is stretched: a stage computes,
then sleeps until the operation has taken 0.3 milliseconds a token (a backward twice that), the durations of the paper's
worked example, and then sends. Sleeping takes no core, so stages run beside each other as on devices of their own, and
what is measured is what a schedule decides: who waits for whom, with real messages between real processes. With
`--real` nothing is stretched, and the simulation gets the durations that operations had.

With `--balance` samples are divided among four ranks, in six layouts and settings; the share of the ranks' time in
which they wait for the slowest stands beside that of the plan.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import emit, hardware, say

STAGES = 4
SECONDS_PER_TOKEN = 0.3e-3
"""Of a stretched forward; a backward takes twice as long, each half of a split one as long as a forward."""
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
BALANCED = {
    "whole samples": (),
    "whole samples, K=4": ("chunk.k=4",),
    "whole samples, larger chunks": ("chunk.size=512",),
    "groups of 2": ("parallel.sequence=2",),
    "groups of 2, all spread": ("parallel.sequence=2", "parallel.spread=all"),
    "a group of 4": ("parallel.sequence=4",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=3, help="which step is compared; the first ones warm up")
    parser.add_argument("--real", action="store_true", help="do not stretch operations")
    parser.add_argument("--balance", action="store_true", help="ranks that share samples instead of stages")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # One sample that is more than a rank's share, so that there is something to balance.
        words = prepare(Path(folder), longest=3000 if arguments.balance else 1000)
        if arguments.balance:
            if arguments.real:
                parser.error("--balance with --real: four ranks on two cores say nothing of balance")
            rows = [balance(name, [*words, *extra], Path(folder), arguments.step) for name, extra in BALANCED.items()]
        else:
            words.append(f"parallel.pipeline={STAGES}")
            rows = [
                compare(name, [*words, *extra], Path(folder), arguments.step, is_stretched=not arguments.real)
                for name, extra in SCHEDULES.items()
            ]
    simulated, measured = ([row[f"{kind}_bubble_ratio"] for row in rows] for kind in ("simulated", "measured"))
    result = {
        "benchmark": "pipeline",
        "hardware": hardware(),
        "layout": f"{STAGES} {'ranks' if arguments.balance else 'stages'}",
        "step": arguments.step,
        "operations": "as long as they take" if arguments.real else f"stretched to {SECONDS_PER_TOKEN} s a token",
        "schedules": rows,
        "all_in_order": all(row["in_order"] for row in rows),
        "rank_correlation_of_bubbles": rank_correlation(simulated, measured),
        "largest_difference_of_bubbles": float(np.abs(np.subtract(simulated, measured)).max()),
    }
    emit(result, arguments.out)


def prepare(folder: Path, longest: int) -> list[str]:
    """A model of four layers, long-tailed rows, and the words of every run."""
    from transformers import AutoConfig

    AutoConfig.for_model(
        "qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2048, max_position_embeddings=4096, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / "model")  # fmt: skip
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(20, 200, 20), [longest, 700, 420]])
    with (folder / "rows.jsonl").open("w") as file:
        for length in random.permutation(lengths).tolist():
            file.write(json.dumps({"input_ids": random.integers(3, 2048, length).tolist()}) + "\n")
    return [
        f"model.path={folder / 'model'}", "model.init=random", "model.dtype=float32", "data.format=tokens",
        f"data.path={folder / 'rows.jsonl'}", f"data.cache_dir={folder}", "data.num_workers=1", "train.guard=false",
        f"train.global_batch_size={len(lengths)}", "train.shuffle=false", "chunk.size=128", "optim=sgd",
        f"launch.processes={STAGES}", "train.trace=true", "plan.cost_model=proportional",
    ]  # fmt: skip


def compare(name: str, words: list[str], folder: Path, step: int, *, is_stretched: bool) -> dict[str, Any]:
    from chunkflow_cli.cli.plan import make_plan
    from chunkflow_cli.config.load import load
    from chunkflow_cli.planning.costs import chunk_tokens
    from chunkflow_cli.planning.simulate import OperationSeconds, simulate
    from chunkflow_cli.planning.trace import measured_timeline

    say(f"{name}...")
    run = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    words = [*words, f"train.epochs={step}"]
    launch([*words, f"train.output_dir={run}"], is_stretched)
    (rank,) = make_plan(load(words), step=step).step.ranks
    timeline = measured_timeline(json.loads((run / "trace.json").read_text()), step)
    in_order = True
    for stage, schedule in enumerate(rank.schedules):
        rows = timeline.stage == stage
        ran = [f"{kind}{chunk}" for kind, chunk in zip(timeline.kind[rows], timeline.chunk[rows], strict=True)]
        in_order &= ran == str(schedule).split()
    tokens = chunk_tokens(rank.chunks)
    given = OperationSeconds.proportional(tokens * SECONDS_PER_TOKEN, STAGES)
    replayed = simulate(rank.schedules, given if is_stretched else durations(timeline, len(rank.chunks)))
    return {
        "schedule": name,
        "chunks": len(rank.chunks),
        "in_order": bool(in_order),
        "measured_makespan_seconds": timeline.makespan,
        "simulated_makespan_seconds": replayed.makespan,
        "measured_bubble_ratio": timeline.bubble_ratio,
        "simulated_bubble_ratio": replayed.bubble_ratio,
    }


def balance(name: str, words: list[str], folder: Path, step: int) -> dict[str, Any]:
    """How long the ranks run operations, and how long the slowest one takes: as the trace and as the plan has it."""
    from chunkflow_cli.cli.plan import make_plan
    from chunkflow_cli.config.load import load

    say(f"{name}...")
    run = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    words = [*words, f"train.epochs={step}"]
    launch([*words, f"train.output_dir={run}"], is_stretched=True)
    planned = make_plan(load(words), step=step)
    events = [event for event in json.loads((run / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    busy, stops, starts, in_order = np.zeros(STAGES), [], [], True
    for rank, plan in enumerate(planned.step.ranks):
        own = [event for event in events if event["args"]["step"] == step and event["pid"] == rank]
        own.sort(key=lambda event: event["ts"])
        in_order &= [event["name"] for event in own] == str(plan.schedule).split()
        busy[rank] = sum(event["dur"] for event in own) / 1e6
        starts.append(own[0]["ts"] / 1e6)
        stops.append((own[-1]["ts"] + own[-1]["dur"]) / 1e6)
    makespan = max(stops) - min(starts)
    predicted = planned.timeline
    return {
        "schedule": name,
        "chunks": planned.step.chunks,
        "in_order": bool(in_order),
        "measured_makespan_seconds": makespan,
        "simulated_makespan_seconds": predicted.makespan * SECONDS_PER_TOKEN,
        "measured_bubble_ratio": float(1 - busy.sum() / (STAGES * makespan)),
        "simulated_bubble_ratio": predicted.bubble_ratio,
    }


def launch(words: list[str], is_stretched: bool) -> None:
    """The ranks of a run, started here instead of by `chunkflow train`, so that their operations can be stretched."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = [sys.executable, __file__, "--stretched"] if is_stretched else [sys.executable, "-m", "chunkflow_cli"]
    ranks = [
        subprocess.Popen(
            [*own, "train", "--json", *words],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(STAGES), "LOCAL_WORLD_SIZE": str(STAGES), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(STAGES)
    ]  # fmt: skip
    if sum(rank.wait() for rank in ranks):  # of all, whatever the first says
        raise SystemExit(f"chunkflow train {' '.join(words)} failed")


def train_stretched() -> None:
    """`chunkflow train` whose ranks sleep at the end of each operation until it has taken its given time."""
    from chunkflow_cli.cli.main import main as chunkflow
    from chunkflow_cli.execution.messages import Messages
    from chunkflow_cli.execution.runner import _WholeModelStep
    from chunkflow_cli.execution.stage_runner import _StageStep

    execute, send, execute_alone = _StageStep.execute, Messages.send, _WholeModelStep.execute
    ends = [0.0]

    def sleep_to_the_end() -> None:
        time.sleep(max(0.0, ends[0] - time.perf_counter()))

    def stretched(step: Any, op: Any) -> None:
        tokens = step.context.batch.chunks[op.chunks[0]].tokens
        ends[0] = time.perf_counter() + SECONDS_PER_TOKEN * tokens * (2 if op.kind.value == "B" else 1)
        execute(step, op)
        sleep_to_the_end()

    def send_at_the_end(messages: Any, tensor: Any, *, onward: bool) -> None:
        sleep_to_the_end()
        send(messages, tensor, onward=onward)

    def stretched_alone(step: Any, op: Any) -> None:
        tokens = 0.0
        for index in op.real_chunks:
            group = step.context.sequence_group(index)
            tokens += step.context.batch.chunks[index].tokens / (1 if group is None else group.size)
        end = time.perf_counter() + SECONDS_PER_TOKEN * tokens * (2 if op.kind.value == "B" else 1)
        execute_alone(step, op)
        time.sleep(max(0.0, end - time.perf_counter()))

    _StageStep.execute, Messages.send = stretched, send_at_the_end  # type: ignore[method-assign]
    _WholeModelStep.execute = stretched_alone  # type: ignore[method-assign]
    chunkflow()


def durations(timeline: Any, chunks: int) -> Any:
    """Of every operation as it ran; 0 for those that no schedule holds."""
    from chunkflow_cli.planning.simulate import OperationSeconds

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
    if sys.argv[1:2] == ["--stretched"]:
        del sys.argv[1]
        train_stretched()
    else:
        main()
