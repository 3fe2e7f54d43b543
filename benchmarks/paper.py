"""The paper's experiments (arXiv 2503.02356) in our simulation: Qwen2.5-7B on 16 GPUs as <TP 4, PP 4>.

    python benchmarks/paper.py             seconds; no GPU, no model
    python benchmarks/paper.py --out paper.json

chunkflow has no tensor parallelism: TP 4 is modeled as a device of four times the rate, whose layers wait for two
all-reduces forward and two backward over NVLink. The GPU of the paper is not named; an A100 of 80 GB is taken. Its data
is not public; drawn is the shape of LMSys-Chat-1M (its table 1), 256 samples a step, cut off at 256K, with and without
one sample of 256K in every step. What agrees and what does not: docs/paper.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.memory_parts import state_bytes
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.pipeline import PipelineLayout, plan_pipeline, sequences_as_chunks
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import search
from chunkflow_cli.planning.simulate import simulate
from common import emit, say

K = 1024
TENSOR_PARALLEL, STAGES = 4, 4
QWEN_7B = ModelShape(
    layers=28, hidden_size=3584, intermediate_size=18944, attention=(AttentionLayers(28, 28, 4, 128, 128),),
    vocab_size=152_064, matmul_parameters=7_070_000_000, parameters=7_615_616_512, trainable_parameters=7_615_616_512,
)  # fmt: skip
NVLINK_BYTES_PER_SECOND = 200e9
"""What an all-reduce within a node reaches on an A100, in one direction."""
ALL_REDUCE_LATENCY = 25e-6
SHARES = (0.0, 0.90499, 0.99539, 0.9991, 0.99987, 1.0)
LENGTHS = (32, 1 * K, 4 * K, 8 * K, 32 * K, 303 * K)
STEPS = 8


def draw(generator: np.random.Generator, count: int, longest: int) -> NDArray[np.int64]:
    """Lengths of LMSys-Chat-1M's shape: its cumulative table, log-linear in between."""
    drawn = np.exp(np.interp(generator.random(count), SHARES, np.log(LENGTHS)))
    return np.minimum(drawn, longest).astype(np.int64)


def tensor_parallel_costs(*, checkpointed: bool, launch_seconds: float | None = None) -> CostModel:
    device = replace(DEVICES["a100"], matmul_flops=TENSOR_PARALLEL * DEVICES["a100"].matmul_flops)
    if launch_seconds is not None:
        device = replace(device, layer_launch_seconds=launch_seconds)
    costs = CostModel.profile(QWEN_7B, device, checkpointed=checkpointed)
    # A ring moves 2 (n - 1) / n of the hidden states, twice a layer forward and twice backward.
    reduced = 2 * QWEN_7B.layers * 2 * (TENSOR_PARALLEL - 1) / TENSOR_PARALLEL * QWEN_7B.hidden_size * 2
    token, fixed = reduced / NVLINK_BYTES_PER_SECOND, 2 * QWEN_7B.layers * ALL_REDUCE_LATENCY

    def with_reductions(cost: OperationCost, times: int) -> OperationCost:
        return OperationCost(
            cost.fixed_seconds + times * fixed, cost.seconds_per_token + times * token, cost.seconds_per_pair
        )

    return replace(
        costs,
        forward=with_reductions(costs.forward, 1),
        backward=with_reductions(costs.backward, 2 if checkpointed else 1),
        recompute=with_reductions(costs.recompute, 1),
        state_pass=with_reductions(costs.state_pass, 1),
    )


def steps_of(longest: int, *, one_long: bool) -> RunPlan:
    generator = np.random.default_rng(0)
    lengths = draw(generator, 256 * STEPS, longest)
    if one_long:
        lengths[::256] = longest
    return RunPlan(
        GlobalBatches(len(lengths), 256, seed=0, shuffle=False), STEPS, lengths, lengths, chunk_size=8 * K, k=1,
        pipeline=PipelineLayout(STAGES), costs=tensor_parallel_costs(checkpointed=False),
    )  # fmt: skip


def per_sequence_seconds(run: RunPlan, *, checkpointed: bool) -> float:
    """Megatron's way: plain 1F1B, a micro-batch a sequence, in the data's order; mean of a step."""
    costs, layout = tensor_parallel_costs(checkpointed=checkpointed), PipelineLayout(STAGES, "1f1b")
    seconds = []
    for step in range(STEPS):
        lengths = run.lengths[run.batches[step]]
        chunks = sequences_as_chunks(lengths)
        timeline = simulate(plan_pipeline(chunks, 1, layout), costs.of_chunks(chunks, lengths, STAGES))
        seconds.append(timeline.makespan)
    return float(np.mean(seconds))


def pairs_table(run: RunPlan, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    runs = [replace(run, chunk_size=size, k=k) for size, k in pairs]
    rows = search(runs, range(STEPS), lambda run, timelines: 0, 1)
    return [
        {
            "chunk_size": row.chunk_size,
            "k": row.k,
            "seconds": row.step_seconds,
            "bubble_ratio": row.bubble_ratio,
            "recompute_share": row.recompute_share,
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "paper", "model": "Qwen2.5-7B", "layout": "TP 4, PP 4, A100 profile"}
    equal_product = [(2 * K, 16), (4 * K, 8), (8 * K, 4), (16 * K, 2), (32 * K, 1)]
    for longest in (32 * K, 256 * K):
        for one_long in (False, True):
            name = f"{longest // K}K" + (", one of that length a step" if one_long else ", LMSys shape")
            run = steps_of(longest, one_long=one_long)
            rows = pairs_table(run, equal_product)
            best = min(rows, key=lambda row: row["seconds"])
            full = per_sequence_seconds(run, checkpointed=longest > 32 * K)
            result[name] = {
                "pairs": rows,
                "best": [best["chunk_size"], best["k"]],
                "per_sequence_1f1b_seconds": full,
                "speedup": full / best["seconds"],
                "tokens_a_step": int(run.lengths.sum()) // STEPS,
            }
            say(f"{name}: best {best['chunk_size'] // K}K, K={best['k']} {best['seconds']:.2f} s; "
                f"per sequence {full:.2f} s, {full / best['seconds']:.2f} times")  # fmt: skip
            for row in rows:
                say(f"   {row['chunk_size'] // K:>3}K K={row['k']:<3} {row['seconds']:7.2f} s  "
                    f"{row['seconds'] / best['seconds']:.3f}  bubbles {100 * row['bubble_ratio']:.1f} %")  # fmt: skip
    # How slow must a layer be to start for small chunks to lose, as the paper measured?
    run = steps_of(256 * K, one_long=True)
    sweep = {}
    for launch in (60e-6, 0.5e-3, 1e-3, 2e-3, 4e-3):
        slow = replace(run, costs=tensor_parallel_costs(checkpointed=False, launch_seconds=launch))
        rows = {f"{row['chunk_size'] // K}K,{row['k']}": row["seconds"] for row in pairs_table(slow, equal_product)}
        sweep[f"{1e3 * launch:g} ms a layer"] = {name: value / rows["8K,4"] for name, value in rows.items()}
        say(
            f"{1e3 * launch:5.2f} ms a layer: "
            + "  ".join(f"({name}) {value / rows['8K,4']:.3f}" for name, value in rows.items())
        )
    result["launch_sweep_relative_to_8K_4"] = sweep
    result["state_gib_per_gpu"] = {
        f"{length // K}K": state_bytes(QWEN_7B, length, 8 * K, 2) / TENSOR_PARALLEL / 2**30
        for length in (32 * K, 256 * K)
    }
    emit(result, arguments.out)


if __name__ == "__main__":
    main()
