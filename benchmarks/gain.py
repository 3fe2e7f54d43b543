"""What chunkflow is predicted to gain over per-sequence training in Megatron's way: Qwen2.5 at 32K and 256K.

    python benchmarks/gain.py               minutes; no GPU, no model
    python benchmarks/gain.py --out gain.json

Four sizes. Seconds of a step of 256 samples in LMSys-Chat-1M's shape, as drawn and with one sample of the full length
in each step, on as many H100 as the paper's baseline takes (its table 3, as far as we know it).

    baseline     the paper's <TP, PP>, a sequence a micro-batch, plain 1F1B in the data's order, its recompute
    paper's way  the same <TP, PP> and data, chunks instead of sequences; the best (ChunkSize, K) of a grid that fits
    ours         no tensor parallelism: the best layout of data x sequence or data x pipeline on as many GPUs that fits
    both         the same with sequence and pipeline parallelism together

chunkflow has no tensor parallelism: TP is a device of so many times the rate whose layers wait for two all-reduces
forward and two backward over NVLink (`benchmarks/paper.py`). What agrees with the paper: docs/distributed.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from balance import MODELS
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.memory_parts import memory_parts, step_seconds
from chunkflow_cli.planning.memory_settings import MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.pipeline import PipelineLayout, plan_pipeline, sequences_as_chunks
from chunkflow_cli.planning.run_plan import RunPlan
from chunkflow_cli.planning.search import search
from chunkflow_cli.planning.simulate import simulate
from common import emit, say
from paper import draw

K = 1024
BATCH, STEPS = 256, 2
H100 = DEVICES["h100"]
ALL_REDUCE_EFFICIENCY = 0.6
"""Of NVLink's rate in one direction, as exchanges are assumed to reach."""
ALL_REDUCE_LATENCY = 25e-6
CHUNK_SIZES = (2 * K, 4 * K, 8 * K, 16 * K, 32 * K)
KS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 4, 8, 16)
GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Baseline:
    """A row of the paper's table 3: <TP, SP, PP, recompute>; Megatron's SP is TP's."""

    tensor: int
    pipeline: int
    checkpointing: str
    is_known: bool
    """Whether the row was found; where it was not, it is the one that is most like it."""
    paper: float | None
    """The paper's speed-up, as far as found (its figure 8)."""
    is_paper_sure: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline


BASELINES = {
    ("7B", 32 * K): Baseline(4, 1, "selective", True, 2.38),
    ("14B", 32 * K): Baseline(4, 2, "selective", False, None),
    ("32B", 32 * K): Baseline(4, 4, "selective", False, None),
    ("72B", 32 * K): Baseline(8, 4, "selective", False, None),
    ("7B", 256 * K): Baseline(4, 4, "full", True, 4.53, True),
    ("14B", 256 * K): Baseline(4, 4, "full", True, 3.76),
    ("32B", 256 * K): Baseline(8, 4, "full", False, 3.21),
    ("72B", 256 * K): Baseline(8, 4, "selective", True, 1.67),
}


def tensor_parallel_costs(shape: ModelShape, tensor: int, *, recompute_share: float) -> CostModel:
    """Of a device made of `tensor` ones.

    A ring moves 2 (n - 1) / n of the hidden states of a chunk, twice a layer forward and twice backward (Megatron-LM,
    arXiv 1909.08053; with its sequence parallelism as many bytes, arXiv 2205.05198).

    Args:
        recompute_share: of a layer's forward that its backward runs again.
    """
    costs = CostModel.profile(shape, replace(H100, matmul_flops=tensor * H100.matmul_flops), checkpointed=False)
    reduced = 2 * shape.layers * 2 * (tensor - 1) / tensor * shape.hidden_size * 2
    token = reduced / (ALL_REDUCE_EFFICIENCY * H100.node_bytes_per_second)
    fixed = 2 * shape.layers * ALL_REDUCE_LATENCY if tensor > 1 else 0.0

    def with_reductions(cost: OperationCost) -> OperationCost:
        return OperationCost(cost.fixed_seconds + fixed, cost.seconds_per_token + token, cost.seconds_per_pair)

    forward, backward = with_reductions(costs.forward), with_reductions(costs.backward)
    backward = OperationCost(
        backward.fixed_seconds + recompute_share * forward.fixed_seconds,
        backward.seconds_per_token + recompute_share * forward.seconds_per_token,
        backward.seconds_per_pair + recompute_share * forward.seconds_per_pair,
    )
    return replace(costs, forward=forward, backward=backward, recompute=forward, state_pass=forward)


