"""Recurrent layers in chunks: is the gradient exact, and what does packing cost?

    python benchmarks/recurrent.py                       a minute or two
    python benchmarks/recurrent.py --parts errors        the table of gradient errors alone
    python benchmarks/recurrent.py --parts cost --rounds 8

`errors`: every recurrent and hybrid configuration of the tests, small and with random weights, in float64 and float32.
Chunked training is compared with transformers' own training on whole sequences; the largest relative error of the
gradient over six cases counts. `rounding` is the distance of transformers' own float32 gradient from the float64 one.

`cost`: a packed chunk of 1,024 tokens through one recurrent layer of a real width, forward and backward, with 1, 4, 16
and 64 segments of random lengths. CPU seconds, the least of some rounds, as multiples of one segment.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chunkflow_cli.config.schema import ActivationCheckpointing
from chunkflow_cli.execution.attention.backend import Packing
from chunkflow_cli.execution.attention.function import ChunkAttentionContext
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import compare, random_sequences
from chunkflow_cli.execution.recurrent import RunningChunk, prepare_recurrent_layers
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.forward_scope import ForwardScope
from common import emit, hardware, median, say
from support.exact import float64_throughout
from support.models import RECURRENT, recurrent_model

LENGTHS = (53, 1, 3, 2, 1, 33, 5, 9)
CASES: tuple[tuple[tuple[int, ...], int, int, bool, str], ...] = (
    (LENGTHS, 13, 2, True, "full"),
    ((10, 1, 2, 4, 7), 3, 2, True, "none"),
    ((64, 1, 3, 2, 9, 32), 16, 1, True, "none"),
    (LENGTHS, 17, 1, True, "selective"),
    (LENGTHS, 11, 99, True, "none"),
    (LENGTHS, 16, 2, False, "none"),
)
"""Lengths, chunk size, K, filled tails, activation checkpointing."""

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
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "recurrent", "hardware": hardware()}
    if "errors" in arguments.parts:
        rows = [errors(name) for name in RECURRENT if arguments.only in name]
        result["errors"] = rows
        result["largest_float64_error"] = max((row["float64"] for row in rows), default=None)
    if "cost" in arguments.parts:
        rows = [cost(name, arguments.rounds) for name in LAYERS if arguments.only in name]
        result["cost"] = rows
        result["largest_cost_of_16_segments"] = max((row["times_one_segment"]["16"] for row in rows), default=None)
    emit(result, arguments.out)


def errors(name: str) -> dict[str, Any]:
    with float64_throughout():
        exact = max(error(name, torch.float64, case) for case in CASES)
    in_float32 = max(error(name, torch.float32, case) for case in CASES)
    row = {"configuration": name, "float64": exact, "float32": in_float32, "rounding": rounding(name)}
    say(f"{name:40} float64 {exact:.1e}   float32 {in_float32:.1e}   rounding {row['rounding']:.1e}")
    return row


def error(name: str, dtype: torch.dtype, case: tuple[tuple[int, ...], int, int, bool, str]) -> float:
    lengths, chunk_size, k, fill_tails, checkpointing = case
    model = recurrent_model(name, dtype)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    sequences = random_sequences(lengths, model.config.vocab_size)
    compared = compare(model, ReferenceBackend(), sequences, chunk_size=chunk_size, k=k, fill_tails=fill_tails)
    return compared.grad_rel_error


def rounding(name: str) -> float:
    """How far transformers' own float32 gradient lies from its float64 one."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = recurrent_model(name, dtype)
        for sequence in random_sequences(LENGTHS, model.config.vocab_size):
            targets = torch.as_tensor(sequence.targets, dtype=torch.int64)
            logits = model(input_ids=torch.as_tensor(sequence.input_ids, dtype=torch.int64)[None]).logits[0]
            torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


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
