"""Would a K for each sequence pay? Every sequence keeps as many chunks as memory has room for beside its own state.

    python benchmarks/per_sequence_k.py                     two minutes of one core, nothing is trained

A single K must suit the longest sample, whose keys and values fill most of the memory at long contexts; the others
could keep more chunks and be recomputed less. Compared by predicted seconds of a step: the best (ChunkSize, K), and the
best ChunkSize with

    K_i = (memory for activations and state - state of sequence i) / (ChunkSize x activation bytes a token), at least 1

for Qwen2.5-7B on H100 by its data sheet, steps of 256 samples of LMSys-Chat-1M's shape, the first with a sample as long
as the context, on 1 and 8 ranks without a pipeline. Both must hold the longest sample.
Prints one JSON object on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.balance import balance, rank_loads
from chunkflow_cli.planning.costs import DEVICES, CostModel, ModelShape
from chunkflow_cli.planning.memory_parts import kept_bytes_per_token, state_bytes_per_token
from common import emit, median, say
from longtail import long_tailed_lengths

K, GIB = 1024, 2**30
SIZES = [1 * K, 2 * K, 4 * K, 8 * K, 16 * K]
KS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128]
STEPS, BATCH = 20, 256
QWEN_7B = ModelShape(
    layers=28, hidden_size=3584, intermediate_size=18944, attention_heads=28, kv_heads=4, head_dim=128,
    vocab_size=152064, matmul_parameters=7_070_000_000, parameters=7_615_616_512, trainable_parameters=7_615_616_512,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    rows = []
    for longest, checkpointing in itertools.product((32 * K, 128 * K, 256 * K), ("none", "full")):
        lengths = np.minimum(long_tailed_lengths(BATCH * 400, np.random.default_rng(0)), longest)
        lengths = lengths[: BATCH * STEPS].reshape(STEPS, BATCH)
        lengths[0, 0] = longest
        for ranks, gib in itertools.product((1, 8), (32, 48, 64, 96)):
            row = compare(lengths, checkpointing, ranks, gib * GIB)
            if row is not None:
                rows.append({"longest": longest, "checkpointing": checkpointing, "ranks": ranks, "gib": gib, **row})
                say(str(rows[-1]))
    gains = [row["gain"] for row in rows]
    emit(
        {"benchmark": "per_sequence_k", "rows": rows, "median_gain": median(gains), "largest_gain": max(gains)},
        arguments.out,
    )


def compare(lengths: NDArray[np.int64], checkpointing: str, ranks: int, memory_bytes: int) -> dict[str, Any] | None:
    """
    Args:
        lengths: (steps, samples) tokens.
        checkpointing: of activations.
        ranks: among which the samples of a step are divided.
        memory_bytes: for activations and state.

    Returns:
        None where not even the smallest chunk fits beside the state of the longest sample.
    """
    costs = CostModel.profile(QWEN_7B, DEVICES["h100"], checkpointed=checkpointing != "none")
    a_token, longest = kept_bytes_per_token(QWEN_7B, 2, checkpointing), int(lengths.max())

    def state(lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return (lengths - 1) // size * size * state_bytes_per_token(QWEN_7B, 2)

    def seconds(size: int, k: Callable[[NDArray[np.int64]], Any]) -> float:
        total = 0.0
        for samples in lengths:
            of_samples = costs.of_sequences(samples, size, k(samples))
            total += float(rank_loads(of_samples, balance(of_samples, ranks)).max())
        return total / len(lengths)

    def most_chunks(samples: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return np.maximum(1, (memory_bytes - state(samples, size)) // (size * a_token)).astype(np.int64)

    one, many = [], []
    for size in SIZES:
        room = memory_bytes - int(state(np.array([longest]), size)[0])
        fitting = [k for k in KS if k * size * a_token <= room and (k == 1 or (k - 1) * size < longest)]
        if not fitting:
            continue
        k = fitting[-1]  # of those that fit, the largest forwards the fewest chunks twice
        one.append((seconds(size, lambda samples, k=k: k), size, k))
        many.append((seconds(size, lambda samples, size=size: most_chunks(samples, size)), size))
    if not one:
        return None
    (best, size, k), (best_of_many, size_of_many) = min(one), min(many)
    return {
        "seconds": best, "chunk_size": size, "k": k, "seconds_per_sequence_k": best_of_many,
        "chunk_size_per_sequence_k": size_of_many, "gain": best / best_of_many - 1,
    }  # fmt: skip


if __name__ == "__main__":
    main()