RECOMPUTE_SHARE = {"none": 0.0, "selective": 0.0, "full": 1.0}
"""Megatron's selective recompute runs attention's inner product again, which flash attention does in any case;
chunkflow's runs element-wise operations again. Neither is charged here, in any column."""


def memory_settings(run: RunPlan, checkpointing: str) -> MemorySettings:
    """Bfloat16 weights, AdamW, ZeRO-1 over the data-parallel ranks."""
    return MemorySettings(
        element_bytes=2, optimizer_states=2, zero_stage=1, data_parallel=run.ranks, offload="none",
        checkpointing=checkpointing, chunk_size=run.chunk_size, device_type="cuda",
    )  # fmt: skip


def tokens_held(run: RunPlan, longest: int, in_flight: int) -> tuple[int, float]:
    """Tokens of a rank that hold activations, and that are in its state store; a sample of the full length must fit.

    Args:
        in_flight: chunks of the pipeline beside those K of the long sample; then a second long one has state, too.
    """
    size = run.spread_chunk_size
    chunks = min(run.k, -(-longest // size)) + in_flight
    stored = (longest - 1) // size * size / run.state_shares
    return run.chunk_size * chunks, stored * (1 if run.pipeline is None else 2)


def data(longest: int, *, one_long: bool) -> NDArray[np.int64]:
    lengths = draw(np.random.default_rng(0), BATCH * STEPS, longest)
    if one_long:
        lengths[::BATCH] = longest
    return lengths


def run_of(lengths: NDArray[np.int64], costs: CostModel, **options: Any) -> RunPlan:
    batches = GlobalBatches(len(lengths), BATCH, seed=0, shuffle=False)
    return RunPlan(batches, STEPS, lengths, lengths, costs=costs, **options)


def with_step(run: RunPlan, shape: ModelShape, settings: MemorySettings) -> RunPlan:
    seconds = max(step_seconds(shape, settings, H100, held) for held in run.stage_layers(shape.layers))
    return replace(run, costs=replace(run.costs, step_seconds=seconds))


def baseline_seconds(shape: ModelShape, baseline: Baseline, lengths: NDArray[np.int64]) -> float:
    """One pipeline has all samples, in the data's order."""
    costs = tensor_parallel_costs(shape, baseline.tensor, recompute_share=RECOMPUTE_SHARE[baseline.checkpointing])
    layout = PipelineLayout(baseline.pipeline, "1f1b")
    seconds = []
    for step in range(STEPS):
        own = lengths[step * BATCH : (step + 1) * BATCH]
        chunks = sequences_as_chunks(own)
        made = simulate(plan_pipeline(chunks, 1, layout), costs.of_chunks(chunks, own, layout.stages))
        seconds.append(made.makespan)
    return float(np.mean(seconds)) + optimizer_seconds(shape, baseline)


def optimizer_seconds(shape: ModelShape, baseline: Baseline) -> float:
    """No data parallelism: every GPU updates its part."""
    one = MemorySettings(2, 2, 0, 1, "none", "none", 1, "cuda")
    return step_seconds(shape, one, H100) / baseline.gpus


def best_of(runs: Iterator[tuple[dict[str, Any], RunPlan, int]]) -> dict[str, Any] | None:
    """The fastest that fits, if any does.

    Args:
        runs: a description, the run, and its bytes on the fullest device.
    """
    best: dict[str, Any] | None = None
    for described, run, memory in runs:
        if memory > 0.95 * H100.memory_bytes:
            continue
        (found,) = search([run], range(STEPS), lambda run, steps: 0, 1)
        row = {**described, "chunk_size": run.chunk_size, "k": run.k, "memory_gib": memory / 2**30,
               "seconds": found.step_seconds, "waiting": found.bubble_ratio}  # fmt: skip
        if best is None or row["seconds"] < best["seconds"]:
            best = row
    return best


def papers_way(
    shape: ModelShape, baseline: Baseline, lengths: NDArray[np.int64], longest: int
) -> dict[str, Any] | None:
    """State-aware 1F1B on the baseline's <TP, PP>; without full recompute, as the paper says, where that fits."""

    def runs() -> Iterator[tuple[dict[str, Any], RunPlan, int]]:
        optimizer = optimizer_seconds(shape, baseline)
        for checkpointing in ("selective", "full"):
            costs = tensor_parallel_costs(shape, baseline.tensor, recompute_share=RECOMPUTE_SHARE[checkpointing])
            costs = replace(costs, step_seconds=optimizer)
            for size in CHUNK_SIZES:
                for k in KS:
                    pipeline = PipelineLayout(baseline.pipeline)
                    run = run_of(lengths, costs, chunk_size=size, k=k, pipeline=pipeline)
                    yield (
                        {"checkpointing": checkpointing},
                        run,
                        tensor_memory(shape, run, checkpointing, baseline, longest),
                    )

    return best_of(runs())


def tensor_memory(shape: ModelShape, run: RunPlan, checkpointing: str, baseline: Baseline, longest: int) -> int:
    """TP divides all, stages divide all but the head. The first stage has the most chunks in flight."""
    live, stored = tokens_held(run, longest, baseline.pipeline - 1)
    parts = memory_parts(shape, memory_settings(run, checkpointing), live=live, stored=stored)
    return (parts.device_total - parts.head) // baseline.gpus + parts.head // baseline.tensor


def ours(
    shape: ModelShape, gpus: int, lengths: NDArray[np.int64], longest: int, *, both: bool
) -> dict[str, Any] | None:
    """ZeRO-1.

    Args:
        shape: of the model.
        gpus: in all.
        lengths: of all samples.
        longest: tokens of a sample that must fit.
        both: allow sequence and pipeline parallelism together.
    """

    def runs() -> Iterator[tuple[dict[str, Any], RunPlan, int]]:
        for checkpointing in ("none", "selective", "full"):
            costs = CostModel.profile(shape, H100, checkpointed=checkpointing == "full")
            for stages in STAGES:
                for group in GROUPS:
                    if gpus % (stages * group) or shape.attention[0].heads % group or shape.layers < stages:
                        continue
                    if group > 1 and stages > 1 and not both:
                        continue
                    for size in CHUNK_SIZES:
                        for k in KS:
                            pipeline = PipelineLayout(stages) if stages > 1 else None
                            run = run_of(
                                lengths, costs, chunk_size=size, k=k, pipeline=pipeline, ranks=gpus // stages,
                                sequence=group,
                            )  # fmt: skip
                            settings = memory_settings(run, checkpointing)
                            run = with_step(run, shape, settings)
                            described = {"data": gpus // stages // group, "sequence": group, "pipeline": stages,
                                         "checkpointing": checkpointing}  # fmt: skip
                            yield described, run, pipeline_memory(shape, run, settings, longest)

    return best_of(runs())


def pipeline_memory(shape: ModelShape, run: RunPlan, settings: MemorySettings, longest: int) -> int:
    """Of the fullest stage, without simulating: stage s of P has P - 1 - s chunks in flight."""
    totals = []
    for held in run.stage_layers(shape.layers):
        live, stored = tokens_held(run, longest, held.stages - 1 - held.stage)
        totals.append(memory_parts(shape, settings, held, live=live, stored=stored).device_total)
    return max(totals)


def in_words(found: dict[str, Any] | None, plain: float) -> str:
    if found is None:
        return "nothing fits"
    layout = " x ".join(f"{axis} {found[axis]}" for axis in ("data", "sequence", "pipeline") if found.get(axis, 1) > 1)
    return (
        f"{found['seconds']:.2f} s ({plain / found['seconds']:.2f}x, {layout} {found['chunk_size'] // K}K "
        f"K={found['k']} {found['checkpointing']} {found['memory_gib']:.0f} GiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    rows = []
    for (model, longest), baseline in BASELINES.items():
        if model not in arguments.models:
            continue
        for one_long in (False, True):
            shape, lengths = MODELS[model], data(longest, one_long=one_long)
            plain = baseline_seconds(shape, baseline, lengths)
            as_paper = papers_way(shape, baseline, lengths, longest)
            own = ours(shape, baseline.gpus, lengths, longest, both=False)
            with_both = ours(shape, baseline.gpus, lengths, longest, both=True)
            row = {
                "model": model, "longest": longest, "one_of_full_length_a_step": one_long, "gpus": baseline.gpus,
                "baseline": {"tensor": baseline.tensor, "pipeline": baseline.pipeline, "seconds": plain,
                             "checkpointing": baseline.checkpointing, "in_the_papers_table_3": baseline.is_known},
                "papers_way": as_paper, "ours": own, "both": with_both,
                **{
                    f"{name}_gain": None if found is None else plain / found["seconds"]
                    for name, found in (("papers_way", as_paper), ("ours", own), ("both", with_both))
                },
                "paper": baseline.paper, "paper_is_sure": baseline.is_paper_sure,
            }  # fmt: skip
            rows.append(row)
            say(
                f"{model:>3} {longest // K:>3}K {'one long' if one_long else 'as drawn'} {baseline.gpus:>2} GPUs: "
                f"plain {plain:.2f} s; paper's way {in_words(as_paper, plain)}; ours {in_words(own, plain)}; both "
                f"{in_words(with_both, plain)}; paper {baseline.paper}"
            )
    emit({"benchmark": "gain", "device": "H100 SXM, by its profile", "batch": BATCH, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
