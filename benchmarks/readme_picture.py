"""Peak memory and speed by sample length, in chunks and as whole sequences: the picture of the README.

    python benchmarks/readme_picture.py --points chunks:512 whole:512          measure two points, then draw
    python benchmarks/readme_picture.py                                        draw what has been measured

A point is a process of its own that trains SmolLM2-135M in float32. Its first optimizer step trains on 512 tokens and
warms up. Each further one trains on one sample of the point's length; there are as many as make 4,096 tokens, but at
least one, and the median of their speeds counts. Three contenders:

- `chunks`: `chunkflow train` with chunk.size=512 and chunk.k=1;
- `whole`: a plain Hugging Face loop with PyTorch's sdpa attention, one forward and one backward for the whole sample;
- `checkpointed`: the same loop with gradient checkpointing.

Peak memory is the process's own (ru_maxrss): weights, gradients, optimizer, activations and libraries. All tokens are
random and all are targets; equal losses show that all contenders do the same work. A process that grows beyond
--memory-gib is killed, and its point is recorded as one that does not fit. Each point is written to the results file as
soon as it is there, so the points may be measured in several goes. Nothing else should run meanwhile. Every contender
has two threads by default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hardware, median, say, smollm2_path
from memory import random_tokens

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "memory-and-speed.svg"
CHUNK_SIZE = 512
WARM_UP_TOKENS = 512
TIMED_TOKENS = 4096
"""Short steps are noisy, so they are repeated up to this many tokens."""
LEARNING_RATE = 1e-5
CONTENDERS = {
    "chunks": f"chunkflow, chunks of {CHUNK_SIZE}, K = 1",
    "whole": "whole sequence",
    "checkpointed": "whole sequence, gradient checkpointing",
}
STYLES = {
    "chunks": {"color": "#0969da", "marker": "o", "linewidth": 2.4},
    "whole": {"color": "#cf222e", "marker": "s", "linewidth": 1.8},
    "checkpointed": {"color": "#9a6700", "marker": "^", "linewidth": 1.8, "linestyle": "--"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="*", default=[], metavar="CONTENDER:TOKENS", help="points to measure")
    parser.add_argument("--memory-gib", type=float, default=20.0, help="kill a process beyond this (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    parser.add_argument(
        "--picture", type=Path, default=PICTURE, help="SVG to draw; results are in the .json next to it"
    )
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "TOKENS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        contender, tokens, result = arguments.child
        train_whole(int(tokens), Path(result), checkpointed=contender == "checkpointed")
        return

    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    results = arguments.picture.with_suffix(".json")
    for point in arguments.points:
        contender, _, tokens = point.partition(":")
        add(results, arguments.threads, measure(contender, int(tokens), arguments.memory_gib))
    draw(json.loads(results.read_text(encoding="utf-8")), arguments.picture)


def add(path: Path, threads: int, point: dict[str, Any]) -> None:
    """Write the point to the results, in place of an earlier one of the same contender and length."""
    new = {"benchmark": "readme_picture", "model": "SmolLM2-135M-Instruct", "dtype": "float32", "points": []}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
    place = (point["contender"], point["tokens"])
    others = [other for other in stored["points"] if (other["contender"], other["tokens"]) != place]
    order = list(CONTENDERS)
    points = sorted([*others, point], key=lambda each: (order.index(each["contender"]), each["tokens"]))
    document = stored | {"hardware": hardware() | {"torch_threads": threads}, "points": points}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure(contender: str, tokens: int, memory_gib: float) -> dict[str, Any]:
    """Train one point in a process of its own.

    Returns:
        `peak_bytes` and `tokens_per_second`; both are null, and `killed_beyond_gib` is set, if it did not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "run", "metrics.jsonl")
        command = chunked(tokens, Path(folder)) if contender == "chunks" else whole(contender, tokens, result)
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
        peak, status = wait_for(child, int(memory_gib * 2**30))
        say(f"{contender} {tokens:,}: {peak / 2**30:.2f} GiB, {time.perf_counter() - start:.0f} s, status {status}")
        point: dict[str, Any] = {"contender": contender, "tokens": tokens}
        if status is None:
            return point | {"peak_bytes": None, "tokens_per_second": None, "killed_beyond_gib": memory_gib}
        if status:
            raise SystemExit(f"{contender}:{tokens} failed with exit status {status}")
        steps = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
        timed = steps[1:]
        assert [step["tokens"] for step in timed] == lengths_of(tokens)[1:]
        seconds = median(step["step_seconds"] for step in timed)
        return point | {
            "peak_bytes": peak, "tokens_per_second": round(tokens / seconds, 1), "step_seconds": round(seconds, 2),
            "steps": len(timed), "loss": round(timed[0]["loss"], 5),
        }  # fmt: skip


