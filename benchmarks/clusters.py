"""Planning for 1 to 64 nodes of 8 GPUs: `chunkflow tune-chunk-size` for the shipped recipes, from the profile alone.

    python benchmarks/clusters.py --docs                     all recipes, and the tables of docs/clusters.md
    python benchmarks/clusters.py --recipes qwen7b_256k --nodes 1 64 --out clusters.json

It needs neither a GPU nor weights, and takes some 30 minutes of a core.

Each row is the command itself, run in this process: its search over ChunkSize, K, pipeline
stages, sequence-parallel groups and cuts of long samples, on rows of ids in LMSys-Chat-1M's shape with one sample of
the recipe's full length in each global batch of 256. Models are written as `config.json` from their published sizes;
nothing is trained. What the tables say: docs/clusters.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import clusters_page
from chunkflow_cli.cli import tune
from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.topology import key_value_copies
from common import emit, say
from paper import draw

K = 1024
BATCH = 256
STEPS = 2
NODES = (1, 2, 4, 8, 16, 64)
GPUS = 8
"""Of a node."""
STAGES = (1, 2, 4, 8, 16)
CHUNK_SIZES = (2 * K, 4 * K, 8 * K, 16 * K, 32 * K)
KS = (1, 2, 4, 8, 16, 32, 64, 128)
SEQUENCES = (1, 2, 4, 8)
"""Sequence-parallel groups: within a node, where exchanges are cheap. A model's heads may allow fewer."""

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768,
    "rope_theta": 1e6, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def qwen(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **changed: Any) -> dict[str, Any]:
    return {
        **QWEN, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, **changed,
    }  # fmt: skip


