"""Recurrent layers in chunks: is the gradient exact, and what does packing cost?

    python benchmarks/recurrent.py                       about twenty minutes
    python benchmarks/recurrent.py --parts errors        the table of gradient errors alone
    python benchmarks/recurrent.py --parts cost --rounds 8

`errors`: every recurrent and hybrid configuration of the tests, and those that attend to blocks of keys, small and with
random weights, in nine cases. In float64, the relative distance of the chunked gradient from that of transformers' own
training on whole sequences must be at most 1e-10. In float32 both sides round. `rounding` is how far the gradient of
whole sequences lies from its own float64 gradient. `from_whole` and `from_truth` are how far the chunked gradient lies
from the one of whole sequences, and from the float64 one, as multiples of `rounding`. `holds` says whether `from_whole`
is at most 1 in each case, too.

Rounding is chance (one draw in ten is ill-conditioned and rounds ten times worse), so these are geometric means over
draws of the tokens. A case that is not two standard errors away from 1 gets more draws, at most 128.

Two independent computations that round equally much lie 1.4 times their rounding apart. Chunked and whole-sequence
training lie closer because most of their rounding is the same: a product rounds each row alike, however many rows there
are. MKL multiplies blocks of four rows and sums those left over in another order, so small chunks are padded.

`cost`: a packed chunk of 1,024 tokens through one recurrent layer of a real width, forward and backward, with 1, 4, 16
and 64 segments of random lengths. CPU seconds, the least of some rounds, as multiples of one segment.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Packing
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, InChunks, compare, random_sequences, use_implementation
from chunkflow_cli.execution.recurrent import RunningChunk, prepare_recurrent_layers
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.forward_scope import ForwardScope
from chunkflow_cli.model.hf_config import known_ids
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from common import emit, hardware, median, say
from support.exact import float64_throughout
from support.models import BLOCKS, RECURRENT, recurrent_model

LENGTHS = (53, 1, 3, 2, 1, 33, 5, 9)
Case = tuple[tuple[int, ...], int, int, bool, str]
CASES: tuple[Case, ...] = (
    (LENGTHS, 13, 2, True, "full"),
    ((10, 1, 2, 4, 7), 3, 2, True, "none"),
    ((10, 1, 2, 4, 7), 2, 99, True, "none"),
    ((10, 1, 2, 4, 7), 1, 1, True, "none"),
    ((10, 1, 2, 4, 7), 4, 2, True, "none"),
    ((64, 1, 3, 2, 9, 32), 16, 1, True, "none"),
    (LENGTHS, 17, 1, True, "selective"),
    (LENGTHS, 11, 99, True, "none"),
    (LENGTHS, 16, 2, False, "none"),
)
"""Lengths, chunk size, K, filled tails, activation checkpointing."""
LARGEST_FLOAT64_ERROR = 1e-10
MOST_DRAWS = 128

TOKENS = 1024
SEGMENTS = (1, 4, 16, 64)
SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gated DeltaNet, Qwen3.5-0.8B": (
        "qwen3_5_text",
        {
            "hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 256, "linear_num_value_heads": 16, "linear_num_key_heads": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Kimi Delta Attention, hidden 1024": (
        "kimi_linear",
        {
            "hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
            "linear_num_heads": 8, "linear_head_dim": 128, "moe_intermediate_size": 16, "num_local_experts": 2,
            "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
        },
    ),
    "short convolution, LFM2-1.2B": (
        "lfm2",
        {
            "hidden_size": 2048, "intermediate_size": 64, "num_attention_heads": 32, "num_key_value_heads": 8,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "Mamba-2, Granite-4.0-h-1b": (
        "granitemoehybrid",
        {
            "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48,
            "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "num_local_experts": 0,
            "shared_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Mamba, Jamba at hidden 128": (  # torch's scan of Mamba-1 is a loop over tokens
        "jamba",
        {
            "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
            "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["errors", "cost"], default=["errors", "cost"])
    parser.add_argument("--only", default="", help="configurations and layers whose names contain this")
    parser.add_argument("--draws", type=int, default=16, help="draws of the tokens in float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # it would list the weights of each new model as missing
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"benchmark": "recurrent", "hardware": hardware()}
    if "errors" in arguments.parts:
        rows = [errors(name, arguments.draws) for name in (*RECURRENT, *BLOCKS) if arguments.only in name]
        result["errors"] = rows
        result["largest_float64_error"] = max((row["float64"] for row in rows), default=None)
        result["largest_from_whole"] = max((row["from_whole_largest_case"] for row in rows), default=None)
        failed = [row["configuration"] for row in rows if not row["holds"]]
        say(f"holds in {len(rows) - len(failed)} of {len(rows)} configurations" + f", not in {failed}" * bool(failed))
    if "cost" in arguments.parts:
        rows = [cost(name, arguments.rounds) for name in LAYERS if arguments.only in name]
        result["cost"] = rows
        result["largest_cost_of_16_segments"] = max((row["times_one_segment"]["16"] for row in rows), default=None)
    emit(result, arguments.out)


def errors(name: str, draws: int) -> dict[str, Any]:
    cases = cases_of(name)
    with float64_throughout():
        exact = max(error(name, case) for case in cases)
    found = [multiples(name, case, draws) for case in cases]
    worst = max(range(len(cases)), key=lambda index: found[index].from_whole)
    row = {
        "configuration": name,
        "float64": exact,
        "rounding": geometric_mean([case.rounding for case in found]),
        "from_whole": round(geometric_mean([case.from_whole for case in found]), 2),
        "from_whole_largest_case": round(found[worst].from_whole, 2),
        "its_standard_error": round(found[worst].standard_error, 2),
        "its_chunk_size": cases[worst][1],
        "its_draws": found[worst].draws,
        "from_truth": round(geometric_mean([case.from_truth for case in found]), 2),
        "from_truth_largest_case": round(max(case.from_truth for case in found), 2),
        "holds": exact <= LARGEST_FLOAT64_ERROR and found[worst].from_whole <= 1,
    }
    say("  ".join(f"{v:.2g}" if isinstance(v, float) else f"{v!s:{36 if v == name else 4}}" for v in row.values()))
    return row


@dataclass(frozen=True)
class Multiples:
    """Distances in one case, geometric means over draws; the last three as multiples of the first."""

    draws: int
    rounding: float
    from_whole: float
    from_truth: float
    standard_error: float
    """Of `from_whole`."""


def multiples(name: str, case: Case, draws: int) -> Multiples:
    """Take more draws until `from_whole` is two standard errors away from 1."""
    distances: list[tuple[float, float, float]] = []
    while True:
        distances += [float32_distances(name, case, seed) for seed in range(len(distances), draws)]
        rounding, from_whole, from_truth = np.log(np.array(distances)).T
        error = (from_whole - rounding).std(ddof=1) / draws**0.5
        logarithm = (from_whole - rounding).mean()
        if abs(logarithm) >= 2 * error or draws >= MOST_DRAWS:
            multiple, of_truth = np.exp(logarithm), np.exp((from_truth - rounding).mean())
            return Multiples(draws, *map(float, (np.exp(rounding.mean()), multiple, of_truth, multiple * error)))
        draws = min(2 * draws, MOST_DRAWS)


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def cases_of(name: str) -> list[Case]:
    """Return the cases of a configuration; models that compute attention themselves refuse selective checkpointing."""
    modes = {"selective": "full"} if name in BLOCKS else {}
    return [(*how, modes.get(checkpointing, checkpointing)) for *how, checkpointing in CASES]  # type: ignore[misc]


def error(name: str, case: Case) -> float:
    lengths, chunk_size, k, fill_tails, checkpointing = case
    model = recurrent_model(name, torch.float64)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    sequences = random_sequences(lengths, known_ids(model.config))
    compared = compare(
        model, sequences, InChunks(ReferenceBackend(), chunk_size=chunk_size, k=k, fill_tails=fill_tails)
    )
    return compared.grad_rel_error


def float32_distances(name: str, case: Case, seed: int) -> tuple[float, float, float]:
    """Relative distances between gradients: whole from truth, chunked from whole, chunked from truth."""
    truth, whole = whole_gradients(name, case[0], seed)
    chunked = chunked_gradient(name, case, seed)
    pairs = ((whole, truth), (chunked, whole), (chunked, truth))
    return tuple(float((one - other).norm() / truth.norm()) for one, other in pairs)  # type: ignore[return-value]


@lru_cache(maxsize=512)
def whole_gradients(name: str, lengths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of whole sequences as transformers computes it, in float64 throughout and in float32."""
    exact = recurrent_model(name, torch.float64)
    with float64_throughout():
        truth = whole_gradient(exact, lengths, seed)
    return truth, whole_gradient(recurrent_model(name), lengths, seed)


