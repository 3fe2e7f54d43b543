"""Peak memory by sample length: `chunkflow train` in chunks, and the same training with the sample as one forward.

    python benchmarks/memory.py                            4K, 8K, 16K; whole 4K: about half an hour on two cores
    python benchmarks/memory.py --lengths 4096 32768 --whole-lengths 4096 8192 --out memory.json
    python benchmarks/memory.py --lengths 2048 8192 --whole-lengths 2048     a first look

Every point is a process of its own; its peak is what the kernel says of it (ru_maxrss, from wait4): weights,
gradients, optimizer, activations, libraries, everything. The data is one sample of random tokens, all of them targets.

Held by `chunkflow train` for each weight, in bfloat16: 2 bytes weight, 4 master weight, 8 AdamW moments, 4 summed
gradient, and 2 a gradient of the present chunk. Held by the whole-sequence loop (transformers with sdpa, no
checkpointing): 2 weight, 4 master, 8 moments, 2 gradient, and 4 its float32 copy at the step. Both take two steps, so
that activations and optimizer states meet in the peak.
Prints one JSON object on stdout; everything else goes to stderr.
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

import numpy as np

from common import emit, hardware, say, smollm2_path

VOCABULARY = 49_152
STATE_BYTES_PER_ELEMENT = {"bfloat16": 2 + 4, "float32": 4 + 4}
"""Of a key or value, and of its gradient, which is float32."""
ALLOWED_GROWTH = 1.15


@dataclass(frozen=True)
class Point:
    peak_bytes: int | None
    """None: the process ended with an error, such as too little memory."""
    seconds: float
    exit_status: int
    loss: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens, in chunks")
    parser.add_argument("--whole-lengths", type=int, nargs="*", default=[4096], help="tokens, as one forward")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(STATE_BYTES_PER_ELEMENT), default="bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each point (default: 2)")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    parser.add_argument("--whole-child", type=int, metavar="LENGTH", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.whole_child:
        train_whole(arguments.whole_child, arguments.dtype, arguments.steps)
        return

    chunked = {length: chunked_point(length, arguments) for length in arguments.lengths}
    whole = {length: whole_point(length, arguments) for length in arguments.whole_lengths}
    state = {length: state_bytes(length, arguments.chunk_size, arguments.dtype) for length in chunked}
    emit(
        {
            "benchmark": "memory",
            "hardware": hardware(),
            "model": "SmolLM2-135M-Instruct",
            "dtype": arguments.dtype,
            "chunk_size": arguments.chunk_size,
            "k": arguments.k,
            "steps": arguments.steps,
            "chunked": [row(length, point) | {"state_bytes": state[length]} for length, point in chunked.items()],
            "whole": [row(length, point) for length, point in whole.items()],
            "claims": claims(chunked, whole, state),
        },
        arguments.out,
    )


def row(length: int, point: Point) -> dict[str, Any]:
    return {
        "length": length, "peak_bytes": point.peak_bytes, "seconds": round(point.seconds, 1), "loss": point.loss,
        "exit_status": point.exit_status,
    }  # fmt: skip


def claims(chunked: dict[int, Point], whole: dict[int, Point], state: dict[int, int]) -> dict[str, Any]:
    """The longest chunked sample against the shortest one, and against the whole-sequence loop."""
    shortest, longest = min(chunked), max(chunked)
    low, high = chunked[shortest].peak_bytes, chunked[longest].peak_bytes
    if low is None or high is None:
        return {}
    result: dict[str, Any] = {
        "shortest": shortest,
        "longest": longest,
        "peak_ratio": round(high / low, 4),
        "peak_ratio_without_state": round((high - state[longest]) / (low - state[shortest]), 4),
        "at_most": ALLOWED_GROWTH,
        # "at most 15 % above the short sample's peak, plus the state's own bytes"
        "holds": high <= ALLOWED_GROWTH * low + state[longest],
    }
    for length, point in whole.items():
        if point.peak_bytes is not None:
            result[f"whole_{length}_to_chunked_{longest}"] = round(point.peak_bytes / high, 2)
    return result


def state_bytes(length: int, chunk_size: int, dtype: str) -> int:
    """Keys and values of all tokens before the last chunk, and their gradients."""
    from chunkflow_cli.config.schema import ModelConfig
    from chunkflow_cli.model.hf_config import load_config

    config = load_config(ModelConfig(path=smollm2_path())).get_text_config()
    head_dim = config.hidden_size // config.num_attention_heads
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    stored_tokens = (length - 1) // chunk_size * chunk_size
    return stored_tokens * elements * STATE_BYTES_PER_ELEMENT[dtype]


def chunked_point(length: int, arguments: argparse.Namespace) -> Point:
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder, "data.jsonl"), Path(folder, "run")
        data.write_text(json.dumps({"input_ids": random_tokens(length).tolist()}) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "chunkflow_cli", "train", f"model.path={smollm2_path()}",
            f"model.dtype={arguments.dtype}", f"data.path={data}", "data.format=tokens", "data.train_on=all",
            "data.max_length=1000000", "data.num_workers=1", f"data.cache_dir={folder}/cache",
            f"chunk.size={arguments.chunk_size}", f"chunk.k={arguments.k}", f"train.steps={arguments.steps}",
            "train.global_batch_size=1", "train.guard=false", f"train.output_dir={run}",
        ]  # fmt: skip
        point = measured(f"chunked {length:,}", command)
        metrics = run / "metrics.jsonl"
        if point.exit_status or not metrics.exists():
            return point
        first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
        return Point(point.peak_bytes, point.seconds, point.exit_status, first["loss"])


def whole_point(length: int, arguments: argparse.Namespace) -> Point:
    command = [sys.executable, __file__, "--whole-child", str(length)]
    return measured(f"whole {length:,}", [*command, "--dtype", arguments.dtype, "--steps", str(arguments.steps)])


def measured(name: str, command: list[str]) -> Point:
    """Run the command; its peak is the kernel's figure for it and for the processes that it waited for."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # it is reaped; Popen need not look again
    seconds = time.perf_counter() - start
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    say(f"{name} tokens: {peak / 2**30:.2f} GiB, {seconds:.0f} s, exit status {child.returncode}")
    return Point(peak if child.returncode == 0 else None, seconds, child.returncode)


def random_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, length, dtype=np.int32)


def train_whole(length: int, dtype: str, steps: int) -> None:
    """What a point without chunks runs: the sample in one forward and one backward."""
    import torch

    from common import PlainTraining, load_plain_model

    @dataclass(frozen=True)
    class Whole:
        input_ids: np.ndarray
        targets: np.ndarray

    ids = random_tokens(length)
    sample = Whole(ids, np.append(ids[1:], -100).astype(np.int32))
    training = PlainTraining(load_plain_model(getattr(torch, dtype)), lr=1e-5)
    for step in range(steps):
        say(f"step {step}: loss {training.step([sample]):.4f}")


if __name__ == "__main__":
    main()