MODELS = {
    # The config.json of each model, as published with its weights.
    "Qwen2.5-0.5B": qwen(24, 896, 4864, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-7B": qwen(28, 3584, 18944, 28, 4),
    "Qwen2.5-14B": qwen(48, 5120, 13824, 40, 8),
    "Qwen2.5-32B": qwen(64, 5120, 27648, 40, 8),
    "Qwen2.5-72B": qwen(80, 8192, 29568, 64, 8),
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 131072,
        "rope_theta": 5e5, "vocab_size": 128256, "tie_word_embeddings": False, "num_hidden_layers": 32,
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
ON_A_CLUSTER = ["tune.device=h100", "tune.memory_gib=null", "engine.zero_stage=1", "engine.offload=none"]
"""What a recipe for one GPU says otherwise: here stages and ZeRO-1 divide what it moves to the host."""
SETTINGS: dict[str, tuple[str, str, list[str]]] = {
    # name in the table: recipe, model, what is changed besides
    "qwen0_5b": ("qwen0_5b", "Qwen2.5-0.5B", []),
    "qwen7b": ("qwen7b", "Qwen2.5-7B", []),
    "llama8b": ("llama8b", "Llama-3.1-8B", []),
    "qwen14b": ("qwen14b", "Qwen2.5-14B", []),
    "qwen32b": ("qwen32b", "Qwen2.5-32B", []),
    "qwen72b": ("qwen72b", "Qwen2.5-72B", []),
    "qwen7b_256k": ("qwen7b_256k", "Qwen2.5-7B", []),
    "qwen14b at 256K": ("qwen14b", "Qwen2.5-14B", ["data.max_length=262144"]),
    "qwen32b at 256K": ("qwen32b", "Qwen2.5-32B", ["data.max_length=262144"]),
    "qwen72b at 256K": ("qwen72b", "Qwen2.5-72B", ["data.max_length=262144"]),
}


def write_model(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    return path


def lengths_of(longest: int, batch: int) -> NDArray[np.int64]:
    """Of the samples of some steps: one of 256 is as long as the recipe allows."""
    lengths = draw(np.random.default_rng(0), batch * STEPS, longest)
    lengths[::BATCH] = longest
    return lengths


def write_rows(folder: Path, longest: int, batch: int) -> Path:
    """Rows of ids; all but the first token of each are targets."""
    path = folder / f"rows_{longest}_{batch}.jsonl"
    if not path.exists():
        with path.open("w", encoding="utf-8") as file:
            for length in lengths_of(longest, batch).tolist():
                file.write(json.dumps({"input_ids": [7] * length}) + "\n")
    return path


@dataclass(frozen=True)
class Grid:
    """What the search of every row tries, as far as the model and the number of GPUs allow."""

    chunk_sizes: list[int]
    ks: list[int]
    sequences: list[int]
    stages: list[int]
    cuts: list[str]


def groups_for(model: str, sequences: list[int]) -> list[int]:
    """Those sizes of a sequence-parallel group that the model's heads can be divided among."""
    heads, kv_heads = MODELS[model]["num_attention_heads"], MODELS[model]["num_key_value_heads"]
    possible = []
    for size in sequences:
        try:
            key_value_copies(heads, kv_heads, size)
        except ValueError:
            continue  # the command would refuse the whole list
        possible.append(size)
    return possible


def plan_for(name: str, nodes: int, batch: int, tried: Grid, folder: Path) -> dict[str, Any]:
    """What the command finds for one recipe and one cluster."""
    recipe, model, changed = SETTINGS[name]
    gpus = nodes * GPUS
    words = [f"recipe={recipe}", *ON_A_CLUSTER, *changed]
    longest = load(words).config.data.max_length
    assert longest is not None
    stages = [count for count in tried.stages if gpus % count == 0]
    words += [
        f"model.path={write_model(folder, model)}", "model.init=random",
        f"data.path={write_rows(folder, longest, batch)}", "data.format=tokens", f"data.cache_dir={folder / 'cache'}",
        "data.num_workers=1", "train.shuffle=false", f"train.global_batch_size={batch}", f"launch.processes={gpus}",
        f"tune.samples={batch * STEPS}", f"cluster.pipelines=[{','.join(map(str, stages))}]",
        f"cluster.sequences=[{','.join(map(str, groups_for(model, tried.sequences)))}]",
        f"tune.chunk_sizes=[{','.join(map(str, tried.chunk_sizes))}]", f"tune.ks=[{','.join(map(str, tried.ks))}]",
        f"tune.cuts=[{','.join(tried.cuts)}]",
    ]  # fmt: skip
    started = time.perf_counter()
    row: dict[str, Any] = {"recipe": name, "model": model, "longest": longest, "nodes": nodes, "gpus": gpus}
    try:
        found = tune.run(load(words), output=str(folder / "tuned.yaml"), json_output=True)
    except UsageError as error:
        return {**row, "best": None, "refused": str(error), "search_seconds": time.perf_counter() - started}
    best = found["best"]
    tokens = int(lengths_of(longest, batch).sum()) / STEPS
    return {
        **row,
        "best": best,
        "explanation": found["explanation"],
        "tokens_a_step": tokens,
        "tokens_per_second": tokens / best["step_seconds"],
        "memory_limit_bytes": found["memory_limit_bytes"],
        "of_each_layout": found["layouts"],
        "search_seconds": time.perf_counter() - started,
    }


def in_words(row: dict[str, Any]) -> str:
    start = f"{row['recipe']:<16} {row['nodes']:>2} nodes  "
    if row["best"] is None:
        return start + row["refused"].splitlines()[0]
    best = row["best"]
    layout = f"{best['data_parallel'] // best['sequence']:>3} x {best['sequence']} x {best['stages']:<2}"
    return start + (
        f"{best['chunk_size'] // K:>2}K K={best['k']:<4} {layout} {best['cuts']:<6} "
        f"{best['step_seconds']:8.2f} s {best['memory_bytes'] / 2**30:5.1f} GiB "
        f"{row['tokens_per_second']:>11,.0f} tok/s "
        f"{row['speedup']:6.1f}x  waiting {100 * best['bubble_ratio']:3.0f} %   ({row['search_seconds']:.1f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODES))
    parser.add_argument("--batch", type=int, default=BATCH, help="train.global_batch_size (%(default)s)")
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=list(CHUNK_SIZES))
    parser.add_argument("--ks", nargs="+", type=int, default=list(KS))
    parser.add_argument("--sequences", nargs="+", type=int, default=list(SEQUENCES), help="ranks of a group")
    parser.add_argument("--stages", nargs="+", type=int, default=list(STAGES))
    parser.add_argument("--cuts", nargs="+", choices=("tokens", "time"), default=["tokens", "time"])
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/clusters.md: of all recipes")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    arguments = parser.parse_args()
    if arguments.docs and (arguments.recipes != list(SETTINGS) or arguments.nodes != list(NODES)):
        parser.error("--docs needs all recipes and nodes")
    tried = Grid(arguments.chunk_sizes, arguments.ks, arguments.sequences, arguments.stages, arguments.cuts)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes:
            fewest: dict[str, Any] | None = None
            for nodes in sorted(arguments.nodes):
                row = plan_for(name, nodes, arguments.batch, tried, Path(folder))
                if row["best"] is not None:
                    fewest = row if fewest is None else fewest
                    row["speedup"] = row["tokens_per_second"] / fewest["tokens_per_second"]
                    row["speedup_over_nodes"] = fewest["nodes"]
                rows.append(row)
                say(in_words(row))
    if arguments.docs:
        clusters_page.write(rows, NODES)
    emit({"benchmark": "clusters", "device": "H100 SXM, by its profile", "batch": arguments.batch,
          "tried": asdict(tried), "rows": rows},
         arguments.out)  # fmt: skip


if __name__ == "__main__":
    main()
