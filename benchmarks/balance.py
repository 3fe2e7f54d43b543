"""How long ranks wait for the one with the longest sequence, and what spreading sequences over groups of ranks brings.

    python benchmarks/balance.py                     a minute; no GPU, no model
    python benchmarks/balance.py --out balance.json

Steps of LMSys-Chat-1M's shape, one of 256 samples as long as the context, on 8 to 512 H100 by their data sheet:

    whole     every sequence on one rank, by cost (data parallelism alone)
    all       every chunk spread over a group of 2, 4 or 8 neighboring ranks
    mixed     those sequences spread that would otherwise be waited for; all others on single ranks (what is planned)
    nested    each sequence over as many ranks as it needs, 1, 2, 4, 8... (FlexSP, arXiv 2412.01523)

Seconds are predicted, of the slowest rank; nothing is run. What is made of it: docs/distributed.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.balance import balance, rank_loads, share_out
from chunkflow_cli.planning.batches import GlobalBatches
from chunkflow_cli.planning.costs import CostModel, OperationCost
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.prediction import rank_seconds
from chunkflow_cli.planning.run_plan import RunPlan
from common import emit, say
from paper import draw

K = 1024
STEPS = 3
RANKS = (8, 32, 128, 512)
BATCHES = (256, 1024, 4096)
CONTEXTS = (32 * K, 256 * K)
GROUPS = (2, 4, 8)


def qwen_shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> ModelShape:
    """Of a Qwen2.5 model with an untied head, from its published config.json."""
    head_dim, vocabulary = hidden // heads, 152_064
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    products = layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden
    biases_and_norms = layers * (head_dim * (heads + 2 * kv_heads) + 2 * hidden) + hidden
    parameters = products + vocabulary * hidden + biases_and_norms
    return ModelShape(
        layers, hidden, intermediate, (AttentionLayers(layers, heads, kv_heads, head_dim, head_dim),), vocabulary,
        products, parameters, parameters,
    )  # fmt: skip


MODELS = {
    "7B": qwen_shape(28, 3584, 18944, 28, 4),
    "14B": qwen_shape(48, 5120, 13824, 40, 8),
    "32B": qwen_shape(64, 5120, 27648, 40, 8),
    "72B": qwen_shape(80, 8192, 29568, 64, 8),
}


def groups_of(shape: ModelShape) -> list[int]:
    """Sizes that the model's heads can be divided among."""
    return [size for size in GROUPS if shape.attention[0].heads % size == 0]


def lengths_of(batch: int, longest: int) -> NDArray[np.int64]:
    """(STEPS x batch,)"""
    lengths = draw(np.random.default_rng(0), STEPS * batch, longest)
    lengths[::256] = longest
    return lengths


def mean(seconds: list[float]) -> float:
    return float(np.mean(seconds))


