"""Loss and gradients in chunks and of whole sequences, both against float64, for each attention backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.kernel_check import check_backend, head_dims_of
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences, use_implementation, whole_implementation
from chunkflow_cli.execution.precision import float64_throughout, without_kernel_packages
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.recurrent_functions import installed_kernels
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.schedule import plan
from gpu_proof.cases import Case
from gpu_proof.rows import NotHere, Values, attempt
from gpu_proof.training import Place, free_memory

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 0.0}
"""Relative error of gradients that passes however exact the whole sequence is."""
LOSS_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""The same of the loss, whose error on whole sequences can be zero by chance."""
MOST_TIMES = 2.0
"""Times the error of whole sequences that passes."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {"sliding_window": 100}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
}  # fmt: skip


def rows(cases: tuple[Case, ...], place: Place) -> Iterator[Values]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for case in cases:
        free_memory()
        yield attempt(partial(_compared, case.facts, place))


def _compared(facts: dict[str, Any], place: Place) -> Values:
    device, dtype = training_device(), getattr(torch, facts["dtype"])
    kernels = facts.get("kernels")
    if kernels == "fla" and not (device.type == "cuda" and "fla" in installed_kernels()):
        raise NotHere("it needs a GPU and flash-linear-attention")
    model = _model(facts["kind"], dtype, device, dry=place.dry)
    backend = choose_backend(Attention(facts["backend"]), model.config, device, dtype).backend
    try:
        check_backend(backend, device, dtype, head_dims_of(model.config))
    except UsageError as error:
        return {"failed": str(error)}
    lengths, size = ((90, 20, 30), 32) if place.dry else ((3000, 300, 90), 512)
    sequences = random_sequences(lengths, model.config.vocab_size)
    with without_kernel_packages() if kernels != "fla" else nullcontext():
        whole = whole_gradients(model, sequences)
        chunked = chunked_gradients(model, backend, sequences, build_chunks(lengths, size), k=2)
    with float64_throughout(), without_kernel_packages():
        truth = whole_gradients(copy.deepcopy(model).double(), sequences)
    values = {
        "loss_error": abs(chunked.loss / truth.loss - 1),
        "loss_error_whole": abs(whole.loss / truth.loss - 1),
        "grad_error": relative_error(chunked, truth),
        "grad_error_whole": relative_error(whole, truth),
    }
    limits = {
        "loss_error": max(MOST_TIMES * values["loss_error_whole"], LOSS_FLOOR[dtype]),
        "grad_error": max(MOST_TIMES * values["grad_error_whole"], FLOOR[dtype]),
    }
    over = [
        f"{name} is {values[name]:.1e}, over {limit:.1e}" for name, limit in limits.items() if not values[name] <= limit
    ]
    return {**values, **({"failed": "; ".join(over)} if over else {})}


@dataclass(frozen=True)
class Gradients:
    """A loss, and its gradients by parameter."""

    loss: float
    of: dict[str, torch.Tensor]


def whole_gradients(model: Any, sequences: Sequence[TokenizedSample]) -> Gradients:
    """Return what transformers computes of whole sequences, one per batch."""
    total, weight = 0.0, _weight_of_target(sequences)
    with use_implementation(model, whole_implementation(model)):
        for sequence in sequences:
            ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64, device=model.device)[None]
            targets = torch.as_tensor(sequence.targets, dtype=torch.int64, device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") * weight
            loss.backward()
            total += float(loss.detach())
    return _taken(model, total)


def chunked_gradients(
    model: Any, backend: Backend, sequences: Sequence[TokenizedSample], chunks: Chunks, *, k: int
) -> Gradients:
    """Return what `train` computes in chunks, without an engine."""
    with use_implementation(model, attention.NAME):
        runner = Runner(DirectEngine(ChunkModel(model, backend)), RunnerSettings(model.device))
        weights = np.full(len(sequences), _weight_of_target(sequences))
        result = runner.run((plan(chunks, k),), StepBatch(chunks, sequences, weights))
    return _taken(model, result.loss)


def _weight_of_target(sequences: Sequence[TokenizedSample]) -> float:
    return 1.0 / sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences)


def _taken(model: Any, loss: float) -> Gradients:
    """Take the gradients out of the model."""
    taken = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Gradients(loss, taken)


def relative_error(some: Gradients, truth: Gradients) -> float:
    """Return the norm of the difference of all gradients over that of the true ones."""
    off = sum(float((some.of[name] - gradient).square().sum()) for name, gradient in truth.of.items())
    norm = sum(float(gradient.square().sum()) for gradient in truth.of.values())
    return float((off / norm) ** 0.5)


def _model(kind: str, dtype: torch.dtype, device: torch.device, *, dry: bool) -> Any:
    name, settings = MODELS[kind]
    width, head = (64, 16) if dry else (512, 128)
    sizes = {
        "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head, "vocab_size": 512, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05,
    }  # fmt: skip
    if name == "qwen3_5_text":
        sizes |= {"linear_key_head_dim": head, "linear_value_head_dim": head}
    if dry and "sliding_window" in settings:
        settings = {**settings, "sliding_window": 20}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **settings), dtype=dtype)
    model.config.use_cache = False
    return model.to(device).train()