def whole_gradient(model: Any, lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    for sequence in random_sequences(lengths, known_ids(model.config), seed):
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
        logits = model(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").backward()
    return flat_gradient(model)


def chunked_gradient(name: str, case: Case, seed: int) -> torch.Tensor:
    lengths, chunk_size, k, fill_tails, checkpointing = case
    model = recurrent_model(name)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    chunks = build_chunks(list(lengths), chunk_size, fill_tails=fill_tails)
    batch = StepBatch(chunks, random_sequences(lengths, known_ids(model.config), seed), np.ones(len(lengths)))
    device = torch.device("cpu")
    backend = choose_backend(Attention.auto, model.config, device, torch.float32).backend
    with use_implementation(model, attention.NAME):
        engine = DirectEngine(ChunkModel(model, backend))
        Runner(engine, RunnerSettings(device)).run((plan(chunks, k),), batch)
    return flat_gradient(model)


def flat_gradient(model: Any) -> torch.Tensor:
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def cost(name: str, rounds: int) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = LAYERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, **SMALL, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    layer = model.get_submodule(prepare_recurrent_layers(model)[0])
    hidden = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    rng = np.random.default_rng(1)
    cuts = {count: sorted(rng.choice(np.arange(1, TOKENS), count - 1, replace=False).tolist()) for count in SEGMENTS}
    seconds: dict[int, list[float]] = {count: [] for count in (0, *SEGMENTS)}
    for _ in range(rounds):  # in turns, so that other work on the machine meets all alike
        seconds[0].append(run(layer, hidden, None))
        for count in SEGMENTS:
            seconds[count].append(run(layer, hidden, Packing((0, *cuts[count], TOKENS), torch.device("cpu"))))
    best = {count: min(each) for count, each in seconds.items()}
    row = {
        "layer": name,
        "cpu_seconds_of_transformers_own": round(best[0], 3),
        "cpu_seconds_of_one_segment": round(best[1], 3),
        "times_one_segment": {str(count): round(best[count] / best[1], 2) for count in SEGMENTS},
        "median_times_one_segment": {
            str(count): round(median(seconds[count]) / median(seconds[1]), 2) for count in SEGMENTS
        },
    }
    say(f"{name:40} {row['cpu_seconds_of_one_segment']} s   {row['times_one_segment']}")
    return row


def run(layer: Any, hidden: torch.Tensor, packing: Packing | None) -> float:
    """CPU seconds of a forward and backward of the layer over one packed chunk; None: as transformers runs it."""
    chunk = None if packing is None else RunningChunk(ChunkAttentionContext(packing, ReferenceBackend()))
    start = time.process_time()
    with ForwardScope(chunk):
        out = layer(hidden)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