class Setting:
    """One model and chunk size on some ranks, and the sequences of some steps."""

    def __init__(self, costs: CostModel, lengths: NDArray[np.int64], batch: int, ranks: int, size: int, k: int) -> None:
        self.run = RunPlan(
            GlobalBatches(len(lengths), batch, seed=0, shuffle=False), STEPS, lengths, lengths, chunk_size=size, k=k,
            ranks=ranks, costs=costs,
        )  # fmt: skip
        self.steps = [lengths[self.run.batches[step]] for step in range(STEPS)]

    def seconds(self, lengths: NDArray[np.int64], degree: int, chunk_size_grows: bool = True) -> NDArray[np.float64]:
        """(sequences,) of each, spread over so many ranks."""
        size = self.run.chunk_size * (degree if chunk_size_grows else 1)
        return self.run.costs.spread_over(degree).of_sequences(lengths, size, self.run.k)

    def fair(self) -> float:
        """If all ranks finished together, and nothing were communicated."""
        return mean([self.seconds(lengths, 1).sum() / self.run.ranks for lengths in self.steps])

    def whole(self) -> float:
        costs = [self.seconds(lengths, 1) for lengths in self.steps]
        return mean([rank_loads(cost, balance(cost, self.run.ranks)).max() for cost in costs])

    def all_spread(self, group: int, *, chunk_size_grows: bool = True) -> float:
        costs = [self.seconds(lengths, group, chunk_size_grows) for lengths in self.steps]
        return mean([rank_loads(cost, balance(cost, self.run.ranks // group)).max() for cost in costs])

    def shared_out(self, degrees: list[int]) -> float:
        return mean([
            share_out(np.stack([self.seconds(lengths, degree) for degree in degrees]), degrees, self.run.ranks).seconds
            for lengths in self.steps
        ])  # fmt: skip

    def planned(self, group: int) -> tuple[float, float, float]:
        """Of the plans that would run, chunk by chunk: seconds, share of the time that ranks wait, spread samples."""
        run = replace(self.run, sequence=group)
        seconds, busy, spread = [], [], []
        for step in run:
            of_ranks = np.array([rank_seconds(rank, run.costs) for rank in step.ranks])
            seconds.append(float(of_ranks.max()))
            busy.append(float(of_ranks.mean()))
            spread.append(step.spread_samples)
        return mean(seconds), 1 - sum(busy) / sum(seconds), mean(spread)


def row_of(model: str, longest: int, batch: int, ranks: int) -> dict[str, Any]:
    shape = MODELS[model]
    costs = CostModel.profile(shape, DEVICES["h100"], checkpointed=True)
    setting = Setting(costs, lengths_of(batch, longest), batch, ranks, 8 * K, 1)
    fair, whole = setting.fair(), setting.whole()
    row: dict[str, Any] = {
        "model": model, "longest": longest, "batch": batch, "ranks": ranks, "fair_seconds": fair,
        "whole_seconds": whole, "whole_waiting": 1 - fair / whole, "groups": {},
    }  # fmt: skip
    for group in groups_of(shape):
        planned, waiting, spread = setting.planned(group)
        row["groups"][group] = {
            "all_seconds": setting.all_spread(group),
            "all_seconds_chunk_size_over_the_group": setting.all_spread(group, chunk_size_grows=False),
            "mixed_seconds": planned,
            "mixed_waiting": waiting,
            "mixed_spread_samples": spread,
            "nested_seconds": setting.shared_out([size for size in (1, 2, 4, 8) if size <= group]),
        }
    return row


def in_words(row: dict[str, Any]) -> str:
    groups = "   ".join(
        f"{group}: " + " ".join(f"{name} {found[f'{name}_seconds']:.2f}" for name in ("all", "mixed", "nested"))
        for group, found in row["groups"].items()
    )
    return (
        f"{row['model']:>3} {row['longest'] // K:>3}K batch {row['batch']:>4} on {row['ranks']:>3}: "
        f"fair {row['fair_seconds']:6.2f} whole {row['whole_seconds']:6.2f} s, "
        f"waiting {100 * row['whole_waiting']:3.0f} %   " + groups
    )


def slow_to_start(seconds_a_layer: float) -> dict[str, float]:
    """All spread against mixed where a chunk costs much however small it is: 14B, 32 ranks in groups of 8, 32K."""
    device = replace(DEVICES["h100"], layer_launch_seconds=seconds_a_layer)
    costs = CostModel.profile(MODELS["14B"], device, checkpointed=True)
    setting = Setting(costs, lengths_of(1024, 32 * K), 1024, 32, 8 * K, 1)
    return {"all_seconds": setting.all_spread(8), "mixed_seconds": setting.shared_out([1, 8])}


def over_the_network() -> dict[str, float]:
    """The same where a group's ranks lie on different nodes."""
    costs = CostModel.profile(MODELS["14B"], DEVICES["h100"], checkpointed=True)
    costs = replace(costs, node_seconds_per_byte=costs.network_seconds_per_byte)
    setting = Setting(costs, lengths_of(1024, 32 * K), 1024, 32, 8 * K, 1)
    return {"all_seconds": setting.all_spread(8), "mixed_seconds": setting.shared_out([1, 8])}


def exchange_share(model: str, tokens: int, group: int) -> float:
    """Of the time of a sequence of one chunk, forward and backward."""
    costs = CostModel.profile(MODELS[model], DEVICES["h100"], checkpointed=True)
    free = replace(costs, node_seconds_per_byte=0.0, network_seconds_per_byte=0.0, transfer_latency_seconds=0.0)

    def seconds(model: CostModel) -> float:
        spread = model.spread_over(group)
        size, pairs = np.array([float(tokens)]), model.pairs_up_to(np.array([float(tokens)]))
        passes: tuple[OperationCost, ...] = (spread.forward, spread.backward)
        return float(sum(each(size, pairs)[0] for each in passes))

    return 1 - seconds(free) / seconds(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B", "14B"], metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        for longest in CONTEXTS:
            for batch in BATCHES:
                for ranks in RANKS:
                    rows.append(row_of(model, longest, batch, ranks))
                    say(in_words(rows[-1]))
    result = {
        "benchmark": "balance",
        "device": "H100 SXM, by its profile",
        "chunk_size": 8 * K,
        "k": 1,
        "rows": rows,
        "fixed_cost_14B_32K_32_ranks_groups_of_8": {
            f"{1e3 * seconds:g} ms a layer": slow_to_start(seconds) for seconds in (60e-6, 1e-3, 4e-3)
        },
        "groups_over_the_network_14B_32K_32_ranks_groups_of_8": over_the_network(),
        "exchange_share_of_one_chunk_14B": {
            f"{tokens // K}K over {group}": exchange_share("14B", tokens, group)
            for tokens in (1 * K, 8 * K, 32 * K) for group in (2, 8, 40)
        },
    }  # fmt: skip
    say(str({name: value for name, value in result.items() if name != "rows"}))
    emit(result, arguments.out)


if __name__ == "__main__":
    main()