def lengths_of(tokens: int) -> list[int]:
    """Return the tokens of each optimizer step: one that warms up, then those that are timed."""
    return [WARM_UP_TOKENS, *[tokens] * max(1, TIMED_TOKENS // tokens)]


def wait_for(child: subprocess.Popen[bytes], limit: int) -> tuple[int, int | None]:
    """Wait until the process ends, or kill it beyond `limit` bytes.

    Returns:
        Its peak memory in bytes, and its exit status; None if it was killed here.
    """
    killed = False
    while True:
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            child.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * 1024, None if killed else child.returncode
        if not killed and resident_bytes(child.pid) > limit:
            child.kill()
            killed = True
        time.sleep(0.05)


def resident_bytes(process: int) -> int:
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def chunked(tokens: int, folder: Path) -> list[str]:
    data = folder / "data.jsonl"
    rows = [{"input_ids": random_tokens(length).tolist()} for length in lengths_of(tokens)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        sys.executable, "-m", "chunkflow_cli", "train", f"model.path={smollm2_path()}", "model.dtype=float32",
        f"data.path={data}", "data.format=tokens", "data.train_on=all", "data.max_length=1000000",
        "data.num_workers=1", f"data.cache_dir={folder}/cache", f"chunk.size={CHUNK_SIZE}", "chunk.k=1",
        "train.global_batch_size=1", "train.shuffle=false", "train.guard=false", f"train.output_dir={folder}/run",
        f"optim.lr={LEARNING_RATE}", "optim.schedule=constant", "optim.warmup_ratio=0",
    ]  # fmt: skip


def whole(contender: str, tokens: int, result: Path) -> list[str]:
    result.parent.mkdir()
    return [sys.executable, __file__, "--child", contender, str(tokens), str(result)]


def train_whole(tokens: int, result: Path, *, checkpointed: bool) -> None:
    """Take the optimizer steps of a contender that runs the sample as a whole, and write a row for each."""
    import numpy as np
    import torch

    from common import PlainTraining, load_plain_model

    @dataclass(frozen=True)
    class Sample:
        input_ids: np.ndarray
        targets: np.ndarray

    model = load_plain_model(torch.float32)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training = PlainTraining(model, LEARNING_RATE)
    with result.open("w", encoding="utf-8") as file:
        for length in lengths_of(tokens):
            ids = random_tokens(length)
            sample = Sample(ids, np.append(ids[1:], -100).astype(np.int32))
            start = time.perf_counter()
            loss = training.step([sample])
            row = {"tokens": length, "loss": loss, "step_seconds": time.perf_counter() - start}
            file.write(json.dumps(row) + "\n")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw memory and speed over sample length, side by side, on a white card that reads on any background."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "chunkflow", "font.size": 11})
    figure = Figure(figsize=(10.4, 4.1), layout="constrained", facecolor="white")
    memory, speed = figure.subplots(1, 2)
    longest = max(point["tokens"] for point in results["points"])
    for contender, label in CONTENDERS.items():
        points = [point for point in results["points"] if point["contender"] == contender]
        fitting = [point for point in points if point["peak_bytes"] is not None]
        if not fitting:
            continue
        tokens = [point["tokens"] for point in fitting]
        peaks = [point["peak_bytes"] / 2**30 for point in fitting]
        rates = [point["tokens_per_second"] for point in fitting]
        memory.plot(tokens, peaks, label=label, **STYLES[contender])
        speed.plot(tokens, rates, label=label, **STYLES[contender])
        single = [place for place, point in enumerate(fitting) if point.get("steps", 1) == 1]
        hollow = {"linestyle": "none", "markerfacecolor": "white", "markeredgewidth": 1.6}
        if single:
            places = [tokens[place] for place in single], [rates[place] for place in single]
            speed.plot(*places, **STYLES[contender] | hollow)
        for point in points:
            if point["peak_bytes"] is None:
                limit, colour = point["killed_beyond_gib"], STYLES[contender]["color"]
                ends = [tokens[-1], point["tokens"]], [peaks[-1], limit]
                memory.plot(*ends, color=colour, linestyle=":", linewidth=1.5)
                memory.plot(point["tokens"], limit, marker="x", color=colour, markersize=10, markeredgewidth=2.4)
                memory.annotate(
                    f"stopped at {limit:g} GiB", (point["tokens"], limit), (-9, -3), textcoords="offset points",
                    ha="right", color=colour, fontsize=10,
                )  # fmt: skip
    memory.set_title("Peak memory of the process", loc="left", fontsize=12, fontweight="bold")
    memory.set_ylabel("GiB")
    speed.set_title("Speed (hollow: one step, the first of its length)", loc="left", fontsize=12, fontweight="bold")
    speed.set_ylabel("tokens per second")
    memory.legend(loc="upper left", frameon=False, fontsize=10)
    for axes in (memory, speed):
        ticks = range(0, longest + 1, 2048)
        axes.set_xticks(ticks, ["0", *(f"{tick // 1024}K" for tick in ticks[1:])])
        axes.set_xlim(0, longest * 1.03)
        axes.set_xlabel("tokens in the sample")
        axes.set_ylim(bottom=0)
        axes.grid(color="#d0d7de", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_yticks(range(0, 26, 5))
    memory.set_ylim(top=26)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    say(f"drawn: {path}")


if __name__ == "__main__":
    main()
